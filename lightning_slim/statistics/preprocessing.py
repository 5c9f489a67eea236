"""Series made fit for a test of causality: without a trend they share, and with a variance that stays."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def differences(series: Float[Tensor, "time *series"]) -> Float[Tensor, "time1 *series"]:
    """Steps from each value to the next, in float64: one step fewer, and neither a level nor a trend.

    Two series that both fall while a network trains look as if one caused the other; their differences do not. Take
    more own lags than lags with them (`own_lags=2 * lags + 4`), as differencing leaves a moving average.

    Raises:
        ValueError: fewer than 2 steps.

    Example:
        >>> differences(torch.tensor([1.0, 4.0, 6.0])).tolist()
        [3.0, 2.0]
    """
    if len(series) < 2:
        raise ValueError(f"differences need at least 2 steps, got {len(series)}: record longer series.")
    return series.double().diff(dim=0)


def over_rolling_rms(series: Float[Tensor, "time *series"], span: int = 32) -> Float[Tensor, "time *series"]:
    """Values over the root mean square of those before them, so that a variance that decays does so no more.

    `s_t = v_t / sqrt(m_t)`, with `m_(t+1) = m_t + (v_t^2 - m_t) / span` and `m_0` the mean square of the first `span`
    values: an exponential average of the past alone. (A filter that looks ahead would let the future into the past.)

    Args:
        series: usually `differences`.
        span: steps of the average.

    Returns:
        float64; zero where a series is, and has been, zero.

    Raises:
        ValueError: `span` is less than 1.

    Example:
        >>> over_rolling_rms(torch.tensor([2.0, -2.0, 4.0]), span=2).tolist()
        [1.0, -1.0, 2.0]
    """
    if span < 1:
        raise ValueError(f"expected a span of at least 1 step, got {span}.")
    values = series.double()
    scale = values.abs().amax(0, keepdim=True).clamp_min(1e-300) if len(values) else values
    values = values / scale  # squares of huge and tiny values stay in range
    mean_square = values[:span].square().mean(0)
    result = torch.empty_like(values)
    for step, value in enumerate(values):
        root = mean_square.sqrt()
        result[step] = torch.where(root > 0, value / root.clamp_min(1e-150), 0.0)
        mean_square = mean_square + (value.square() - mean_square) / span
    return result
