"""What every layer kind tells: which entries of its tensors make a channel, and which read one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lightning_slim.units import MIN_UNITS, Role


@dataclass(frozen=True, eq=False)
class Place:
    """Where a layer's channels live in one of its own tensors: `index[c]` is the position of channel `c`.

    A negative position says that the channel does not live there; a role of its own says that a tensor of the layer
    reads what the layer makes, as recurrent columns do.
    """

    tensor: str
    axis: int
    index: Int[Tensor, "channels"]
    role: Role | None = None


class LayerKind(ABC):
    """One kind of layer. A new kind is a new file with a subclass; `layer_kind` finds it by its `types`.

    Attributes:
        types: the module classes it speaks for (and their subclasses).
        mixes_channels: whether the layer computes across channels without weights, so that removing one changes others.
        channel_axis: for layers that read channels by a weighted sum, the channel axis of their input; None for
            layers that only carry them.
    """

    types: ClassVar[tuple[type[nn.Module], ...]]
    channel_axis: ClassVar[int | None] = None
    mixes_channels: ClassVar[bool] = False

    @abstractmethod
    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        """Where the layer's output channels (`"out"`) or input channels (`"in"`) live."""

    def chunks(self, layer: nn.Module, role: Role) -> int:
        """Into how many equal runs the channels fall that must all lose the same positions."""
        return 1

    def inner(self, layer: nn.Module) -> Sequence[tuple[str, Sequence[Place]]]:
        """Units that are not seen from outside the layer: (name, where they live)."""
        return ()

    def cells(self, layer: nn.Module) -> Sequence[tuple[str, Sequence[Place]]]:
        """Units behind those that the layer makes: (name, where they live); all groups must keep the same number."""
        return ()

    def min_cells(self, layer: nn.Module) -> int:
        """How many of each of these groups must stay at least."""
        return MIN_UNITS

    def pack(self, layer: nn.Module) -> int:
        """If all groups of the layer must keep the same number of units: the units of all of them; 0 if not."""
        return 0

    def bias_of(self, layer: nn.Module, tensor: str) -> str | None:
        """The bias beside a weight that reads channels; None if there is none."""
        return "bias" if getattr(layer, "bias", None) is not None else None

    @abstractmethod
    def refresh(self, layer: nn.Module) -> None:
        """Make the layer's attributes (`out_features`, ...) follow the shapes of its tensors."""


def every_channel(channels: int) -> Int[Tensor, "channels"]:
    """Channel `c` lives at position `c`."""
    return torch.arange(channels)


def present(layer: nn.Module, names: Sequence[str], axis: int, index: Tensor) -> list[Place]:
    """The same place in each of those tensors that the layer has (a bias may be missing)."""
    return [Place(name, axis, index) for name in names if getattr(layer, name, None) is not None]
