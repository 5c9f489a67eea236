"""Lightning callbacks: thin, no arithmetic."""

from lightning_slim.callbacks.base import SlimCallback
from lightning_slim.callbacks.explore import explore
from lightning_slim.callbacks.granger_prune import GrangerPrune
from lightning_slim.callbacks.input_screening import InputScreening
from lightning_slim.callbacks.prune import Prune
from lightning_slim.callbacks.sensitivity import Sensitivity, sensitivity
from lightning_slim.callbacks.sparsity_regularization import SparsityRegularization
from lightning_slim.callbacks.weight_prune import WeightPrune

__all__ = [
    "GrangerPrune",
    "InputScreening",
    "Prune",
    "Sensitivity",
    "SlimCallback",
    "SparsityRegularization",
    "WeightPrune",
    "explore",
    "sensitivity",
]
