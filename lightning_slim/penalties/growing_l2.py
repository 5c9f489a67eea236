"""Squares of the units that matter least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.arguments import check_fields
from lightning_slim.penalties.base import Penalty


@dataclass(frozen=True)
class GrowingL2(Penalty):
    """`sum |w_unit|^2 / 2` over the units of a group with the smallest norms (after Wang et al., 2021, GReg-1).

    It grows with the callback's schedule. GReg-1 chooses the units once, by the norm of the weights that make them;
    here they are chosen at every step, by the norm of all their entries: those that are pulled stay the smallest.

    Attributes:
        fraction: share of the group's units that is pulled, of those that are there; rounded down.
    """

    fraction: float = 0.5

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.fraction < 1:
            raise ValueError(f"Expected `fraction` between 0 and 1, got {self.fraction}.")

    def value(self, rows: Float[Tensor, "units fan"]) -> Float[Tensor, ""]:
        return (rows[self._least(rows)] ** 2).sum() / 2

    def gradient(self, rows: Float[Tensor, "units fan"]) -> Float[Tensor, "units fan"]:
        least = self._least(rows)
        return torch.zeros_like(rows).index_copy(0, least, rows[least])

    def _least(self, rows: Float[Tensor, "units fan"]) -> Tensor:
        order: Tensor = rows.detach().norm(dim=1).argsort(stable=True)
        return order[: int(self.fraction * len(rows))]
