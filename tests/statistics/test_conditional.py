"""Every leave-one-out test against a refit without that series."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from torch import Tensor

from lightning_slim.statistics import leave_one_out_test, ridge_leave_one_out


def world(steps: int, number: int, memory: float = 0.5) -> tuple[Tensor, Tensor]:
    """Series that mix common causes, and two targets."""
    noise = torch.randn(steps + 100, number, dtype=torch.float64)
    for step in range(1, len(noise)):
        noise[step] += memory * noise[step - 1]
    series = noise[100:] + noise[100:] @ torch.randn(number, number, dtype=torch.float64) / number**0.5
    targets = torch.randn(steps, 2, dtype=torch.float64)
    targets[1:] += 0.4 * targets[:-1] + 0.5 * series[:-1, :2]
    return series, targets


def past(values: Tensor, lags: int, skip: int) -> list[np.ndarray]:
    """One block of lags for each series."""
    return [
        np.column_stack([column[skip - lag : len(values) - lag].numpy() for lag in range(1, lags + 1)])
        for column in values.T
    ]


@pytest.mark.parametrize(("lags", "own_lags"), [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_all_tests_equal_refits_without_the_series(lags: int, own_lags: int, memory: float) -> None:
    series, targets = world(300, 6, memory)
    test = leave_one_out_test(series * 1e-6 + 1, targets * 1e6, lags, own_lags)
    skip = max(lags, own_lags)
    blocks = past(series, lags, skip)
    own = [np.ones((300 - skip, 1)), *past(targets, own_lags, skip)]
    for k in range(2):
        y = targets[skip:, k].numpy()
        whole = sm.OLS(y, np.hstack([*own, *blocks])).fit()
        np.testing.assert_allclose(test.rss[k] * 1e-12, whole.ssr, rtol=1e-9)
        np.testing.assert_allclose(test.rss_own[k] * 1e-12, sm.OLS(y, np.hstack(own)).fit().ssr, rtol=1e-9)
        assert test.df_denom == whole.df_resid
        for i in range(6):
            without = sm.OLS(y, np.hstack([*own, *blocks[:i], *blocks[i + 1 :]])).fit()
            f, p, df = whole.compare_f_test(without)
            np.testing.assert_allclose(test.f[k, i], f, rtol=1e-9)
            np.testing.assert_allclose(test.p[k, i], p, rtol=1e-9)
            np.testing.assert_allclose(test.effect[k, i], np.log(without.ssr / whole.ssr), rtol=1e-8)
            assert test.df_num[k, i] == df


def test_copies_and_the_dead_add_nothing_and_others_stay_as_they_are() -> None:
    series, targets = world(300, 4)
    expected = leave_one_out_test(series, targets, 2)
    more = torch.cat([series, series[:, :1] * 3, torch.zeros(300, 1)], 1)
    test = leave_one_out_test(more, targets, 2)
    assert not test.df_num[:, [0, 4, 5]].any()
    assert (test.p[:, [0, 4, 5]] == 1).all()
    assert not test.effect[:, [0, 4, 5]].any()
    assert test.df_denom == expected.df_denom
    np.testing.assert_allclose(test.f[:, 1:4], expected.f[:, 1:], rtol=1e-5)


def test_a_lag_that_others_span_is_not_counted() -> None:
    """The delayed copy shares one of its two lags with the original."""
    series, targets = world(300, 2)
    series = torch.cat([series, series[:, :1].roll(1, 0)], 1)[1:]
    test = leave_one_out_test(series, targets[1:], 2)
    assert test.df_num.tolist() == [[1, 2, 1]] * 2
    assert test.df_denom == 297 - 5 - 5


def test_dead_and_explained_targets_have_p_1() -> None:
    series, _ = world(120, 3)
    t = torch.arange(120.0, dtype=torch.float64)
    test = leave_one_out_test(series, torch.stack([0 * t, 0 * t + 0.1, torch.sin(0.3 * t)], 1), 2)
    assert not test.f.any()
    assert (test.p == 1).all()
    assert not test.effect.any()
    perfect = leave_one_out_test(series, series[:, :1].roll(1, 0) * 2, 2)
    assert perfect.f.isfinite().all()
    assert perfect.effect[0, 0] > 20


def test_where_nothing_causes_one_in_twenty_is_rejected() -> None:
    """Near a unit root, own lags are underestimated, the more so the more columns there are: there it is 9 %."""
    rates = []
    for _ in range(20):
        noise = torch.randn(356, 40, dtype=torch.float64)
        for step in range(1, 356):
            noise[step] += 0.5 * noise[step - 1]
        rates.append((leave_one_out_test(noise[100:, :20], noise[100:, 20:], 1).p < 0.05).double().mean())
    assert 0.03 <= torch.stack(rates).mean() <= 0.07


def test_too_few_rows_are_refused() -> None:
    series, targets = world(30, 20)
    with pytest.raises(
        ValueError, match=r"20 series with 2 lags need more than 45 rows, got 28: .*ridge_leave_one_out"
    ):
        leave_one_out_test(series, targets, 2)


def objective(columns: np.ndarray, residual: np.ndarray, ridge: float) -> float:
    """The least of `|r - X b|^2 / rows + ridge |b|^2`, by least squares of augmented rows."""
    rows, number = columns.shape
    augmented = np.vstack([columns / rows**0.5, ridge**0.5 * np.eye(number)])
    target = np.concatenate([residual / rows**0.5, np.zeros(number)])
    coefficients = np.linalg.lstsq(augmented, target, rcond=None)[0]
    return float(((target - augmented @ coefficients) ** 2).sum())


@pytest.mark.parametrize(("steps", "number"), [(200, 5), (40, 30)], ids=["primal", "dual"])
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_ridge_equals_refits_in_both_forms(steps: int, number: int, ridge: float) -> None:
    series, targets = world(steps, number)
    result = ridge_leave_one_out(series + 3, targets, 2, ridge=ridge)
    deviation = series.std(0, correction=0)
    blocks = past(series / deviation, 2, 2)
    own = np.hstack([np.ones((steps - 2, 1)), *past(targets, 2, 2)])
    annihilate = np.eye(steps - 2) - own @ np.linalg.pinv(own)
    for k in range(2):
        residual = annihilate @ targets[2:, k].numpy()
        whole = objective(annihilate @ np.hstack(blocks), residual, ridge)
        for i in range(0, number, 3):
            without = objective(annihilate @ np.hstack([*blocks[:i], *blocks[i + 1 :]]), residual, ridge)
            variance = (residual**2).mean()
            np.testing.assert_allclose(result.increase[k, i], (without - whole) / variance, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize(("steps", "number"), [(60, 28), (60, 29)])
def test_the_two_forms_choose_the_same_penalty(steps: int, number: int) -> None:
    """With 57 rows, 28 series with two lags are 56 columns; one dead series more makes it the dual form."""
    series, targets = world(steps, 28)
    padded = torch.cat([series, torch.zeros(steps, 1)], 1)[:, :number]
    result, expected = ridge_leave_one_out(padded, targets, 2), ridge_leave_one_out(series, targets, 2)
    assert result.ridge == pytest.approx(expected.ridge)
    np.testing.assert_allclose(result.increase[:, :28], expected.increase, rtol=1e-8, atol=1e-14)
    assert not result.increase[:, 28:].any()


def test_ridge_refuses_no_penalty_and_is_finite_for_the_dead() -> None:
    series, targets = world(40, 3)
    with pytest.raises(ValueError, match="expected a positive ridge, got 0"):
        ridge_leave_one_out(series, targets, 1, ridge=0.0)
    result = ridge_leave_one_out(torch.zeros(40, 3), torch.zeros(40, 2), 1)
    assert not result.increase.any()


@pytest.mark.parametrize("seed", range(8))
def test_no_input_leads_to_nan(seed: int) -> None:
    """Waves, impulses, copies, echoes, the dead, of all units."""
    torch.manual_seed(seed)
    t = torch.arange(100, dtype=torch.float64)
    noise = torch.randn(100, 4, dtype=torch.float64)
    others = [0 * t, 0 * t + 0.1, t, torch.sin(t / 2), (t == 50).double(), (t % 2), torch.exp(-t / 9)]
    series = torch.cat([noise, noise[:, :1], noise[:, 1:2].roll(1, 0), torch.stack(others, 1)], 1)
    series = series[:, torch.randperm(13)] * 10.0 ** torch.randint(-12, 13, (13,)).double()
    targets = torch.stack([torch.randn(100), noise[:, 0].roll(1), torch.sin(t / 3), 0 * t, noise[:, 2]], 1)
    test = leave_one_out_test(series, targets, 2)
    for value in (test.f, test.log_p, test.effect, test.rss_own, test.rss):
        assert value.isfinite().all()
    assert (test.df_num >= 0).all()
    assert ((test.df_num > 0) | (test.p == 1)).all()
    assert (test.effect >= 0).all()
    for ridge in (None, 1e-6, 1e6):
        assert ridge_leave_one_out(series, targets, 2, ridge=ridge).increase.isfinite().all()
