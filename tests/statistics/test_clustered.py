"""The cluster-robust test equals statsmodels', and is right where rows of a sequence are alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_slim.statistics.clustered import ClusteredPanel
from lightning_slim.statistics.panel import PanelGranger
from lightning_slim.statistics.panel_rows import PanelDesign
from tests.statistics.test_panel import TARGETS, UNITS, batch, ols, ragged
from tests.statistics.worlds import null_pairs, null_world, randn


@pytest.mark.parametrize("center", ["step", "batch", "item"])
@pytest.mark.parametrize(("lags", "own", "first", "warm"), [(1, 1, 1, 0), (2, 2, 1, 1), (2, 1, 0, 0), (1, 0, 1, 0)])
@pytest.mark.parametrize("make", [batch, ragged])
def test_equals_statsmodels_with_clusters(make, lags: int, own: int, first: int, warm: int, center: str) -> None:
    batches = [make() for _ in range(5)]
    panel = ClusteredPanel(UNITS, TARGETS, PanelDesign(lags, own, first, warm, center))
    for units, targets, mask, resets in batches:
        panel.update(units, targets, mask=mask, resets=resets)
    got = panel.result()
    for unit in range(UNITS):
        for target in range(TARGETS):
            full, small, items = ols(batches, unit, target, lags, own, first, warm, center)
            names = sorted(set(items))
            robust = full.get_robustcov_results("cluster", groups=np.array([names.index(item) for item in items]))
            expected = robust.f_test(np.eye(lags, len(full.params)))
            at = target, unit
            np.testing.assert_allclose(got.statistic[at], np.squeeze(expected.fvalue), rtol=1e-8)
            np.testing.assert_allclose(got.p_value[at], expected.pvalue, rtol=1e-8)
            np.testing.assert_allclose(got.geweke[at], np.log(small.ssr / full.ssr), rtol=1e-8, atol=1e-10)
            assert got.df1[at] == lags
            assert got.df2[at] == len(names) - 1


def test_dead_units_and_copies_of_the_target_tell_nothing() -> None:
    units, targets, _, _ = batch()
    units[..., 0], units[..., 1], targets[..., 1] = 0.1, targets[..., 0], 7 / 3
    panel = ClusteredPanel(UNITS, TARGETS)
    panel.update(units, targets)
    got = panel.result()
    assert not got.statistic[0, :2].any()
    assert not got.statistic[1].any()
    assert got.p_value[1].eq(1).all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale: float) -> None:
    one, other = ClusteredPanel(UNITS, TARGETS), ClusteredPanel(UNITS, TARGETS)
    for _ in range(3):
        units, targets, _, _ = batch()
        one.update(units, targets)
        other.update(units * scale, targets / scale)
    torch.testing.assert_close(other.result(), one.result(), rtol=1e-9, atol=1e-12)


def test_units_go_in_blocks_of_bounded_memory(monkeypatch) -> None:
    units, targets, mask, resets = ragged()
    one, other = (ClusteredPanel(UNITS, TARGETS, PanelDesign(2)) for _ in range(2))
    one.update(units, targets, mask=mask, resets=resets)
    monkeypatch.setattr("lightning_slim.statistics.clustered.BLOCK", 1)
    other.update(units, targets, mask=mask, resets=resets)
    torch.testing.assert_close(other.products, one.products)


def rejections(make: type, kind: str, steps: int, repeats: int) -> float:
    found = []
    for _ in range(repeats):
        panel = make(32, 1, PanelDesign(lags=2))
        for _ in range(4):
            panel.update(*null_world(kind, 64, steps, 32))
        found.append((panel.result().p_value < 0.05).double().mean())
    return float(torch.stack(found).mean())


def test_of_many_pairs_without_a_cause_one_in_twenty_is_rejected() -> None:
    panel = ClusteredPanel(40, 40)
    for _ in range(4):
        panel.update(*null_pairs("independent", 64, 12, 40))
    assert 0.03 <= (panel.result().p_value < 0.05).double().mean() <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["independent", "echo", "feedback", "waves"])
def test_where_nothing_causes_one_in_twenty_is_rejected(kind: str) -> None:
    assert 0.03 <= rejections(ClusteredPanel, kind, 16, 40) <= 0.07


def test_a_cause_is_found() -> None:
    x, noise = randn(80, 20, 2), randn(80, 20, 1)
    panel, plain = ClusteredPanel(2, 1), PanelGranger(2, 1, nulls=0)
    for one in (panel, plain):
        one.update(x, 0.3 * x[..., :1].roll(1, 1) + noise)
    got = panel.result()
    assert got.log_p[0, 0] < -20
    assert got.p_value[0, 1] > 0.001
    torch.testing.assert_close(got.geweke, plain.result().geweke)
