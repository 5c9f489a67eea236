"""What every layer kind tells: which entries of its tensors make a channel, and which read one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lightning_slim.surgery.layers.one_node import one_node
from lightning_slim.units import MIN_UNITS, Role

ROLES: tuple[Role, Role] = ("in", "out")


@dataclass(frozen=True, eq=False)
class Place:
    """Where a layer's channels live in one of its tensors: `index[c]` is the position of channel `c`.

    A negative position says that the channel does not live there; a role of its own says that a tensor of the layer
    reads what the layer makes, as recurrent columns do. Units of `inner` groups may have several positions each.
    """

    tensor: str
    axis: int
    index: Int[Tensor, "channels"] | Int[Tensor, "units width"]
    role: Role | None = None


class LayerKind(ABC):
    """One kind of layer. A new kind is a new file with a subclass; `layer_kind` finds it by its `types`.

    Attributes:
        types: the module classes it speaks for (and their subclasses).
        opaque: whether a trace sees the layer as one node, whatever happens inside.
        mixes_channels: whether the layer computes across channels without weights, so that removing one changes others.
        channel_axis: for layers that read channels by a weighted sum, the channel axis of their input; None for
            layers that only carry them.
    """

    types: ClassVar[tuple[type[nn.Module], ...]] = ()
    channel_axis: ClassVar[int | None] = None
    mixes_channels: ClassVar[bool] = False
    opaque: ClassVar[bool] = False

    def speaks_for(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        return isinstance(module, self.types)

    @abstractmethod
    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        """Where the layer's output channels (`"out"`) or input channels (`"in"`) live."""

    def families(self, layer: nn.Module, role: Role) -> Int[Tensor, "channels"] | None:
        """A number for each channel: those with the same number live or die together. None: each on its own."""
        return None

    def stand_in(self, layer: nn.Module) -> Callable[..., Any]:
        """What takes the place of an opaque layer's `forward` while it is traced."""
        channels_in, channels_out = (len(self.places(layer, role)[0].index) for role in ROLES)
        axis = -1 if self.channel_axis is None else self.channel_axis
        return one_node(layer.forward, channels_in, channels_out, axis)

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

    def mixing(self, layer: nn.Module) -> tuple[str, int] | None:
        """The tensor and axis whose size the layer's MACs without weights follow; None if it has none."""
        return None

    @abstractmethod
    def refresh(self, layer: nn.Module) -> None:
        """Make the layer's attributes (`out_features`, ...) follow the shapes of its tensors."""


def every_channel(channels: int) -> Int[Tensor, "channels"]:
    """Channel `c` lives at position `c`."""
    return torch.arange(channels)


def present(layer: nn.Module, names: Sequence[str], axis: int, index: Tensor) -> list[Place]:
    """The same place in each of those tensors that the layer has (a bias may be missing)."""
    return [Place(name, axis, index) for name in names if getattr(layer, name, None) is not None]


def in_runs(channels: int, runs: int) -> Int[Tensor, "channels"] | None:
    """Families of channels that fall into equal runs, which must all lose the same positions."""
    return None if runs == 1 else torch.arange(channels) % (channels // runs)
