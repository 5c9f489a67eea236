"""Layer kinds: one file for each kind of layer that surgery understands."""

from __future__ import annotations

from torch import nn

from lightning_slim.surgery.layers.activation import PReLU
from lightning_slim.surgery.layers.base import LayerKind, Place
from lightning_slim.surgery.layers.conv import Conv
from lightning_slim.surgery.layers.embedding import Embedding
from lightning_slim.surgery.layers.linear import Linear
from lightning_slim.surgery.layers.norm import BatchNorm, GroupNorm, LayerNorm
from lightning_slim.surgery.layers.recurrent import Recurrent

KINDS: tuple[LayerKind, ...] = (
    Linear(),
    Conv(),
    BatchNorm(),
    GroupNorm(),
    LayerNorm(),
    PReLU(),
    Embedding(),
    Recurrent(),
)


def layer_kind(module: nn.Module) -> LayerKind | None:
    """The kind that speaks for a module, or None if surgery does not understand it."""
    return next((kind for kind in KINDS if isinstance(module, kind.types)), None)


__all__ = ["KINDS", "LayerKind", "Place", "layer_kind"]
