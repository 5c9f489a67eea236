"""Norms of whole units."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lightning_slim.penalties.base import Proximal


@dataclass(frozen=True)
class GroupLasso(Proximal):
    """`sqrt(fan) * sum |w_unit|` over all entries of a unit, in every tensor that is coupled (Yuan and Lin, 2006).

    These are the dependency groups of Fang et al. (2023): a unit at zero is zero in all layers that make, carry or read
    it. The root of the fan pulls as hard at an entry of a wide group as of a narrow one: about 1 each, as `L1` does.
    """

    def value(self, rows: Float[Tensor, "units fan"]) -> Float[Tensor, ""]:
        total: Tensor = rows.norm(dim=1).sum()
        return math.sqrt(rows.shape[1]) * total

    def gradient(self, rows: Float[Tensor, "units fan"]) -> Float[Tensor, "units fan"]:
        norms: Tensor = rows.norm(dim=1, keepdim=True)
        return math.sqrt(rows.shape[1]) * (rows / norms).where(norms > 0, 0.0)

    def shrinkage(self, rows: Float[Tensor, "units fan"], threshold: float) -> Float[Tensor, "units fan"]:
        norms: Tensor = rows.norm(dim=1, keepdim=True)
        left = norms - threshold * math.sqrt(rows.shape[1])
        return (left / norms).where(left > 0, 0.0).expand_as(rows)
