"""The effect of each unit on the loss, by trying it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_slim.scores.base import Evidence, Need, Score, UnitScores


@dataclass(frozen=True)
class Ablation(Score):
    """How much larger the loss of a batch is without the unit: leave-one-out, exact.

    On every recorded step, one forward pass a unit, in eval mode: the oracle of single units, to compare others with,
    and too dear for large networks. It does not see that two copies of a unit cannot both go. Units without which the
    loss is smaller have importance 0.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"ablation"})
    absolute: ClassVar[bool] = True

    def __call__(self, evidence: Evidence) -> UnitScores:
        return UnitScores(evidence.effects["ablation"].double().clamp_min(0).cpu())
