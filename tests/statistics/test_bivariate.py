"""Batched Granger tests against statsmodels, one pair after the other, and what is defined where it has no answer."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from statsmodels.tsa.stattools import grangercausalitytests
from torch import Tensor

from lightning_slim.statistics import (
    GrangerTest,
    common_lag_order,
    granger_test,
    leave_one_out_test,
    ridge_leave_one_out,
)
from tests.statistics.worlds import randn

TESTS = ("ssr_ftest", "ssr_chi2test", "lrtest", "params_ftest")
unchecked = inspect.unwrap(granger_test)  # without the check of shapes


def autoregressive(steps: int, number: int, memory: float) -> Tensor:
    noise = torch.randn(steps + 200, number, dtype=torch.float64)
    for step in range(1, len(noise)):
        noise[step] += memory * noise[step - 1]
    return noise[200:]


def world(kind: str, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Seven series, of which two cause one of two targets each."""
    series = autoregressive(steps, 7, {"persistent": 0.9, "walk": 1.0}.get(kind, 0.0))
    if kind == "smooth":
        series = torch.nn.functional.avg_pool1d(autoregressive(steps + 20, 7, 0.0).T[None], 21, 1)[0].T.contiguous()
    targets = autoregressive(steps, 2, 0.6)
    targets[2:] += 0.3 * series[1:-1, :2] / series.std() + 0.2 * series[:-2, 1:3] / series.std()
    return series, targets


def statsmodels_tests(target: Tensor, series: Tensor, lags: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return grangercausalitytests(np.column_stack([target.numpy(), series.numpy()]), [lags])[lags]


def lagged(series: Tensor, lags: int, skip: int) -> np.ndarray:
    return np.column_stack([series[skip - lag : len(series) - lag].numpy() for lag in range(1, lags + 1)])


def assert_sound(test: GrangerTest) -> None:
    """Finite and in range, all of it."""
    tests = [getattr(test, name) for name in TESTS]
    for value in (test.f, test.log_p, test.p, test.effect, test.partial_r2, test.rss_own, test.rss_both):
        assert value.isfinite().all()
    for statistic, p, log_p in tests:
        assert statistic.isfinite().all()
        assert (statistic >= 0).all()
        assert log_p.isfinite().all()
        assert (log_p <= 0).all()
        assert ((p >= 0) & (p <= 1)).all()
    assert (test.effect >= 0).all()
    assert ((test.partial_r2 >= 0) & (test.partial_r2 <= 1)).all()
    assert (test.df_denom > 0).all()
    assert (test.df_num >= 0).all()


@pytest.mark.parametrize("lags", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["white", "persistent", "walk", "smooth"])
def test_all_four_tests_equal_statsmodels(kind: str, lags: int) -> None:
    series, targets = world(kind)
    test = granger_test(series, targets, lags)
    assert_sound(test)
    for k in range(2):
        for i in range(7):
            expected, (own, both, _) = statsmodels_tests(targets[:, k], series[:, i], lags)
            for name in TESTS:
                ours = [float(part[k, i]) for part in getattr(test, name)[:2]]
                np.testing.assert_allclose(ours, expected[name][:2], rtol=1e-8, err_msg=name)
            np.testing.assert_allclose(test.rss_own[k], own.ssr, rtol=1e-10)
            np.testing.assert_allclose(test.rss_both[k, i], both.ssr, rtol=1e-10)
            np.testing.assert_allclose(test.effect[k, i], np.log(own.ssr / both.ssr), rtol=1e-8)
            np.testing.assert_allclose(test.partial_r2[k, i], 1 - both.ssr / own.ssr, rtol=1e-8)
            assert (int(test.df_num[k, i]), int(test.df_denom[k, i])) == (lags, both.df_resid)
            assert test.rows == both.nobs


@pytest.mark.parametrize(("lags", "own_lags"), [(1, 3), (2, 8), (4, 1), (3, 2)])
def test_numbers_of_lags_may_differ_and_errors_may_be_robust(lags: int, own_lags: int) -> None:
    """Against OLS and its Wald test, by HC3 as well."""
    series, targets = world("persistent")
    skip = max(lags, own_lags)
    plain, robust = (granger_test(series, targets, lags, own_lags, how) for how in ("none", "hc3"))
    assert_sound(robust)
    restriction = np.eye(1 + own_lags + lags)[1 + own_lags :]
    for k in range(2):
        own = sm.add_constant(lagged(targets[:, k], own_lags, skip))
        for i in range(7):
            design = np.hstack([own, lagged(series[:, i], lags, skip)])
            model = sm.OLS(targets[skip:, k].numpy(), design)
            for test, kind in ((plain, "nonrobust"), (robust, "HC3")):
                wald = model.fit(cov_type=kind, use_t=True).f_test(restriction)
                np.testing.assert_allclose(test.f[k, i], wald.fvalue, rtol=1e-8)
                np.testing.assert_allclose(test.p[k, i], wald.pvalue, rtol=1e-8)
            np.testing.assert_allclose(robust.ssr_ftest.statistic[k, i], plain.f[k, i], rtol=1e-8)


@pytest.mark.parametrize("robust", ["none", "hc3"])
@pytest.mark.parametrize(("offset", "scale"), [(1e7, 1.0), (-1e7, 1.0), (0.0, 1e-12), (0.0, 1e12), (1e3, 1e-6)])
def test_offsets_and_units_do_not_matter(offset: float, scale: float, robust) -> None:
    series, targets = world("persistent")
    if offset:  # what is left of the values beside the offset, exactly
        series, targets = ((values * scale + offset - offset) / scale for values in (series, targets))
    test = granger_test(series * scale + offset, targets / scale - offset, 3, robust=robust)
    plain = granger_test(series, (targets / scale - offset + offset) * scale, 3, robust=robust)
    tolerance = 1e-8 if abs(offset) < 1e4 or scale == 1 else 1e-6
    np.testing.assert_allclose(test.f, plain.f, rtol=tolerance)
    np.testing.assert_allclose(test.effect, plain.effect, rtol=tolerance)
    np.testing.assert_allclose(test.rss_own, plain.rss_own / scale**2, rtol=tolerance)


def test_near_singular_pairs_are_computed_from_the_rows() -> None:
    """Smooth curves with little noise, where sums of products alone have lost all digits."""
    t = torch.arange(300.0, dtype=torch.float64)
    for noise, tolerance in ((1e-2, 1e-8), (1e-4, 1e-7), (1e-5, 1e-5)):  # statsmodels' own digits go first
        series = torch.exp(-t / 40)[:, None] + noise * autoregressive(300, 5, 0.0)
        target = torch.exp(-t / 60)[:, None] + noise * autoregressive(300, 1, 0.3)
        test = granger_test(series, target, 2)
        expected = [statsmodels_tests(target[:, 0], series[:, i], 2)[0]["ssr_ftest"][0] for i in range(5)]
        np.testing.assert_allclose(test.f[0], expected, rtol=tolerance)


@pytest.mark.parametrize("robust", ["none", "hc3"])
@pytest.mark.parametrize("lags", [1, 2, 4])
def test_degenerate_series_and_targets_have_a_defined_result(lags: int, robust) -> None:
    t = torch.arange(150.0, dtype=torch.float64)
    noise, target = torch.randn(2, 150, dtype=torch.float64)
    impulse = (t == 70).double()
    series = torch.stack([0 * t, 0 * t + 0.1, t, impulse, torch.sin(0.3 * t), target, noise, noise * 1e150], 1)
    targets = torch.stack([target, 0 * t, 0 * t - 1e9, t, torch.sin(0.3 * t), impulse, noise], 1)
    test = granger_test(series, targets, lags, robust=robust)
    assert_sound(test)
    assert not test.f[:, :2].any()
    assert not test.effect[:, :2].any()
    assert (test.p[:, :2] == 1).all()
    assert not test.df_num[:, :2].any()
    assert not test.f[1:4].any()
    assert (test.p[1:4] == 1).all()
    assert test.f[0, 5] == test.f[6, 6] == test.f[6, 7] == 0  # the target itself adds nothing to its own past
    np.testing.assert_allclose(test.f[0, 7], test.f[0, 6], rtol=1e-8)  # a copy in other units


def test_of_collinear_lags_only_those_count_that_add_something() -> None:
    t = torch.arange(150.0, dtype=torch.float64)
    target = torch.randn(150, 1, dtype=torch.float64)
    wave = torch.sin(0.3 * t)[:, None]  # four lags, of which two span the others
    test = granger_test(wave, target, 4)
    assert (test.df_num.item(), test.df_denom.item()) == (2, 146 - 5 - 2)
    own = sm.add_constant(lagged(target[:, 0], 4, 4))
    both = sm.OLS(target[4:, 0].numpy(), np.hstack([own, lagged(wave[:, 0], 2, 4)])).fit()
    np.testing.assert_allclose(test.f.item(), both.f_test(np.eye(7)[5:]).fvalue, rtol=1e-8)


def test_a_perfect_fit_is_finite_and_beats_all_others() -> None:
    series = torch.randn(200, 4, dtype=torch.float64)
    target = series[:, :1].roll(1, 0) * 3 + 5
    target[0] = 0
    for robust in ("none", "hc3"):
        test = granger_test(series, target, 2, robust=robust)
        assert_sound(test)
        assert test.effect[0, 0] > 50
        assert test.log_p[0, 0] < -1000
        assert test.log_p[0, 1:].min() > -20


def test_a_row_that_nothing_else_predicts_says_nothing_robustly() -> None:
    series = torch.zeros(100, 1, dtype=torch.float64)
    series[40] = 1.0
    target = torch.randn(100, 1, dtype=torch.float64)
    assert granger_test(series, target, 2).f > 0
    assert granger_test(series, target, 2, robust="hc3").log_p == 0


@pytest.mark.parametrize("robust", ["none", "hc3"])
def test_chunks_change_nothing(robust) -> None:
    series, targets = world("walk")
    targets = targets.repeat(1, 40)[:, :70] + 0.1 * torch.randn(200, 70)
    whole, chunked = (granger_test(series, targets, 2, robust=robust, chunk_bytes=size) for size in (1 << 30, 1))
    assert whole.f.shape == (70, 7)
    np.testing.assert_allclose(chunked.f, whole.f, rtol=1e-9)
    np.testing.assert_allclose(granger_test(series, targets[:, 66:67], 2, robust=robust).f, whole.f[66:67], rtol=1e-9)


def test_single_precision_is_taken_as_it_is() -> None:
    series, targets = (values.float() for values in world("white"))
    single, double = granger_test(series, targets, 2), granger_test(series.double(), targets.double(), 2)
    assert torch.equal(single.f, double.f)


def test_none_is_none() -> None:
    series, targets = world("white")
    assert granger_test(series[:, :0], targets, 2).f.shape == (2, 0)


@pytest.mark.parametrize(
    ("series", "targets", "lags", "message"),
    [
        (torch.randn(9, 3), torch.randn(9, 1), 3, "3 lags and 3 own lags need at least 11 steps, got 9: record longer"),
        (torch.randn(9, 3), torch.randn(8, 1), 1, "as many steps, got 9 and 8: record them together"),
        (torch.randn(9, 3), torch.randn(9, 1), 0, "expected at least 1 lag of each, got lags=0 and own_lags=0"),
        (torch.full((9, 3), torch.nan), torch.randn(9, 1), 1, "NaN or infinity in 3 of 3 series, first in number 0"),
        (torch.randn(9, 3), torch.full((9, 2), torch.inf), 1, "NaN or infinity in 2 of 2 targets, first in number 0"),
    ],
)
def test_unusable_input_is_refused(series: Tensor, targets: Tensor, lags: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unchecked(series, targets, lags)


def awkward(steps: int, number: int) -> Tensor:
    """Series of all the kinds that make regressions fail, mixed at random."""
    t = torch.arange(steps, dtype=torch.float64)
    kinds = [
        lambda: torch.randn(steps),
        lambda: torch.randn(steps).relu(),
        lambda: torch.zeros(steps),
        lambda: torch.ones(steps) / 3,
        lambda: (torch.rand(steps) < 0.1).double(),
        lambda: t**2,
        lambda: torch.exp(-t / 5),
        lambda: torch.sin(t / 2),
        lambda: (t % 2) - 0.5,
        lambda: torch.randn(steps).cumsum(0).round(),
    ]
    picks = [kinds[int(torch.randint(len(kinds), ()))]().double() for _ in range(number)]
    scales = 10.0 ** torch.randint(-12, 13, (number,)).double()
    offsets = torch.randn(number) * 10.0 ** torch.randint(-3, 8, (number,)).double()
    result = torch.stack(picks, 1) * scales + offsets * (torch.rand(number) < 0.3)
    result[:, -1] = result[:, 0].roll(1)  # an echo
    return result


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("robust", ["none", "hc3"])
def test_no_input_leads_to_nan(seed: int, robust) -> None:
    torch.manual_seed(seed)
    lags, own_lags, steps = (int(torch.randint(*ends, ())) for ends in ((1, 5), (1, 5), (15, 60)))
    series = awkward(steps, 30)
    targets = torch.cat([awkward(steps, 8), series[:, :2].roll(1, 0), torch.randn(steps, 1).double() * 1e200], 1)
    test = granger_test(series, targets, lags, own_lags, robust)
    assert_sound(test)
    assert (test.df_num <= lags).all()
    assert ((test.df_num > 0) | (test.p == 1)).all()


@pytest.mark.parametrize("steps", [8, 9, 12])
def test_the_shortest_series_have_a_result(steps: int) -> None:
    series, target = torch.randn(steps, 5, dtype=torch.float64), torch.randn(steps, 1, dtype=torch.float64)
    test = granger_test(series, target, 2)
    assert_sound(test)
    assert (test.df_denom == steps - 2 - 5).all()


def size(memory: float, steps: int, lags: int, robust, scale: Tensor | None = None) -> float:
    """Share of 8000 pairs of independent series that are called causal at 5 %."""
    series, targets = autoregressive(steps, 200, memory), autoregressive(steps, 40, memory)
    if scale is not None:
        series, targets = series * scale[:, None], targets * scale[:, None]
    return float((granger_test(series, targets, lags, robust=robust).p < 0.05).double().mean())


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("robust", ["none", "hc3"])
def test_unrelated_series_are_called_causal_in_3_to_7_percent(memory: float, robust) -> None:
    assert 0.03 < size(memory, 256, 2, robust) < 0.07


def test_all_four_tests_and_a_common_order_hold_the_level() -> None:
    series, targets = autoregressive(512, 200, 0.5), autoregressive(512, 40, 0.5)
    tests = granger_test(series, targets, common_lag_order(series, targets, 4).lags), granger_test(series, targets, 2)
    for test in tests:
        for name in TESTS:
            assert 0.03 < (getattr(test, name).p < 0.05).double().mean() < 0.07


@pytest.mark.slow
@pytest.mark.parametrize("memory", [0.0, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("lags", [1, 2, 4])
@pytest.mark.parametrize("robust", ["none", "hc3"])
def test_size_over_the_whole_grid(memory: float, lags: int, robust) -> None:
    assert 0.03 < size(memory, 512, lags, robust) < 0.07


def test_only_robust_errors_hold_the_level_where_the_variance_decays() -> None:
    scale = torch.exp(-torch.arange(512.0, dtype=torch.float64) / 77) + 0.1
    assert size(0.5, 512, 2, "none", scale) > 0.3
    assert 0.03 < size(0.5, 512, 2, "hc3", scale) < 0.07


@pytest.mark.parametrize("test", [granger_test, leave_one_out_test, ridge_leave_one_out])
def test_one_dimension_is_one_series(test: Callable[..., Any]) -> None:
    series, target = randn(100, 1), randn(100, 1)
    got, expected = (test(*each, lags=2) for each in ((series[:, 0], target[:, 0]), (series, target)))
    assert str(got) == str(expected)


@pytest.mark.parametrize("test", [granger_test, leave_one_out_test, ridge_leave_one_out])
def test_other_shapes_are_refused(test: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"of shape \(time, series\).*got shape \(100, 2, 1\)"):
        test(randn(100, 3), randn(100, 2, 1), lags=2)
