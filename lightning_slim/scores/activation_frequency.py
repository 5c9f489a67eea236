"""How often units are active."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lightning_slim.scores.base import Evidence, Need, Reduction, Score, UnitScores, reduced
from lightning_slim.statistics import Frequency
from lightning_slim.witness import Witness


@dataclass(frozen=True)
class Activity(Witness):
    """Counts how often what arrives is not zero."""

    def hold(self, units: Float[Tensor, "items positions columns"]) -> Tensor:
        return units.flatten(0, 1)

    def add(self, gathered: Frequency | None, held: Tensor, known: None) -> Frequency:
        gathered = gathered or Frequency(held.shape[1], held.device)
        gathered.update(held)
        return gathered

    def blank(self, state: Mapping[str, Tensor]) -> Frequency:
        return Frequency(0)


@dataclass(frozen=True)
class ActivationFrequency(Score):
    """Share of samples, pixels and steps at which the unit is not zero: one minus APoZ (Hu et al., 2016).

    It says something of units behind a ReLU; others are zero never, or always. Of the channels of a head the mean
    counts. Whole blocks are refused.

    Attributes:
        reduction: of several readers: their `"mean"`, `"max"` or `"sum"`.
    """

    reduction: Reduction = "mean"
    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})

    @property
    def witnesses(self) -> tuple[Witness, ...]:
        return (Activity(),)

    def __call__(self, evidence: Evidence) -> UnitScores:
        units = len(evidence.weights)
        shares = [reading.gathered(Activity()).result()[0].view(units, -1).mean(1) for reading in evidence.heard]
        return UnitScores(reduced(shares, self.reduction))
