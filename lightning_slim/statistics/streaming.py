"""What every streaming statistic promises."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor


class Accumulator(ABC):
    """A statistic of units that is gathered batch by batch, in sums that add.

    The laws, which hold for every subclass and are tested for all of them:

    * a stream gives what all of its rows give at once;
    * two streams merge into one stream: `merge` adds sums, so ranks are reduced by adding `sums`, where there are
      pivots after `move_pivots` to those of one rank;
    * `keep` forgets all other units: the rest goes on as if they had never been there;
    * a state that is saved and loaded is the same to the last bit;
    * nothing seen, dead units and non-finite values give defined results, never NaN.

    A subclass names its tensors and writes `update` and `result`. Tensors are float64 and have at least one axis: a
    0-dim float64 buffer that a compiled graph writes to is silently lost (torch 2.13).

    Attributes:
        SUMS: the tensors that add, each with the axis along which its units lie, or None.
        FIXED: likewise the tensors that stay as they are and must be equal in streams that merge.
        SETTINGS: names of what else must be equal in them, such as lags.
    """

    SUMS: ClassVar[Mapping[str, int | None]]
    FIXED: ClassVar[Mapping[str, int | None]] = {}
    SETTINGS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, device: torch.device | str = "cpu") -> None:
        # MPS has no float64: there the sums are kept on the CPU.
        self.device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)

    @abstractmethod
    def update(self, *args: Any, **kwargs: Any) -> None:
        """Adds a batch of rows, of any floating type; the first argument holds the units on its last axis."""

    @abstractmethod
    def result(self) -> tuple[Any, ...]:
        """The statistic of everything seen so far."""

    @property
    def sums(self) -> dict[str, Tensor]:
        """The tensors that add, themselves and not copies: reduce them over ranks in place."""
        return {name: getattr(self, name) for name in self.SUMS}

    def merge(self, other: Accumulator) -> None:
        """Adds another stream of the same units, which is left as it is.

        Raises:
            ValueError: the other stream is of another statistic, or of other units, classes or targets.
        """
        self._check(other)
        theirs = other.sums
        for name, mine in self.sums.items():
            mine += theirs[name].to(mine)

    def decay(self, factor: float) -> None:
        """Forgets: what was seen so far counts only `factor` times as much from now on."""
        for tensor in self.sums.values():
            tensor *= factor

    def keep(self, units: Int[Tensor, "kept"]) -> None:
        """Drops all other units: the statistic is that of a stream that never had them."""
        for name, axis in self._tensors().items():
            if axis is not None:
                tensor = getattr(self, name)
                setattr(self, name, tensor.index_select(axis, units.to(tensor.device)))

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors only."""
        return {**self.sums, **{name: getattr(self, name) for name in self._tensors() if name not in self.SUMS}}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, of any number of units."""
        for name in self._tensors():
            setattr(self, name, state[name].to(getattr(self, name)).clone())

    def _tensors(self) -> dict[str, int | None]:
        return {**self.SUMS, **self.FIXED}

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def _expect(self, values: Tensor, last: Tensor, what: str) -> None:
        """Refuses values unless there are as many as the tensor `last` has on its last axis."""
        if values.shape[-1] != last.shape[-1]:
            raise ValueError(
                f"{type(self).__name__} was made for {last.shape[-1]} {what}, got {values.shape[-1]}: make a new one, "
                f"or `keep` the units that are left."
            )

    def _accept(self, values: Tensor, last: Tensor, what: str) -> Tensor:
        """Values as float64 on the right device, if there are as many as expected."""
        self._expect(values, last, what)
        return values.detach().to(self.device, torch.float64)

    def _check(self, other: Accumulator) -> None:
        if type(other) is not type(self):
            raise ValueError(
                f"Only streams of one statistic merge: expected {type(self).__name__}, got {type(other).__name__}."
            )
        for name in self.SETTINGS:
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"Streams merge when they have one {name}: expected {getattr(self, name)}, "
                    f"got {getattr(other, name)}."
                )
        for name in self._tensors():
            mine, theirs = (getattr(stream, name) for stream in (self, other))
            if mine.shape != theirs.shape:
                raise ValueError(
                    f"Streams merge when they have the same units and classes: expected `{name}` of shape "
                    f"{tuple(mine.shape)}, got {tuple(theirs.shape)}. `keep` the same units in both."
                )
        for name in self.FIXED:
            if not torch.equal(getattr(self, name), getattr(other, name).to(getattr(self, name).device)):
                raise ValueError(f"Streams merge when `{name}` is equal in both: make both with the same `{name}`.")


class Pivoted(Accumulator):
    """An accumulator of sums about pivots: a small variance beside a large mean is not lost.

    A pivot is a number a column that is subtracted before anything is summed. It is the median of the first batch: near
    the mean whatever the tails, and an element, so that what never changes is exactly zero from then on.

    Attributes:
        PIVOTS: the pivots, each with the axis along which its units lie, or None.
    """

    PIVOTS: ClassVar[Mapping[str, int | None]]
    _settled = False  # before the first batch, pivots are zero and free to move

    @property
    def pivots(self) -> dict[str, Tensor]:
        """All pivots; ranks whose sums are to be added need those of one rank, see `move_pivots`."""
        return {name: getattr(self, name) for name in self.PIVOTS}

    def move_pivots(self, pivots: Mapping[str, Tensor]) -> None:
        """Makes the sums those about other pivots: the same statistic, exactly."""
        self._shift({name: pivot - pivots[name].to(pivot) for name, pivot in self.pivots.items()})
        for name, pivot in self.pivots.items():
            setattr(self, name, pivots[name].to(pivot).clone())
        self._settled = True

    def merge(self, other: Accumulator) -> None:
        """Adds another stream of the same units, which is left as it is. Its pivots may differ.

        Raises:
            ValueError: the other stream is of another statistic, or of other units, classes or targets.
        """
        self._check(other)
        if isinstance(other, Pivoted) and other._settled:
            if not self._settled:
                self.move_pivots(other.pivots)
            other = copy.copy(other)
            other.move_pivots(self.pivots)
        super().merge(other)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, of any number of units."""
        super().load_state_dict(state)
        self._settled = any(bool(tensor.any()) for tensor in self.sums.values())

    def _about(self, name: str, values: Tensor) -> Tensor:
        """Values about a pivot, which the first batch sets."""
        if not self._settled:
            setattr(self, name, values.median(0).values)
        pivot: Tensor = getattr(self, name)
        return values - pivot

    @abstractmethod
    def _shift(self, by: Mapping[str, Tensor]) -> None:
        """Replaces the sums, in new tensors, by those of values that are larger by this much."""

    def _tensors(self) -> dict[str, int | None]:
        return {**super()._tensors(), **self.PIVOTS}
