"""Forward selection against regressions run by statsmodels and numpy, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from torch import Tensor

from lightning_slim.statistics import ForwardSelection, Moments, Regression, forward_selection, with_lags


def moments_of(rows: Tensor) -> Moments:
    moments = Moments(rows.shape[1])
    moments.update(rows)
    return moments


def regression(columns: Tensor, targets: Tensor) -> Regression:
    """Population moments of a regression of targets on columns."""
    both = moments_of(torch.cat([columns, targets], 1)).covariance
    k = columns.shape[1]
    return Regression(both[:k, :k], both[:k, k:], float(both.diagonal()[k:].sum()))


def explained(columns: np.ndarray, targets: np.ndarray) -> float:
    """Share of the targets' total variance that OLS with a constant explains (statsmodels)."""
    fits = [sm.OLS(target, sm.add_constant(columns)).fit() for target in targets.T]
    return 1 - sum(fit.ssr for fit in fits) / sum(fit.centered_tss for fit in fits)


def greedy(blocks: list[np.ndarray], targets: np.ndarray) -> tuple[list[int], list[float]]:
    """Forward selection by brute force: one OLS for every candidate at every step."""
    order: list[int] = []
    shares = [0.0]
    while len(order) < len(blocks):
        rest = [i for i in range(len(blocks)) if i not in order]
        share = [explained(np.hstack([blocks[j] for j in [*order, i]]), targets) for i in rest]
        order.append(rest[int(np.argmax(share))])
        shares.append(max(share))
    return order, list(np.diff(shares))


def check(selection: ForwardSelection, order: list[int], gains: list[float]) -> None:
    assert selection.order.tolist() == order
    np.testing.assert_allclose(selection.gains, gains, atol=2e-5)


def test_order_and_gains_equal_brute_force_ols() -> None:
    x = torch.randn(400, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    y = x @ torch.randn(7, 3, dtype=torch.float64) + torch.randn(400, 3)
    check(forward_selection([regression(x, y)], 7), *greedy([x[:, [i]].numpy() for i in range(7)], y.numpy()))


AWKWARD = ("plain", "scales", "far", "dead", "copies", "near copies", "perfect", "few rows")


def awkward(kind: str) -> tuple[Tensor, Tensor]:
    """Seven units of two columns, and three targets; sums that a computer makes of them lose digits."""
    rows = 16 if kind == "few rows" else 300
    x = torch.randn(rows, 14, dtype=torch.float64) @ torch.randn(14, 14, dtype=torch.float64)
    y = x @ torch.randn(14, 3, dtype=torch.float64) + 3 * torch.randn(rows, 3)
    if kind == "scales":
        x, y = x * torch.logspace(-5, 5, 14, dtype=torch.float64), y * 1e12
    if kind == "far":
        x, y = ((values * 2**20).round() / 2**20 + 1e7 for values in (x, y))
    if kind == "dead":
        x[:, 3], x[:, 8:10] = 0.1, 1e7 / 3
    if kind == "copies":
        x[:, 4:6], x[:, 9] = 7 * x[:, :2], -x[:, 2]
    if kind == "near copies":
        x[:, 4:6] = x[:, :2] + 1e-2 * x[:, 4:6]
    if kind == "perfect":
        y = x[:, [0, 3, 7]] * torch.tensor([1.0, -2.0, 3.0])
    return x, y


def penalised(x: Tensor, y: Tensor, chosen: list[int]) -> float:
    """Share of `y` that the ridge regression of `forward_selection` explains, by least squares of augmented rows."""
    x, y = ((values - values.mean(0)).numpy() for values in (x, y))
    alive = x.std(0) > 1e-12
    x = np.where(alive, x, 0) / np.where(alive, x.std(0), 1) / len(x) ** 0.5
    y, columns = y / len(y) ** 0.5, [2 * unit + lag for unit in chosen for lag in range(2)]
    design = np.vstack([x[:, columns], 1e-3 * np.eye(len(columns))])
    target = np.vstack([y, np.zeros((len(columns), 3))])
    left = target - design @ np.linalg.lstsq(design, target, rcond=None)[0]
    return 1 - float((left**2).sum() / (y**2).sum())


@pytest.mark.parametrize("kind", AWKWARD)
def test_every_choice_equals_explicit_refits(kind: str) -> None:
    x, y = awkward(kind)
    chosen, before = [], 0.0
    for unit, gain in zip(*(part.tolist() for part in forward_selection([regression(x, y)], 7)), strict=True):
        rest = [other for other in range(7) if other not in chosen]
        gains = {other: penalised(x, y, [*chosen, other]) - before for other in rest}
        tolerance = 1e-9 if kind != "few rows" else 1e-8  # more columns than rows: the penalty alone decides
        assert gains[unit] >= max(gains.values()) - tolerance
        assert abs(gain - gains[unit]) < tolerance
        chosen.append(unit)
        before += gains[unit]


def test_with_lags_a_unit_is_its_present_and_past() -> None:
    series = torch.randn(5, 80, 4, dtype=torch.float64).cumsum(1) * 0.1 + torch.randn(5, 80, 4)
    table = with_lags(series, lags=2)
    y = table[:, 0, 2:3] + 0.5 * table[:, 3, 1:2] + 0.3 * torch.randn(len(table), 1)
    selection = forward_selection([regression(table.flatten(1), y)], 4)
    check(selection, *greedy([table[:, i].numpy() for i in range(4)], y.numpy()))
    assert set(selection.order[:2].tolist()) == {0, 3}


def test_the_first_choices_are_those_of_the_whole_order() -> None:
    x = torch.randn(300, 12, dtype=torch.float64)
    both = [regression(x, x @ torch.randn(12, 2, dtype=torch.float64)), regression(x, x[:, :2])]
    whole = forward_selection(both, 6)
    for keep in (0, 1, 4, 6):
        first = forward_selection(both, 6, keep=keep)
        assert torch.equal(first.order, whole.order[:keep])
        torch.testing.assert_close(first.gains, whole.gains[:keep])  # products of other strides
    with pytest.raises(ValueError, match="expected to keep 0 to 6 units, got 7"):
        forward_selection(both, 6, keep=7)


def test_several_readers_are_averaged() -> None:
    x = torch.randn(300, 3, dtype=torch.float64)
    first, second = regression(x, x[:, :1] * 5), regression(x, x[:, 1:2])
    selection = forward_selection([first, second], 3)
    assert selection.order[:2].sort().values.tolist() == [0, 1]
    np.testing.assert_allclose(selection.gains[:2].sum(), 1.0, atol=1e-4)


def test_copies_of_a_chosen_unit_gain_nothing() -> None:
    """Where leave-one-out calls every copy useless, selection takes exactly one of each."""
    causes = torch.randn(1000, 3, dtype=torch.float64)
    copies = causes.repeat_interleave(3, dim=1) + 0.05 * torch.randn(1000, 9)
    selection = forward_selection([regression(copies, causes)], 9)
    assert sorted((selection.order[:3] // 3).tolist()) == [0, 1, 2]
    assert selection.gains[3:].max() < 0.01


def test_dead_and_collinear_units_are_harmless() -> None:
    x = torch.randn(200, 4, dtype=torch.float64)
    x[:, 1], x[:, 2] = 0.0, x[:, 0]
    selection = forward_selection([regression(x, x[:, [0, 3]])], 4)
    assert selection.gains.isfinite().all()
    assert selection.order[:2].sort().values.tolist() in ([0, 3], [2, 3])
    np.testing.assert_allclose(selection.gains[2:], 0, atol=1e-5)


@pytest.mark.parametrize("lags", [0, 1, 3])
def test_lagged_columns_are_shifted_copies_within_an_item(lags: int) -> None:
    series = torch.arange(2 * 6 * 2, dtype=torch.float64).view(2, 6, 2)
    table = with_lags(series, lags)
    assert table.shape == (2 * (6 - lags), 2, lags + 1)
    expected = torch.stack([series[1, lags + 1 - lag] for lag in range(lags + 1)], -1)  # item 1, second usable step
    assert torch.equal(table[6 - lags + 1], expected)


def test_too_short_series_are_refused() -> None:
    with pytest.raises(ValueError, match="8 lags need at least 9 steps, got 8: record longer series or lower `lags`"):
        with_lags(torch.randn(2, 8, 3), lags=8)
