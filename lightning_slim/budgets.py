"""What may remain: the budget a user asks for, as a fraction of the original model or as a figure."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from lightning_slim.arguments import check_fields
from lightning_slim.costs import Costs, Widths


class Budget(ABC):
    """What may remain of the ORIGINAL when pruning is over. It never compounds: 0.5 is half, once.

    Attributes:
        fraction: of the original, in (0, 1]; 0.5 if no figure is given either, None beside one.
        absolute: instead of the fraction, a figure in the budget's own unit.
        open_ended: whether pruning may end before so little is left.
        monitored: whether a metric says how much may remain, so that only a callback can prune by it.
    """

    fraction: float | None
    absolute: float | None = None
    open_ended: ClassVar[bool] = False
    monitored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        kind = type(self).__name__
        if self.fraction is not None and self.absolute is not None:
            raise ValueError(
                f"Expected `fraction` or `absolute`, got both in {self}: write {kind}({self.fraction}), or "
                f"{kind}(absolute={self.absolute}); in YAML, one of them and `null` for the other."
            )
        if self.absolute is not None and not 0 < self.absolute < math.inf:
            raise ValueError(
                f"Expected a figure above 0 that may remain, got {self}: a fraction of the original is {kind}(0.5)."
            )
        if self.absolute is None and self.fraction is None:
            object.__setattr__(self, "fraction", 0.5)
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(
                f"Expected a fraction in (0, 1] of the original that may remain, got {self}: "
                f"{kind}(0.5) leaves half, and {kind}(absolute=...) is for a figure."
            )

    def __repr__(self) -> str:
        given = [] if self.fraction is None else [f"{self.fraction!r}"]
        given += [] if self.absolute is None else [f"absolute={self.absolute!r}"]
        return f"{type(self).__name__}({', '.join(given)})"

    @abstractmethod
    def count(self, costs: Costs, widths: Widths) -> float:
        """What is budgeted, in its own unit, for some widths."""

    def whole(self, costs: Costs) -> float:
        """What the original has of it."""
        return self.count(costs.whole, costs.original)

    def remaining(self, costs: Costs, widths: Widths) -> float:
        """Fraction of the original that remains at some widths."""
        return self.count(costs, widths) / self.whole(costs)

    def target(self, costs: Costs) -> float:
        """Fraction of the original that may remain in the end; above 1 if the figure is above that of the original."""
        if self.absolute is not None:
            return self.absolute / self.whole(costs)
        assert self.fraction is not None
        return self.fraction


@dataclass(frozen=True, repr=False)
class Units(Budget):
    """Prunable units that may remain.

    Attributes:
        fraction: of those that there were.
        absolute: instead, their number.
    """

    fraction: float | None = None
    absolute: float | None = None

    def count(self, costs: Costs, widths: Widths) -> float:
        return costs.units(widths)


@dataclass(frozen=True, repr=False)
class Params(Budget):
    """Parameters that may remain; those of layers left whole count too.

    Attributes:
        fraction: of those that there were.
        absolute: instead, their number, such as 200_000.
    """

    fraction: float | None = None
    absolute: float | None = None

    def count(self, costs: Costs, widths: Widths) -> float:
        return costs.params(widths)


@dataclass(frozen=True, repr=False)
class MACs(Budget):
    """Multiply-accumulates of a forward pass of one sample that may remain; those of layers left whole count too.

    Attributes:
        fraction: of those that there were.
        absolute: instead, their number, such as 1e6.
    """

    fraction: float | None = None
    absolute: float | None = None

    def count(self, costs: Costs, widths: Widths) -> float:
        return costs.macs(widths)


@dataclass(frozen=True, repr=False)
class Bytes(Budget):
    """Bytes of the state dict's tensors that may remain, buffers included; a tied tensor counts once.

    Attributes:
        fraction: of those that there were.
        absolute: instead, their number, such as 2**20 for a mebibyte.
    """

    fraction: float | None = None
    absolute: float | None = None

    def count(self, costs: Costs, widths: Widths) -> float:
        return costs.bytes(widths)


@dataclass(frozen=True, repr=False)
class Latency(Budget):
    """Time of a forward pass of one batch that may remain, on this machine: CPU time of one thread.

    The batch is the first of training, of the size that the run trains with, or the example that `Pruner.prepare` is
    given; the report at the end measures the same one, and says how many samples are in it.

    It goes by a table that is measured once, when a run begins: what every layer takes at sixteenths of all widths.
    Widths are no finer than that: with `round_to=1`, multiples of the largest power of two in a sixteenth of a group,
    or of 16. Page faults do not count: freed memory stays with the process while it is measured.

    Attributes:
        fraction: of the original's.
        absolute: instead, milliseconds.
    """

    fraction: float | None = None
    absolute: float | None = None

    def count(self, costs: Costs, widths: Widths) -> float:
        return costs.milliseconds(widths)


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
        check_fields(self)
        if not 0 < self.alpha < 1:
            raise ValueError(f"Expected `alpha` between 0 and 1, got {self.alpha}: 0.05 is common.")

    @property
    def fraction(self) -> float:  # type: ignore[override]
        """Nothing but what is significant."""
        return 0.0

    def count(self, costs: Costs, widths: Widths) -> float:
        return costs.units(widths)
