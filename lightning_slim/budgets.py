"""What may remain: the budget a user asks for, as a fraction of the original model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from lightning_slim.costs import Costs, Widths


class Budget(ABC):
    """The fraction of the ORIGINAL that may remain when pruning is over. It never compounds: 0.5 is half, once.

    Attributes:
        fraction: in (0, 1].
        open_ended: whether pruning may end before so little is left.
    """

    fraction: float
    open_ended: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"Expected a fraction in (0, 1] of the original that may remain, got "
                f"{type(self).__name__}({self.fraction}): {type(self).__name__}(0.5) leaves half."
            )

    @abstractmethod
    def count(self, costs: Costs, widths: Widths) -> int:
        """What is budgeted, in its own unit, for some widths."""

    def remaining(self, costs: Costs, widths: Widths) -> float:
        """Fraction of the original that remains at some widths."""
        return self.count(costs, widths) / self.count(costs.whole, costs.original)


@dataclass(frozen=True)
class Units(Budget):
    """Fraction of the prunable units that may remain."""

    fraction: float = 0.5

    def count(self, costs: Costs, widths: Widths) -> int:
        return costs.units(widths)


@dataclass(frozen=True)
class MACs(Budget):
    """Fraction of the multiply-accumulates of a forward pass that may remain; layers left whole count too."""

    fraction: float = 0.5

    def count(self, costs: Costs, widths: Widths) -> int:
        return costs.macs(widths)


@dataclass(frozen=True)
class Significant(Budget):
    """Every unit that is significant may remain, and nothing else: no fraction has to be named.

    At every point of the schedule units go that a score with p-values (`Granger`, `Screening`, `RandomGates`) does not
    find significant, until there are none.

    Attributes:
        alpha: which share of the significant units may be so by chance (Benjamini and Hochberg, 1995).
    """

    alpha: float = 0.05
    open_ended: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"Expected `alpha` between 0 and 1, got {self.alpha}: 0.05 is common.")

    @property
    def fraction(self) -> float:  # type: ignore[override]
        """Nothing but what is significant."""
        return 0.0

    def count(self, costs: Costs, widths: Widths) -> int:
        return costs.units(widths)
