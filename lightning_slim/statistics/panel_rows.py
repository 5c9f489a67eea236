"""Rows of a panel: many sequences cut into steps with a whole past, centred."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Center = Literal["step", "batch", "item"]

BLOCK = 1 << 20  # float64 numbers of lagged units that are held at once


class Rows(NamedTuple):
    """Columns of a regression, zero in rows that do not count.

    Attributes:
        at: the units.
        units: their lags, nearest first.
        targets: each target (column 0) and its own lags.
        counts: which rows count.
        absorbed: number of means that were subtracted, which are degrees of freedom.
    """

    at: slice
    units: Float[Tensor, "items rows lags units"]
    targets: Float[Tensor, "items rows targets columns"]
    counts: Bool[Tensor, "items rows"]
    absorbed: Float[Tensor, "1"]


@dataclass(frozen=True)
class PanelDesign:
    """Which lags are regressors, which steps count, and which means are subtracted.

    Attributes:
        lags: lags of the unit.
        own_lags: lags of the target; None for as many as `lags`.
        first_lag: the nearest lag of the unit; 0 for targets that are computed from it within the same step.
        warm_up: steps at the beginning of each stretch that are past only, never a row.
        center: `"step"` subtracts from each column, at each step, its mean over the items of the batch: what the
            position in a sequence explains is not taken for a cause. `"batch"` subtracts one mean a batch. `"item"`
            subtracts each item's mean, the usual fixed effect: with short sequences and units that respond to the
            target, it finds causes where there are none (Nickell, 1981: 97 % at 8 steps).
    """

    lags: int = 1
    own_lags: int | None = None
    first_lag: int = 1
    warm_up: int = 0
    center: Center = "step"

    def __post_init__(self) -> None:
        object.__setattr__(self, "own_lags", self.own)  # given or not, equal designs are equal
        if self.lags < 1 or self.own < 0 or self.first_lag not in (0, 1) or self.warm_up < 0:
            raise ValueError(
                f"Expected lags of at least 1, own lags and a warm-up of at least 0 and a first lag of 0 or 1, got "
                f"lags={self.lags}, own_lags={self.own}, warm_up={self.warm_up}, first_lag={self.first_lag}."
            )
        if self.center not in ("step", "batch", "item"):
            raise ValueError(f'Expected center "step", "batch" or "item", got {self.center!r}.')

    @property
    def own(self) -> int:
        """Lags of the target."""
        return self.lags if self.own_lags is None else self.own_lags

    @property
    def past(self) -> int:
        """Steps before the first row of a stretch."""
        return max(self.own, self.first_lag + self.lags - 1) + self.warm_up

    def rows(
        self,
        units: Float[Tensor, "items steps units"],
        targets: Float[Tensor, "items steps targets"],
        mask: Bool[Tensor, "items steps"],
        resets: Bool[Tensor, "items steps"],
    ) -> Iterator[Rows]:
        """Blocks of units with the rows of all items.

        Args:
            units: float64.
            targets: float64.
            mask: steps that exist; what stands at others, such as padding, is not looked at.
            resets: steps that begin a new stretch of their item: what came before them is not their past.

        Raises:
            ValueError: the sequences are too short to have any row.
        """
        items, steps, width = units.shape
        if steps <= self.past:
            raise ValueError(
                f"{self.past} steps of past (lags and warm-up) need at least {self.past + 1} steps, got {steps}: "
                f"record longer series, or lower `lags` or `warm_up`."
            )
        counts = whole_past(mask, resets, self.past)[:, self.past :]
        size = counts.sum(self._over, keepdim=True, dtype=torch.float64)
        absorbed = (size > 0).sum().double()[None]
        targets = torch.where(mask[..., None], targets, 0.0)
        answers = torch.stack([self._column(targets, lag, counts, size) for lag in range(self.own + 1)], -1)
        block = max(1, BLOCK // max(1, items * steps * self.lags))
        for start in range(0, width, block):
            part = torch.where(mask[..., None], units[..., start : start + block], 0.0)
            lags = range(self.first_lag, self.first_lag + self.lags)
            columns = torch.stack([self._column(part, lag, counts, size) for lag in lags], 2)
            yield Rows(slice(start, start + block), columns, answers, counts, absorbed)

    @property
    def _over(self) -> tuple[int, ...]:
        return {"step": (0,), "batch": (0, 1), "item": (1,)}[self.center]

    def _column(self, series: Tensor, lag: int, counts: Tensor, size: Tensor) -> Tensor:
        column = series[:, self.past - lag : series.shape[1] - lag]
        column = torch.where(counts[..., None], column, 0.0)
        mean = column.sum(self._over, keepdim=True) / size.clamp_min(1)[..., None]
        return torch.where(counts[..., None], column - mean, 0.0)


DESIGN = PanelDesign()


def present(
    units: Float[Tensor, "items steps units"],
    lengths: Int[Tensor, "items"] | None,
    mask: Bool[Tensor, "items steps"] | None,
    resets: Bool[Tensor, "items steps"] | None,
) -> tuple[Bool[Tensor, "items steps"], Bool[Tensor, "items steps"]]:
    """Steps that exist by lengths and mask, and steps that begin anew."""
    real = torch.ones(units.shape[:2], dtype=torch.bool, device=units.device)
    if lengths is not None:
        real &= torch.arange(units.shape[1], device=units.device) < lengths.to(units.device)[:, None]
    if mask is not None:
        real &= mask.to(units.device)
    return real, torch.zeros_like(real) if resets is None else resets.to(units.device)


def pairings(
    targets: Float[Tensor, "items steps targets"],
    real: Bool[Tensor, "items steps"],
    anew: Bool[Tensor, "items steps"],
    worlds: int,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """The true targets, then those of other items of the batch, where there is nothing to find.

    Yields:
        Number of the pairing, 0 the true one; targets; steps that both items have; steps at which either begins anew. A
        pairing that would be the true one again, for want of items, is left out.
    """
    for world in range(worlds):
        if world == 0 or world % max(1, len(targets)):
            yield world, targets.roll(world, 0), real & real.roll(world, 0), anew | anew.roll(world, 0)


def raw_squares(
    series: Float[Tensor, "items steps columns"], real: Bool[Tensor, "items steps"]
) -> Float[Tensor, "columns"]:
    """Squares of all columns, not centred, over the steps that exist: what their rounding errors are relative to."""
    return torch.where(real[..., None], series, 0.0).square().sum((0, 1))


def whole_past(
    mask: Bool[Tensor, "items steps"], resets: Bool[Tensor, "items steps"], past: int
) -> Bool[Tensor, "items steps"]:
    """Steps that exist and have so many steps before them, without a gap and without a reset in between.

    Example:
        >>> mask, resets = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool(), torch.tensor([[0, 0, 1, 0, 0, 0]]).bool()
        >>> whole_past(mask, resets, past=1).tolist()
        [[False, True, False, True, True, False]]
    """
    step = torch.arange(mask.shape[1], device=mask.device)
    begins = resets | ~mask | ~mask.roll(1, 1) | (step == 0)
    since = step - torch.where(begins, step, 0).cummax(1).values
    return mask & (since >= past)


def distinct_rows(starts: Int[Tensor, "items"], steps: int, past: int) -> int:
    """How many different moments the rows of overlapping windows of one series are.

    Args:
        starts: first step of each window within the series.
        steps: length of a window.
        past: steps at its beginning that are no rows.

    Example:
        >>> distinct_rows(torch.tensor([0, 1, 2, 50]), steps=10, past=2)
        18
    """
    starts = torch.unique(starts).long()
    return int(torch.diff(starts).clamp_max(steps - past).sum()) + (steps - past) * bool(len(starts))
