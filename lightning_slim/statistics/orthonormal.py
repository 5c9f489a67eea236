"""Gram-Schmidt that reveals rank, for many small sets of columns at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

RANK_TOLERANCE = 1e-9  # of a column's norm: what the columns before it leave of it, or it adds nothing


def orthonormalised(
    columns: Sequence[Float[Tensor, "rows sets"]], basis: Float[Tensor, "rows known"] | None = None
) -> tuple[Float[Tensor, "columns rows sets"], Bool[Tensor, "columns sets"], Float[Tensor, "columns sets"]]:
    """Orthonormal columns that span, set by set, what `columns` add to `basis`.

    Each column is made orthogonal to all before it twice, which is enough for orthogonality to rounding (Giraud et al.,
    2005); one of which less than 1e-9 is left is dropped, so that no direction of noise enters.

    Args:
        columns: one tensor for each column; its columns are those of the sets.
        basis: orthonormal columns that all sets have in common.

    Returns:
        The columns (a dropped one is zero), whether each is kept, and the share of its norm that was left.
    """
    rows, sets = columns[0].shape
    result = columns[0].new_zeros(len(columns), rows, sets)
    kept = torch.zeros(len(columns), sets, dtype=torch.bool, device=result.device)
    left = result.new_zeros(len(columns), sets)
    for i, column in enumerate(columns):
        residual = without(column, result[:i], basis)
        norm, before = torch.linalg.vector_norm(residual, dim=0), torch.linalg.vector_norm(column, dim=0)
        left[i] = norm / before.clamp_min(1e-300)
        kept[i] = left[i] > RANK_TOLERANCE
        torch.mul(residual, torch.where(kept[i], 1 / norm.clamp_min(1e-300), 0.0), out=result[i])
    return result, kept, left


def without(
    column: Float[Tensor, "rows sets"],
    directions: Float[Tensor, "known_of_each rows sets"],
    basis: Float[Tensor, "rows known"] | None = None,
) -> Float[Tensor, "rows sets"]:
    """What is left of one column of each set without its orthonormal directions and the common basis."""
    for _ in range(2):
        if basis is not None:
            column = column - basis @ (basis.T @ column)
        along = (directions * column).sum(1, keepdim=True)
        column = column - (directions * along).sum(0)
    return column
