"""Make a network smaller and faster while PyTorch Lightning trains it."""

from lightning_slim.budgets import Budget, MACs, Significant, Units
from lightning_slim.callbacks import GrangerPrune, InputScreening, Prune, WeightPrune
from lightning_slim.checkpoint import load_from_checkpoint
from lightning_slim.history import History, MaskEvent, PruningEvent, ScreeningEvent
from lightning_slim.masker import Masker
from lightning_slim.masks import (
    NM,
    Block,
    Distribution,
    ErdosRenyiKernel,
    Global,
    Pattern,
    Uniform,
    Unstructured,
    WeightMagnitude,
    WeightSaliency,
    WeightScore,
)
from lightning_slim.pruner import NoEffectWarning, Pruner
from lightning_slim.report import Report, report
from lightning_slim.schedules import Cubic, Linear, OneCycle, OneShot, Schedule
from lightning_slim.scores import (
    Ablation,
    ActivationFrequency,
    ActivationMean,
    ActivationStd,
    BatchNormScale,
    BivariateGranger,
    Combined,
    Fisher,
    GeometricMedian,
    Granger,
    Lamp,
    Magnitude,
    MagnitudeTimesStd,
    Random,
    RandomGates,
    Score,
    Screening,
    Taylor,
    Wanda,
)
from lightning_slim.surgery import find_groups, migrate, remove_units
from lightning_slim.units import Plan, UnitGroup

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (plainly sorted)
    "Ablation",
    "ActivationFrequency",
    "ActivationMean",
    "ActivationStd",
    "BatchNormScale",
    "BivariateGranger",
    "Block",
    "Budget",
    "Combined",
    "Cubic",
    "Distribution",
    "ErdosRenyiKernel",
    "Fisher",
    "GeometricMedian",
    "Global",
    "Granger",
    "GrangerPrune",
    "History",
    "InputScreening",
    "Lamp",
    "Linear",
    "MACs",
    "Magnitude",
    "MagnitudeTimesStd",
    "MaskEvent",
    "Masker",
    "NM",
    "NoEffectWarning",
    "OneCycle",
    "OneShot",
    "Pattern",
    "Plan",
    "Prune",
    "Pruner",
    "PruningEvent",
    "Random",
    "RandomGates",
    "Report",
    "Schedule",
    "Score",
    "Screening",
    "ScreeningEvent",
    "Significant",
    "Taylor",
    "Uniform",
    "UnitGroup",
    "Units",
    "Unstructured",
    "Wanda",
    "WeightMagnitude",
    "WeightPrune",
    "WeightSaliency",
    "WeightScore",
    "find_groups",
    "load_from_checkpoint",
    "migrate",
    "remove_units",
    "report",
]
