"""Tensors in, tensors out; knows no layer, no unit, no trainer."""

from lightning_slim.statistics.distributions import chi2_log_sf, f_log_sf
from lightning_slim.statistics.granger import ForwardSelection, Regression, forward_selection
from lightning_slim.statistics.least_squares import Image, least_squares_image
from lightning_slim.statistics.moments import Moments, merged
from lightning_slim.statistics.series import with_lags

__all__ = [
    "ForwardSelection",
    "Image",
    "Moments",
    "Regression",
    "chi2_log_sf",
    "f_log_sf",
    "forward_selection",
    "least_squares_image",
    "merged",
    "with_lags",
]
