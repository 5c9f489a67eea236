"""Log tails of few whole degrees of freedom equal scipy's, those by quadrature, and known asymptotics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_slim.statistics.distributions import chi2_log_sf, f_log_sf

STATISTICS = torch.tensor([1e-8, 1e-3, 0.1, 0.7, 1, 2, 3, 10, 30, 100], dtype=torch.float64)


@pytest.mark.parametrize("df_num", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("df_denom", [1, 2, 5, 23, 503, 100_000])
def test_f_tail_equals_scipys(df_num: int, df_denom: int) -> None:
    df = torch.full((len(STATISTICS),), 1)
    ours = f_log_sf(STATISTICS, df * df_num, df * df_denom)
    theirs = stats.f.sf(STATISTICS.numpy(), df_num, df_denom)
    np.testing.assert_allclose(ours.exp(), theirs, rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(ours[theirs > 1e-290], np.log(theirs[theirs > 1e-290]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 16, 33])
def test_chi2_tail_equals_scipys(df: int) -> None:
    ours = chi2_log_sf(STATISTICS, torch.full((len(STATISTICS),), df))
    np.testing.assert_allclose(ours, stats.chi2.logsf(STATISTICS.numpy(), df), rtol=1e-11, atol=1e-12)


def test_tails_do_not_underflow() -> None:
    f = f_log_sf(torch.tensor([1e4, 1e20, 1e30], dtype=torch.float64), torch.full((3,), 2), torch.full((3,), 500))
    exact = [-250 * math.log1p(value / 250) for value in (1e4, 1e20, 1e30)]  # P = (1 + 2 F / d2)^(-d2 / 2)
    np.testing.assert_allclose(f, exact, rtol=1e-13)
    t = f_log_sf(torch.tensor([1e20], dtype=torch.float64), torch.tensor([1]), torch.tensor([1]))
    np.testing.assert_allclose(t, math.log(2 / math.pi * math.atan(1e-10)), rtol=1e-13)  # Cauchy
    chi2 = chi2_log_sf(torch.tensor([1e6], dtype=torch.float64), torch.tensor([2]))
    np.testing.assert_allclose(chi2, -5e5, rtol=1e-13)


def test_degrees_of_freedom_may_differ_and_none_is_certainty() -> None:
    f, num, denom = torch.tensor([3.0, 3.0, 3.0, 0.0]), torch.tensor([0, 1, 4, 3]), torch.tensor([9, 9, 7, 5])
    expected = [0.0, *np.log(stats.f.sf([3.0, 3.0], [1, 4], [9, 7])), 0.0]
    np.testing.assert_allclose(f_log_sf(f, num, denom), expected, rtol=1e-12, atol=1e-120)
    assert f_log_sf(torch.zeros(2, 0), torch.zeros(2, 0).long(), torch.zeros(2, 0).long()).shape == (2, 0)


def test_order_is_kept_where_p_values_are_zero() -> None:
    f = torch.logspace(0, 25, 200, dtype=torch.float64)
    for df_num in (1, 2, 5):
        log_p = f_log_sf(f, torch.full((200,), df_num), torch.full((200,), 503))
        assert (log_p.diff() < 0).all()
        assert log_p.isfinite().all()


@pytest.mark.parametrize("df", [1, 2, 3, 4, 8, 15, 16])
def test_sums_and_quadrature_agree(df: int) -> None:
    """Whole numbers, as integers and as floats."""
    for statistic in (STATISTICS, torch.tensor([1e3, 1e6, 1e12], dtype=torch.float64)):
        for df_denom in (1, 7, 500):
            by_sums, by_quadrature = (f_log_sf(statistic, number, df_denom) for number in (df, float(df)))
            np.testing.assert_allclose(by_sums, by_quadrature, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(
            chi2_log_sf(statistic, df), chi2_log_sf(statistic, float(df)), rtol=1e-11, atol=1e-12
        )
