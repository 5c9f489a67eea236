"""Conditional Granger causality, greedily: which units, together, best predict what is computed from them.

A unit that Granger-causes a target on its own is often one of many copies, and a leave-one-out test calls every copy
useless. Forward selection conditions each candidate on those that were already chosen, so one copy is taken and the
others are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

JITTER = 1e-6  # on the unit diagonal: dead and collinear columns stay harmless


class Regression(NamedTuple):
    """Second moments of a regression of some targets on all units' present and past.

    Attributes:
        gram: covariance of the regressors; the columns of unit `u` are `u * width ... u * width + width - 1`.
        cross: covariance of the regressors with the targets.
        variance: total variance of the targets, to which the gains are relative.
    """

    gram: Float[Tensor, "columns columns"]
    cross: Float[Tensor, "columns targets"]
    variance: float


class ForwardSelection(NamedTuple):
    """Units in the order in which they are chosen.

    Attributes:
        order: unit numbers, most useful first.
        gains: share of the targets' variance that each adds to what those before it explain; never negative.
    """

    order: Int[Tensor, "chosen"]
    gains: Float[Tensor, "chosen"]


def forward_selection(regressions: Sequence[Regression], units: int, keep: int | None = None) -> ForwardSelection:
    """Greedy conditional Granger selection over one or several regressions on the same units.

    Each step takes the unit whose present and past add most to the explained variance of the targets, given all units
    chosen before: `gain_i = ||L_i^-1 c_i||^2`, with `L_i L_i'` the unit's covariance and `c_i` its covariance with the
    targets, both conditional on the chosen. Gains of several regressions (several readers of the same units) are
    averaged. Columns are of unit variance, to which 1e-6 is added: gains are those of a ridge regression with that
    penalty. A lazy block-pivoted Cholesky factorisation updates only what the next choice needs:
    `O(units keep^2 width^3)`, in float64.

    Sources: Granger (1969); Geweke (1984) for the conditional form; Fine and Scheinberg (2001) for the factorisation.

    Args:
        regressions: at least one; their columns are blocks of equal width, unit by unit.
        units: number of units.
        keep: number of units that are chosen; all of them unless given.

    Returns:
        The order of the chosen units and their gains. A dead unit gains 0.

    Raises:
        ValueError: `keep` is not between 0 and `units`.
    """
    keep = units if keep is None else keep
    if not 0 <= keep <= units:
        raise ValueError(f"expected to keep 0 to {units} units, got {keep}.")
    single = len(regressions[0].gram) == units and regressions[0].gram.device.type == "cpu"
    states = [(_Scalars if single else _Blocks)(regression, units, keep) for regression in regressions]
    order: list[int] = []
    gains: list[float] = []
    taken = np.zeros(units, dtype=bool)
    for _ in range(keep):
        gain = np.maximum(sum(state.gains() for state in states) / len(states), 0.0)
        gain[taken] = -1.0
        best = int(gain.argmax())
        taken[best] = True
        order.append(best)
        gains.append(float(gain[best]))
        for state in states:
            state.choose(best)
    return ForwardSelection(torch.tensor(order, dtype=torch.int64), torch.tensor(gains, dtype=torch.float64))


class _Scalars:
    """A pivoted Cholesky factorisation under way, of one column a unit: what is known of each, given those chosen.

    Vectors are numpy's, whose calls take a fifth of the time of torch's; matrices are changed by torch.
    """

    def __init__(self, regression: Regression, units: int, keep: int) -> None:
        gram, self.cross = of_unit_variance(regression)
        self.gram = gram.numpy()
        self.left = gram.diagonal().clone().numpy()  # variance of each unit, given the chosen
        self.scale = 1 / max(regression.variance, 1e-300)
        self.factor = np.zeros((keep, units))
        self.chosen = 0

    def gains(self) -> Float[np.ndarray, "units"]:
        squares = torch.linalg.vecdot(self.cross, self.cross).numpy()
        gains = np.zeros_like(self.left)
        np.divide(squares * self.scale, self.left, out=gains, where=self.left > 0)
        return gains

    def choose(self, unit: int) -> None:
        """Conditions every unit on `unit` as well."""
        known, root = self.factor[: self.chosen], math.sqrt(max(self.left[unit], 0.0)) or math.inf
        new = self.factor[self.chosen] = (self.gram[unit] - known[:, unit] @ known) / root
        self.chosen += 1
        self.cross.addr_(torch.from_numpy(new), self.cross[unit] / root, alpha=-1)
        self.left -= new * new
        self.left[unit] = 1.0


class _Blocks:
    """The same, of any number of columns a unit, on any device."""

    def __init__(self, regression: Regression, units: int, keep: int) -> None:
        self.gram, cross = of_unit_variance(regression)
        self.width = len(self.gram) // units
        blocks = self.gram.view(units, self.width, units, self.width)
        self.block = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()  # units width width
        self.cross = cross.view(units, self.width, -1)  # units width targets
        self.variance = max(regression.variance, 1e-300)
        self.factor = self.gram.new_zeros(len(self.gram), keep * self.width)
        self.chosen = 0

    def gains(self) -> Float[np.ndarray, "units"]:
        self.root = torch.linalg.cholesky_ex(self.block).L
        self.solved = torch.linalg.solve_triangular(self.root, self.cross, upper=False)
        explained: Tensor = self.solved.square().sum((1, 2)).nan_to_num(0.0) / self.variance
        return explained.cpu().numpy()

    def choose(self, unit: int) -> None:
        """Conditions every unit on `unit` as well."""
        width, at = self.width, slice(unit * self.width, (unit + 1) * self.width)
        known = self.factor[:, : self.chosen]
        column = self.gram[:, at] - known @ known[at].T
        new = torch.linalg.solve_triangular(self.root[unit], column.T, upper=False).T
        self.factor[:, self.chosen : self.chosen + width] = new
        self.chosen += width
        blocks = new.view(-1, width, width)
        self.cross -= blocks @ self.solved[unit]
        self.block -= blocks @ blocks.mT
        self.block[unit] = torch.eye(width, dtype=self.block.dtype, device=self.block.device)


def of_unit_variance(
    regression: Regression,
) -> tuple[Float[Tensor, "columns columns"], Float[Tensor, "columns targets"]]:
    """Covariances of regressors of unit variance, so that the scale of a unit decides nothing, with the jitter.

    A dead column stands alone.
    """
    gram = regression.gram.double()
    spread = gram.diagonal().clamp_min(0).sqrt()
    scale = torch.where(spread > 1e-12 * spread.max(), 1 / spread.clamp_min(1e-300), 0.0)
    gram = (gram * scale).mul_(scale[:, None])
    gram.diagonal().add_(JITTER)
    return gram, regression.cross.double() * scale[:, None]
