"""Scales of normalisations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_slim.scores.base import Evidence, Need, Score, UnitScores
from lightning_slim.scores.magnitude import Magnitude


@dataclass(frozen=True)
class BatchNormScale(Score):
    """Size of the scale that a unit gets in its normalisation: `mean over norms of |gamma|` (Liu et al., 2017).

    Batch, instance, group, layer and RMS norms of torch (and what inherits from them) that have scales count, wherever
    units pass: those of a residual stream pass several. The score says most where training pulls scales to zero (an L1
    penalty on them).

    Groups that pass no norm, and whole blocks, are scored by `Magnitude` instead: within a group the ranks count, and
    across groups importance relative to the group's mean. A network without any norm on the way of its units is
    refused before training is touched.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"scales"})

    def __call__(self, evidence: Evidence) -> UnitScores:
        if evidence.scales is None or evidence.scales.shape[1] == 0:
            return Magnitude()(evidence)
        return UnitScores(evidence.scales.detach().double().abs().mean(1).cpu())
