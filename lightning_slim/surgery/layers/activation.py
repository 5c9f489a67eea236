"""nn.PReLU: one slope for all channels, or one a channel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_slim.surgery.layers.base import LayerKind, Place, every_channel
from lightning_slim.units import Role


class PReLU(LayerKind):
    """A shared slope belongs to no channel."""

    types = (nn.PReLU,)

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        assert isinstance(layer, nn.PReLU)
        shared = layer.num_parameters == 1
        return [] if shared else [Place("weight", 0, every_channel(layer.num_parameters))]

    def refresh(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.PReLU)
        layer.num_parameters = layer.weight.shape[0]
