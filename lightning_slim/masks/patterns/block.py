"""Blocks of neighbouring weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from lightning_slim.arguments import check_fields
from lightning_slim.masks.patterns.base import Pattern, best


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks go and stay whole: what block-sparse kernels skip.

    `Block(128, 1)` is tile-wise sparsity (Guo et al., 2020): every tile of 128 outputs loses inputs of its own, and
    what is left of it is a small dense product.

    Attributes:
        rows: outputs of a block.
        cols: inputs of a block.

    >>> Block(2, 1).choose(torch.tensor([[[3.0, 1.0], [3.0, 2.0]]]), removed=1)
    tensor([[[ True, False],
             [ True, False]]])
    """

    rows: int = 4
    cols: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"Expected `rows` and `cols` of at least 1, got {self.rows} and {self.cols}.")

    @property
    def piece(self) -> int:
        return self.rows * self.cols

    def refuses(self, shape: Sequence[int]) -> str:
        if shape[1] % self.rows == 0 and shape[2] % self.cols == 0:
            return ""
        return (
            f"Expected a multiple of {self.rows} outputs and of {self.cols} inputs for {self.rows}x{self.cols} "
            f"blocks, got {shape[1]} and {shape[2]}: pad them, or skip it"
        )

    def pool(self, scores: Float[Tensor, "taps rows inputs"]) -> Float[Tensor, "pieces"]:
        return self._blocks(scores).flatten()

    def choose(self, scores: Float[Tensor, "taps rows inputs"], removed: int) -> Bool[Tensor, "taps rows inputs"]:
        """The last blocks may be short, after a cut."""
        _, rows, inputs = scores.shape
        blocks = self._blocks(scores)
        stay = best(blocks.flatten(), blocks.numel() - removed).view(blocks.shape)
        whole = stay.repeat_interleave(self.rows, 1).repeat_interleave(self.cols, 2)
        return whole[:, :rows, :inputs].contiguous()

    def _blocks(self, scores: Float[Tensor, "taps rows inputs"]) -> Float[Tensor, "taps down across"]:
        _, rows, inputs = scores.shape
        padded = pad(scores, (0, -inputs % self.cols, 0, -rows % self.rows), value=-torch.inf)
        taps, down, across = len(scores), padded.shape[1] // self.rows, padded.shape[2] // self.cols
        blocks = padded.reshape(taps, down, self.rows, across, self.cols).transpose(2, 3).flatten(3)
        gone = blocks.isneginf()
        return blocks.masked_fill(gone, 0).sum(-1).masked_fill(gone.all(-1), -torch.inf)
