"""Conditional Granger causality, greedily from the other end: which unit is missed least, given those that are left?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.statistics.granger import JITTER, Regression


class BackwardElimination(NamedTuple):
    """Units in the order in which they go.

    Attributes:
        order: unit numbers, least useful first; those that are kept are not among them.
        losses: share of the targets' variance that each takes along; never negative.
    """

    order: Int[Tensor, "removed"]
    losses: Float[Tensor, "removed"]


@torch.no_grad()
def backward_elimination(regressions: Sequence[Regression], units: int, keep: int = 1) -> BackwardElimination:
    """Removes one unit after another, each time the one whose loss is least.

    With `M` the inverse of the Gram matrix of the units that are left and `b` the coefficients, unit `i` takes
    `b_i' M_ii^-1 b_i` of the explained variance along; `M` and `b` are then updated by its block. Losses of several
    regressions are averaged. Of several copies all but one go first, where leave-one-out tests would let all go; where
    less than 1e-6 of a column is left by others, 1e-6 is added to the unit diagonal, and losses are those of a ridge.

    Costs `O(removed * (units * width)^2 * width)`, in float64, and `8 * 2 * (units * width)^2` bytes for each
    regression. `forward_selection` is much faster where few units stay, and as good.

    Args:
        regressions: at least one; their columns are blocks of equal width, unit by unit.
        units: number of units.
        keep: number of units that are left at the end.

    Returns:
        The removed units and their losses. A dead unit goes first, at no loss.

    Raises:
        ValueError: `keep` is not between 0 and `units`.

    Example:
        >>> regression = Regression(torch.eye(3), torch.tensor([[3.0], [0.0], [1.0]]), 10.0)
        >>> [part.tolist() for part in backward_elimination([regression], 3)]
        [[1, 2], [0.0, 0.1]]
    """
    if not 0 <= keep <= units:
        raise ValueError(f"expected to keep 0 to {units} units, got {keep}.")
    states = [_Inverse(regression, units) for regression in regressions]
    order: list[int] = []
    losses: list[Tensor] = []
    left = torch.ones(units, dtype=torch.bool, device=states[0].inverse.device)
    for _ in range(units - keep):
        loss = torch.stack([state.losses() for state in states]).mean(0).clamp_min(0)
        least = int(torch.where(left, loss, torch.inf).argmin())
        left[least] = False
        order.append(least)
        losses.append(loss[least])
        for state in states:
            state.remove(least)
    removed = torch.tensor(order, dtype=torch.int64)
    return BackwardElimination(removed, torch.stack(losses).cpu() if losses else torch.zeros(0, dtype=torch.float64))


class _Inverse:
    """The inverse Gram matrix and the coefficients of the units that are left; zero at those that are not."""

    def __init__(self, regression: Regression, units: int) -> None:
        gram = regression.gram.double()
        self.units, self.width = units, gram.shape[0] // units
        # Of unit diagonal, so that the scale of a unit decides nothing; a dead column stands alone.
        spread = gram.diagonal().clamp_min(0).sqrt()
        alive = spread > 1e-12 * spread.max()
        scale = torch.where(alive, 1 / spread.clamp_min(1e-300), 0.0)
        gram = gram * scale[:, None] * scale + torch.diag((~alive).double())
        root, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed) or bool(root.diagonal().square().min() < JITTER):
            root = torch.linalg.cholesky(gram + JITTER * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        self.inverse = torch.cholesky_inverse(root)
        self.coefficients = self.inverse @ (regression.cross.double() * scale[:, None])
        self.variance = max(regression.variance, 1e-300)

    def losses(self) -> Float[Tensor, "units"]:
        blocks = self.inverse.view(self.units, self.width, self.units, self.width)
        blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        root = torch.linalg.cholesky_ex(blocks).L
        known = self.coefficients.view(self.units, self.width, -1)
        solved = torch.linalg.solve_triangular(root, known, upper=False)
        explained: Tensor = solved.square().sum((1, 2)).nan_to_num(0.0, 0.0)
        return explained / self.variance

    def remove(self, unit: int) -> None:
        """Makes the inverse that of the Gram matrix without the unit."""
        at = slice(unit * self.width, (unit + 1) * self.width)
        columns = self.inverse[:, at].clone()
        scaled = torch.linalg.solve(columns[at], columns.T).T
        self.coefficients -= scaled @ self.coefficients[at]
        self.inverse.addmm_(scaled, columns.T, alpha=-1)
        self.inverse[at], self.inverse[:, at], self.coefficients[at] = 0.0, 0.0, 0.0
        self.inverse[at, at].fill_diagonal_(1.0)
