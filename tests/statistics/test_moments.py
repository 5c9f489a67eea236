"""Streaming moments equal the ones numpy computes from all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_slim.statistics import Moments, Spread


def streamed(rows: torch.Tensor, batch: int = 50) -> Moments:
    moments = Moments(rows.shape[1])
    for part in rows.split(batch):
        moments.update(part)
    return moments


@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 1e-6), (100.0, 1e-6), (1e4, 1e-3)])
def test_covariance_and_mean_equal_numpys_also_beside_large_means(offset: float, tolerance: float) -> None:
    rows = torch.randn(500, 6) @ torch.randn(6, 6) + offset
    moments = streamed(rows)
    exact = rows.double().numpy()
    np.testing.assert_allclose(moments.covariance, np.cov(exact.T, bias=True), atol=tolerance * float(rows.var()))
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-6, atol=1e-6)


def test_float64_rows_are_exact() -> None:
    rows = torch.randn(500, 4, dtype=torch.float64) + 10
    np.testing.assert_allclose(streamed(rows).covariance, np.cov(rows.T.numpy(), bias=True), rtol=1e-11)


def test_streams_merge_by_addition() -> None:
    rows = torch.randn(300, 5, dtype=torch.float64)
    merged, second = streamed(rows[:120]), streamed(rows[120:])
    merged.merge(second)
    torch.testing.assert_close(merged.covariance, streamed(rows).covariance, rtol=1e-12, atol=1e-14)


def test_dropping_columns_equals_never_having_had_them() -> None:
    rows, kept = torch.randn(300, 5, dtype=torch.float64), torch.tensor([0, 3])
    moments = streamed(rows)
    moments.keep(kept)
    torch.testing.assert_close(moments.covariance, streamed(rows[:, kept]).covariance, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e7])
def test_covariance_keeps_its_digits_beside_any_mean_and_at_any_scale(offset: float, scale: float) -> None:
    rows = (torch.randn(500, 4, dtype=torch.float64) * 2**20).round() / 2**20  # the offset rounds nothing away
    expected = np.cov(rows.T.numpy(), bias=True) * scale**2
    got = streamed((rows + offset) * scale).covariance
    np.testing.assert_allclose(got, expected, rtol=1e-9 if scale == 1 else 1e-6, atol=1e-10 * scale**2)


def test_a_column_that_is_not_finite_is_as_dead_and_others_are_as_ever() -> None:
    rows, others = torch.randn(100, 4, dtype=torch.float64), torch.tensor([0, 1, 3])
    expected = streamed(rows[:, others])
    rows[60, 2] = torch.inf
    moments = streamed(rows)
    assert not moments.covariance[2].any()
    assert not moments.covariance[:, 2].any()
    assert moments.mean[2] == moments.variance[2] == 0
    torch.testing.assert_close(moments.covariance[others][:, others], expected.covariance, rtol=1e-12, atol=1e-14)


def test_a_decay_counts_whatever_comes_next() -> None:
    """Rows of weight 1/2 and rows of weight 1: after a decay come a batch, a merge either way, a sum over ranks."""
    old, new = torch.randn(50, 3, dtype=torch.float64), torch.randn(70, 3, dtype=torch.float64) + 5
    weights = np.concatenate([np.full(50, 0.5), np.ones(70)])
    expected = np.cov(torch.cat([old, new]).T.numpy(), aweights=weights, ddof=0)
    results = []
    for way in ("update", "merge", "merge into", "sums", "state"):
        one, other = streamed(old), streamed(new)
        one.decay(0.5)
        if way == "update":
            one.update(new)
        elif way == "merge":
            one.merge(other)
        elif way == "merge into":
            other.merge(one)
            one = other
        elif way == "sums":
            other.move_pivots(one.pivots)
            for name, tensor in one.sums.items():
                tensor += other.sums[name]
        else:
            loaded = Moments(0)
            loaded.load_state_dict(one.state_dict())
            loaded.update(new)
            one = loaded
        results.append(one)
    for one in results:
        np.testing.assert_allclose(one.covariance, expected, rtol=1e-10, atol=1e-12)
        assert one.count.item() == 95


def test_decay_weighs_old_rows_less() -> None:
    moments = Moments(1)
    moments.update(torch.tensor([[0.0], [0.0]]))
    moments.decay(0.5)
    moments.update(torch.tensor([[3.0]]))
    assert moments.mean.item() == pytest.approx(3 / 2)  # weights 0.5, 0.5 and 1


def test_variance_is_the_diagonal_of_the_covariance_and_never_negative() -> None:
    moments = streamed(torch.randn(300, 5) + 3)
    torch.testing.assert_close(moments.variance, moments.covariance.diagonal(), rtol=1e-12, atol=0)
    assert (streamed(torch.full((7, 400), 0.1) * torch.arange(400)).variance >= 0).all()


def test_nothing_seen_is_zero_and_not_nan() -> None:
    assert not Moments(3).covariance.any()
    assert not Moments(3).mean.any()


def test_state_survives_a_pickle_free_checkpoint(tmp_path) -> None:
    moments, loaded = streamed(torch.randn(40, 3)), Moments(0)
    torch.save(moments.state_dict(), tmp_path / "moments.pt")
    loaded.load_state_dict(torch.load(tmp_path / "moments.pt", weights_only=True))
    assert torch.equal(moments.covariance, loaded.covariance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spread_is_that_of_numpy_also_beside_large_means(dtype: torch.dtype) -> None:
    spread, rows = Spread(5), (torch.randn(400, 5) + torch.tensor([0.0, 1.0, 10.0, 100.0, 1e4])).to(dtype)
    for part in rows.split(70):
        spread.update(part)
    exact = rows.double().numpy()
    np.testing.assert_allclose(spread.result().mean, exact.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(spread.result().variance, exact.var(0), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(spread.mean_square, (exact**2).mean(0), rtol=1e-6)


def test_counts_spread_as_the_one_hot_rows_that_they_stand_for() -> None:
    rows = torch.nn.functional.one_hot(torch.randint(0, 4, (50,)), 6).double()
    counted, given = Spread(6), Spread(6)
    counted.update_one_hot(rows[:30].sum(0).long())
    counted.update(rows[30:])
    given.update(rows[:30])
    given.update_one_hot(rows[30:].sum(0).long())
    for spread in (counted, given):
        np.testing.assert_allclose(spread.result().mean, rows.numpy().mean(0), atol=1e-15)
        np.testing.assert_allclose(spread.result().variance, rows.numpy().var(0), atol=1e-15)
        np.testing.assert_allclose(spread.mean_square, rows.numpy().mean(0), atol=1e-15)
