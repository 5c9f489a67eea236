"""Analysis of variance across classes: does a unit's mean differ from class to class?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.statistics.labels import check_labels
from lightning_slim.statistics.screening import EPS, Screening, f_screening
from lightning_slim.statistics.streaming import Pivoted


class Anova(Pivoted):
    """One-way analysis of variance of every unit, streaming: `F`, p and eta-squared.

    `F = (between / (classes - 1)) / (within / (rows - classes))`, where classes without rows do not count. Null
    hypothesis: the unit's mean is the same in all classes. A unit that is the same everywhere has `F` 0; one that is
    the same within each class but not across them has `F` infinite and eta-squared 1, "the same" meaning to within
    rounding of its spread, about 1e-15 of its squares.

    The effect is eta-squared, the share of a unit's variance that lies between classes. Source: Fisher (1925); equal to
    `scipy.stats.f_oneway` and scikit-learn's `f_classif`.

    Memory: `8 * units * (classes + 2)` bytes, and a float64 copy of a batch while it is added.

    Args:
        classes: number of classes; labels are `0 ... classes - 1`.
        units: number of units.
        device: where the sums are kept.

    Example:
        >>> anova = Anova(classes=2, units=2)
        >>> anova.update(torch.tensor([[1.0, 7.0], [2.0, 7.0], [4.0, 7.0], [5.0, 7.0]]), torch.tensor([0, 0, 1, 1]))
        >>> anova.result().statistic.tolist(), anova.result().effect.tolist()
        ([18.0, 0.0], [0.9, 0.0])
    """

    SUMS: ClassVar = {"count": None, "total": 1, "square": 0}
    PIVOTS: ClassVar = {"pivot": 0}

    def __init__(self, classes: int, units: int, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.count: Float[Tensor, "classes"] = self._zeros(classes)
        self.total: Float[Tensor, "classes units"] = self._zeros(classes, units)
        self.square: Float[Tensor, "units"] = self._zeros(units)
        self.pivot: Float[Tensor, "units"] = self._zeros(units)

    @torch.no_grad()
    def update(self, values: Float[Tensor, "rows units"], labels: Int[Tensor, "rows"]) -> None:
        """Adds a batch.

        Raises:
            ValueError: another number of units, or a label that is none of the classes.
        """
        values = self._accept(values, self.pivot, "units")
        labels = check_labels(labels.to(self.device), len(self.count))
        if len(values) == 0:
            return
        values = self._about("pivot", values)
        self._settled = True
        self.count += torch.bincount(labels, minlength=len(self.count))
        self.total.index_add_(0, labels, values)
        self.square += torch.linalg.vecdot(values, values, dim=0)

    def grow(self, classes: int) -> None:
        """Makes room for more classes, if there are fewer than so many; none of them was seen yet."""
        missing = max(classes - len(self.count), 0)
        self.count = torch.cat([self.count, self._zeros(missing)])
        self.total = torch.cat([self.total, self._zeros(missing, self.total.shape[1])])

    def result(self) -> Screening:
        """The test of every unit; `statistic` is F and `effect` is eta-squared, both `[units]`."""
        rows, classes = self.count.sum(), (self.count > 0).sum()
        between = (self.total.square() / self.count.clamp_min(1)[:, None]).sum(0)
        shift = self.total.sum(0).square() / rows.clamp_min(1)
        noise = EPS * (4 + rows.sqrt()) * self.square
        return f_screening(between - shift, self.square - between, noise, classes - 1, rows - classes)

    def _shift(self, by: Mapping[str, Tensor]) -> None:
        d = by["pivot"]
        self.square = self.square + 2 * d * self.total.sum(0) + self.count.sum() * d.square()
        self.total = self.total + self.count[:, None] * d
