"""Tensors in, tensors out; knows no layer, no unit, no trainer."""

from lightning_slim.statistics.bivariate import GrangerTest, Tested, granger_test
from lightning_slim.statistics.granger import ForwardSelection, Regression, forward_selection
from lightning_slim.statistics.least_squares import Image, least_squares_image
from lightning_slim.statistics.moments import Moments, merged
from lightning_slim.statistics.multiple_testing import adjusted_log_p, adjusted_p
from lightning_slim.statistics.preprocessing import differences, over_rolling_rms
from lightning_slim.statistics.series import with_lags
from lightning_slim.statistics.tails import chi2_log_sf, f_log_sf

__all__ = [
    "ForwardSelection",
    "GrangerTest",
    "Image",
    "Moments",
    "Regression",
    "Tested",
    "adjusted_log_p",
    "adjusted_p",
    "chi2_log_sf",
    "differences",
    "f_log_sf",
    "forward_selection",
    "granger_test",
    "least_squares_image",
    "merged",
    "over_rolling_rms",
    "with_lags",
]
