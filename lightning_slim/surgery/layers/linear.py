"""nn.Linear: weight (out, in), bias (out); and the Conv1D of transformers, which is one with a transposed weight."""

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


class Conv1D(LayerKind):
    """The linear layer of GPT-2 in the transformers library: weight (in, out), bias (out); told by its name."""

    channel_axis: ClassVar[int | None] = -1
    opaque: ClassVar[bool] = True

    def speaks_for(self, module: nn.Module) -> bool:
        return (
            type(module).__name__ == "Conv1D"
            and {"nx", "nf"} <= vars(module).keys()
            and module.get_parameter("weight").ndim == 2
        )

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        channels = every_channel(layer.__dict__["nx" if role == "in" else "nf"])
        if role == "in":
            return [Place("weight", 0, channels)]
        return [Place("weight", 1, channels), *present(layer, ("bias",), 0, channels)]

    def refresh(self, layer: nn.Module) -> None:
        vars(layer)["nx"], vars(layer)["nf"] = layer.get_parameter("weight").shape
