"""Size of the weights."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_slim.arguments import check_fields
from lightning_slim.scores.base import Evidence, Reduction, Score, UnitScores, reduced


@dataclass(frozen=True)
class Magnitude(Score):
    """The p-norm of all weights that a unit owns, in every tensor of its group (Li et al., 2017; Fang et al., 2023).

    Attributes:
        p: 1 or 2, or any other positive norm.
        reduction: what is made of the norms in coupled tensors: their `"mean"`, `"max"` or `"sum"`; None takes one
            norm over all of them.
    """

    p: float = 2.0
    reduction: Reduction | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.p <= 0:
            raise ValueError(f"Expected a positive norm `p`, got {self.p}.")

    def __call__(self, evidence: Evidence) -> UnitScores:
        parts = (evidence.weights.detach(),) if self.reduction is None else evidence.parts
        return UnitScores(reduced([part.double().norm(p=self.p, dim=1) for part in parts], self.reduction or "sum"))
