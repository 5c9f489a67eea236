"""Tail probabilities equal scipy's where scipy has them, and closed forms where it underflows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_slim.statistics.distributions import chi2_log_sf, f_log_sf


def grid(center: float) -> torch.Tensor:
    wide, near = 10 ** (6 * torch.rand(200, dtype=torch.float64) - 3), 0.5 + 1.5 * torch.rand(200, dtype=torch.float64)
    return center * torch.cat([wide, near, torch.ones(1)])


@pytest.mark.parametrize("df1", [1, 2, 3, 8, 1.0, 2.0, 3.0, 8.0, 999])
@pytest.mark.parametrize("df2", [1, 2, 7, 50, 1e3, 1e6])
def test_f_equals_scipy(df1: float, df2: float) -> None:
    F = grid(1.0)
    expected = stats.f.logsf(F.numpy(), df1, df2)
    there = np.isfinite(expected)
    np.testing.assert_allclose(f_log_sf(F, df1, df2)[there], expected[there], rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("df", [1, 2, 3, 10, 1.0, 2.0, 3.0, 10.0, 999])
def test_chi2_equals_scipy(df: float) -> None:
    x = grid(float(df))
    expected = stats.chi2.logsf(x.numpy(), df)
    there = np.isfinite(expected)
    np.testing.assert_allclose(chi2_log_sf(x, df)[there], expected[there], rtol=1e-10, atol=1e-15)


def test_two_degrees_of_freedom_have_a_closed_form_far_beyond_underflow() -> None:
    F, x = torch.tensor([1e4, 1e8, 1e100], dtype=torch.float64), torch.tensor([1e4, 1e8], dtype=torch.float64)
    np.testing.assert_allclose(f_log_sf(F, 2, 400), [-200 * math.log1p(2 * f / 400) for f in F], rtol=1e-13)
    np.testing.assert_allclose(chi2_log_sf(x, 2), -x / 2, rtol=1e-13)


def test_degrees_of_freedom_broadcast() -> None:
    F, df1, df2 = torch.rand(3, 4), torch.tensor([1, 2, 3])[:, None], torch.tensor([5.0, 6.0, 7.0, 8.0])
    expected = stats.f.logsf(F.double().numpy(), df1.numpy(), df2.numpy())
    np.testing.assert_allclose(f_log_sf(F, df1, df2), expected, rtol=1e-12)


@pytest.mark.parametrize("untestable", [(0.0, 1, 5), (-1.0, 1, 5), (4.0, 0, 5), (4.0, 1, 0), (4.0, 1, -3)])
def test_where_nothing_can_be_tested_p_is_one(untestable: tuple[float, float, float]) -> None:
    F, df1, df2 = untestable
    assert f_log_sf(torch.tensor([F]), df1, df2).tolist() == [0.0]
    assert chi2_log_sf(torch.tensor([F]), min(df1, df2)).tolist() == [0.0]


@pytest.mark.parametrize("kind", [int, float])
def test_an_infinite_statistic_is_impossible_and_not_nan(kind: type) -> None:
    assert f_log_sf(torch.tensor([math.inf]), kind(2), 5).tolist() == [-math.inf]
    assert chi2_log_sf(torch.tensor([math.inf]), kind(2)).tolist() == [-math.inf]


def test_no_nan_leaves() -> None:
    F = torch.tensor([math.nan, 1e-300, 1e-30, 1e300, math.inf], dtype=torch.float64)
    for df1, df2 in [(1, 1), (1.0, 1), (999, 3), (2, 1e9), (2.0, 1e9), (4999, 1e7)]:
        assert not f_log_sf(F, df1, df2).isnan().any()
        assert not chi2_log_sf(F, df1).isnan().any()
