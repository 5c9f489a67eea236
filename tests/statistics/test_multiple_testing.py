"""Adjusted p-values equal statsmodels' `multipletests`, and hold their level."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from statsmodels.stats.multitest import multipletests

from lightning_slim.statistics import adjusted_log_p, adjusted_p

METHODS = {"benjamini_hochberg": "fdr_bh", "benjamini_yekutieli": "fdr_by", "holm": "holm"}


def p_values(kind: str) -> torch.Tensor:
    p = torch.rand(300, dtype=torch.float64)
    return {
        "uniform": p,
        "small": p**8,
        "ties": (p * 10).round() / 10,
        "ends": torch.cat([p, torch.zeros(3), torch.ones(3)]),
        "one": p[:1],
    }[kind].double()


@pytest.mark.parametrize("kind", ["uniform", "small", "ties", "ends", "one"])
@pytest.mark.parametrize("method", METHODS)
def test_adjusted_p_values_equal_statsmodels(method, kind: str) -> None:
    p = p_values(kind)
    expected = multipletests(p.numpy(), method=METHODS[method])[1]
    np.testing.assert_allclose(adjusted_p(p, method), expected, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_other_dimensions_are_families_of_their_own(method) -> None:
    p = torch.rand(2, 30, 2, dtype=torch.float64)
    result = adjusted_p(p, method, dim=1)
    for i in range(2):
        for j in range(2):
            expected = multipletests(p[i, :, j].numpy(), method=METHODS[method])[1]
            np.testing.assert_allclose(result[i, :, j], expected, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_p_values_too_small_for_a_float_keep_their_order(method) -> None:
    log_p = -torch.arange(1.0, 101.0, dtype=torch.float64) * 50
    adjusted = adjusted_log_p(log_p, method)
    assert (adjusted.diff() < 0).all()
    assert (adjusted >= log_p).all()
    assert adjusted.isfinite().all()


def test_other_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected p-values in \[0, 1\], got 2 others"):
        adjusted_p(torch.tensor([0.5, float("nan"), 1.5]))
    with pytest.raises(ValueError, match="expected logarithms of p-values, at most 0, got 1 others"):
        adjusted_log_p(torch.tensor([-0.5, 0.5]))


def test_nothing_to_adjust_is_nothing() -> None:
    assert adjusted_p(torch.zeros(3, 0)).shape == (3, 0)


@pytest.mark.parametrize("method", METHODS)
def test_the_level_holds(method) -> None:
    """Under the null any rejection is false; with 10 of 100 true effects, the share of false ones is held."""
    families = torch.rand(4000, 100, dtype=torch.float64)
    any_rejected = (adjusted_p(families, method) <= 0.05).any(1).double().mean()
    assert any_rejected < 0.06  # 0.05 plus three standard errors
    families[:, :10] **= 6
    rejected = adjusted_p(families, method) <= 0.05
    share = rejected[:, 10:].sum(1) / rejected.sum(1).clamp_min(1)
    assert share.double().mean() < 0.06


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shared", [0.7, -0.5], ids=["alike", "opposed"])
def test_the_level_holds_for_tests_that_depend_on_one_another(method, shared: float) -> None:
    """Families that share a factor; or of pairs that go against one another."""
    noise, factor = torch.randn(4000, 100, dtype=torch.float64), torch.randn(4000, 1, dtype=torch.float64)
    against = torch.cat([noise[:, :50], -0.9 * noise[:, :50] + 0.19**0.5 * noise[:, 50:]], 1)
    z = shared**0.5 * factor + (1 - shared) ** 0.5 * noise if shared > 0 else against
    z[:, :10] += 3
    rejected = adjusted_p(torch.special.ndtr(-z), method) <= 0.05
    false = rejected[:, 10:].sum(1)
    assert (false / rejected.sum(1).clamp_min(1)).mean() < 0.055
    assert rejected[:, :10].double().mean() > 0.1
