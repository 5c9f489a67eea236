"""Make a network smaller and faster while PyTorch Lightning trains it."""

from lightning_slim.budgets import Budget, MACs, Significant, Units
from lightning_slim.callbacks import GrangerPrune, InputScreening, Prune, SparsityRegularization
from lightning_slim.checkpoint import load_from_checkpoint
from lightning_slim.history import History, PruningEvent, ScreeningEvent
from lightning_slim.penalties import L1, GroupLasso, GrowingL2, HoyerSquare, NormScaleL1, Penalty
from lightning_slim.pruner import NoEffectWarning, Pruner
from lightning_slim.regularizer import Regularizer
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

__all__ = [  # noqa: RUF022 (plain order: L1 is a class)
    "Ablation",
    "ActivationFrequency",
    "ActivationMean",
    "ActivationStd",
    "BatchNormScale",
    "BivariateGranger",
    "Budget",
    "Combined",
    "Cubic",
    "Fisher",
    "GeometricMedian",
    "Granger",
    "GrangerPrune",
    "GroupLasso",
    "GrowingL2",
    "History",
    "HoyerSquare",
    "InputScreening",
    "L1",
    "Lamp",
    "Linear",
    "MACs",
    "Magnitude",
    "MagnitudeTimesStd",
    "NoEffectWarning",
    "NormScaleL1",
    "OneCycle",
    "OneShot",
    "Penalty",
    "Plan",
    "Prune",
    "Pruner",
    "PruningEvent",
    "Random",
    "RandomGates",
    "Regularizer",
    "Report",
    "Schedule",
    "Score",
    "Screening",
    "ScreeningEvent",
    "Significant",
    "SparsityRegularization",
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
