"""Synaptic flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_slim.flows import Flow, SynapticFlow
from lightning_slim.scores.base import Evidence, Need, Score, UnitScores


@dataclass(frozen=True)
class SynFlow(Score):
    """What flows through the weights that make a unit: `sum |w| * dR/d|w|` (Tanaka et al., 2020); see `SynapticFlow`.

    For `when="start"` only: before training it needs no data, and in many rounds (`rounds`) no layer is emptied.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"flow"})
    absolute: ClassVar[bool] = True
    flow: ClassVar[Flow | None] = SynapticFlow()

    def __call__(self, evidence: Evidence) -> UnitScores:
        return UnitScores(evidence.effects["flow"].double().abs().cpu())
