"""How often units are active."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.statistics.streaming import Accumulator


class Frequency(Accumulator):
    """Share of rows in which each unit is not zero, streaming.

    One minus it is the average percentage of zeros (APoZ) of Hu et al. (2016).

    Memory: `8 * units` bytes.

    Args:
        units: number of units.
        device: where the sums are kept.

    Example:
        >>> frequency = Frequency(units=2)
        >>> frequency.update(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        >>> frequency.result()[0].tolist()
        [0.0, 0.5]
    """

    SUMS: ClassVar = {"count": None, "active": 0}

    def __init__(self, units: int, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.count: Float[Tensor, 1] = self._zeros(1)
        self.active: Float[Tensor, "units"] = self._zeros(units)

    @torch.no_grad()
    def update(self, values: Float[Tensor, "rows units"]) -> None:
        """Adds a batch.

        Raises:
            ValueError: another number of units.
        """
        values = self._accept(values, self.active, "units")
        self.count += len(values)
        self.active += (values != 0).sum(0)

    def result(self) -> tuple[Float[Tensor, "units"]]:
        """The shares, in [0, 1]; 0 while nothing was seen."""
        return (self.active / self.count.clamp_min(1e-300),)
