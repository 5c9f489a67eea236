"""What a regression loses without each of its units, from its moments alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.statistics.granger import Regression, of_unit_variance


def leave_one_out(regressions: Sequence[Regression], units: int) -> Float[Tensor, "units"]:
    """Share of the targets' variance that is explained with each unit and not without it, all others there.

    With `S` the covariance of the units and `M = (S + jitter I)^-1`, `b = M c`, leaving out unit `i` adds exactly
    `b_i' M_ii^-1 b_i` to what is unexplained. Copies make one another useless: to choose what stays, take
    `forward_selection`.

    Source: Geweke (1984).

    Args:
        regressions: at least one; their columns are blocks of equal width, unit by unit. The shares are averaged.
        units: number of units.
    """
    return torch.stack([_shares(regression, units) for regression in regressions]).mean(0)


def _shares(regression: Regression, units: int) -> Float[Tensor, "units"]:
    gram, cross = of_unit_variance(regression)
    width = len(gram) // units
    inverse = torch.linalg.inv(gram)
    coefficients = (inverse @ cross).view(units, width, -1)
    blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    lost = (coefficients * torch.linalg.solve(blocks, coefficients)).sum((1, 2)).clamp_min(0)
    shares: Tensor = lost / max(regression.variance, 1e-300)
    return shares.cpu()
