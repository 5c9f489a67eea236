"""What a score may look at, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.arguments import check_fields
from lightning_slim.flows import Flow
from lightning_slim.statistics import JointMoments, Moments
from lightning_slim.witness import Witness

Need = Literal["moments", "made", "scales", "saliency", "information", "sensitivity", "ablation", "gates", "flow"]
OF_GRADIENTS: frozenset[Need] = frozenset({"saliency", "information", "sensitivity"})

Reduction = Literal["mean", "max", "sum"]


class Reading(NamedTuple):
    """How one layer reads the units.

    Attributes:
        moments: of the units as they arrive there; with lags, the columns of unit `u` are its present and its past.
        weight: by which the layer multiplies each unit; several positions of a unit are several targets.
        channels: of one unit, where these are variables of their own: the columns of `moments` are all of them, without
            a past, and so are the rows of `weight`. Taps of a kernel may count as channels, too.
        told: what witnesses gathered there.
    """

    moments: Moments
    weight: Float[Tensor, "columns targets"]
    channels: int = 1
    told: Mapping[Witness, Any] = {}

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

    def gathered(self, witness: Witness) -> Any:
        """What a witness gathered here.

        Raises:
            ValueError: nothing.
        """
        if witness not in self.told:
            raise ValueError(
                f"Expected what {type(witness).__name__} gathers of units where they arrive, got nothing, as of whole "
                'blocks: choose another score for those, or `granularity="units"`.'
            )
        return self.told[witness]

    def _present(self, of_columns: Float[Tensor, "all"]) -> Float[Tensor, "units channels"]:
        return of_columns.view(len(self.weight), -1)[:, 0].view(-1, self.channels)


@dataclass(frozen=True, eq=False)
class Evidence:
    """All that is known of one group when it is scored.

    Attributes:
        weights: every parameter entry a unit owns, one unit a row.
        fans: how many columns of `weights` come from each of the tensors that are coupled; all from one if empty.
        readings: how the units arrive at the layers that read them; empty unless a score needs `"moments"`.
        effects: what of the loss depends on each unit, mean over recorded steps, for those that a score needs:
            `"saliency"`, `(sum of weight * gradient over the unit's entries) ** 2`; `"information"`, the sum of their
            `(weight * gradient) ** 2`; `"sensitivity"`, of their `|weight * gradient|`; `"ablation"`, how much larger
            the loss was without the unit; `"flow"`, the sum of their `weight * gradient`, with a flow (see `Flow`) for
            the gradient.
        gates: which units were gated, item by item, and how much larger its loss was then; None unless a score needs
            `"gates"`.
        made: those of `weights` that make or carry the units, and not those that read them; None for whole blocks, and
            unless a score needs `"made"`.
        scales: absolute scale of each unit in every normalisation that the group passes (of several positions: their
            mean); no columns where it passes none, as whole blocks do; None unless a score needs `"scales"`.
        generator: for scores that draw, seeded by the run's seed, the event and the group.
    """

    weights: Float[Tensor, "units fan"]
    readings: tuple[Reading, ...] = ()
    effects: Mapping[str, Float[Tensor, "units"]] = field(default_factory=dict)
    made: Float[Tensor, "units making"] | None = None
    scales: Float[Tensor, "units norms"] | None = None
    generator: torch.Generator = field(default_factory=torch.Generator)
    gates: JointMoments | None = None
    fans: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[Float[Tensor, "units fan"], ...]:
        """The weights, tensor by tensor."""
        return torch.split(self.weights.detach(), list(self.fans) or self.weights.shape[1], 1)

    @property
    def heard(self) -> tuple[Reading, ...]:
        """The readings, of which there must be one."""
        if not self.readings:
            raise ValueError(
                "Expected a record of the units at the layers that read them, got none: run the network within "
                "`recording()` before units are scored."
            )
        return self.readings


class Calibration(NamedTuple):
    """How much a selection found, beside what it finds where there is nothing.

    Attributes:
        rows: of which moments were taken; old ones count less.
        units: of the group.
        live: units that are not constant.
        variance: of all targets.
        explained: share of the targets' variance that the first chosen units explain, one more at a time.
        by_chance: the same of targets of other items, of which units can tell nothing; zeros where that was not
            recorded.
        inflation: mean F of single units there, at least 1.
    """

    rows: float
    units: int
    live: int
    variance: float
    explained: Float[Tensor, "units"]
    by_chance: Float[Tensor, "units"]
    inflation: float


class UnitScores(NamedTuple):
    """One importance per unit: finite, high stays; not negative, but for scores that are `absolute`.

    Attributes:
        importance: of each unit.
        log_p: logarithms of the p-values of "the unit tells nothing", where the score tests that.
        calibration: where the score calibrates itself.
    """

    importance: Float[Tensor, "units"]
    log_p: Float[Tensor, "units"] | None = None
    calibration: Calibration | None = None


class Score(ABC):
    """Evidence of one group -> importance of its units. A child is a frozen dataclass in a file of its own.

    Attributes:
        needs: which parts of the evidence must be there.
        lags: how many past steps of each unit `readings` must hold.
        absolute: whether importances of several groups compare as they are; if not, they are compared relative to the
            mean of their group.
        tests: whether `log_p` comes with the importance.
        flow: of scores that are taken before training: what stands in for the gradient of the loss.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    lags: int = 0
    absolute: ClassVar[bool] = False
    tests: ClassVar[bool] = False
    flow: ClassVar[Flow | None] = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def witnesses(self) -> tuple[Witness, ...]:
        """Who looks on where units arrive, for what moments do not tell; whole blocks do not arrive anywhere."""
        return ()

    @property
    def needs_witnesses(self) -> bool:
        """Whether nothing can be said without the witnesses."""
        return bool(self.witnesses)

    @property
    def needs_gradients(self) -> bool:
        """Whether some of the evidence comes from gradients."""
        return bool(self.needs & OF_GRADIENTS)

    @abstractmethod
    def __call__(self, evidence: Evidence) -> UnitScores:
        """Scores the units of one group."""


def reduced(parts: Sequence[Float[Tensor, "units"]], how: Reduction) -> Float[Tensor, "units"]:
    """One number a unit, of those that coupled tensors or several readers give it."""
    stacked = torch.stack([part.double().cpu() for part in parts])
    if how == "max":
        return stacked.max(0).values
    return stacked.mean(0) if how == "mean" else stacked.sum(0)
