"""Tables of bins against classes, which tests of any relation, not only of a linear one, are read from."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.statistics.labels import check_labels
from lightning_slim.statistics.streaming import Accumulator


def quantile_edges(values: Float[Tensor, "rows units"], bins: int) -> Float[Tensor, "units edges"]:
    """Edges between bins that hold equally many rows of a first batch, unit by unit.

    An edge is a value of the batch and belongs to the bin below it. Edges may coincide, as those of a unit that is
    often exactly zero: bins between them stay empty.

    Raises:
        ValueError: fewer than two bins, or no rows.

    Example:
        >>> quantile_edges(torch.tensor([[3.0], [1.0], [2.0], [4.0]]), bins=2).tolist()
        [[2.0]]
    """
    if bins < 2 or len(values) == 0:
        raise ValueError(f"Edges need at least 2 bins and 1 row, got {bins} and {len(values)}: pass more of them.")
    last = (torch.arange(1, bins, device=values.device) * len(values)).div(bins, rounding_mode="floor") - 1
    return values.detach().double().sort(0).values[last.clamp_min(0)].T.contiguous()


class Contingency(Accumulator):
    """Counts of rows by unit, bin and class, streaming.

    Memory: `8 * units * bins * classes` bytes, and 8 bytes for each value of a batch while it is added. 4096 units, 16
    bins and 1000 classes are half a gigabyte: there, take fewer bins, or `Anova`.

    Args:
        edges: edges between bins, rising, as of `quantile_edges`. An edge belongs to the bin below it; infinite values
            are in the outer bins, and NaN is in the last.
        classes: number of classes; labels are `0 ... classes - 1`.
        device: where the counts are kept.
    """

    SUMS: ClassVar = {"table": 0}
    FIXED: ClassVar = {"edges": 0}

    def __init__(self, edges: Float[Tensor, "units edges"], classes: int, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.edges: Float[Tensor, "units edges"] = edges.detach().to(self.device, torch.float64).contiguous()
        self.table: Float[Tensor, "units bins classes"] = self._zeros(len(edges), edges.shape[1] + 1, classes)

    @torch.no_grad()
    def update(self, values: Float[Tensor, "rows units"], labels: Int[Tensor, "rows"]) -> None:
        """Adds a batch.

        Raises:
            ValueError: another number of units, or a label that is none of the classes.
        """
        units, bins, classes = self.table.shape
        values = self._accept(values, self.edges[:, 0], "units").T.contiguous()
        labels = check_labels(labels.to(self.device), classes)
        cell = torch.searchsorted(self.edges, values)
        cell += torch.arange(units, device=self.device)[:, None] * bins
        cell = (cell * classes + labels).flatten()
        self.table.view(-1).index_add_(0, cell, torch.ones_like(cell, dtype=torch.float64))
