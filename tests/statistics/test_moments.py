"""Streaming moments equal the ones numpy computes from all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_slim.statistics import Moments


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
