"""Tensors in, tensors out; knows no layer, no unit, no trainer."""

from lightning_slim.statistics.anova import Anova
from lightning_slim.statistics.backward import BackwardElimination, backward_elimination
from lightning_slim.statistics.bivariate import GrangerTest, Tested, granger_test
from lightning_slim.statistics.chi_square import ChiSquare
from lightning_slim.statistics.clustered import ClusteredPanel
from lightning_slim.statistics.conditional import (
    ConditionalTest,
    RidgeImportance,
    leave_one_out_test,
    ridge_leave_one_out,
)
from lightning_slim.statistics.contingency import Contingency, quantile_edges
from lightning_slim.statistics.correlation import Correlation, MultilabelAnova
from lightning_slim.statistics.distributions import chi2_log_sf, f_log_sf
from lightning_slim.statistics.dumitrescu_hurlin import DumitrescuHurlin, DumitrescuHurlinTest
from lightning_slim.statistics.frequency import Frequency
from lightning_slim.statistics.granger import ForwardSelection, Regression, forward_selection
from lightning_slim.statistics.information import MutualInformation, mutual_information
from lightning_slim.statistics.joint import JointMoments
from lightning_slim.statistics.kruskal import KruskalWallis, kruskal_wallis
from lightning_slim.statistics.lag_order import LagOrder, Stationarity, common_lag_order, stationarity
from lightning_slim.statistics.least_squares import Image, least_squares_image
from lightning_slim.statistics.leave_one_out import leave_one_out
from lightning_slim.statistics.moments import Moments, merged
from lightning_slim.statistics.multiple_testing import adjusted_log_p, adjusted_p
from lightning_slim.statistics.panel import PanelGranger, PanelTest
from lightning_slim.statistics.panel_rows import PanelDesign, distinct_rows
from lightning_slim.statistics.preprocessing import differences, over_rolling_rms
from lightning_slim.statistics.screening import Screening
from lightning_slim.statistics.series import thinned, with_lags
from lightning_slim.statistics.spectral import BivariateVAR, SpectralCausality, fit_var, spectral_causality
from lightning_slim.statistics.spread import MeanAndVariance, Spread
from lightning_slim.statistics.streaming import Accumulator, Pivoted

__all__ = [
    "Accumulator",
    "Anova",
    "BackwardElimination",
    "BivariateVAR",
    "ChiSquare",
    "ClusteredPanel",
    "ConditionalTest",
    "Contingency",
    "Correlation",
    "DumitrescuHurlin",
    "DumitrescuHurlinTest",
    "ForwardSelection",
    "Frequency",
    "GrangerTest",
    "Image",
    "JointMoments",
    "KruskalWallis",
    "LagOrder",
    "MeanAndVariance",
    "Moments",
    "MultilabelAnova",
    "MutualInformation",
    "PanelDesign",
    "PanelGranger",
    "PanelTest",
    "Pivoted",
    "Regression",
    "RidgeImportance",
    "Screening",
    "SpectralCausality",
    "Spread",
    "Stationarity",
    "Tested",
    "adjusted_log_p",
    "adjusted_p",
    "backward_elimination",
    "chi2_log_sf",
    "common_lag_order",
    "differences",
    "distinct_rows",
    "f_log_sf",
    "fit_var",
    "forward_selection",
    "granger_test",
    "kruskal_wallis",
    "least_squares_image",
    "leave_one_out",
    "leave_one_out_test",
    "merged",
    "mutual_information",
    "over_rolling_rms",
    "quantile_edges",
    "ridge_leave_one_out",
    "spectral_causality",
    "stationarity",
    "thinned",
    "with_lags",
]
