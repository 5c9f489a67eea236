"""Size of the weights."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_slim.scores.base import Evidence, Score, UnitScores


@dataclass(frozen=True)
class Magnitude(Score):
    """The p-norm of all weights that a unit owns, in every tensor of its group (Li et al., 2017; Fang et al., 2023).

    Attributes:
        p: 1 or 2, or any other positive norm.
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        if self.p <= 0:
            raise ValueError(f"Expected a positive norm `p`, got {self.p}.")

    def __call__(self, evidence: Evidence) -> UnitScores:
        return UnitScores(evidence.weights.detach().double().norm(p=self.p, dim=1).cpu())
