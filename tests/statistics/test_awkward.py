"""Panels and series of awkward kinds equal regressions that statsmodels runs on their exact values."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from torch import Tensor

from lightning_slim.statistics import (
    ClusteredPanel,
    DumitrescuHurlin,
    PanelDesign,
    PanelGranger,
    granger_test,
    leave_one_out_test,
)
from tests.statistics.test_bivariate import TESTS, statsmodels_tests
from tests.statistics.test_conditional import past
from tests.statistics.test_panel import ITEMS, STEPS, UNITS, batch, ols
from tests.statistics.worlds import randn

KINDS = ("far", "small", "large", "copies", "smooth", "near-perfect", "short")


def exact(kind: str, steps: int) -> tuple[Tensor, Tensor]:
    """Panels in exact arithmetic: what is added and multiplied later rounds nothing away."""
    units, targets, _, _ = batch()
    units, targets = (((values[:, :steps] * 2**20).round() / 2**20) for values in (units, targets))
    if kind == "copies":
        units[..., 1] = 4 * units[..., 0]
    if kind == "smooth":
        units = units.cumsum(1).cumsum(1)
    if kind == "near-perfect":
        targets[:, 1:] = units[:, :-1, :2] + 2.0**-5 * targets[:, 1:]  # moments keep half the digits
    return units, targets


def seen(kind: str, values: Tensor) -> Tensor:
    return {"far": values + 1e7, "small": values * 2.0**-40, "large": values * 2.0**40}.get(kind, values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("robust", [False, True], ids=["pooled", "clustered"])
def test_panels_equal_explicit_regressions(kind: str, robust: bool) -> None:
    design = PanelDesign(lags=2)
    panel = ClusteredPanel(UNITS, 2, design) if robust else PanelGranger(UNITS, 2, design, nulls=0)
    whole = torch.ones(ITEMS, STEPS, dtype=torch.bool)
    batches = []
    for _ in range(4):
        units, targets = exact(kind, 3 if kind == "short" else STEPS)
        panel.update(seen(kind, units), seen(kind, targets))
        batches.append((units, targets, whole, ~whole))
    got = panel.result()
    for unit in range(UNITS):
        for target in range(2):
            full, small, items = ols(batches, unit, target, 2, 2, 1, 0, "step")
            names = sorted(set(items))
            groups = np.array([names.index(item) for item in items])
            wald = full.get_robustcov_results("cluster", groups=groups).f_test(np.eye(2, len(full.params)))
            F, p = (np.squeeze(wald.fvalue), wald.pvalue) if robust else full.compare_f_test(small)[:2]
            at = target, unit
            np.testing.assert_allclose(got.statistic[at], F, rtol=1e-8)
            np.testing.assert_allclose(got.p_value[at], p, rtol=1e-6, atol=1e-300)  # digits of F, times -log p
            np.testing.assert_allclose(got.geweke[at], np.log(small.ssr / full.ssr), rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_dumitrescu_and_hurlins_walds_equal_regressions_item_by_item(kind: str) -> None:
    units, targets = exact(kind, 9 if kind == "short" else STEPS)  # 5 degrees of freedom are the least that count
    test = DumitrescuHurlin(UNITS, 2, nulls=0)
    test.update(seen(kind, units), seen(kind, targets))
    for unit in range(UNITS):
        for target in range(2):
            walds = []
            for x, y in zip(units[..., unit].numpy(), targets[..., target].numpy(), strict=True):
                design = sm.add_constant(np.column_stack([x[:-1], y[:-1]]))
                walds.append(sm.OLS(y[1:], design).fit().f_test([0, 1, 0]).fvalue)
            np.testing.assert_allclose(test.result().mean_wald[target, unit], np.mean(walds), rtol=1e-8)


@pytest.mark.parametrize("lags", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_pairs_equal_statsmodels(kind: str, lags: int) -> None:
    steps = 3 * lags + 2 if kind == "short" else 120  # the least that either takes
    series, targets = (((randn(steps, number) * 2**20).round() / 2**20) for number in (4, 2))
    targets[1:] += 0.25 * series[:-1, :2]
    if kind == "copies":
        series[:, 1] = 4 * series[:, 0]
    if kind == "smooth":
        series = series.cumsum(0).cumsum(0)
    if kind == "near-perfect":
        targets[1:] = series[:-1, :2] + 2.0**-16 * targets[1:]
    test = granger_test(seen(kind, series), seen(kind, targets), lags)
    for k in range(2):
        for i in range(4):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = statsmodels_tests(targets[:, k], series[:, i], lags)[0]
            for name in TESTS:
                ours = [float(part[k, i]) for part in getattr(test, name)[:2]]
                np.testing.assert_allclose(ours, expected[name][:2], rtol=1e-8, atol=1e-300, err_msg=name)


@pytest.mark.parametrize("kind", ["far", "small", "large", "near copies", "near-perfect", "short"])
def test_leaving_one_out_equals_refits(kind: str) -> None:
    steps = 2 + 5 + 8 + 1 if kind == "short" else 200
    series, targets = (((randn(steps, number) * 2**20).round() / 2**20) for number in (4, 2))
    targets[1:] += 0.25 * series[:-1, :2]
    if kind == "near copies":
        series[:, 1] = series[:, 0] + 2.0**-6 * series[:, 1]
    if kind == "near-perfect":
        targets[1:] = series[:-1, :2] + 2.0**-10 * targets[1:]
    test = leave_one_out_test(seen(kind, series), seen(kind, targets), 2)
    blocks = past(series, 2, 2)
    own = [np.ones((steps - 2, 1)), *past(targets, 2, 2)]
    for k in range(2):
        whole = sm.OLS(targets[2:, k].numpy(), np.hstack([*own, *blocks])).fit()
        for i in range(4):
            without = sm.OLS(whole.model.endog, np.hstack([*own, *blocks[:i], *blocks[i + 1 :]])).fit()
            f, p, _ = whole.compare_f_test(without)
            np.testing.assert_allclose(test.f[k, i], f, rtol=1e-8)
            np.testing.assert_allclose(test.p[k, i], p, rtol=1e-8)
