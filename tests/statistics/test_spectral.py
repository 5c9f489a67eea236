"""Spectral causality integrates to the time domain, and is where it was put."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from statsmodels.tsa.api import VAR
from torch import Tensor

from lightning_slim.statistics.spectral import BivariateVAR, fit_var, spectral_causality
from tests.statistics.worlds import randn


def simulated(coefficients: Tensor, steps: int, shared: float = 0.0) -> tuple[Tensor, Tensor]:
    noise = randn(steps + 200, 2)
    noise[:, 1] += shared * noise[:, 0]
    series = noise.clone()
    for t in range(len(coefficients), len(series)):
        series[t] += sum(coefficients[a] @ series[t - a - 1] for a in range(len(coefficients)))
    return series[200:, 0][None], series[200:, 1][None]


def oscillator(drive: float) -> Tensor:
    """`x` resonates at a fifth of a cycle per step and drives `y`."""
    r, w = 0.9, 2 * math.pi * 0.2
    coefficients = torch.zeros(2, 2, 2, dtype=torch.float64)
    coefficients[0, 0, 0], coefficients[1, 0, 0] = 2 * r * math.cos(w), -(r**2)
    coefficients[0, 1, 1], coefficients[0, 1, 0] = 0.4, drive
    return coefficients


def log_rss_ratio(x: Tensor, y: Tensor, lags: int) -> float:
    """`log(rss_own / rss_both)` by least squares on explicit rows."""
    steps = y.shape[1]
    past = [series[0, lags - a : steps - a].numpy() for series in (y, x) for a in range(1, lags + 1)]
    rss = []
    for columns in (past[:lags], past):
        design = np.column_stack([np.ones(steps - lags), *columns])
        rss.append(np.linalg.lstsq(design, y[0, lags:].numpy(), rcond=None)[1][0])
    return math.log(rss[0] / rss[1])


def test_the_autoregression_equals_statsmodels() -> None:
    x, y = simulated(oscillator(0.3), 400, shared=0.5)
    x, y = 1e3 * x + 50, 1e-3 * y
    expected = VAR(torch.cat([x, y]).T.numpy()).fit(3, trend="c")
    got = fit_var(x, y, lags=3)
    np.testing.assert_allclose(got.coefficients, expected.coefs, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(got.covariance, expected.sigma_u, rtol=1e-9)
    assert got.rows == expected.nobs


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_the_mean_over_frequencies_is_the_measure_in_the_time_domain(shared: float) -> None:
    x, y = simulated(oscillator(0.5), 40_000, shared)
    got = spectral_causality(fit_var(x, y, lags=30))  # enough for either series on its own, too
    np.testing.assert_allclose(got.x_to_y.mean(), log_rss_ratio(x, y, 30), rtol=1e-3)
    np.testing.assert_allclose(got.y_to_x.mean(), log_rss_ratio(y, x, 30), atol=1e-4)


def test_without_a_cause_there_is_none_at_any_frequency() -> None:
    model = BivariateVAR(oscillator(0.0), torch.tensor([[1.0, 0.3], [0.3, 2.0]]).double(), 100)
    got = spectral_causality(model)
    assert not got.x_to_y.any()
    assert not got.y_to_x.any()


def test_it_peaks_at_the_rhythm_of_the_cause() -> None:
    got = spectral_causality(BivariateVAR(oscillator(0.5), torch.eye(2).double(), 100), frequencies=500)
    assert abs(float(got.frequency[got.x_to_y.argmax()]) - 0.2) < 0.01
    assert abs(float(got.frequency[got.spectrum[0].argmax()]) - 0.2) < 0.01


def test_spectra_integrate_to_variances() -> None:
    x, y = simulated(oscillator(0.5), 40_000)
    got = spectral_causality(fit_var(x, 10 * y, lags=4), frequencies=2000)
    np.testing.assert_allclose(got.spectrum.mean(1), [float(x.var()), 100 * float(y.var())], rtol=0.02)


def test_neither_scale_nor_place_matters() -> None:
    x, y = simulated(oscillator(0.5), 500)
    expected = spectral_causality(fit_var(x, y, lags=2))
    got = spectral_causality(fit_var(1e12 * x + 1e13, 1e-12 * y - 1e-11, lags=2))
    np.testing.assert_allclose(got.x_to_y, expected.x_to_y, rtol=1e-6, atol=1e-12)


def test_stretches_are_pooled_and_lags_never_cross_them() -> None:
    x, y = (torch.cat(part) for part in zip(*(simulated(oscillator(0.5), 2000) for _ in range(20)), strict=True))
    np.testing.assert_allclose(fit_var(x, y, 2).coefficients, oscillator(0.5), atol=0.02)
    assert fit_var(x, y, 2).rows == 20 * 1998


@pytest.mark.parametrize("kind", ["dead", "copy", "both dead", "walk"])
def test_degenerate_series_are_defined(kind: str) -> None:
    x, y = randn(1, 60), randn(1, 60)
    x, y = {"dead": (x, y * 0 + 0.1), "copy": (x, x), "both dead": (x * 0, y * 0), "walk": (x.cumsum(1), y)}[kind]
    got = spectral_causality(fit_var(x, y, lags=2))
    assert all(part.isfinite().all() for part in got)
    assert (got.x_to_y >= 0).all()
    assert got.x_to_y.max() < 1e-6 or kind == "walk"


def test_short_series_are_refused() -> None:
    with pytest.raises(ValueError, match="of 4 lags needs at least 1 lag and 10 rows, got 5 rows: record longer"):
        fit_var(randn(1, 9), randn(1, 9), lags=4)
