"""Make a network smaller and faster while PyTorch Lightning trains it."""

from lightning_slim.budgets import Budget, Bytes, MACs, Params, Significant, Units
from lightning_slim.callbacks import GrangerPrune, InputScreening, Prune
from lightning_slim.checkpoint import load_from_checkpoint
from lightning_slim.history import History, PruningEvent, ScreeningEvent
from lightning_slim.pruner import NoEffectWarning, Pruner
from lightning_slim.report import Report, report
from lightning_slim.schedules import (
    Annealing,
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    OneCycle,
    OneShot,
    Schedule,
    Stepwise,
)
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

__all__ = [
    "Ablation",
    "ActivationFrequency",
    "ActivationMean",
    "ActivationStd",
    "Annealing",
    "BatchNormScale",
    "BivariateGranger",
    "Budget",
    "Bytes",
    "Combined",
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "Fisher",
    "GeometricMedian",
    "Granger",
    "GrangerPrune",
    "History",
    "InputScreening",
    "Lamp",
    "Linear",
    "MACs",
    "Magnitude",
    "MagnitudeTimesStd",
    "NoEffectWarning",
    "OneCycle",
    "OneShot",
    "Params",
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
    "Stepwise",
    "Taylor",
    "UnitGroup",
    "Units",
    "Wanda",
    "find_groups",
    "load_from_checkpoint",
    "migrate",
    "remove_units",
    "report",
]
