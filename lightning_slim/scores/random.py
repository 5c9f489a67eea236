"""The baseline that every score must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_slim.scores.base import Evidence, Score, UnitScores


@dataclass(frozen=True)
class Random(Score):
    """Uniform in [0, 1), from the run's seed: the same units go after a resume."""

    def __call__(self, evidence: Evidence) -> UnitScores:
        units = evidence.weights.shape[0]
        return UnitScores(torch.rand(units, generator=evidence.generator, dtype=torch.float64))
