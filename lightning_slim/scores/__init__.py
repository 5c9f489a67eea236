"""Importance scores: one file each, evidence in, importance out (high stays)."""

from lightning_slim.scores.activation_mean import ActivationMean
from lightning_slim.scores.activation_std import ActivationStd
from lightning_slim.scores.base import Evidence, Reading, Score, UnitScores
from lightning_slim.scores.batch_norm_scale import BatchNormScale
from lightning_slim.scores.combined import Combined
from lightning_slim.scores.fisher import Fisher
from lightning_slim.scores.geometric_median import GeometricMedian
from lightning_slim.scores.granger import Granger
from lightning_slim.scores.lamp import Lamp
from lightning_slim.scores.magnitude import Magnitude
from lightning_slim.scores.magnitude_times_std import MagnitudeTimesStd
from lightning_slim.scores.random import Random
from lightning_slim.scores.taylor import Taylor
from lightning_slim.scores.wanda import Wanda

__all__ = [
    "ActivationMean",
    "ActivationStd",
    "BatchNormScale",
    "Combined",
    "Evidence",
    "Fisher",
    "GeometricMedian",
    "Granger",
    "Lamp",
    "Magnitude",
    "MagnitudeTimesStd",
    "Random",
    "Reading",
    "Score",
    "Taylor",
    "UnitScores",
    "Wanda",
]
