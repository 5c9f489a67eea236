"""Two nested regressions from the moments of their columns: what does the larger one explain more?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

COLLINEAR = 1e-10  # a column of which others leave less than this share is their combination


class Nested(NamedTuple):
    """Sums of squares of two nested regressions.

    Attributes:
        explained: what the added columns explain beyond the others: a sum of squares, not a difference of two.
        restricted: what is left of the target without the added columns.
        rank: number of added columns that are not combinations of columns before them.
        own: likewise of the columns that both have.
    """

    explained: Float[Tensor, "*pairs"]
    restricted: Float[Tensor, "*pairs"]
    rank: Float[Tensor, "*pairs"]
    own: Float[Tensor, "*pairs"]

    @property
    def share(self) -> Float[Tensor, "*pairs"]:
        """Partial r-squared: the explained part of what is left without the added columns, in [0, 1], never NaN."""
        defined = (self.rank > 0) & (self.restricted > 0) & self.explained.isfinite()
        share = torch.where(defined, self.explained, 0.0) / torch.where(defined, self.restricted, 1.0)
        return share.clamp(0, 1)


def nested(moments: Float[Tensor, "*pairs columns columns"], own: int, floor: Float[Tensor, "..."]) -> Nested:
    """Eliminates columns one after the other (Gauss, symmetric), batched over pairs.

    Each elimination explains `(x'y)^2 / x'x`, of the column and the target given all columns before: a sum of squares
    that is exact however small it is. Columns that are dead or combinations of others are passed over.

    Args:
        moments: of centred columns, in this order: those that both regressions have, those that one adds, the target.
        own: number of columns that both have.
        floor: squares of each column that are rounding error; what is not above it is dead. Broadcasts to
            `[*pairs, columns]`.
    """
    variance = moments.diagonal(dim1=-2, dim2=-1)
    least = torch.maximum(COLLINEAR * variance, floor.expand_as(variance))
    scale = variance.clamp_min(1e-300).sqrt()
    left, least = moments / scale[..., :, None] / scale[..., None, :], least / scale.square()
    explained, ranks = ([torch.zeros_like(variance[..., 0]) for _ in range(2)] for _ in range(2))
    restricted = left[..., -1, -1]
    for column in range(moments.shape[-1] - 1):
        pivot = left[..., column, column]
        alive = (pivot > least[..., column]) & (variance[..., column] > 0)
        factor = left[..., column] * torch.where(alive, pivot, torch.inf).rsqrt()[..., None]
        added = int(column >= own)
        explained[added] = explained[added] + factor[..., -1].square()
        ranks[added] = ranks[added] + alive
        left = left - factor[..., :, None] * factor[..., None, :]
        restricted = restricted if added else left[..., -1, -1]
    restricted = torch.where(restricted > least[..., -1], restricted, 0.0)
    unit = scale[..., -1].square()
    return Nested(explained[1] * unit, restricted * unit, ranks[1], ranks[0])
