"""Convolutions: dense, grouped, depthwise and transposed, in one to three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_slim.surgery.layers.base import LayerKind, Place, every_channel, in_runs, present
from lightning_slim.units import Role


class Conv(LayerKind):
    """weight (out, in / groups, *kernel); a transposed one has (in, out / groups, *kernel).

    Grouped: every group must lose the same positions. Depthwise (one filter a channel): output channel `c` *is* input
    channel `c`, and the number of groups follows.
    """

    types = (_ConvNd,)
    channel_axis: ClassVar[int | None] = 1

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        assert isinstance(layer, _ConvNd)
        if role == "in" and not is_depthwise(layer):
            share = layer.in_channels // layer.groups
            index = every_channel(layer.in_channels)
            return [Place("weight", 0, index) if layer.transposed else Place("weight", 1, index % share)]
        index = every_channel(layer.out_channels)
        bias = present(layer, ("bias",), 0, index)
        if layer.transposed and not is_depthwise(layer):
            return [Place("weight", 1, index % (layer.out_channels // layer.groups)), *bias]
        return [Place("weight", 0, index), *bias]

    def families(self, layer: nn.Module, role: Role) -> Int[Tensor, "channels"] | None:
        assert isinstance(layer, _ConvNd)
        channels = layer.in_channels if role == "in" else layer.out_channels
        return None if is_depthwise(layer) else in_runs(channels, layer.groups)

    def refresh(self, layer: nn.Module) -> None:
        assert isinstance(layer, _ConvNd)
        # Read before the channel counts are overwritten: the weight's shape alone cannot tell.
        if is_depthwise(layer):
            times = layer.out_channels // layer.in_channels
            channels = layer.weight.shape[0] // (1 if layer.transposed else times)
            layer.groups, layer.in_channels, layer.out_channels = channels, channels, channels * times
            return
        first, second = layer.weight.shape[:2]
        layer.in_channels = first if layer.transposed else second * layer.groups
        layer.out_channels = second * layer.groups if layer.transposed else first


def is_depthwise(layer: _ConvNd) -> bool:
    """A group for every input channel; several outputs of one live or die with it."""
    return 1 < layer.groups == layer.in_channels
