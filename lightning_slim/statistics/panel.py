"""Granger causality over many sequences: does a unit's past tell of a target what the target's own past does not?"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_slim.statistics.distributions import f_log_sf
from lightning_slim.statistics.nested import Nested, nested
from lightning_slim.statistics.panel_rows import DESIGN, PanelDesign, Rows, pairings, present, raw_squares
from lightning_slim.statistics.streaming import Accumulator

ROUNDING = 1e-26  # of a column's raw squares: a standard deviation of 1e-13 of the mean is none


class PanelTest(NamedTuple):
    """A test of every pair. Where nothing can be tested, the statistic and effects are 0 and p is 1.

    Attributes:
        statistic: F or Wald statistic over its degrees of freedom, divided by `inflation`.
        p_value: of the null hypothesis that the unit does not Granger-cause the target; underflows to 0.
        log_p: its natural logarithm, which does not underflow.
        partial_r2: share of what the target's own past leaves that the unit's past explains, in [0, 1].
        geweke: Geweke's (1982) measure in nats, `-log(1 - partial_r2)`. Rank by it: it does not grow with rows.
        df1: degrees of freedom: lags of the unit that are not combinations of others.
        df2: degrees of freedom of the denominator.
        inflation: factor by which statistics exceed their distribution where there is nothing to find; at least 1.
    """

    statistic: Float[Tensor, "targets units"]
    p_value: Float[Tensor, "targets units"]
    log_p: Float[Tensor, "targets units"]
    partial_r2: Float[Tensor, "targets units"]
    geweke: Float[Tensor, "targets units"]
    df1: Float[Tensor, "targets units"]
    df2: Float[Tensor, "targets units"]
    inflation: Float[Tensor, "targets"]


class PanelGranger(Accumulator):
    """Pooled Granger causality of every unit on every target over many sequences, streaming.

    Each target at step `t` is regressed on its own `own_lags` and on a unit's `lags`, pooled over all items; the F test
    compares the regression with and without the unit. The regression sees centred columns (see `PanelDesign`), lags
    that never cross from one item, or one side of a reset, to another, and no padding. Only moments are kept: `F` has
    some `16 + log10(1 - partial_r2)` digits.

    F supposes that rows are independent. Sequences that share what is not modelled make it too large, so it is
    calibrated (as in genomic control, Devlin and Roeder 1999): beside the true pairs, `nulls` streams pair units with
    the targets of other items of the batch, where there is nothing to find, and F is divided by its mean there, if that
    is above 1. Batches must hold unrelated items for that; where windows of one series overlap, pass their number to
    `result`, too. Source: Granger (1969), Geweke (1982).

    Memory: `8 * units * (1 + nulls) * lags * (lags + targets * (own_lags + 1))` bytes; while a batch is added, a
    float64 copy of it and some 50 MB; while `result` is made, `40 * units * (lags + own_lags + 1) ** 2` bytes, for a
    target at a time.

    Args:
        units: number of units.
        targets: number of targets.
        design: lags, steps that count, and means that are subtracted.
        nulls: streams of wrongly paired items, for calibration; 0 for none.
        device: where the sums are kept.

    Example:
        >>> panel = PanelGranger(units=2, targets=1)
        >>> units = torch.randn(32, 20, 2, generator=torch.Generator().manual_seed(0))
        >>> panel.update(units, units[:, :, :1].roll(1, dims=1) + 0.1 * units[:, :, 1:])  # the first one leads
        >>> panel.result().geweke.round(decimals=1).tolist()
        [[4.5, 0.0]]
    """

    SUMS: ClassVar = {
        "unit_moments": 1, "cross_moments": 1, "target_moments": None, "rows": None, "absorbed": None, "unit_size": 0,
        "target_size": None,
    }  # fmt: skip
    SETTINGS: ClassVar = ("design",)

    def __init__(
        self,
        units: int,
        targets: int,
        design: PanelDesign = DESIGN,
        *,
        nulls: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(device)
        self.design = design
        worlds, lags, columns = 1 + nulls, design.lags, design.own + 1
        self.unit_moments: Float[Tensor, "worlds units lags lags"] = self._zeros(worlds, units, lags, lags)
        self.cross_moments: Float[Tensor, "worlds units lags targets columns"] = self._zeros(
            worlds, units, lags, targets, columns
        )
        self.target_moments: Float[Tensor, "worlds targets columns columns"] = self._zeros(
            worlds, targets, columns, columns
        )
        self.rows, self.absorbed = self._zeros(worlds), self._zeros(worlds)
        self.unit_size, self.target_size = self._zeros(units), self._zeros(targets)

    @torch.no_grad()
    def update(
        self,
        units: Float[Tensor, "items steps units"],
        targets: Float[Tensor, "items steps targets"],
        lengths: Int[Tensor, "items"] | None = None,
        *,
        mask: Bool[Tensor, "items steps"] | None = None,
        resets: Bool[Tensor, "items steps"] | None = None,
    ) -> None:
        """Adds a batch of sequences.

        Args:
            units: states or activations, of any floating type.
            targets: what they might cause.
            lengths: steps of each item that exist, its first ones.
            mask: steps that exist, if they are not the first ones. What stands at others is not looked at.
            resets: steps whose past is not their own, as where a recurrent state was set anew.

        Raises:
            ValueError: another number of units or targets, or too few steps for any row.
        """
        units = self._accept(units, self.unit_size, "units")
        targets = self._accept(targets, self.target_size, "targets")
        real, anew = present(units, lengths, mask, resets)
        for world, paired, both, fresh in pairings(targets, real, anew, len(self.rows)):
            for rows in self.design.rows(units, paired, both, fresh):
                self._add(world, rows)
                if world == 0:
                    self.unit_size[rows.at] += raw_squares(units[..., rows.at], real)
        self.target_size += raw_squares(targets, real)

    def result(self, distinct: int | float | None = None) -> PanelTest:
        """The test of every pair.

        Args:
            distinct: how many different moments the rows are, where they overlap or were seen several times
                (`distinct_rows` counts them for windows of a series). None takes each row for its own.
        """
        true, *null = (self._compare(world) for world in range(len(self.rows)))
        share = true.share
        rows, absorbed = self.rows, self.absorbed
        if distinct is not None:
            seen = (distinct / rows[0].clamp_min(1)).clamp_max(1)
            rows, absorbed = rows * seen, absorbed * seen
        left = [rows[world] - absorbed[world] - one.own - one.rank for world, one in enumerate((true, *null))]
        F = _f(true, left[0])
        inflation = torch.ones_like(F[:, 0])
        if null:
            testable = torch.cat([(one.rank > 0) & (df >= 1) for one, df in zip(null, left[1:], strict=True)], 1)
            by_chance = torch.cat([_f(one, df) for one, df in zip(null, left[1:], strict=True)], 1)
            by_chance = torch.where(testable & by_chance.isfinite(), by_chance, 0.0)
            inflation = (by_chance.sum(1) / testable.sum(1).clamp_min(1)).clamp_min(1)
        log_p = f_log_sf(F / inflation[:, None], true.rank, left[0])
        return PanelTest(
            F / inflation[:, None],
            log_p.exp(),
            log_p,
            share,
            _geweke(share),
            true.rank,
            left[0].clamp_min(0),
            inflation,
        )

    def _add(self, world: int, rows: Rows) -> None:
        lags, units = rows.units.shape[2:]
        columns = rows.units.flatten(0, 1)
        answers = rows.targets.flatten(0, 1).flatten(1)
        for i in range(lags):
            for j in range(i, lags):
                product = torch.linalg.vecdot(columns[:, i], columns[:, j], dim=0)
                self.unit_moments[world, rows.at, i, j] += product
                if i != j:
                    self.unit_moments[world, rows.at, j, i] += product
        cross = columns.flatten(1).T @ answers
        self.cross_moments[world, rows.at] += cross.view(lags, units, *self.cross_moments.shape[3:]).transpose(0, 1)
        if rows.at.start == 0:
            self.target_moments[world] += torch.einsum("brkc,brkd->kcd", rows.targets, rows.targets)
            self.rows[world] += rows.counts.sum()
            self.absorbed[world] += rows.absorbed[0]

    def _compare(self, world: int) -> Nested:
        """Moments of all pairs, a target at a time, with the columns own lags, unit lags, target."""
        parts = []
        for target, size in enumerate(self.target_size):
            joint, floor = self._joint(world, target), self._floor(size)
            parts.append(nested(joint, self.design.own, floor))
        return Nested(*(torch.stack(part) for part in zip(*parts, strict=True)))

    def _joint(self, world: int, target: int) -> Float[Tensor, "units columns columns"]:
        own, lags = self.design.own, self.design.lags
        order = [*range(1, own + 1), 0]  # own lags first, the target itself last
        targets = self.target_moments[world, target][order][:, order]
        cross = self.cross_moments[world, :, :, target][..., order]
        joint = cross.new_zeros(len(cross), own + lags + 1, own + lags + 1)
        outer, inner = [*range(own), own + lags], slice(own, own + lags)
        joint[:, torch.tensor(outer)[:, None], torch.tensor(outer)] = targets
        joint[:, inner, inner] = self.unit_moments[world]
        joint[:, inner, outer] = cross
        joint[:, outer, inner] = cross.mT
        return joint

    def _floor(self, size: Float[Tensor, ""]) -> Float[Tensor, "units columns"]:
        own, lags = self.design.own, self.design.lags
        unit = self.unit_size[:, None].expand(-1, lags)
        target = size.expand(len(unit), own + 1)
        return ROUNDING * torch.cat([target[:, :own], unit, target[:, :1]], 1)


def _geweke(share: Tensor) -> Tensor:
    return -torch.log1p(-share.clamp_max(1 - torch.finfo(share.dtype).eps))


def _f(one: Nested, df2: Tensor) -> Tensor:
    share = torch.where(df2 >= 1, one.share, 0.0)
    left = torch.where(share > 0, 1 - share, 1.0)
    return share / one.rank.clamp_min(1) / (left / df2.clamp_min(1))
