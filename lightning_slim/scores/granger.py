"""Conditional Granger causality of units for what their readers compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.scores.base import Evidence, Need, Reading, Score, UnitScores
from lightning_slim.statistics import Regression, forward_selection


@dataclass(frozen=True)
class Granger(Score):
    """Units chosen greedily so that their present and past best predict their readers' pre-activations.

    The importance of a unit is the share of the readers' variance that was still unexplained when it was chosen:
    1 for the first, about 0 for those that the others predict. It therefore compares across layers: cutting every
    layer at the same importance leaves every layer the same relative error.

    What is not chosen should be folded into what is (`compensate="least_squares"`): the same moments serve both.

    Attributes:
        lags: past steps of each unit beside its present. They count where the units arrive as series: at a `Conv1d`, or
            at a linear layer that reads (item, step, channel). Elsewhere only the present is used.
    """

    lags: int = 1
    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})

    def __post_init__(self) -> None:
        if self.lags < 0:
            raise ValueError(f"Expected `lags` of at least 0, got {self.lags}.")

    def __call__(self, evidence: Evidence) -> UnitScores:
        units = evidence.weights.shape[0]
        selection = forward_selection([_regression(reading) for reading in evidence.readings], units)
        explained = selection.gains.cumsum(0)
        importance = torch.zeros(units, dtype=torch.float64)
        importance[selection.order] = (1 - (explained - selection.gains)).clamp_min(0)
        dead = torch.stack([reading.variance.sum(1).cpu() for reading in evidence.readings]).sum(0) == 0
        return UnitScores(importance.masked_fill(dead, 0.0))


def _regression(reading: Reading) -> Regression:
    """The reader's pre-activation is `weight' x`: its moments follow from those of x."""
    gram = reading.moments.covariance
    columns = reading.weight.shape[0]
    present = gram.view(len(gram), columns, -1)[:, :, 0]
    weight = _few_targets(reading.weight.to(gram))
    cross = present @ weight
    variance = float((weight * cross.view(columns, -1, weight.shape[1])[:, 0]).sum())
    return Regression(gram, cross, variance)


def _few_targets(weight: Float[Tensor, "columns targets"]) -> Float[Tensor, "columns fewer"]:
    """At most as many targets as columns, with the same gains: they depend on `weight weight'` only."""
    columns, targets = weight.shape
    if targets <= columns:
        return weight
    values, vectors = torch.linalg.eigh(weight @ weight.T)
    fewer: Tensor = vectors * values.clamp_min(0).sqrt()
    return fewer
