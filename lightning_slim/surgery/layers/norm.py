"""Normalisations: they carry channels, and compute across or along them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_slim.surgery.layers.base import LayerKind, Place, every_channel, in_runs, present
from lightning_slim.units import Role, Span, UnitGroup, columns
from lightning_slim.weight_norm import layer_of


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

    def families(self, layer: nn.Module, role: Role) -> Int[Tensor, "channels"] | None:
        assert isinstance(layer, nn.GroupNorm)
        return in_runs(layer.num_channels, layer.num_groups)

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
        return present(layer, ("weight", "bias"), 0, every_channel(channels))

    def refresh(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.LayerNorm | nn.RMSNorm)
        if layer.weight is not None:
            layer.normalized_shape = tuple(layer.weight.shape)


class _OfAnyWidth:
    """What a norm without weights becomes in a network that was cut: it has no tensor that tells its width.

    It normalises over its last axis, however wide, computes the same, and is printed under its own name.
    """

    eps: Any  # a float; of an RMS norm perhaps None

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Slim")

    def extra_repr(self) -> str:
        """As wide as its input."""
        return f"any width, eps={self.eps}, elementwise_affine=False"


class SlimLayerNorm(_OfAnyWidth, nn.LayerNorm):
    """An `nn.LayerNorm` as wide as its input."""

    def forward(self, input: Tensor) -> Tensor:
        """See `nn.LayerNorm.forward`."""
        return F.layer_norm(input, input.shape[-1:], eps=self.eps)


class SlimRMSNorm(_OfAnyWidth, nn.RMSNorm):
    """An `nn.RMSNorm` as wide as its input."""

    def forward(self, x: Tensor) -> Tensor:
        """See `nn.RMSNorm.forward`."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


OF_ANY_WIDTH: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: SlimLayerNorm, nn.RMSNorm: SlimRMSNorm}
CUTS = "_slim_cuts"  # how many cuts such a norm lived through: those that are put back do not count


def norms_of_any_width(model: nn.Module, cuts: int = 1) -> None:
    """Lets norms without weights follow the width of their input.

    Args:
        model: that was cut.
        cuts: 1; or -1: one was put back, and after the last of them the norms are as they were.
    """
    for layer in model.modules():
        plain = {new: old for old, new in OF_ANY_WIDTH.items()}.get(type(layer), type(layer))
        bare = plain in OF_ANY_WIDTH and layer.weight is None and len(layer.normalized_shape) == 1
        if bare:
            count = vars(layer).pop(CUTS, 0) + cuts
            if count > 0:
                vars(layer)[CUTS] = count
            layer.__class__ = OF_ANY_WIDTH[plain] if count > 0 else plain


class LayerNormLike(LayerKind):
    """Layer and RMS normalisations of other libraries, told by their name: one weight a channel, perhaps a bias."""

    mixes_channels: ClassVar[bool] = True
    opaque: ClassVar[bool] = True

    def speaks_for(self, module: nn.Module) -> bool:
        named = type(module).__name__.endswith(("LayerNorm", "RMSNorm", "LayerNorm2d", "RMSNorm2d"))
        own = dict(module.named_parameters())
        plain = "weight" in own and own.keys() <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())
        return named and plain and not isinstance(module, nn.LayerNorm | nn.RMSNorm)

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        channels = len(layer.get_parameter("weight"))
        return present(layer, ("weight", "bias"), 0, every_channel(channels))

    def refresh(self, layer: nn.Module) -> None:
        if "normalized_shape" in vars(layer):
            vars(layer)["normalized_shape"] = (len(layer.get_parameter("weight")),)


def scale_spans(model: nn.Module, group: UnitGroup) -> list[Span]:
    """Where a group's units have scales in normalisations; a tied scale once.

    Norms of other libraries, of which only the name is known, do not count: some multiply by one more than their
    weight.
    """
    spans: dict[int, Span] = {}
    for span in group.spans:
        layer = model.get_submodule(layer_of(span.tensor))
        if isinstance(layer, (*BatchNorm.types, *GroupNorm.types, *LayerNorm.types)) and span.tensor.endswith("weight"):
            spans[id(layer.weight)] = span
    return [*spans.values()]


def norm_scales(model: nn.Module, group: UnitGroup) -> Float[Tensor, "units norms"]:
    """The absolute scale of each unit in every normalisation that a group passes; no columns if there is none.

    The mean over the positions of a unit; see `scale_spans` for what counts.
    """
    scales = [
        columns(model.get_parameter(span.tensor).detach(), span).abs().mean(1) for span in scale_spans(model, group)
    ]
    return torch.stack(scales, 1) if scales else torch.zeros(group.size, 0)
