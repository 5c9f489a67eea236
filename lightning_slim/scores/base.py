"""What a score may look at, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.statistics import Moments

Need = Literal["moments", "saliency", "information", "made", "scales"]
OF_GRADIENTS: frozenset[Need] = frozenset({"saliency", "information"})


class Reading(NamedTuple):
    """How one layer reads the units.

    Attributes:
        moments: of the units as they arrive there; with lags, the columns of unit `u` are its present and its past.
        weight: by which the layer multiplies each unit; several positions of a unit are several targets.
        channels: of one unit, where these are variables of their own: the columns of `moments` are all of them, without
            a past, and so are the rows of `weight`. Taps of a kernel may count as channels, too.
    """

    moments: Moments
    weight: Float[Tensor, "columns targets"]
    channels: int = 1

    @property
    def mean(self) -> Float[Tensor, "units channels"]:
        """Of each unit as it is now, without its past."""
        return self._present(self.moments.mean)

    @property
    def variance(self) -> Float[Tensor, "units channels"]:
        """Of each unit as it is now, without its past."""
        return self._present(self.moments.variance)

    def of_weight(self, p: float) -> Float[Tensor, "units channels"]:
        """The p-norm of the weights that read each unit, over all targets; in the precision of the moments."""
        size: Tensor = self.weight.detach().to(self.moments.total).norm(p=p, dim=1)
        return size.view(-1, self.channels)

    def _present(self, of_columns: Float[Tensor, "all"]) -> Float[Tensor, "units channels"]:
        return of_columns.view(len(self.weight), -1)[:, 0].view(-1, self.channels)


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that is known of one group when it is scored.

    Attributes:
        weights: every parameter entry a unit owns, one unit a row.
        readings: how the units arrive at the layers that read them; empty unless a score needs `"moments"`.
        saliency: mean over recorded steps of `(sum of weight * gradient over the unit's entries) ** 2`; None unless a
            score needs `"saliency"`.
        information: mean over recorded steps of `sum of (weight * gradient) ** 2` over the unit's entries; None unless
            a score needs `"information"`.
        made: those of `weights` that make or carry the units, and not those that read them; None for whole blocks, and
            unless a score needs `"made"`.
        scales: absolute scale of each unit in every normalisation that the group passes (of several positions: their
            mean); no columns where it passes none, as whole blocks do; None unless a score needs `"scales"`.
        generator: for scores that draw, seeded by the run's seed, the event and the group.
    """

    weights: Float[Tensor, "units fan"]
    readings: tuple[Reading, ...] = ()
    saliency: Float[Tensor, "units"] | None = None
    information: Float[Tensor, "units"] | None = None
    made: Float[Tensor, "units making"] | None = None
    scales: Float[Tensor, "units norms"] | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)

    @property
    def heard(self) -> tuple[Reading, ...]:
        """The readings, of which there must be one."""
        if not self.readings:
            raise ValueError(
                "Expected a record of the units at the layers that read them, got none: run the network within "
                "`recording()` before units are scored."
            )
        return self.readings


class UnitScores(NamedTuple):
    """One importance per unit: finite, not negative, high stays."""

    importance: Float[Tensor, "units"]
    pvalue: Float[Tensor, "units"] | None = None


class Score(ABC):
    """Evidence of one group -> importance of its units. A child is a frozen dataclass in a file of its own.

    Attributes:
        needs: which parts of the evidence must be there.
        lags: how many past steps of each unit `readings` must hold.
        absolute: whether importances of several groups compare as they are; if not, they are compared relative to the
            mean of their group.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    lags: int = 0
    absolute: ClassVar[bool] = False

    @property
    def needs_gradients(self) -> bool:
        """Whether some of the evidence comes from gradients."""
        return bool(self.needs & OF_GRADIENTS)

    @abstractmethod
    def __call__(self, evidence: Evidence) -> UnitScores:
        """Scores the units of one group."""
