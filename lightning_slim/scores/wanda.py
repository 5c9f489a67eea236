"""Weights times activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_slim.scores.base import Evidence, Need, Score, UnitScores


@dataclass(frozen=True)
class Wanda(Score):
    """Weights that read the unit, times the size of what they read: `sum over readers of |w| * rms(unit)`.

    The score of single weights by Sun et al. (2024), `|w_ij| * |x_j|_2`, summed over all weights that read a unit. The
    norm of the activations is divided by the root of their number, so that readers with many pixels or steps do not
    outweigh others. Channels of a head sum; of a whole block the size of what it adds to its input counts, which all
    that follows reads.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})

    def __call__(self, evidence: Evidence) -> UnitScores:
        shares = [((r.variance + r.mean.square()).sqrt() * r.of_weight(1.0)).sum(1) for r in evidence.heard]
        return UnitScores(torch.stack(shares).sum(0).cpu())
