"""Statistical screening: how much a unit tells classes apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.arguments import check_fields
from lightning_slim.scores.base import Evidence, Need, Reading, Reduction, Score, UnitScores, reduced
from lightning_slim.statistics import (
    Accumulator,
    Anova,
    ChiSquare,
    Correlation,
    KruskalWallis,
    MutualInformation,
    quantile_edges,
)
from lightning_slim.statistics.labels import classes_in
from lightning_slim.witness import Known, Witness, check_items

Statistic = Literal["anova", "chi_square", "mutual_information", "kruskal_wallis"]
BINNED: dict[str, type[MutualInformation] | type[KruskalWallis]] = {
    "mutual_information": MutualInformation,
    "kruskal_wallis": KruskalWallis,
}
BINS = 16


@dataclass(frozen=True)
class ByClass(Witness):
    """Compares the mean of each unit over an item with the item's label."""

    statistic: Statistic = "anova"
    known: ClassVar[Known | None] = "labels"

    def add(self, gathered: Any, held: Tensor, known: Tensor) -> Any:
        check_items(held, known, "labels")
        if known.is_floating_point() or known.ndim > 1:
            return self._correlate(gathered, held, known)
        held, labels = held[known >= 0], known[known >= 0].to(held.device)
        room = classes_in(labels)
        if gathered is None:
            gathered = self._new(held, room)
        elif room > _classes(gathered):
            gathered = _with_room(gathered, self._new(held, room))
        gathered.update(held, labels)
        return gathered

    def blank(self, state: Mapping[str, Tensor]) -> Any:
        if "product" in state:
            return Correlation(0, 0)
        return self._new(torch.zeros(1, 0), 0)

    def _new(self, held: Tensor, classes: int) -> Any:
        if self.statistic in BINNED:
            return BINNED[self.statistic](quantile_edges(held, BINS), classes, held.device)
        kind = Anova if self.statistic == "anova" else ChiSquare
        return kind(classes, held.shape[1], held.device)

    def _correlate(self, gathered: Correlation | None, held: Tensor, known: Tensor) -> Correlation:
        labels = known.flatten(1) if known.ndim > 1 else known[:, None]
        several = not labels.is_floating_point() and bool(((labels != 0) & (labels != 1)).any())
        if several or self.statistic != "anova":
            raise ValueError(
                f"Expected one class for each item, got {known.dtype} of shape {tuple(known.shape)}: several "
                'labels (0 or 1) and real targets can be screened with statistic="anova" only, and series of classes '
                "not at all."
            )
        gathered = gathered or Correlation(labels.shape[1], held.shape[1], held.device)
        gathered.update(held, labels.double())
        return gathered


@dataclass(frozen=True)
class Screening(Score):
    """How much a unit tells classes apart, and how much its readers hear of it: `effect^(1/2) * |w| * std(unit)`.

    With `statistic="anova"` the effect is eta-squared, the share of the unit's variance that lies between classes, so
    this is the size of what readers hear of the differences between classes. A unit's value for an item is its mean
    over pixels or steps. Real targets and several labels an item are screened by correlation (r-squared; the mean
    over targets). p-values are those of the test alone: of the most telling target and channel, times their number.

    The test alone (`times="nothing"`) is a weak score of trained units, and cannot rank the weights of one unit; it
    is strong at choosing inputs.

    Attributes:
        statistic: `"anova"` (F, Fisher 1925), `"chi_square"` (for what is not negative), `"mutual_information"` or
            `"kruskal_wallis"`, both of 16 bins of equal size. For the last two, one process only: ranks would bin
            differently.
        times: `"weight_std"`: as above; `"scale"`: the effect times the scale of the normalisation the unit passes
            (Liu et al., 2017), or as above where there is none; `"nothing"`: the effect.
        reduction: of several readers: their `"mean"`, `"max"` or `"sum"`.
    """

    statistic: Statistic = "anova"
    times: Literal["weight_std", "scale", "nothing"] = "weight_std"
    reduction: Reduction = "sum"
    tests: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """Moments, and scales where these count."""
        return frozenset({"moments", "scales"} if self.times == "scale" else {"moments"})

    @property
    def witnesses(self) -> tuple[Witness, ...]:
        return (ByClass(self.statistic),)

    def __call__(self, evidence: Evidence) -> UnitScores:
        heard = evidence.heard
        log_p = torch.stack([self._log_p(reading) for reading in heard]).min(0).values + math.log(len(heard))
        return UnitScores(self._importance(evidence), log_p.clamp_max(0))

    def connections(self, reading: Reading) -> Float[Tensor, "columns targets"]:
        """Importance of every weight of a reader: `effect^(1/2) * |w| * std(unit)`."""
        spread = (self._effect(reading) * reading.variance).sqrt().flatten()
        return reading.weight.detach().to(spread).abs() * spread[:, None]

    def _importance(self, evidence: Evidence) -> Float[Tensor, "units"]:
        if self.times == "nothing":
            return reduced([self._effect(r).mean(1) for r in evidence.heard], self.reduction)
        if self.times == "scale" and evidence.scales is not None and evidence.scales.shape[1]:
            effect = reduced([self._effect(r).mean(1) for r in evidence.heard], self.reduction)
            return effect * evidence.scales.detach().double().abs().mean(1).cpu()
        shares = [(self._effect(r) * r.variance * r.of_weight(2.0).square()).sum(1).sqrt() for r in evidence.heard]
        return reduced(shares, self.reduction)

    def _effect(self, reading: Reading) -> Float[Tensor, "units channels"]:
        effect: Tensor = reading.gathered(ByClass(self.statistic)).result().effect
        of_units = effect.view(-1, effect.shape[-1]).mean(0).view(len(reading.weight) // reading.channels, -1)
        return of_units.repeat_interleave(reading.channels // of_units.shape[1], 1)  # taps of a kernel read the same

    def _log_p(self, reading: Reading) -> Float[Tensor, "units"]:
        of_columns: Tensor = reading.gathered(ByClass(self.statistic)).result().log_p
        units = len(reading.weight) // reading.channels
        tests = of_columns.view(-1, units, of_columns.shape[-1] // units).movedim(1, 0).flatten(1)
        return (tests.min(1).values + math.log(tests.shape[1])).clamp_max(0).cpu()


def _classes(gathered: Any) -> int:
    table: Tensor = gathered.table[0, 0] if hasattr(gathered, "table") else gathered.count
    return len(table)


def _with_room(gathered: Accumulator, larger: Accumulator) -> Accumulator:
    """What was gathered, with room for more classes."""
    state = larger.state_dict()
    for name, old in gathered.state_dict().items():
        state[name][tuple(slice(0, size) for size in old.shape)] = old
    larger.load_state_dict(state)
    return larger
