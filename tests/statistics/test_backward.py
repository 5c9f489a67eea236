"""Backward elimination against regressions run by numpy, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_slim.statistics import Moments, Regression, backward_elimination, forward_selection
from tests.statistics.test_granger import awkward


def regression(columns: Tensor, targets: Tensor) -> Regression:
    moments = Moments(columns.shape[1] + targets.shape[1])
    moments.update(torch.cat([columns, targets], 1))
    both, k = moments.covariance, columns.shape[1]
    return Regression(both[:k, :k], both[:k, k:], float(both.diagonal()[k:].sum()))


def unexplained(columns: np.ndarray, targets: np.ndarray) -> float:
    design = np.hstack([np.ones((len(targets), 1)), columns])
    left = targets - design @ np.linalg.lstsq(design, targets, rcond=None)[0]
    return float((left**2).sum() / ((targets - targets.mean(0)) ** 2).sum())


@pytest.mark.parametrize("width", [1, 3])
def test_order_and_losses_equal_refits(width: int) -> None:
    x = torch.randn(400, 6 * width, dtype=torch.float64) @ torch.randn(6 * width, 6 * width, dtype=torch.float64)
    y = x @ torch.randn(6 * width, 2, dtype=torch.float64) + 3 * torch.randn(400, 2)
    result = backward_elimination([regression(x, y)], 6, keep=1)
    left, share = list(range(6)), unexplained(x.numpy(), y.numpy())
    for unit, loss in zip(result.order.tolist(), result.losses.tolist(), strict=True):
        columns = {i: np.hstack([x[:, width * j : width * (j + 1)] for j in left if j != i]) for i in left}
        shares = {i: unexplained(columns[i], y.numpy()) for i in left}
        assert unit == min(shares, key=shares.__getitem__)
        np.testing.assert_allclose(loss, shares[unit] - share, rtol=1e-9)
        left.remove(unit)
        share = shares[unit]
    assert len(left) == 1


@pytest.mark.parametrize("kind", ["plain", "scales", "far", "near copies", "perfect"])
def test_losses_equal_refits_of_awkward_columns(kind: str) -> None:
    x, y = awkward(kind)
    result = backward_elimination([regression(x, y)], 7, keep=1)
    left = list(range(7))
    x, y = ((x - x.mean(0)) / x.std(0)).numpy(), (y - y.mean(0)).numpy()
    share = unexplained(x, y)
    for unit, loss in zip(result.order.tolist(), result.losses.tolist(), strict=True):
        left.remove(unit)
        after = unexplained(np.hstack([x[:, 2 * j : 2 * j + 2] for j in left]), y)
        assert abs(loss - (after - share)) < 1e-9
        share = after


def test_of_copies_one_is_left() -> None:
    causes = torch.randn(1000, 3, dtype=torch.float64)
    copies = causes.repeat_interleave(3, dim=1) + 0.05 * torch.randn(1000, 9)
    result = backward_elimination([regression(copies, causes)], 9, keep=3)
    kept = sorted(set(range(9)) - set(result.order.tolist()))
    assert [unit // 3 for unit in kept] == [0, 1, 2]
    chosen = forward_selection([regression(copies, causes)], 9).order[:3].tolist()
    assert sorted(unit // 3 for unit in chosen) == [0, 1, 2]


def test_dead_and_collinear_units_go_first_at_no_loss() -> None:
    x = torch.randn(300, 4, dtype=torch.float64) * torch.tensor([1.0, 1e-6, 1e6, 1.0])
    x = torch.cat([x, torch.zeros(300, 1), x[:, :1] * 2], 1)
    y = x[:, :4] / x[:, :4].std(0)
    result = backward_elimination([regression(x, y)], 6, keep=2)
    assert result.losses.isfinite().all()
    assert set(result.order[:2].tolist()) in ({4, 0}, {4, 5})
    np.testing.assert_allclose(result.losses, [0, 0, 0.25, 0.25], atol=0.02)


def test_several_readers_are_averaged_and_everything_may_go() -> None:
    x = torch.randn(300, 3, dtype=torch.float64)
    result = backward_elimination([regression(x, x[:, :1] * 5), regression(x, x[:, 1:2])], 3, keep=0)
    assert result.order[0] == 2
    np.testing.assert_allclose(result.losses.sum(), 1.0, atol=1e-2)
    assert len(backward_elimination([regression(x, x)], 3, keep=3).order) == 0
    with pytest.raises(ValueError, match="expected to keep 0 to 3 units, got 4"):
        backward_elimination([regression(x, x)], 3, keep=4)
