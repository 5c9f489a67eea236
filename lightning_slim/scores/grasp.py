"""Gradient signal preservation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_slim.arguments import check_fields
from lightning_slim.flows import Flow, GradientFlow
from lightning_slim.scores.base import Evidence, Need, Score, UnitScores


@dataclass(frozen=True)
class GraSP(Score):
    """What the weights that make a unit add to the norm of the gradient: `sum w * (Hg)` (Wang et al., 2020).

    Units without which the network would learn no slower, or faster, go first: theirs may be negative. For
    `when="start"` only.

    Attributes:
        temperature: divides the networks' outputs; see `GradientFlow`.
    """

    temperature: float = 200.0
    needs: ClassVar[frozenset[Need]] = frozenset({"flow"})
    absolute: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        GradientFlow(self.temperature)  # says what is wrong with it

    @property
    def flow(self) -> Flow:  # type: ignore[override]
        """The gradient flow, at this temperature."""
        return GradientFlow(self.temperature)

    def __call__(self, evidence: Evidence) -> UnitScores:
        return UnitScores(evidence.effects["flow"].double().cpu())
