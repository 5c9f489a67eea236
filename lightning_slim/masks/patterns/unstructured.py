"""Single weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from lightning_slim.masks.patterns.base import Pattern, best


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight for itself.

    >>> Unstructured().choose(torch.tensor([[[3.0, 1.0, 2.0, 4.0]]]), removed=1)
    tensor([[[ True, False,  True,  True]]])
    """

    aligned: ClassVar[bool] = False

    def pool(self, scores: Float[Tensor, "taps rows inputs"]) -> Float[Tensor, "pieces"]:
        return scores.flatten()

    def choose(self, scores: Float[Tensor, "taps rows inputs"], removed: int) -> Bool[Tensor, "taps rows inputs"]:
        return best(scores.flatten(), scores.numel() - removed).view(scores.shape)
