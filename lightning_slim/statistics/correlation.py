"""Correlation of units with targets: numbers, logits, or labels of which a row may have several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_slim.statistics.screening import EPS, Screening, f_screening
from lightning_slim.statistics.streaming import Pivoted


class Correlation(Pivoted):
    """Simple linear regression of every target on every unit, streaming: `F`, p and r-squared.

    `F = r^2 / (1 - r^2) * (rows - 2)`, with Pearson's `r`. Null hypothesis: they are not correlated. A dead unit or a
    constant target has `F` 0; an exactly linear relation, to within rounding, has `F` infinite and r-squared 1.

    The effect is r-squared, the share of a target's variance that a unit explains, and the other way round. Equal to
    scikit-learn's `f_regression`.

    Memory: `8 * (units * (targets + 3) + 3 * targets)` bytes, and a float64 copy of a batch while it is added.

    Args:
        targets: number of targets.
        units: number of units.
        device: where the sums are kept.

    Example:
        >>> correlation = Correlation(targets=1, units=2)
        >>> correlation.update(torch.tensor([[1.0, 3.0], [2.0, 3.0], [3.0, 3.0]]), torch.tensor([[1.0], [1.0], [4.0]]))
        >>> correlation.result().effect.tolist()
        [[0.75, 0.0]]
    """

    SUMS: ClassVar = {
        "count": None, "total": 0, "square": 0, "target_total": None, "target_square": None, "product": 1,
    }  # fmt: skip
    PIVOTS: ClassVar = {"pivot": 0, "target_pivot": None}

    def __init__(self, targets: int, units: int, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.count: Float[Tensor, "1"] = self._zeros(1)
        self.total, self.square, self.pivot = (self._zeros(units) for _ in range(3))
        self.target_total, self.target_square, self.target_pivot = (self._zeros(targets) for _ in range(3))
        self.product: Float[Tensor, "targets units"] = self._zeros(targets, units)

    @torch.no_grad()
    def update(self, values: Float[Tensor, "rows units"], targets: Float[Tensor, "rows targets"]) -> None:
        """Adds a batch.

        Raises:
            ValueError: another number of units or targets.
        """
        values = self._accept(values, self.pivot, "units")
        targets = self._accept(targets, self.target_pivot, "targets")
        if len(values) == 0:
            return
        values, targets = self._about("pivot", values), self._about("target_pivot", targets)
        self._settled = True
        self.count += len(values)
        self.total += values.sum(0)
        self.square += torch.linalg.vecdot(values, values, dim=0)
        self.target_total += targets.sum(0)
        self.target_square += torch.linalg.vecdot(targets, targets, dim=0)
        self.product += targets.T @ values

    def result(self) -> Screening:
        """The test of every pair; `statistic` is F and `effect` is r-squared, both `[targets, units]`."""
        n = self.count.clamp_min(1)
        noise = EPS * (4 + n.sqrt())
        x = self.square - self.total.square() / n
        y = (self.target_square - self.target_total.square() / n)[:, None]
        xy = self.product - torch.outer(self.target_total, self.total) / n
        alive = (x > noise * self.square) & (y > (noise * self.target_square)[:, None])
        r2 = torch.where(alive, (xy / x) * (xy / y), 0.0).clamp_max(1)
        return f_screening(r2, torch.where(alive, 1 - r2, 0.0), noise.expand_as(r2), n / n, self.count - 2)

    def _shift(self, by: Mapping[str, Tensor]) -> None:
        dx, dy, n = by["pivot"], by["target_pivot"], self.count
        self.product = (
            self.product + torch.outer(self.target_total, dx) + torch.outer(dy, self.total) + n * torch.outer(dy, dx)
        )
        self.square = self.square + 2 * dx * self.total + n * dx.square()
        self.target_square = self.target_square + 2 * dy * self.target_total + n * dy.square()
        self.total, self.target_total = self.total + n * dx, self.target_total + n * dy


class MultilabelAnova(Correlation):
    """Analysis of variance between rows with and without a label, for every label and unit, streaming.

    Each label makes two groups, and the two-group `F` is that of the point-biserial correlation. Equal to
    scikit-learn's `f_classif`, label by label. A label that all rows or none have has `F` 0. The effect is eta-squared.

    Args:
        targets: number of labels.
        units: number of units.
        device: where the sums are kept.
    """

    @torch.no_grad()
    def update(self, values: Float[Tensor, "rows units"], targets: Bool[Tensor, "rows targets"]) -> None:
        """Adds a batch; rows may have any number of labels.

        Raises:
            ValueError: another number of units or labels.
        """
        super().update(values, targets.double())
