"""Tensors in, tensors out; knows no layer, no unit, no trainer."""

from lightning_slim.statistics.backward import BackwardElimination, backward_elimination
from lightning_slim.statistics.bivariate import GrangerTest, Tested, granger_test
from lightning_slim.statistics.conditional import (
    ConditionalTest,
    RidgeImportance,
    leave_one_out_test,
    ridge_leave_one_out,
)
from lightning_slim.statistics.granger import ForwardSelection, Regression, forward_selection
from lightning_slim.statistics.lag_order import LagOrder, Stationarity, common_lag_order, stationarity
from lightning_slim.statistics.least_squares import Image, least_squares_image
from lightning_slim.statistics.moments import Moments, merged
from lightning_slim.statistics.multiple_testing import adjusted_log_p, adjusted_p
from lightning_slim.statistics.preprocessing import differences, over_rolling_rms
from lightning_slim.statistics.series import with_lags
from lightning_slim.statistics.tails import chi2_log_sf, f_log_sf

__all__ = [
    "BackwardElimination",
    "ConditionalTest",
    "ForwardSelection",
    "GrangerTest",
    "Image",
    "LagOrder",
    "Moments",
    "Regression",
    "RidgeImportance",
    "Stationarity",
    "Tested",
    "adjusted_log_p",
    "adjusted_p",
    "backward_elimination",
    "chi2_log_sf",
    "common_lag_order",
    "differences",
    "f_log_sf",
    "forward_selection",
    "granger_test",
    "least_squares_image",
    "leave_one_out_test",
    "merged",
    "over_rolling_rms",
    "ridge_leave_one_out",
    "stationarity",
    "with_lags",
]
