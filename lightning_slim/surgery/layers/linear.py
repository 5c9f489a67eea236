"""nn.Linear: weight (out, in), bias (out)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from lightning_slim.surgery.layers.base import LayerKind, Place, every_channel, present
from lightning_slim.units import Role


class Linear(LayerKind):
    """A linear layer makes a channel with a row and reads one with a column."""

    types = (nn.Linear,)
    channel_axis: ClassVar[int | None] = -1

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        assert isinstance(layer, nn.Linear)
        if role == "in":
            return [Place("weight", 1, every_channel(layer.in_features))]
        index = every_channel(layer.out_features)
        return [Place("weight", 0, index), *present(layer, ("bias",), 0, index)]

    def refresh(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.Linear)
        layer.out_features, layer.in_features = layer.weight.shape
