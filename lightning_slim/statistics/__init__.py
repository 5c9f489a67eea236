"""Tensors in, tensors out; knows no layer, no unit, no trainer."""

from lightning_slim.statistics.anova import Anova
from lightning_slim.statistics.chi_square import ChiSquare
from lightning_slim.statistics.clustered import ClusteredPanel
from lightning_slim.statistics.contingency import Contingency, quantile_edges
from lightning_slim.statistics.correlation import Correlation, MultilabelAnova
from lightning_slim.statistics.distributions import chi2_log_sf, f_log_sf
from lightning_slim.statistics.dumitrescu_hurlin import DumitrescuHurlin, DumitrescuHurlinTest
from lightning_slim.statistics.granger import ForwardSelection, Regression, forward_selection
from lightning_slim.statistics.information import MutualInformation, mutual_information
from lightning_slim.statistics.kruskal import KruskalWallis, kruskal_wallis
from lightning_slim.statistics.least_squares import Image, least_squares_image
from lightning_slim.statistics.moments import Moments, merged
from lightning_slim.statistics.panel import PanelGranger, PanelTest
from lightning_slim.statistics.panel_rows import PanelDesign, distinct_rows
from lightning_slim.statistics.screening import Screening
from lightning_slim.statistics.series import with_lags
from lightning_slim.statistics.spectral import BivariateVAR, SpectralCausality, fit_var, spectral_causality
from lightning_slim.statistics.streaming import Accumulator, Pivoted

__all__ = [
    "Accumulator",
    "Anova",
    "BivariateVAR",
    "ChiSquare",
    "ClusteredPanel",
    "Contingency",
    "Correlation",
    "DumitrescuHurlin",
    "DumitrescuHurlinTest",
    "ForwardSelection",
    "Image",
    "KruskalWallis",
    "Moments",
    "MultilabelAnova",
    "MutualInformation",
    "PanelDesign",
    "PanelGranger",
    "PanelTest",
    "Pivoted",
    "Regression",
    "Screening",
    "SpectralCausality",
    "chi2_log_sf",
    "distinct_rows",
    "f_log_sf",
    "fit_var",
    "forward_selection",
    "kruskal_wallis",
    "least_squares_image",
    "merged",
    "mutual_information",
    "quantile_edges",
    "spectral_causality",
    "with_lags",
]
