"""First-order effect on the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_slim.arguments import check_fields
from lightning_slim.scores.base import Evidence, Need, Score, UnitScores


@dataclass(frozen=True)
class Taylor(Score):
    """How much the loss would change without the unit, to first order, over the weights `w` that make it.

    Both forms are averaged over recorded steps (Molchanov et al., 2019).

    Attributes:
        of: `"gate"`: `(sum w * dL/dw) ** 2`, the squared derivative by a gate behind the unit (equation 8 there);
            `"weights"`: `sum |w * dL/dw|`, in which effects of single weights do not cancel; before training, that is
            SNIP (Lee et al., 2019).
    """

    of: Literal["gate", "weights"] = "gate"

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """The one effect."""
        return frozenset({"saliency" if self.of == "gate" else "sensitivity"})

    def __call__(self, evidence: Evidence) -> UnitScores:
        (effect,) = self.needs
        return UnitScores(evidence.effects[effect].double().cpu())
