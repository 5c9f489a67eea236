"""Second-order effect on the loss, by the Fisher information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_slim.scores.base import Evidence, Need, Score, UnitScores


@dataclass(frozen=True)
class Fisher(Score):
    """Empirical Fisher information of the weights that make a unit: `mean over steps of sum (w * dL/dw) ** 2`.

    Twice the second-order effect of setting each weight to zero, with the diagonal of the Fisher information for the
    Hessian (Theis et al., 2018). `Taylor` squares the sum, this sums the squares: effects of a unit's weights that
    cancel do not cancel here (Molchanov et al., 2019, discuss both). As there, the gradient is that of a step's mean
    loss, not of each sample.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"information"})

    def __call__(self, evidence: Evidence) -> UnitScores:
        return UnitScores(evidence.effects["information"].double().cpu())
