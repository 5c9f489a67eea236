"""Least squares of some columns on others, from their moments alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.statistics.moments import Moments


class Image(NamedTuple):
    """The least-squares image of removed columns in kept ones: `removed ~ constant + kept @ weight`."""

    weight: Float[Tensor, "kept removed"]
    constant: Float[Tensor, "removed"]


def least_squares_image(
    moments: Moments,
    kept: Int[Tensor, "kept"],
    removed: Int[Tensor, "removed"],
    ridge: float = 1e-3,
    intercept: bool = True,
) -> Image:
    """Regresses removed columns on kept ones.

    `weight = (S_kk + ridge * mean(diag S) I)^-1 S_kr`, `constant = mu_r - weight' mu_k`. Exact, up to the ridge, where
    a removed column is a linear combination of kept ones.

    Args:
        moments: of all columns.
        kept: columns that stay.
        removed: columns that go.
        ridge: relative to the mean variance.
        intercept: without it the raw second moments are used and `constant` is zero (for a reader that has no place
            for a constant).

    Returns:
        float64 tensors.
    """
    gram = moments.covariance if intercept else moments.covariance + torch.outer(moments.mean, moments.mean)
    kept, removed = kept.to(gram.device), removed.to(gram.device)
    damping = ridge * gram.diagonal().mean().clamp_min(1e-300)
    normal = gram[kept][:, kept] + damping * torch.eye(len(kept), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(normal, gram[kept][:, removed])
    if not intercept:
        return Image(weight, gram.new_zeros(len(removed)))
    return Image(weight, moments.mean[removed] - weight.T @ moments.mean[kept])
