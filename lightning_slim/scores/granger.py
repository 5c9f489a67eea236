"""Conditional Granger causality of units for what their readers, or the network, compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.arguments import check_fields
from lightning_slim.scores.base import Calibration, Evidence, Need, Reading, Score, UnitScores
from lightning_slim.statistics import (
    Accumulator,
    ForwardSelection,
    JointMoments,
    Regression,
    f_log_sf,
    forward_selection,
    leave_one_out,
    thinned,
    with_lags,
)
from lightning_slim.statistics.labels import as_targets
from lightning_slim.witness import Known, Witness, check_items, in_full

Target = Literal["readers", "outputs", "labels", "losses"]
NOTHING = 1e-5  # of the targets' variance: with the jitter on the diagonal, copies add a tenth of it
SOME_ROWS = 512  # of a batch: rows of one item say much the same


class OfOthers(Accumulator):
    """Covariances of units with the same units of other items of a batch, of which they can tell nothing.

    Memory: `8 * units ** 2` bytes.

    Args:
        units: number of units.
        device: where the sums are kept.
    """

    SUMS: ClassVar = {"count": None, "products": 0}

    def __init__(self, units: int, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.count: Float[Tensor, "1"] = self._zeros(1)
        self.products: Float[Tensor, "units others"] = self._zeros(units, units)

    def update(self, values: Float[Tensor, "rows units"], others: Float[Tensor, "rows units"]) -> None:
        """Adds a batch, about its own means."""
        self._expect(values, self.products, "units")
        values, others = (in_full(part) - in_full(part).mean(0) for part in (values, others))
        self.products += (values.T @ others).to(self.products)
        self.count += len(values)

    def result(self) -> tuple[Float[Tensor, "units others"]]:
        """The covariances; zero while nothing was seen."""
        return (self.products / self.count.clamp_min(1e-300),)

    def keep(self, units: Int[Tensor, "kept"]) -> None:
        """Drops all other units, on both sides."""
        super().keep(units)
        self.products = self.products.index_select(1, units.to(self.products.device))


@dataclass(frozen=True)
class Exchanged(Witness):
    """Compares units with those of another item of the batch, in some rows of every item.

    And at another pixel or step: what all items have in common at one place is no chance.
    """

    def hold(self, units: Float[Tensor, "items positions columns"]) -> Tensor:
        return units

    def add(self, gathered: OfOthers | None, held: Tensor, known: None) -> OfOthers:
        gathered = gathered or OfOthers(held.shape[2], held.device)
        if len(held) > 1:
            items, places, _ = held.shape
            row = thinned(torch.arange(items * places, device=held.device), SOME_ROWS)
            item, place = row // places, row % places
            gathered.update(held[item, place], held[(item - 1) % items, (place + places // 2) % places])
        return gathered

    def blank(self, state: Mapping[str, Tensor]) -> OfOthers:
        return OfOthers(0)


@dataclass(frozen=True)
class WithTargets(Witness):
    """Joins units, and their past where the target is a series, with what is known of the item."""

    target: Known
    lags: int

    @property
    def known(self) -> Known:  # type: ignore[override]
        """The target."""
        return self.target

    def hold(self, units: Float[Tensor, "items positions columns"]) -> Tensor:
        return in_full(units).clone() if self.target == "outputs" else in_full(units).mean(1, keepdim=True)

    def add(self, gathered: JointMoments | None, held: Tensor, known: Tensor) -> JointMoments:
        check_items(held, known, self.target)
        known = known.detach()
        if known.ndim == 3 and known.shape[1] == held.shape[1] > self.lags:
            values = with_lags(held, self.lags).flatten(1)
            targets = known[:, self.lags :].flatten(0, 1)
        else:
            values, targets = held.mean(1), known.float().mean(1) if known.ndim == 3 else known
        targets = as_targets(targets.to(held.device))
        width = values.shape[1] // held.shape[2]
        if gathered is None:
            gathered = JointMoments(held.shape[2], targets.shape[1], width, held.device)
        elif gathered.cross.shape[2] < targets.shape[1]:  # a class that was never seen before
            larger = JointMoments(held.shape[2], targets.shape[1], width, held.device)
            larger.load_state_dict(
                {n: _padded(old, getattr(larger, n).shape) for n, old in gathered.state_dict().items()}
            )
            gathered = larger
        gathered.update(values, _padded(targets, (len(targets), gathered.cross.shape[2])))
        return gathered

    def blank(self, state: Mapping[str, Tensor]) -> JointMoments:
        return JointMoments(0, 0)


@dataclass(frozen=True)
class Granger(Score):
    """Units chosen greedily so that together they best predict their readers' pre-activations.

    The importance of a unit is the share of the targets' variance that was still unexplained when it was chosen:
    1 for the first, about 0 for those that the others predict.

    What is not chosen should be folded into what is (`compensate="least_squares"`): the same moments serve both.

    p-values are those of F to enter: of what each unit adds to those chosen before it, over what is left unexplained,
    divided by the mean F of single units where there is nothing to find (units joined with another item's targets), if
    that is above 1. Several targets are pooled as if they were one, which makes p too large, never too small. With
    readers as targets nearly every unit that is no combination of others is significant.

    Attributes:
        lags: past steps of each unit beside its present. They count where the units arrive as series: at a `Conv1d`, or
            at a linear layer that reads (item, step, channel). Elsewhere only the present is used. The present alone
            was never worse where we measured it, and its moments take a quarter of the memory of one lag more: what
            a recurrent unit was a step ago is among what its recurrent columns read now.
        target: what is to be predicted: what the `"readers"` of the units compute of them; the network's `"outputs"`,
            step by step if they are a series as the units are; the `"labels"` of the batch; or each item's
            `"losses"`. All but the first take the mean over a unit's pixels or steps, and were never better where we
            measured them.
        form: `"greedy"`: forward selection; `"leave_one_out"`: what is lost without each unit, all others there, which
            calls every copy of a unit useless and ranks below chance where there are copies.
    """

    lags: int = 0
    target: Target = "readers"
    form: Literal["greedy", "leave_one_out"] = "greedy"
    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})

    @property
    def tests(self) -> bool:  # type: ignore[override]
        """Forward selection does."""
        return self.form == "greedy"

    @property
    def needs_witnesses(self) -> bool:
        """Only for the targets that readers do not hold; else they calibrate."""
        return self.target != "readers"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.lags < 0:
            raise ValueError(f"Expected `lags` of at least 0, got {self.lags}.")

    @property
    def witnesses(self) -> tuple[Witness, ...]:
        return (Exchanged(),) if self.target == "readers" else (WithTargets(self.target, self.lags),)

    def __call__(self, evidence: Evidence) -> UnitScores:
        heard, units = tuple(map(_of_few_targets, evidence.heard)), evidence.weights.shape[0]
        regressions = [self._regression(reading) for reading in heard]
        live = torch.stack([reading.variance.sum(1).cpu() for reading in heard]).sum(0) > 0
        if self.form == "leave_one_out":
            return UnitScores(leave_one_out(regressions, units).where(live, 0.0))
        selection = forward_selection(regressions, units)
        explained = selection.gains.cumsum(0)
        importance = torch.zeros(units, dtype=torch.float64)
        importance[selection.order] = (1 - (explained - selection.gains)).clamp_min(0)
        calibration = self._calibrate(heard, regressions, selection, int(live.sum()))
        log_p = _to_enter(selection, calibration, len(regressions[0].gram) // units)
        return UnitScores(importance.where(live, 0.0), log_p, calibration)

    def _regression(self, reading: Reading) -> Regression:
        if self.target == "readers":
            return _of_reader(reading)
        return reading.gathered(WithTargets(self.target, self.lags)).result()  # type: ignore[no-any-return]

    def _calibrate(
        self, heard: tuple[Reading, ...], regressions: list[Regression], selection: ForwardSelection, live: int
    ) -> Calibration:
        units = len(selection.order)
        rows = min(
            float(r.moments.count) if self.target == "readers" else float(r.gathered(self.witnesses[0]).count)
            for r in heard
        )
        by_chance = torch.zeros(units, dtype=torch.float64)
        inflation = 1.0
        null = [(_of_others(reading), reading) for reading in heard]
        exchanged = [(regression, float(r.told[Exchanged()].count)) for regression, r in null if regression is not None]
        if exchanged:
            by_chance = (
                forward_selection([regression for regression, _ in exchanged], units).gains.cumsum(0).clamp_max(1)
            )
            f = [_single(regression, rows, units) for regression, rows in exchanged]
            inflation = max(1.0, float(torch.stack(f).mean()))
        return Calibration(
            rows=rows,
            units=units,
            live=live,
            variance=sum(regression.variance for regression in regressions),
            explained=selection.gains.cumsum(0).clamp_max(1),
            by_chance=by_chance,
            inflation=inflation,
        )


def _of_reader(reading: Reading) -> Regression:
    """The reader's pre-activation is `weight' x`: its moments follow from those of x."""
    gram = reading.moments.covariance
    columns = reading.weight.shape[0]
    present = gram.view(len(gram), columns, -1)[:, :, 0]
    weight = reading.weight
    cross = present @ weight
    variance = float((weight * cross.view(columns, -1, weight.shape[1])[:, 0]).sum())
    return Regression(gram, cross, variance)


def _of_others(reading: Reading) -> Regression | None:
    """What the reader computes of another item, on the units as they are now; None if that was not recorded.

    Where taps of a kernel were recorded one by one (`compensate="exact"`), it was not.
    """
    others = reading.told.get(Exchanged())
    columns = len(reading.weight)
    if others is None or not float(others.count) or len(others.products) != columns:
        return None
    gram = reading.moments.covariance.view(columns, -1, columns, len(reading.moments.total) // columns)[:, 0, :, 0]
    weight = reading.weight
    return Regression(gram, others.result()[0] @ weight, float((weight * (gram @ weight)).sum()))


def _single(regression: Regression, rows: float, units: int) -> Float[Tensor, "units"]:
    """F of each unit alone, all targets together."""
    width = len(regression.gram) // units
    blocks = regression.gram.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    cross = regression.cross.view(units, width, -1)
    identity = torch.eye(width, dtype=blocks.dtype, device=blocks.device)
    damping = 1e-9 * blocks.diagonal(dim1=1, dim2=2).mean() + 1e-300
    explained = (cross * torch.linalg.solve(blocks + damping * identity, cross)).sum((1, 2))
    share = (explained / max(regression.variance, 1e-300)).clamp(0, 1 - 1e-12)
    f: Tensor = share / width / ((1 - share) / max(rows - width - 1, 1.0))
    return f.cpu()


def _to_enter(selection: ForwardSelection, calibration: Calibration, width: int) -> Float[Tensor, "units"]:
    """Logarithms of p of what each unit added when it was chosen."""
    units = len(selection.order)
    gains, left = selection.gains, (1 - selection.gains.cumsum(0)).clamp_min(NOTHING)
    degrees = calibration.rows - width * torch.arange(1, units + 1, dtype=torch.float64) - 1
    testable = (degrees >= 1) & (gains > NOTHING)
    f = gains / width / (left / degrees.clamp_min(1)) / calibration.inflation
    tested = f_log_sf(torch.where(testable, f, 0.0), torch.full_like(f, width), degrees.clamp_min(1))
    log_p = torch.zeros(units, dtype=torch.float64)
    log_p[selection.order] = torch.where(testable, tested, 0.0)
    return log_p


def _padded(tensor: Tensor, shape: Any) -> Tensor:
    """With zeros behind, along every axis."""
    padded = tensor.new_zeros(tuple(shape))
    padded[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded


def _of_few_targets(reading: Reading) -> Reading:
    """With at most as many targets as columns, and the same gains: they depend on `weight weight'` only."""
    weight = reading.weight.to(reading.moments.total)
    if weight.shape[1] > weight.shape[0]:
        values, vectors = torch.linalg.eigh(weight @ weight.T)
        weight = vectors * values.clamp_min(0).sqrt()
    return reading._replace(weight=weight)
