"""Importance scores: one file each, evidence in, importance out (high stays)."""

from lightning_slim.scores.ablation import Ablation
from lightning_slim.scores.activation_frequency import ActivationFrequency
from lightning_slim.scores.activation_mean import ActivationMean
from lightning_slim.scores.activation_std import ActivationStd
from lightning_slim.scores.base import Calibration, Evidence, Need, Reading, Score, UnitScores
from lightning_slim.scores.batch_norm_scale import BatchNormScale
from lightning_slim.scores.bivariate_granger import BivariateGranger
from lightning_slim.scores.combined import Combined
from lightning_slim.scores.fisher import Fisher
from lightning_slim.scores.geometric_median import GeometricMedian
from lightning_slim.scores.granger import Granger
from lightning_slim.scores.grasp import GraSP
from lightning_slim.scores.lamp import Lamp
from lightning_slim.scores.magnitude import Magnitude
from lightning_slim.scores.magnitude_times_std import MagnitudeTimesStd
from lightning_slim.scores.random import Random
from lightning_slim.scores.random_gates import RandomGates
from lightning_slim.scores.screening import Screening
from lightning_slim.scores.synflow import SynFlow
from lightning_slim.scores.taylor import Taylor
from lightning_slim.scores.wanda import Wanda

__all__ = [
    "Ablation",
    "ActivationFrequency",
    "ActivationMean",
    "ActivationStd",
    "BatchNormScale",
    "BivariateGranger",
    "Calibration",
    "Combined",
    "Evidence",
    "Fisher",
    "GeometricMedian",
    "GraSP",
    "Granger",
    "Lamp",
    "Magnitude",
    "MagnitudeTimesStd",
    "Need",
    "Random",
    "RandomGates",
    "Reading",
    "Score",
    "Screening",
    "SynFlow",
    "Taylor",
    "UnitScores",
    "Wanda",
]
