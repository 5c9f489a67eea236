"""Chi-squared test of activations as counts: does a unit's sum spread over classes as rows do?"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.statistics.labels import check_labels
from lightning_slim.statistics.screening import Screening, chi2_screening
from lightning_slim.statistics.streaming import Accumulator


class ChiSquare(Accumulator):
    """Chi-squared of non-negative activations (behind a ReLU) against classes, streaming.

    `chi2 = sum over classes of (observed - expected)^2 / expected`; observed is the sum of a unit within a class,
    expected its whole sum times the class's share of rows. Null hypothesis: the unit's activity spreads over classes as
    rows do. It is a test for counts: for activations, chi-squared and p scale with the unit, so rank by the effect.

    The effect is the mean square contingency, chi-squared over the unit's whole sum: free of scale. A silent unit has
    0. Equal to scikit-learn's `chi2`.

    Memory: `8 * classes * (units + 1)` bytes, and a float64 copy of a batch while it is added.

    Args:
        classes: number of classes; labels are `0 ... classes - 1`.
        units: number of units.
        device: where the sums are kept.

    Example:
        >>> chi_square = ChiSquare(classes=2, units=2)
        >>> chi_square.update(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        >>> chi_square.result().statistic.tolist()
        [1.0, 0.0]
    """

    SUMS: ClassVar = {"count": None, "observed": 1}

    def __init__(self, classes: int, units: int, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.count: Float[Tensor, "classes"] = self._zeros(classes)
        self.observed: Float[Tensor, "classes units"] = self._zeros(classes, units)

    @torch.no_grad()
    def update(self, values: Float[Tensor, "rows units"], labels: Int[Tensor, "rows"]) -> None:
        """Adds a batch.

        Raises:
            ValueError: a negative value, another number of units, or a label that is none of the classes.
        """
        values = self._accept(values, self.observed, "units")
        labels = check_labels(labels.to(self.device), len(self.count))
        if (values < 0).any():
            raise ValueError(
                f"Chi-squared is for values that are not negative, got {float(values.min()):g}: record behind a ReLU, "
                f"or use `Anova`."
            )
        self.count += torch.bincount(labels, minlength=len(self.count))
        self.observed.index_add_(0, labels, values)

    def result(self) -> Screening:
        """The test of every unit; `statistic` is chi-squared and `effect` the mean square contingency, `[units]`."""
        total = self.observed.sum(0)
        share = self.count / self.count.sum().clamp_min(1)
        expected = torch.outer(share, total)
        chi2 = torch.where(expected == 0, 0.0, (self.observed - expected).square() / expected).sum(0)
        effect = torch.where(total == 0, 0.0, chi2 / total)
        return chi2_screening(chi2, effect, (self.count > 0).sum() - 1)
