"""How evenly the norms of units are spread."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.penalties.base import Penalty


@dataclass(frozen=True)
class HoyerSquare(Penalty):
    """`(sum |w_unit|)^2 / sum |w_unit|^2` over the units of a group (Yang et al., 2020, group form).

    Between 1 (one unit is left) and the number of units (all have the same norm), whatever their scale: large units are
    not pulled down, small ones are.
    """

    def value(self, rows: Float[Tensor, "units fan"]) -> Float[Tensor, ""]:
        norms = rows.norm(dim=1)
        spread: Tensor = norms.sum() ** 2 / (norms**2).sum()
        return spread.nan_to_num(nan=0.0)

    def gradient(self, rows: Float[Tensor, "units fan"]) -> Float[Tensor, "units fan"]:
        norms = rows.norm(dim=1, keepdim=True)
        ratio = norms.sum() / (norms**2).sum()
        return torch.where(norms > 0, 2 * ratio * (rows / norms) - 2 * ratio**2 * rows, 0.0)
