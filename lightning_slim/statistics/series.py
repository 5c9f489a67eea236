"""Time series: lags."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def with_lags(series: Float[Tensor, "items steps units"], lags: int) -> Float[Tensor, "rows units columns"]:
    """Present and past of every unit, one row for each step that has a whole past within its item.

    Column 0 is the present, column `a` the value `a` steps earlier. Lags never cross from one item to the next.

    Raises:
        ValueError: the series are too short.

    Example:
        >>> with_lags(torch.tensor([[[1.0], [2.0], [3.0]]]), lags=1).squeeze(1).tolist()
        [[2.0, 1.0], [3.0, 2.0]]
    """
    steps = series.shape[1]
    if steps <= lags:
        raise ValueError(
            f"{lags} lags need at least {lags + 1} steps, got {steps}: record longer series or lower `lags`."
        )
    columns = [series[:, lags - lag : steps - lag] for lag in range(lags + 1)]
    return torch.stack(columns, dim=-1).flatten(0, 1)


def thinned(rows: Float[Tensor, "rows *columns"], enough: int) -> Float[Tensor, "fewer *columns"]:
    """At most so many rows, evenly spread.

    The step between them shares no factor with their number, so that none of the sizes that rows are made of (images,
    lines, pixels) comes round with it: of images 32 wide, a step of 16 would see two columns only.

    Example:
        >>> thinned(torch.arange(8.0), enough=4).tolist()
        [0.0, 3.0, 6.0]
    """
    step = -(-len(rows) // enough)
    while step > 1 and math.gcd(step, len(rows)) > 1:
        step += 1
    return rows[::step]
