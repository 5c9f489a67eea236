"""So many of every few neighbours: what sparse tensor cores read."""

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
class NM(Pattern):
    """`n` of every `m` neighbouring weights along the inputs stay (Mishra et al., 2021, for 2 of 4).

    While a schedule is under way, as many go in every group as is due by then.

    Attributes:
        n: how many stay.
        m: of so many.

    >>> NM(1, 2).choose(torch.tensor([[[3.0, 1.0, 2.0, 4.0]]]), removed=2)
    tensor([[[ True, False, False,  True]]])
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.n < self.m:
            raise ValueError(f"Expected 0 < n < m, got n={self.n}, m={self.m}: n of every m weights stay.")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def refuses(self, shape: Sequence[int]) -> str:
        if shape[2] % self.m == 0:
            return ""
        return f"Expected a multiple of {self.m} inputs for {self.n}:{self.m}, got {shape[2]}: pad them, or skip it"

    def pool(self, scores: Float[Tensor, "taps rows inputs"]) -> Float[Tensor, "pieces"]:
        return scores.flatten()

    def choose(self, scores: Float[Tensor, "taps rows inputs"], removed: int) -> Bool[Tensor, "taps rows inputs"]:
        """The last group may be short, after a cut."""
        taps, rows, inputs = scores.shape
        groups = pad(scores, (0, -inputs % self.m), value=-torch.inf).reshape(taps, rows, -1, self.m)
        gone = min(round(self.m * removed / scores.numel()), self.m - self.n)
        return best(groups, self.m - gone).flatten(2)[..., :inputs].contiguous()
