"""Sums of products of lagged series, from few passes over them.

The sum of `x[t-a] y[t-b]` over a window of `t` depends on `b - a` up to the edges of the window: going from `(a, b)` to
`(a + 1, b + 1)` moves it by one step, which takes one product in and one out.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class Shifted:
    """Targets, shifted by every difference of lags, ready to be multiplied with any series.

    Rows are `t = skip ... time - 1`, series have lags `a = 1 ... lags`, targets `b = 0 ... own_lags`; `skip` is not
    less than either. One matrix product with `lags + own_lags` columns for each target does the work of
    `lags * (own_lags + 1)`.

    Memory: `8 * time * targets * (lags + own_lags)` bytes.
    """

    def __init__(self, targets: Float[Tensor, "time targets"], lags: int, own_lags: int, skip: int) -> None:
        time = len(targets)
        self.targets, self.lags, self.own_lags, self.skip = targets, lags, own_lags, skip
        differences = range(-lags, own_lags)
        # The least lags (a, b) with each difference b - a.
        self.start = [(1, 1 + difference) if difference >= 0 else (-difference, 0) for difference in differences]
        shifted = targets.new_zeros(targets.shape[1], len(self.start), time)
        for i, (a, b) in enumerate(self.start):
            shifted[:, i, skip - a : time - a] = targets[skip - b : time - b].T
        self.matrix = shifted.flatten(0, 1)

    def products(self, series: Float[Tensor, "time series"]) -> Float[Tensor, "targets own_lags2 lags series"]:
        """Sum over rows of `series[t - a] targets[t - b]` at `[target, b, a - 1, series]`.

        The last `b` stands for a constant in the target's place.
        """
        time, count = series.shape
        result = series.new_empty(self.targets.shape[1], self.own_lags + 2, self.lags, count)
        first = (self.matrix @ series).view(-1, len(self.start), count)
        for i, (a, b) in enumerate(self.start):
            value = first[:, i]
            result[:, b, a - 1] = value
            while a < self.lags and b < self.own_lags:
                a, b = a + 1, b + 1
                gained, lost = (self.targets[start - b, :, None] for start in (self.skip, time))
                value = torch.addcmul(value, gained, series[self.skip - a])
                value.addcmul_(lost, series[time - a], value=-1)
                result[:, b, a - 1] = value
        total = series[self.skip - 1 : time - 1].sum(0)
        for a in range(1, self.lags + 1):
            result[:, -1, a - 1] = total
            total = total + series[self.skip - a - 1] - series[time - a - 1]
        return result


def own_products(series: Float[Tensor, "time series"], lags: int, skip: int) -> Float[Tensor, "lags lags series"]:
    """Sum over rows `t = skip ... time - 1` of `series[t - a] series[t - b]` at `[a - 1, b - 1, series]`."""
    time, count = series.shape
    result = series.new_empty(lags, lags, count)
    for difference in range(lags):
        earlier = series[skip - 1 - difference : time - 1 - difference]
        value = torch.linalg.vecdot(series[skip - 1 : time - 1], earlier, dim=0)
        result[difference, 0] = result[0, difference] = value
        for a in range(2, lags - difference + 1):
            b = a + difference
            value = value + series[skip - a] * series[skip - b] - series[time - a] * series[time - b]
            result[b - 1, a - 1] = result[a - 1, b - 1] = value
    return result
