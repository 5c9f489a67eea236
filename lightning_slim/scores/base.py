"""What a score may look at, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.statistics import Moments

Need = Literal["moments", "saliency"]


class Reading(NamedTuple):
    """How one layer reads the units.

    Attributes:
        moments: of the units as they arrive there; with lags, the columns of unit `u` are its present and its past.
        weight: by which the layer multiplies each unit; several positions of a unit are several targets.
        channels: of one unit, where these are variables of their own: the columns of `moments` are all of them, without
            a past, and so are the rows of `weight`.
    """

    moments: Moments
    weight: Float[Tensor, "columns targets"]
    channels: int = 1


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that is known of one group when it is scored.

    Attributes:
        weights: every parameter entry a unit owns, one unit a row.
        readings: how the units arrive at the layers that read them; empty unless a score needs `"moments"`.
        saliency: mean over recorded steps of `(sum of weight * gradient over the unit's entries) ** 2`; None unless a
            score needs `"saliency"`.
        generator: for scores that draw, seeded by the run's seed, the event and the group.
    """

    weights: Float[Tensor, "units fan"]
    readings: tuple[Reading, ...] = ()
    saliency: Float[Tensor, "units"] | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)


class UnitScores(NamedTuple):
    """One importance per unit: finite, not negative, high stays."""

    importance: Float[Tensor, "units"]
    pvalue: Float[Tensor, "units"] | None = None


class Score(ABC):
    """Evidence of one group -> importance of its units. A child is a frozen dataclass in a file of its own.

    Attributes:
        needs: which parts of the evidence must be recorded.
        lags: how many past steps of each unit `readings` must hold.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    lags: int = 0

    @abstractmethod
    def __call__(self, evidence: Evidence) -> UnitScores:
        """Scores the units of one group."""
