"""Dumitrescu and Hurlin's test equals regressions item by item, and is defined where items are too short."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from scipy import stats

from lightning_slim.statistics.dumitrescu_hurlin import DumitrescuHurlin
from lightning_slim.statistics.panel import PanelGranger
from lightning_slim.statistics.panel_rows import PanelDesign
from tests.statistics.worlds import null_pairs, null_world, randn


@pytest.mark.parametrize("lags", [1, 2])
def test_equals_the_papers_formula_on_regressions_item_by_item(lags: int) -> None:
    lengths = [25, 14, 19, 25, 8 + 2 * lags]
    units, targets = randn(5, 25, 2) + 7, randn(5, 25, 1)
    targets[:, 1:] += 0.5 * units[:, :-1, :1]
    test = DumitrescuHurlin(2, 1, PanelDesign(lags), nulls=0)
    test.update(units[:3], targets[:3], torch.tensor(lengths[:3]))
    test.update(units[3:], targets[3:], torch.tensor(lengths[3:]))
    got = test.result()
    for unit in range(2):
        walds, means, variances = [], [], []
        for i, length in enumerate(lengths):
            x, y = units[i, :length, unit].numpy(), targets[i, :length, 0].numpy()
            past = [series[lags - lag : length - lag] for series in (x, y) for lag in range(1, lags + 1)]
            fit = sm.OLS(y[lags:], sm.add_constant(np.column_stack(past))).fit()
            walds.append(lags * fit.f_test(np.eye(lags, 2 * lags + 1, 1)).fvalue)
            T, K = length - lags, lags
            means.append(K * (T - 2 * K - 1) / (T - 2 * K - 3))
            variances.append(2 * K * (T - 2 * K - 1) ** 2 * (T - K - 3) / ((T - 2 * K - 3) ** 2 * (T - 2 * K - 5)))
        z = (np.sum(walds) - np.sum(means)) / math.sqrt(np.sum(variances))
        np.testing.assert_allclose(got.z[0, unit], z, rtol=1e-8)
        np.testing.assert_allclose(got.mean_wald[0, unit], np.mean(walds), rtol=1e-8)
        np.testing.assert_allclose(got.log_p[0, unit], stats.norm.logsf(z), rtol=1e-8)
        assert got.items[0, unit] == 5


def test_items_that_are_too_short_or_dead_do_not_count() -> None:
    units, targets = randn(4, 20, 3), randn(4, 20, 2)
    units[0, :, 1], units[..., 2], targets[..., 1] = 0.1, 0.3, 1e5 / 3
    test = DumitrescuHurlin(3, 2, nulls=0)
    test.update(units, targets, torch.tensor([20, 20, 8, 9]))  # of 8 steps, 4 degrees of freedom are left
    got = test.result()
    assert got.items.tolist() == [[3, 2, 0], [0, 0, 0]]
    assert got.z[0, 2] == 0
    assert got.p_value[1].eq(1).all()


def test_a_cause_of_changing_sign_is_found_where_the_pooled_test_sees_none() -> None:
    x, sign = randn(60, 30, 1), torch.tensor([1.0, -1.0]).repeat(30)[:, None, None]
    y = 0.4 * sign * x.roll(1, 1) + randn(60, 30, 1)
    test, pooled = DumitrescuHurlin(1, 1), PanelGranger(1, 1)
    test.update(x, y)
    pooled.update(x, y)
    assert test.result().log_p.item() < -20
    assert pooled.result().p_value.item() > 0.001


def rejections(steps: int, **options) -> float:
    found = []
    for _ in range(40):
        test = DumitrescuHurlin(32, 1, **options)
        for _ in range(2):
            test.update(*null_world("independent", 64, steps, 32))
        found.append((test.result().p_value < 0.05).double().mean())
    return float(torch.stack(found).mean())


def test_of_many_pairs_of_long_series_one_in_twenty_is_rejected() -> None:
    test = DumitrescuHurlin(40, 40)
    for _ in range(2):
        test.update(*null_pairs("independent", 32, 120, 40))
    assert 0.03 <= (test.result().p_value < 0.05).double().mean() <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("steps", [16, 48])
def test_calibrated_it_rejects_one_in_twenty_where_nothing_causes(steps: int) -> None:
    assert rejections(steps, nulls=0) > 0.2  # the paper's moments are those of long series
    assert 0.03 <= rejections(steps, nulls=4) <= 0.085


def test_a_batch_of_one_item_falls_back_on_the_papers_moments() -> None:
    one, paper = DumitrescuHurlin(1, 1), DumitrescuHurlin(1, 1, nulls=0)
    for test in (one, paper):
        torch.manual_seed(1)
        test.update(randn(1, 40, 1), randn(1, 40, 1))
    assert one.result().z == paper.result().z
