"""Moments of units and of what they might tell of, from which any regression of the second on the first follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.statistics.granger import Regression
from lightning_slim.statistics.streaming import Pivoted


class JointMoments(Pivoted):
    """Covariances of units with each other and with targets, streaming.

    A unit may have several columns (its present and its past): those of unit `u` are `u * width ...`.

    Memory: `8 * columns * (columns + targets)` bytes.

    Args:
        units: number of units.
        targets: number of targets.
        width: columns a unit.
        device: where the sums are kept.

    Example:
        >>> joint = JointMoments(units=2, targets=1)
        >>> joint.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[2.0], [6.0]]))
        >>> joint.result().cross.tolist(), joint.result().variance
        ([[2.0], [0.0]], 4.0)
    """

    SUMS: ClassVar = {"count": None, "total": 0, "second": 0, "cross": 0, "of_targets": None, "squares": None}
    PIVOTS: ClassVar = {"pivot": 0, "target_pivot": None}

    def __init__(self, units: int, targets: int, width: int = 1, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.count: Float[Tensor, 1] = self._zeros(1)
        self.total: Float[Tensor, "units width"] = self._zeros(units, width)
        self.second: Float[Tensor, "units width units width"] = self._zeros(units, width, units, width)
        self.cross: Float[Tensor, "units width targets"] = self._zeros(units, width, targets)
        self.of_targets: Float[Tensor, "targets"] = self._zeros(targets)
        self.squares: Float[Tensor, "targets"] = self._zeros(targets)
        self.pivot: Float[Tensor, "units width"] = self._zeros(units, width)
        self.target_pivot: Float[Tensor, "targets"] = self._zeros(targets)

    @torch.no_grad()
    def update(self, values: Float[Tensor, "rows columns"], targets: Float[Tensor, "rows targets"]) -> None:
        """Adds a batch.

        Raises:
            ValueError: another number of columns or targets.
        """
        values = self._accept(values, self.pivot.flatten(), "units").view(-1, *self.pivot.shape)
        targets = self._accept(targets, self.target_pivot, "targets")
        if len(values) == 0:
            return
        values, targets = self._about("pivot", values), self._about("target_pivot", targets)
        self._settled = True
        columns = values.flatten(1)
        self.count += len(values)
        self.total += values.sum(0)
        self.second += (columns.T @ columns).view_as(self.second)
        self.cross += (columns.T @ targets).view_as(self.cross)
        self.of_targets += targets.sum(0)
        self.squares += targets.square().sum(0)

    def result(self) -> Regression:
        """The regression of the targets on the units' columns: covariances, divided by the number of rows.

        Those of a unit of which a value was not finite are 0, as of a dead one.
        """
        rows = self.count.clamp_min(1e-300)
        mean, target = self.total.flatten() / rows, self.of_targets / rows
        columns = len(mean)
        gram = self.second.view(columns, columns) / rows - torch.outer(mean, mean)
        cross = self.cross.view(columns, -1) / rows - torch.outer(mean, target)
        variance = float((self.squares / rows - target.square()).clamp_min(0).nansum())
        return Regression(_finite(gram), _finite(cross), variance)

    def keep(self, units: Int[Tensor, "kept"]) -> None:
        """Drops all other units: the statistic is that of a stream that never had them."""
        super().keep(units)
        self.second = self.second.index_select(2, units.to(self.second.device))

    def _shift(self, by: Mapping[str, Tensor]) -> None:
        d, e = by["pivot"], by["target_pivot"]
        rows, total, of_targets = self.count, self.total.flatten(), self.of_targets
        flat = d.flatten()
        second = torch.outer(flat, total) + torch.outer(total, flat) + rows * torch.outer(flat, flat)
        cross = torch.outer(flat, of_targets) + torch.outer(total, e) + rows * torch.outer(flat, e)
        self.second = self.second + second.view_as(self.second)
        self.cross = self.cross + cross.view_as(self.cross)
        self.squares = self.squares + 2 * e * of_targets + rows * e.square()
        self.total, self.of_targets = self.total + rows * d, of_targets + rows * e


def _finite(covariance: Float[Tensor, "columns other"]) -> Float[Tensor, "columns other"]:
    return covariance.where(covariance.isfinite(), 0.0)
