"""First-order effect on the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_slim.scores.base import Evidence, Need, Score, UnitScores


@dataclass(frozen=True)
class Taylor(Score):
    """How much the loss would change without the unit, to first order: `mean (sum w * dL/dw) ** 2`.

    The sum runs over the weights that make a unit, so it is the derivative by a gate behind it; its square is averaged
    over recorded steps (Molchanov et al., 2019, equation 8).
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"saliency"})

    def __call__(self, evidence: Evidence) -> UnitScores:
        assert evidence.saliency is not None
        return UnitScores(evidence.saliency.double().cpu())
