"""What is gathered of units where they arrive, beside their moments: a score that wants more says so with a witness."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Known = Literal["labels", "outputs", "losses"]


@runtime_checkable
class Gathered(Protocol):
    """What a witness fills: every streaming statistic is one."""

    @property
    def sums(self) -> dict[str, Tensor]:
        """The tensors that add over ranks, themselves and not copies."""

    def decay(self, factor: float) -> None:
        """Forgets: what was seen so far counts only `factor` times as much from now on."""

    def keep(self, units: Int[Tensor, "kept"]) -> None:
        """Drops all other units."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors only."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""


class Witness(ABC):
    """Looks on where units arrive at the layers that read them, and gathers. A child is a frozen dataclass.

    Attributes:
        known: what else of a step it needs, item by item; it is there once the step is over. None if nothing.
    """

    known: ClassVar[Known | None] = None

    def hold(self, units: Float[Tensor, "items positions columns"]) -> Tensor:
        """What must be held of one arrival until the step is over: by default the mean over its positions."""
        return in_full(units).mean(1)

    def hold_tokens(self, tokens: Int[Tensor, "items positions"], number: int) -> Tensor:
        """`hold` of tokens as one-hot units, without making these: by default the mean over positions, too.

        Args:
            tokens: numbers of the units that are 1.
            number: of units.
        """
        each = torch.ones_like(tokens, dtype=torch.float) / tokens.shape[1]
        return torch.zeros(len(tokens), number, device=tokens.device).scatter_add_(1, tokens.long(), each)

    @abstractmethod
    def add(self, gathered: Any, held: Tensor, known: Any) -> Gathered:
        """Adds what was held to what was gathered.

        Args:
            gathered: what `add` returned last; None at first.
            held: of one arrival.
            known: of the same items; None where nothing is asked for.

        Raises:
            ValueError: what is known does not fit what was held.
        """

    @abstractmethod
    def blank(self, state: Mapping[str, Tensor]) -> Gathered:
        """An empty one, to load a state into."""

    def enough(self, gathered: Any) -> bool:
        """Whether something can be made of what was gathered."""
        return True


def in_full(units: Tensor) -> Tensor:
    """In float32 at least: half precision does not do for sums."""
    return units if units.dtype == torch.float64 else units.float()


def check_items(held: Tensor, known: Tensor, what: str) -> None:
    """Raises where a target is not there once for each item."""
    if known.ndim == 0 or len(known) != len(held):
        got = len(known) if known.ndim else "one number"
        raise ValueError(
            f"Expected {what} for each of the {len(held)} items that arrive at a layer, got {got}: units can be "
            f"compared with {what} only where the first axis is the batch, in the layer's input and in what is given."
        )
