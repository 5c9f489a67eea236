"""Images from moments equal scikit-learn's regressions on the rows."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.linear_model import LinearRegression, Ridge

from lightning_slim.statistics import Moments, least_squares_image

KEPT, REMOVED = torch.tensor([0, 2, 3]), torch.tensor([1, 4])


def data() -> tuple[torch.Tensor, Moments]:
    rows = torch.randn(400, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 3
    moments = Moments(5)
    moments.update(rows)
    return rows, moments


def test_without_a_ridge_it_is_ordinary_least_squares() -> None:
    rows, moments = data()
    fit = LinearRegression().fit(rows[:, KEPT], rows[:, REMOVED])
    image = least_squares_image(moments, KEPT, REMOVED, ridge=0.0)
    np.testing.assert_allclose(image.weight, fit.coef_.T, rtol=1e-8)
    np.testing.assert_allclose(image.constant, fit.intercept_, rtol=1e-7)


def test_without_an_intercept_it_goes_through_the_origin() -> None:
    rows, moments = data()
    fit = LinearRegression(fit_intercept=False).fit(rows[:, KEPT], rows[:, REMOVED])
    image = least_squares_image(moments, KEPT, REMOVED, ridge=0.0, intercept=False)
    np.testing.assert_allclose(image.weight, fit.coef_.T, rtol=1e-8)
    assert not image.constant.any()


def test_the_ridge_is_relative_to_the_mean_variance() -> None:
    rows, moments = data()
    alpha = 0.1 * len(rows) * float(moments.covariance.diagonal().mean())
    fit = Ridge(alpha=alpha).fit(rows[:, KEPT], rows[:, REMOVED])
    np.testing.assert_allclose(least_squares_image(moments, KEPT, REMOVED, ridge=0.1).weight, fit.coef_.T, rtol=1e-8)
