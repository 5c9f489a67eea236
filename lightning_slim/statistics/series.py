"""Time series: what can be tested, common units, lags."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

DEAD = 1e-13  # of a series' largest value: a smaller spread is rounding
LARGEST = 1e300  # squared units of a target, so that no sum of squares is infinite


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


def thinned(rows: Shaped[Tensor, "rows *columns"], enough: int) -> Shaped[Tensor, "fewer *columns"]:
    """At most `enough` rows, from everywhere.

    Rows come in the order of items and pixels: every n-th, where n shares a factor with the width of an image, is of
    some of its columns only. So the step is coprime to the number of rows, and near its golden section.

    Example:
        >>> thinned(torch.arange(8.0), enough=4).tolist()
        [0.0, 5.0, 2.0, 7.0]
    """
    number = len(rows)
    if number <= enough:
        return rows
    step = round(0.618 * number)
    while math.gcd(step, number) > 1:
        step += 1
    return rows[torch.arange(enough, device=rows.device) * step % number]


def as_series(values: Float[Tensor, "time *series"]) -> Float[Tensor, "time series"]:
    """One column for each series; a tensor of one dimension is one series.

    Raises:
        ValueError: more dimensions, or none.
    """
    if values.ndim not in (1, 2):
        raise ValueError(
            f"expected series of shape (time, series), or (time,) of a single one, got shape {tuple(values.shape)}: "
            "`flatten(1)` makes series of what stands behind time."
        )
    return values if values.ndim == 2 else values[:, None]


def check_series(series: Tensor, targets: Tensor, lags: int, own_lags: int) -> None:
    """Refuses what no regression on the past can be made of."""
    time = len(series)
    if len(targets) != time:
        raise ValueError(f"series and targets need as many steps, got {time} and {len(targets)}: record them together.")
    if lags < 1 or own_lags < 1:
        raise ValueError(f"expected at least 1 lag of each, got lags={lags} and own_lags={own_lags}.")
    least = max(lags, own_lags) + lags + own_lags + 2
    if time < least:
        raise ValueError(
            f"{lags} lags and {own_lags} own lags need at least {least} steps, got {time}: "
            "record longer series or lower `lags`."
        )
    for name, values in (("series", series), ("targets", targets)):
        if values.numel() and not bool(torch.stack([values.amin(), values.amax()]).isfinite().all()):
            finite = values.isfinite().all(0)
            first = int((~finite).nonzero()[0])
            raise ValueError(
                f"expected finite values, got NaN or infinity in {int((~finite).sum())} of {len(finite)} {name}, "
                f"first in number {first}: drop these or the steps where they occur."
            )


def standardised(values: Float[Tensor, "time series"]) -> tuple[Float[Tensor, "time series"], Float[Tensor, "series"]]:
    """Centred and divided by half their range, in float64, and that; zero and 1 for a dead series."""
    low, high = values.amin(0).double(), values.amax(0).double()
    centre, spread = low / 2 + high / 2, high / 2 - low / 2  # halved first: the range of the largest values is finite
    alive = spread > DEAD * torch.maximum(low.abs(), high.abs())
    result = values.to(torch.float64, copy=True)
    result -= centre
    result /= torch.where(alive, spread, torch.inf)
    result -= result.mean(0)
    return result, torch.where(alive, spread, 1.0)
