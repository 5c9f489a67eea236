"""What the own past of targets says about them, made ready for what the past of many series may add."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_slim.statistics.orthonormal import orthonormalised, without
from lightning_slim.statistics.series import standardised

PERFECT = 1e-24  # of a target's sum of squares: a smaller residual is rounding


class OwnPast(NamedTuple):
    """What the own past of some targets says about them."""

    targets: Tensor  # time targets, standardised
    scale: Tensor  # targets
    basis: Tensor  # own_lags1 rows targets, orthonormal: the constant and the past
    residual: Tensor  # rows targets
    rss: Tensor  # targets, of the standardised ones
    floor: Tensor  # targets: a smaller residual sum of squares is rounding
    df: Tensor  # targets, columns of the regression
    transform: Tensor  # targets own_lags2 own_lags2: products to those with basis and residual
    certainty: Tensor  # targets, at most 1: share of digits that the transform keeps


def own_past(values: Tensor, own_lags: int, skip: int) -> OwnPast:
    """Regresses targets on a constant and their past, once for all series; rows begin at step `skip`."""
    targets, scale = standardised(values)
    count = targets.shape[1]
    past = [targets[skip - b : len(targets) - b] for b in range(own_lags + 1)]
    columns = [torch.ones_like(past[0]), *past[1:]]
    basis, kept, left = orthonormalised(columns)
    residual = without(past[0], basis)
    rss, floor = residual.square().sum(0), PERFECT * past[0].square().sum(0)
    rss = torch.where(rss > floor, rss, 0.0)

    # Z = basis R, so basis = Z R^-1 and residual = y - Z R^-1 (basis' y).
    triangle = torch.einsum("irk,jrk->kij", basis, torch.stack(columns)).triu()
    triangle = triangle + torch.diag_embed((~kept).T.to(triangle.dtype))
    transform = triangle.new_zeros(count, own_lags + 2, own_lags + 2)
    identity = torch.eye(own_lags + 1, dtype=triangle.dtype, device=triangle.device).expand(count, -1, -1)
    inverse = torch.linalg.solve_triangular(triangle, identity, upper=True)
    transform[:, :-1, :-1] = inverse
    along = (basis * past[0]).sum(1).T.unsqueeze(-1)
    transform[:, :-1, -1] = -(inverse @ along).squeeze(-1)
    transform[:, -1, -1] = 1
    # The products come with the target's lags 0, 1, ... and the constant, the columns with the constant, lags 1, ...
    order = [own_lags + 1, *range(1, own_lags + 1), 0]
    transform = transform.mT[..., order].contiguous()
    certainty = torch.minimum(left.amin(0), (rss / past[0].square().sum(0).clamp_min(1e-300)).sqrt())
    return OwnPast(targets, scale, basis, residual, rss, floor, kept.sum(0), transform, certainty)
