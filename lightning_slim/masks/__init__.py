"""Zeros in weights: patterns, scores of single weights, and how zeros are shared out among layers."""

from lightning_slim.masks.distributions import Distribution, ErdosRenyiKernel, Global, Layer, Uniform
from lightning_slim.masks.flow_scores import WeightGraSP, WeightSynFlow
from lightning_slim.masks.inputs import InputScore
from lightning_slim.masks.last_layers import find_last
from lightning_slim.masks.patterns import NM, Block, Pattern, Unstructured
from lightning_slim.masks.regrowth import SET, Regrowth, RigL
from lightning_slim.masks.screening import WeightScreening
from lightning_slim.masks.wanda import WeightWanda
from lightning_slim.masks.weight_scores import WeightLamp, WeightMagnitude, WeightMovement, WeightSaliency, WeightScore
from lightning_slim.masks.weights import (
    LAYERS,
    find_weights,
    stacked,
    transposed_groups,
    unstacked,
    weights_left_out,
)

__all__ = [
    "LAYERS",
    "NM",
    "SET",
    "Block",
    "Distribution",
    "ErdosRenyiKernel",
    "Global",
    "InputScore",
    "Layer",
    "Pattern",
    "Regrowth",
    "RigL",
    "Uniform",
    "Unstructured",
    "WeightGraSP",
    "WeightLamp",
    "WeightMagnitude",
    "WeightMovement",
    "WeightSaliency",
    "WeightScore",
    "WeightScreening",
    "WeightSynFlow",
    "WeightWanda",
    "find_last",
    "find_weights",
    "stacked",
    "transposed_groups",
    "unstacked",
    "weights_left_out",
]
