"""What a pattern of zeros is: which entries of a weight go together, and which of them may."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_slim.arguments import check_fields


class Pattern(ABC):
    """A frozen dataclass that turns scores of single weights into a mask.

    Weights come as stacks of matrices, one for each tap of a kernel (see `masks.weights.stacked`), so that the last
    axis is always what is read, be it of a linear layer, a convolution or a recurrent layer. Scores may be negative;
    what is gone already has a score of -inf.
    """

    aligned: ClassVar[bool] = True  # whether a mask of which rows or columns were cut is no mask of the pattern

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def sparsity(self) -> float | None:
        """The fraction of zeros that the pattern stands for; None if it allows any."""
        return None

    @property
    def piece(self) -> int:
        """How many entries go or stay together."""
        return 1

    def refuses(self, shape: Sequence[int]) -> str:
        """What is wrong with a stack of this shape; empty if nothing is."""
        return ""

    @abstractmethod
    def pool(self, scores: Float[Tensor, "taps rows inputs"]) -> Float[Tensor, "pieces"]:
        """The score of each piece: the sum over its entries, but for those that are gone; -inf if all are."""

    @abstractmethod
    def choose(self, scores: Float[Tensor, "taps rows inputs"], removed: int) -> Bool[Tensor, "taps rows inputs"]:
        """The entries that stay, when so many pieces go: those of least score."""


def best(scores: Float[Tensor, "*batch pieces"], kept: int) -> Bool[Tensor, "*batch pieces"]:
    """Marks so many of the largest along the last axis, exactly; of equals, the first.

    >>> best(torch.tensor([2.0, 1.0, 2.0, 2.0]), 2)
    tensor([ True, False,  True, False])
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
