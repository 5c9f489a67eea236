"""Granger tests from the rows themselves: where products have lost their digits, and where each row has a variance."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_slim.statistics.orthonormal import orthonormalised
from lightning_slim.statistics.own_past import OwnPast


def from_rows(
    causes: Tensor, own: OwnPast, target: int, lags: int, robust: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Explained and residual sum of squares, rank, and the robust Wald statistic, from orthonormal columns."""
    skip = len(causes) - len(own.residual)
    basis, residual = own.basis[:, :, target].T, own.residual[:, target, None]
    past = [causes[skip - lag : len(causes) - lag] for lag in range(1, lags + 1)]
    columns, kept, _ = orthonormalised(past, basis)
    along = (columns * residual).sum(1)
    left = residual - (columns * along.unsqueeze(1)).sum(0)
    explained, rss, rank = along.square().sum(0), left.square().sum(0), kept.sum(0)
    if not robust:
        return explained, rss, rank, torch.zeros_like(rss)
    return explained, rss, rank, _hc3(columns, kept, along, left, basis, own.floor[target])


def _hc3(columns: Tensor, kept: Tensor, along: Tensor, left: Tensor, basis: Tensor, floor: Tensor) -> Tensor:
    """Wald statistic `b' V^-1 b`, which is the same in any coordinates: here the columns are orthonormal."""
    alone = 1 - basis.square().sum(1, keepdim=True) - columns.square().sum(0)  # 1 - leverage, rows series
    weight = (left / alone.clamp_min(1e-8)).square()
    # V, with the identity where a column was dropped, and never singular.
    count = len(columns)
    variance = left.new_empty(left.shape[1], count, count)
    for i in range(count):
        weighted = columns[i] * weight
        for j in range(i + 1):
            variance[:, i, j] = variance[:, j, i] = (weighted * columns[j]).sum(0)
    trace = variance.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    padding = torch.where(kept.T, floor / len(left) + 1e-15 * trace, 1.0)
    root, failed = torch.linalg.cholesky_ex(variance + torch.diag_embed(padding))
    solved = torch.linalg.solve_triangular(root, along.T.unsqueeze(-1), upper=False).squeeze(-1)
    determined = (failed == 0) & (alone.amin(0) > 1e-8)
    return torch.where(determined, solved.square().sum(1), 0.0)
