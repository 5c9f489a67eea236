"""Series made stationary: values by hand, and the false alarms that this prevents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_slim.statistics import differences, granger_test, over_rolling_rms


def by_hand(values: list[float], span: int) -> list[float]:
    mean = sum(value**2 for value in values[:span]) / min(span, len(values))
    result = []
    for value in values:
        result.append(value / mean**0.5)
        mean += (value**2 - mean) / span
    return result


def test_differences_are_numpys_in_float64() -> None:
    series = torch.randn(20, 3)
    assert torch.equal(differences(series), torch.from_numpy(np.diff(series.double().numpy(), axis=0)))


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("span", [1, 4, 100])
def test_rolling_rms_equals_the_recursion_by_hand(span: int, scale: float) -> None:
    series = torch.randn(30, 2, dtype=torch.float64)
    expected = np.column_stack([by_hand(column.tolist(), span) for column in series.T])
    np.testing.assert_allclose(over_rolling_rms(series * scale, span), expected, rtol=1e-9)


def test_the_future_does_not_change_the_past() -> None:
    series = torch.randn(60, dtype=torch.float64)
    series[0] = 3.0  # the largest in both
    changed = series.clone()
    changed[40:] = 0.0
    np.testing.assert_allclose(over_rolling_rms(changed, 8)[:40], over_rolling_rms(series, 8)[:40], rtol=1e-12)


def test_dead_series_stay_zero_and_a_late_start_is_finite() -> None:
    series = torch.zeros(50, 2)
    series[45:, 1] = 1.0
    result = over_rolling_rms(series, 4)
    assert not result[:, 0].any()
    assert result.isfinite().all()


def test_unusable_input_is_refused() -> None:
    with pytest.raises(ValueError, match="differences need at least 2 steps, got 1"):
        differences(torch.zeros(1))
    with pytest.raises(ValueError, match="expected a span of at least 1 step, got 0"):
        over_rolling_rms(torch.zeros(5), span=0)


def trending(steps: int = 512) -> tuple[Tensor, Tensor]:
    """Independent noise around trends that look alike, as while a network trains."""
    t = torch.arange(steps, dtype=torch.float64)[:, None]
    rates = steps * (0.1 + 0.3 * torch.rand(1, 200, dtype=torch.float64))
    return 5 * torch.exp(-t / rates) + torch.randn(steps, 200), 5 * torch.exp(-t / (0.2 * steps)) + torch.randn(
        steps, 20
    )


def test_differences_prevent_the_false_alarms_of_shared_trends() -> None:
    series, targets = trending()
    raw = granger_test(series, targets, 2)
    made_fit = granger_test(differences(series), differences(targets), 2, own_lags=8, robust="hc3")
    assert (raw.p < 0.05).double().mean() > 0.9
    assert 0.03 < (made_fit.p < 0.05).double().mean() < 0.07
