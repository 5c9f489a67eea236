"""Size of the weights that read a unit, times the spread of what they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_slim.scores.base import Evidence, Need, Score, UnitScores


@dataclass(frozen=True)
class MagnitudeTimesStd(Score):
    """How much the unit moves its readers: `sqrt(sum over readers of |weights that read it|^2 * variance of it)`.

    The norm is over all targets of a reader, so this is the standard deviation of the unit's share in all that is
    computed of it, as if it varied alone: what its mean in its place (`compensate="mean"`) would leave undone. It does
    not change if a unit is scaled up and the weights that read it down, as weights or activations alone do. Channels
    of a head sum like readers; of a whole block the spread of what it adds to its input counts, which all that follows
    reads.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})

    def __call__(self, evidence: Evidence) -> UnitScores:
        shares = [(r.variance * r.of_weight(2.0).square()).sum(1) for r in evidence.heard]
        return UnitScores(torch.stack(shares).sum(0).sqrt().cpu())
