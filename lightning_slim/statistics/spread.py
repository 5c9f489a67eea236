"""Mean and variance of every unit by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.statistics.moments import FIRST_ROWS
from lightning_slim.statistics.streaming import Pivoted


class MeanAndVariance(NamedTuple):
    """First moment, and centred second moment divided by the number of rows."""

    mean: Float[Tensor, "units"]
    variance: Float[Tensor, "units"]


class Spread(Pivoted):
    """Mean and variance of every unit, streaming: those of `Moments`, without covariances.

    Sums are float64 and about pivots; what is added to them is computed in float32, unless the rows are float64.

    A unit with a value that is not finite counts as dead: its mean and variance are zero.

    Memory: `24 * units` bytes, and two copies of a batch while it is added.

    Args:
        units: number of units.
        device: where the sums are kept.

    Example:
        >>> spread = Spread(units=2)
        >>> spread.update(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        >>> spread.result().mean.tolist(), spread.result().variance.tolist(), spread.mean_square.tolist()
        ([2.0, 2.0], [1.0, 4.0], [5.0, 8.0])
    """

    SUMS: ClassVar = {"count": None, "total": 0, "square": 0}
    PIVOTS: ClassVar = {"pivot": 0}

    def __init__(self, units: int, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.count: Float[Tensor, "1"] = self._zeros(1)
        self.total, self.square, self.pivot = (self._zeros(units) for _ in range(3))

    @torch.no_grad()
    def update(self, values: Float[Tensor, "rows units"]) -> None:
        """Adds a batch.

        Raises:
            ValueError: another number of units.
        """
        self._expect(values, self.pivot, "units")
        if len(values) == 0:
            return
        values = values.detach().float() if values.dtype != torch.float64 else values.detach()
        if not self._settled:
            self.pivot = values[:FIRST_ROWS].median(0).values.to(self.device, torch.float64)
            self._settled = True
        values = values - self.pivot.to(values)
        self.count += len(values)
        self.total += values.sum(0).to(self.device)
        self.square += torch.linalg.vecdot(values, values, dim=0).to(self.device)

    @torch.no_grad()
    def update_one_hot(self, counts: Int[Tensor, "units"]) -> None:
        """Adds rows of zeros in which one unit is 1: so many of each unit."""
        counts, self._settled = counts.to(self.total), True
        self.total += counts - counts.sum() * self.pivot
        self.square += counts * (1 - 2 * self.pivot) + counts.sum() * self.pivot.square()
        self.count += counts.sum()

    def result(self) -> MeanAndVariance:
        """Mean and variance of every unit; zero while nothing was seen."""
        near, defined = self.total / self.count.clamp_min(1e-300), self.square.isfinite() & self.total.isfinite()
        variance = (self.square / self.count.clamp_min(1e-300) - near.square()).clamp_min(0)
        return MeanAndVariance(torch.where(defined, self.pivot + near, 0.0), torch.where(defined, variance, 0.0))

    @property
    def mean_square(self) -> Float[Tensor, "units"]:
        """Mean of the squares of every unit, about zero."""
        mean, variance = self.result()
        return mean.square() + variance

    def _shift(self, by: Mapping[str, Tensor]) -> None:
        d = by["pivot"]
        self.square = self.square + 2 * d * self.total + self.count * d.square()
        self.total = self.total + self.count * d
