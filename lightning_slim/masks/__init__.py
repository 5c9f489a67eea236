"""Zeros in weights: patterns, scores of single weights, and how zeros are shared out among layers."""

from lightning_slim.masks.distributions import Distribution, ErdosRenyiKernel, Global, Layer, Uniform
from lightning_slim.masks.last_layers import find_last
from lightning_slim.masks.patterns import NM, Block, Pattern, Unstructured
from lightning_slim.masks.regrowth import SET, Regrowth, RigL
from lightning_slim.masks.weight_scores import WeightLamp, WeightMagnitude, WeightMovement, WeightSaliency, WeightScore
from lightning_slim.masks.weights import find_weights, stacked, transposed_groups, unstacked

__all__ = [
    "NM",
    "SET",
    "Block",
    "Distribution",
    "ErdosRenyiKernel",
    "Global",
    "Layer",
    "Pattern",
    "Regrowth",
    "RigL",
    "Uniform",
    "Unstructured",
    "WeightLamp",
    "WeightMagnitude",
    "WeightMovement",
    "WeightSaliency",
    "WeightScore",
    "find_last",
    "find_weights",
    "stacked",
    "transposed_groups",
    "unstacked",
]
