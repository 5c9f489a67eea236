"""The pooled panel equals explicit regressions with dummies, pair by pair, and finds what was planted."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from jaxtyping import TypeCheckError
from sklearn.datasets import load_digits
from torch import Tensor

from lightning_slim.statistics.dumitrescu_hurlin import DumitrescuHurlin
from lightning_slim.statistics.panel import PanelGranger
from lightning_slim.statistics.panel_rows import PanelDesign, distinct_rows, whole_past
from tests.statistics.worlds import (
    auc,
    autoregressive,
    null_pairs,
    null_world,
    planted_inputs,
    planted_recurrent,
    randn,
)

ITEMS, STEPS, UNITS, TARGETS = 7, 14, 3, 2

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # units, targets, mask, resets


def batch(offset: float = 0.0) -> Batch:
    units, targets = autoregressive(ITEMS, STEPS, UNITS, 0.5) + offset, randn(ITEMS, STEPS, TARGETS)
    for t in range(2, STEPS):
        targets[:, t] += 0.4 * targets[:, t - 1] + 0.3 * units[:, t - 1, :2] + 0.2 * units[:, t - 2, 1:] - 0.5 * offset
    whole = torch.ones(ITEMS, STEPS, dtype=torch.bool)
    return units, targets, whole, ~whole


def ragged() -> Batch:
    """Padding at the end and in the middle, with nonsense in it, and resets."""
    units, targets, mask, resets = batch()
    mask = torch.arange(STEPS) < torch.tensor([14, 14, 9, 5, 14, 3, 14])[:, None]
    mask[4, 6] = False
    resets[0, 5] = resets[1, [3, 8]] = resets[6, 0] = True
    units[~mask], targets[~mask] = torch.nan, 1e30
    return units, targets, mask, resets


def ols(batches: list[Batch], unit: int, target: int, lags: int, own: int, first: int, warm: int, center: str):
    """The pooled regression with one dummy for each mean, from explicit rows."""
    y, own_past, past, group, item = [], [], [], [], []
    for number, (units, targets, mask, resets) in enumerate(batches):
        for b in range(len(units)):
            begin = 0
            for t in range(units.shape[1]):
                if not mask[b, t]:
                    begin = t + 1
                    continue
                begin = t if resets[b, t] else begin
                if t - begin < max(own, first + lags - 1) + warm:
                    continue
                y.append(float(targets[b, t, target]))
                own_past.append([float(targets[b, t - lag, target]) for lag in range(1, own + 1)])
                past.append([float(units[b, t - lag, unit]) for lag in range(first, first + lags)])
                group.append((number, {"step": t, "batch": 0, "item": b}[center]))
                item.append((number, b))
    names = sorted(set(group))
    dummies = np.eye(len(names))[[names.index(g) for g in group]]
    design = np.column_stack([np.array(past), np.array(own_past).reshape(len(y), -1), dummies])
    full = sm.OLS(np.array(y), design).fit()
    return full, sm.OLS(np.array(y), design[:, lags:]).fit(), item


def streamed(batches: list[Batch], nulls: int = 1, **design) -> PanelGranger:
    panel = PanelGranger(UNITS, TARGETS, PanelDesign(**design), nulls=nulls)
    for units, targets, mask, resets in batches:
        panel.update(units, targets, mask=mask, resets=resets)
    return panel


@pytest.mark.parametrize("center", ["step", "batch", "item"])
@pytest.mark.parametrize(("lags", "own", "first", "warm"), [(1, 1, 1, 0), (2, 2, 1, 0), (3, 1, 1, 1), (2, 3, 0, 2)])
@pytest.mark.parametrize("kind", ["whole", "ragged", "offset"])
def test_equals_explicit_regressions(kind: str, lags: int, own: int, first: int, warm: int, center: str) -> None:
    make = {"whole": batch, "ragged": ragged, "offset": lambda: batch(1e4)}[kind]
    batches = [make() for _ in range(4)]
    options = {"lags": lags, "own_lags": own, "first_lag": first, "warm_up": warm, "center": center}
    got = streamed(batches, **options, nulls=0).result()
    for unit in range(UNITS):
        for target in range(TARGETS):
            full, small, _ = ols(batches, unit, target, lags, own, first, warm, center)
            F, p_value, _ = full.compare_f_test(small)
            at = target, unit
            loose = 1e-8 if kind != "offset" else 1e-6  # the regression on raw columns is the weaker one there
            np.testing.assert_allclose(got.statistic[at], F, rtol=loose)
            np.testing.assert_allclose(got.log_p[at], np.log(p_value), rtol=loose, atol=loose)
            np.testing.assert_allclose(got.geweke[at], np.log(small.ssr / full.ssr), rtol=loose, atol=1e-10)
            np.testing.assert_allclose(got.partial_r2[at], 1 - full.ssr / small.ssr, rtol=loose, atol=1e-10)
            assert got.df1[at] == lags
            assert got.df2[at] == full.df_resid


def test_lengths_are_a_mask() -> None:
    units, targets, _, _ = batch()
    lengths = torch.tensor([14, 3, 9, 0, 14, 6, 5])
    one, other = PanelGranger(UNITS, TARGETS), PanelGranger(UNITS, TARGETS)
    one.update(units, targets, lengths=lengths)
    other.update(units, targets, mask=torch.arange(STEPS) < lengths[:, None])
    assert torch.equal(one.result().statistic, other.result().statistic)
    assert one.rows[0] == (lengths - 1).clamp_min(0).sum()


def test_units_go_in_blocks_of_bounded_memory(monkeypatch) -> None:
    parts = [ragged() for _ in range(2)]
    expected = streamed(parts, lags=2).result()
    monkeypatch.setattr("lightning_slim.statistics.panel_rows.BLOCK", 2 * ITEMS * STEPS * 2)  # two units at once
    torch.testing.assert_close(streamed(parts, lags=2).result(), expected, rtol=1e-12, atol=1e-14)


def test_dead_units_and_targets_and_copies_of_the_target_tell_nothing() -> None:
    units, targets, _, _ = batch()
    units[..., 0], targets[..., 1] = 0.1, 1e6 / 3
    units[..., 1] = torch.arange(STEPS) / 3.0  # follows the position only
    units[..., 2] = targets[..., 0]
    panel = PanelGranger(UNITS, TARGETS)
    panel.update(units, targets)
    got = panel.result()
    assert not got.statistic.any()
    assert not got.geweke.any()
    assert got.p_value.eq(1).all()


def test_a_lag_that_is_a_combination_of_others_costs_no_degree_of_freedom() -> None:
    """A unit that alternates: its second lag is its first, negated."""
    sign = torch.tensor([1.0, -1.0]).repeat(STEPS // 2).double()
    units = randn(40, 1, 1) * sign[:, None]
    panel = PanelGranger(1, 1, PanelDesign(lags=2), nulls=0)
    panel.update(units, randn(40, STEPS, 1))
    assert panel.result().df1.item() == 1


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale: float) -> None:
    parts = [batch() for _ in range(2)]
    scaled = [(units * scale, targets / scale, *rest) for units, targets, *rest in parts]
    torch.testing.assert_close(
        streamed(scaled, lags=2).result(), streamed(parts, lags=2).result(), rtol=1e-9, atol=1e-12
    )


def test_nothing_seen_is_defined() -> None:
    got = PanelGranger(2, 3).result()
    assert got.p_value.eq(1).all()
    assert got.inflation.eq(1).all()


def test_a_batch_of_one_item_has_no_false_pairs() -> None:
    panel = PanelGranger(1, 1, PanelDesign(center="batch"), nulls=2)
    panel.update(randn(1, 50, 1), randn(1, 50, 1))
    assert panel.rows.tolist() == [49, 0, 0]
    assert panel.result().inflation.item() == 1


def test_series_that_are_too_short_and_designs_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"5 steps of past .* need at least 6 steps, got 5: record longer series"):
        PanelGranger(1, 1, PanelDesign(lags=3, warm_up=2)).update(randn(2, 5, 1), randn(2, 5, 1))
    with pytest.raises(ValueError, match=r"lags of at least 1, .* got lags=0"):
        PanelDesign(lags=0)
    with pytest.raises((ValueError, TypeCheckError), match="center"):
        PanelDesign(center="time")
    with pytest.raises(ValueError, match=r"made for 2 targets, got 1"):
        PanelGranger(1, 2).update(randn(2, 9, 1), randn(2, 9, 1))


def test_streams_of_other_designs_do_not_merge() -> None:
    assert PanelDesign(lags=2) == PanelDesign(lags=2, own_lags=2)
    with pytest.raises(ValueError, match=r"Streams merge when they have one design: .*'step'.*, got .*'batch'"):
        PanelGranger(1, 1).merge(PanelGranger(1, 1, PanelDesign(center="batch")))
    with pytest.raises(ValueError, match=r"Streams merge when they have one design: .*lags=1.*, got .*lags=2"):
        DumitrescuHurlin(1, 1).merge(DumitrescuHurlin(1, 1, PanelDesign(lags=2)))


def test_steps_without_a_whole_past_are_told() -> None:
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 1]]).bool()
    resets = torch.tensor([[0, 0, 0, 0, 0, 1, 0]]).bool()
    assert whole_past(mask, resets, 1).tolist() == [[False, True, False, False, True, False, True]]
    assert whole_past(mask, resets, 0).equal(mask)


def test_distinct_rows_of_windows_are_counted_once() -> None:
    for starts in (torch.randint(300, (40,)), torch.arange(0, 200, 3), torch.tensor([], dtype=torch.long)):
        seen = {t for start in starts.tolist() for t in range(start + 3, start + 20)}
        assert distinct_rows(starts, steps=20, past=3) == len(seen)


# --- size and power


def rejections(kind: str, steps: int, repeats: int, nulls: int = 1, center: str = "step") -> float:
    """Share of p-values below 0.05, over panels of 256 sequences in 4 batches."""
    found = []
    for _ in range(repeats):
        panel = PanelGranger(32, 1, PanelDesign(lags=2, center=center), nulls=nulls)
        for _ in range(4):
            panel.update(*null_world(kind, 64, steps, 32))
        found.append((panel.result().p_value < 0.05).double().mean())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("kind", ["independent", "feedback"])
def test_of_many_pairs_without_a_cause_one_in_twenty_is_rejected(kind: str) -> None:
    for nulls in (0, 1):
        panel = PanelGranger(60, 60, PanelDesign(lags=2), nulls=nulls)
        for _ in range(4):
            panel.update(*null_pairs(kind, 64, 16, 60))
        assert 0.03 <= (panel.result().p_value < 0.05).double().mean() <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("steps", [8, 32])
@pytest.mark.parametrize("kind", ["independent", "echo", "feedback", "profile"])
def test_where_nothing_causes_one_in_twenty_is_rejected(kind: str, steps: int) -> None:
    assert 0.03 <= rejections(kind, steps, 40, nulls=0) <= 0.07
    assert 0.02 <= rejections(kind, steps, 40) <= 0.07  # calibration only ever makes F smaller: echoes, 0.029


def test_the_means_of_items_would_find_causes_where_there_are_none() -> None:
    """Why "step" is the default and "item" is not: the Nickell bias under feedback."""
    assert rejections("feedback", 8, 3, center="item", nulls=0) > 0.9
    assert rejections("feedback", 8, 3) < 0.15


@pytest.mark.slow
def test_calibration_repairs_dependence_within_sequences_that_is_not_modelled() -> None:
    """Two waves of one period go together within a sequence, though phases have nothing in common: F is too large."""
    raw = rejections("waves", 24, 40, nulls=0)
    assert raw > 0.1
    assert 0.03 <= rejections("waves", 24, 40) <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 4, 16])
def test_overlapping_windows_count_once(stride: int) -> None:
    """Windows of one series: each step is in several of them, and is one observation."""
    starts, raw, repaired = torch.arange(0, 2000 - 31, stride), [], []
    for _ in range(40):
        x, y = autoregressive(1, 2000, 16, 0.7)[0], autoregressive(1, 2000, 1, 0.7)[0]
        index = starts[:, None] + torch.arange(32)
        panel = PanelGranger(16, 1, PanelDesign(lags=2, center="batch"), nulls=0)
        panel.update(x[index], y[index])
        raw.append((panel.result().p_value < 0.05).double().mean())
        distinct = distinct_rows(starts, 32, panel.design.past)
        repaired.append((panel.result(distinct).p_value < 0.05).double().mean())
    assert float(torch.stack(raw).mean()) > 0.1
    assert 0.03 <= float(torch.stack(repaired).mean()) <= 0.07


@pytest.mark.slow
def test_states_of_trained_networks_and_outputs_of_other_items_are_no_cause() -> None:
    """GRUs that read digits row by row: with the items of one side shuffled, nothing is to be found."""
    digits = load_digits()
    images, classes = torch.tensor(digits.images[:1200] / 16 - 0.3).float(), torch.tensor(digits.target[:1200])
    raw, calibrated = [], []
    for seed in range(6):
        torch.manual_seed(seed)
        recurrent, head = torch.nn.GRU(8, 64, batch_first=True), torch.nn.Linear(64, 10)
        optimizer = torch.optim.Adam([*recurrent.parameters(), *head.parameters()], 5e-3)
        for _ in range(300):
            some = torch.randint(1200, (64,))
            loss = torch.nn.functional.cross_entropy(head(recurrent(images[some])[0][:, -1]), classes[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            states = recurrent(images)[0]
            outputs = head(states)
        states = states[torch.randperm(1200)]
        for nulls, rates in ((0, raw), (4, calibrated)):
            panel = PanelGranger(64, 10, nulls=nulls)
            for x, y in zip(states.split(64), outputs.split(64), strict=True):
                panel.update(x, y)
            rates.append((panel.result().p_value < 0.05).double().mean())
    assert torch.stack(raw).mean() > 0.1
    assert 0.03 <= torch.stack(calibrated).mean() <= 0.07


def planted_aucs(make, items: int, steps: int, lags: int, repeats: int) -> tuple[float, float, float]:
    """AUC of causes against the rest, of causes and copies against the rest, and the share of echoes rejected."""
    aucs = []
    for _ in range(repeats):
        units, y, roles = make(items, steps)
        panel = PanelGranger(units.shape[-1], 1, PanelDesign(lags))
        for x, target in zip(units.split(32), y.split(32), strict=True):
            panel.update(x, target)
        got = panel.result()
        cause, useful = (torch.zeros(units.shape[-1], dtype=torch.bool) for _ in range(2))
        cause[roles["causal"]] = useful[roles["causal"]] = useful[roles["copy"]] = True
        echoes = (got.p_value[0, roles["echo"]] < 0.05).double().mean()
        aucs.append([auc(got.geweke[0], cause), auc(got.geweke[0], useful), float(echoes)])
    return tuple(torch.tensor(aucs).mean(0).tolist())


def test_planted_causes_are_recovered() -> None:
    """Copies of strong causes come before weak causes, which bounds the first: 0.895 over 40 systems, 0.909 with
    sixteen times the data. The standard error of the mean over 40 is 0.003.
    """
    causes, useful, echoes = planted_aucs(planted_recurrent, 32, 24, 1, 40)
    assert causes >= 0.88
    assert useful >= 0.95
    assert echoes <= 0.15


def test_planted_input_series_are_recovered() -> None:
    """0.907 over 20 systems, with a standard error of 0.002."""
    causes, useful, echoes = planted_aucs(planted_inputs, 128, 40, 2, 20)
    assert causes >= 0.90
    assert useful >= 0.97
    assert echoes <= 0.15
