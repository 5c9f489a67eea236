"""Absolute values, entry by entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lightning_slim.penalties.base import Entries, Proximal


@dataclass(frozen=True)
class L1(Proximal):
    """`sum |w|` over the entries that make or carry each unit (Tibshirani, 1996).

    What reads a unit is what makes others, so each entry counts once. Single entries go to zero before units do.
    """

    of: ClassVar[Entries] = "made"

    def value(self, rows: Float[Tensor, "units fan"]) -> Float[Tensor, ""]:
        return rows.abs().sum()

    def gradient(self, rows: Float[Tensor, "units fan"]) -> Float[Tensor, "units fan"]:
        return rows.sign()

    def shrinkage(self, rows: Float[Tensor, "units fan"], threshold: float) -> Float[Tensor, "units fan"]:
        return ((rows.abs() - threshold) / rows.abs()).nan_to_num(nan=0.0, neginf=0.0).clamp(min=0)
