"""Orders equal those of statsmodels' BIC, summed over the layer; reports equal its tests."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from statsmodels.tsa.stattools import adfuller, kpss

from lightning_slim.statistics import common_lag_order, stationarity


def test_bic_equals_statsmodels_on_the_same_rows() -> None:
    series, targets = torch.randn(150, 4, dtype=torch.float64), torch.randn(150, 2, dtype=torch.float64)
    targets[3:] += 0.4 * series[:-3, :2] + 0.3 * targets[1:-2]
    order = common_lag_order(series, targets, max_lags=6)
    expected = []
    for lags in range(1, 7):
        bics = []
        for target in targets.T:
            for cause in series.T:
                past = [v[6 - lag : 150 - lag].numpy() for v in (target, cause) for lag in range(1, lags + 1)]
                bics.append(sm.OLS(target[6:].numpy(), sm.add_constant(np.column_stack(past))).fit().bic)
        expected.append(np.mean(bics))
    np.testing.assert_allclose(order.bic, expected, rtol=1e-10)
    assert order.lags == 1 + int(np.argmin(expected))


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_the_lag_of_the_cause_is_found(lag: int) -> None:
    series = torch.randn(600, 3, dtype=torch.float64)
    targets = torch.randn(600, 2, dtype=torch.float64)
    targets[lag:] += series[:-lag, :2] + series[:-lag, 2:]
    assert common_lag_order(series, targets, max_lags=6).lags == lag


def test_dead_units_and_targets_do_not_matter_and_too_few_steps_are_refused() -> None:
    series, targets = torch.randn(300, 3, dtype=torch.float64), torch.randn(300, 1, dtype=torch.float64)
    plain = common_lag_order(series, targets, 4)
    dead = common_lag_order(series, torch.cat([targets, torch.zeros(300, 1)], 1), 4)
    np.testing.assert_allclose(dead.bic, plain.bic, rtol=1e-12)
    assert common_lag_order(torch.zeros(300, 2), torch.zeros(300, 1), 4).bic.isfinite().all()
    with pytest.raises(ValueError, match="6 lags and 6 own lags need at least 20 steps, got 15"):
        common_lag_order(series[:15], targets[:15], 6)
    with pytest.raises(ValueError, match="expected at least 1 lag, got max_lags=0"):
        common_lag_order(series, targets, 0)


def test_the_report_is_that_of_statsmodels() -> None:
    series = torch.stack([torch.randn(200).double(), torch.randn(200).double().cumsum(0) * 1e6 + 1e7], 1)
    report = stationarity(series)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, values in enumerate(series.T.numpy()):
            np.testing.assert_allclose([report.adf[i], report.adf_p[i]], adfuller(values)[:2], rtol=1e-5)
            np.testing.assert_allclose([report.kpss[i], report.kpss_p[i]], kpss(values, nlags="auto")[:2], rtol=1e-7)


def test_series_without_a_report_have_statistic_0_and_p_1() -> None:
    report = stationarity(torch.stack([torch.zeros(50), torch.full((50,), 0.1), torch.arange(50.0)], 1))
    assert torch.stack(list(report)).isfinite().all()
    for part, value in zip(report, (0.0, 1.0, 0.0, 1.0), strict=True):
        assert part[:2].tolist() == [value, value]
    assert stationarity(torch.zeros(30, 0)).adf.shape == (0,)
    with pytest.raises(ValueError, match="at least 20 steps, got 10"):
        stationarity(torch.zeros(10, 1))
    with pytest.raises(ValueError, match="expected finite values"):
        stationarity(torch.full((30, 1), torch.nan))
