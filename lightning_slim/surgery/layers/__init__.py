"""Layer kinds: one file for each kind of layer that surgery understands."""

from __future__ import annotations

from torch import nn

from lightning_slim.surgery.layers.activation import PReLU
from lightning_slim.surgery.layers.attention import Attention
from lightning_slim.surgery.layers.base import LayerKind, Place
from lightning_slim.surgery.layers.conv import Conv
from lightning_slim.surgery.layers.embedding import Embedding
from lightning_slim.surgery.layers.linear import Conv1D, Linear
from lightning_slim.surgery.layers.multihead import MultiheadAttention, TransformerEncoder
from lightning_slim.surgery.layers.norm import BatchNorm, GroupNorm, LayerNorm, LayerNormLike
from lightning_slim.surgery.layers.recurrent import Recurrent, RecurrentCell

KINDS: tuple[LayerKind, ...] = (
    Linear(),
    Conv(),
    BatchNorm(),
    GroupNorm(),
    LayerNorm(),
    LayerNormLike(),
    PReLU(),
    Embedding(),
    Recurrent(),
    RecurrentCell(),
    MultiheadAttention(),
    TransformerEncoder(),
    Conv1D(),
    Attention(),
)


def layer_kind(module: nn.Module) -> LayerKind | None:
    """The kind that speaks for a module, or None if surgery does not understand it."""
    return next((kind for kind in KINDS if kind.speaks_for(module)), None)


__all__ = ["KINDS", "LayerKind", "Place", "layer_kind"]
