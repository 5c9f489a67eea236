"""Normalisations: they carry channels, and compute across or along them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_slim.surgery.layers.base import LayerKind, Place, every_channel, present
from lightning_slim.units import Role


class BatchNorm(LayerKind):
    """Batch and instance normalisation: scale, shift and running statistics, one entry a channel."""

    types = (_NormBase,)

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        assert isinstance(layer, _NormBase)
        names = ("weight", "bias", "running_mean", "running_var")
        return present(layer, names, 0, every_channel(layer.num_features))

    def refresh(self, layer: nn.Module) -> None:
        assert isinstance(layer, _NormBase)
        tensor = layer.weight if layer.weight is not None else layer.running_mean
        if tensor is not None:
            layer.num_features = tensor.shape[0]


class GroupNorm(LayerKind):
    """Every group must lose the same positions, so that the groups keep their members."""

    types = (nn.GroupNorm,)
    mixes_channels: ClassVar[bool] = True

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        assert isinstance(layer, nn.GroupNorm)
        return present(layer, ("weight", "bias"), 0, every_channel(layer.num_channels))

    def chunks(self, layer: nn.Module, role: Role) -> int:
        assert isinstance(layer, nn.GroupNorm)
        return layer.num_groups

    def refresh(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.GroupNorm)
        layer.num_channels = layer.weight.shape[0]


class LayerNorm(LayerKind):
    """Layer and RMS normalisation over the last axis.

    Removing a channel changes the statistics of those that stay, so a cut is not function-preserving.
    """

    types = (nn.LayerNorm, nn.RMSNorm)
    mixes_channels: ClassVar[bool] = True

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
        # Over several axes (channels and pixels, say) no axis is the channels': they cannot be followed.
        channels = layer.normalized_shape[0] if len(layer.normalized_shape) == 1 else 0
        return [Place(name, 0, every_channel(channels)) for name in ("weight", "bias") if hasattr(layer, name)]

    def refresh(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
        layer.normalized_shape = tuple(layer.weight.shape)
