"""Several scores at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.arguments import check_fields
from lightning_slim.flows import Flow
from lightning_slim.scores.base import Evidence, Need, Score, UnitScores
from lightning_slim.scores.magnitude import Magnitude
from lightning_slim.scores.magnitude_times_std import MagnitudeTimesStd
from lightning_slim.witness import Witness


@dataclass(frozen=True)
class Combined(Score):
    """Weighted mean of the ranks that several scores give.

    The rank of a unit is the share of the others in its group that are less important: from 0 for the least important
    to 1 for the most important, whatever the scale of the score; equals have the same. Ranks say nothing of how groups
    compare, so `scope="global"` gains nothing here.

    Attributes:
        scores: any scores; all that one of them needs is recorded. `Magnitude` and `MagnitudeTimesStd` if empty.
        weights: one not negative number for each score, of any sum; all alike if empty.
    """

    scores: Sequence[Score] = field(default_factory=list)  # tuples once made; YAML knows lists only
    weights: Sequence[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "scores", tuple(self.scores) or (Magnitude(), MagnitudeTimesStd()))
        object.__setattr__(self, "weights", tuple(self.weights))
        if self.weights and len(self.weights) != len(self.scores):
            raise ValueError(
                f"Expected one of `weights` for each of {len(self.scores)} scores, or none at all, got {self.weights}."
            )
        if self.weights and not (min(self.weights) >= 0 and 0 < sum(self.weights) < float("inf")):
            raise ValueError(f"Expected `weights` that are not negative, with one above 0, got {self.weights}.")
        if len({score.flow for score in self.scores} - {None}) > 1:
            raise ValueError(f"Expected one score that is taken before training at most, got {self.scores}.")

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """All that one of the scores needs."""
        return frozenset().union(*(score.needs for score in self.scores))

    @property
    def witnesses(self) -> tuple[Witness, ...]:
        """All that one of the scores has."""
        return tuple(dict.fromkeys(witness for score in self.scores for witness in score.witnesses))

    @property
    def needs_witnesses(self) -> bool:
        """Whether one of the scores does."""
        return any(score.needs_witnesses for score in self.scores)

    @property
    def lags(self) -> int:  # type: ignore[override]
        """The most that one of the scores asks for."""
        return max(score.lags for score in self.scores)

    @property
    def flow(self) -> Flow | None:  # type: ignore[override]
        """The one that a score has."""
        return next((score.flow for score in self.scores if score.flow is not None), None)

    def __call__(self, evidence: Evidence) -> UnitScores:
        weights = self.weights or (1.0,) * len(self.scores)
        ranks = [w * _ranks(score(evidence).importance) for w, score in zip(weights, self.scores, strict=True)]
        return UnitScores(torch.stack(ranks).sum(0) / sum(weights))


def _ranks(importance: Float[Tensor, "units"]) -> Float[Tensor, "units"]:
    """Share of the other units that are less important."""
    smaller = torch.searchsorted(importance.sort().values, importance)
    return smaller.double() / max(len(importance) - 1, 1)
