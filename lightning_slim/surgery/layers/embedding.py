"""nn.Embedding: weight (tokens, channels)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_slim.surgery.layers.base import LayerKind, Place, every_channel
from lightning_slim.units import Role


class Embedding(LayerKind):
    """Channels are columns; tokens are never removed."""

    types = (nn.Embedding,)

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        assert isinstance(layer, nn.Embedding)
        return [Place("weight", 1, every_channel(layer.embedding_dim))]

    def refresh(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.Embedding)
        layer.embedding_dim = layer.weight.shape[1]
