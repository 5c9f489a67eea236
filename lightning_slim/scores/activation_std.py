"""Spread of the activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_slim.scores.base import Evidence, Need, Score, UnitScores


@dataclass(frozen=True)
class ActivationStd(Score):
    """Standard deviation of what arrives at the readers: `mean over readers of std(unit)` (Molchanov et al., 2017).

    A unit that hardly varies is a constant, and a bias can take its place (`compensate="mean"`, or the fold). Of the
    channels of a head the root of their mean variance counts; of a whole block, the spread of what it adds to its
    input.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})

    def __call__(self, evidence: Evidence) -> UnitScores:
        return UnitScores(torch.stack([r.variance.mean(1).sqrt() for r in evidence.heard]).mean(0).cpu())
