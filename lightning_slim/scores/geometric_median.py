"""Distance to all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_slim.scores.base import Evidence, Need, Score, UnitScores


@dataclass(frozen=True)
class GeometricMedian(Score):
    """How far the weights that make a unit are from those of all others: `sum over v of |w_u - w_v|` (He et al., 2019).

    Units near the geometric median of their group go first: others can stand for them, however large they are. The
    weights are all that make or carry the unit (filters, biases, scales of norms), and not those that read it. A unit
    whose weights are all zero has importance zero. Whole blocks are left whole: the weights of two blocks do not
    correspond, entry for entry.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"made"})

    def __call__(self, evidence: Evidence) -> UnitScores:
        if evidence.made is None:
            raise ValueError(
                "Expected the weights that make each unit, got units without, such as whole blocks, whose weights do "
                'not correspond: choose `granularity="units"`, or another score.'
            )
        made = evidence.made.detach().double()
        distance = torch.cdist(made, made).sum(1)
        return UnitScores(distance.masked_fill(~made.any(1), 0.0).cpu())
