"""Statistical screening of single weights: how much of the differences between classes each one hears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lightning_slim.masks.inputs import InputScore, Spreads
from lightning_slim.scores.screening import ByClass, Statistic
from lightning_slim.witness import Witness


@dataclass(frozen=True)
class WeightScreening(InputScore):
    """`effect(x_j)^(1/2) * |w_ij| * std(x_j)`: `Screening` of connections instead of units.

    The effect is how much the input tells classes apart: with `statistic="anova"` eta-squared, the share of its
    variance that lies between classes. An input's value for an item is its mean over pixels or steps. Real targets and
    several labels an item are screened by correlation (the mean of r-squared over targets).

    Attributes:
        statistic: see `Screening`.
    """

    statistic: Statistic = "anova"

    @property
    def witnesses(self) -> tuple[Witness, ...]:
        return Spreads(), ByClass(self.statistic)

    def size(self, told: Mapping[Witness, Any]) -> Float[Tensor, "inputs"]:
        effect: Tensor = told[ByClass(self.statistic)].result().effect
        of_inputs = effect.view(-1, effect.shape[-1]).mean(0)
        variance: Tensor = told[Spreads()].result().variance
        return (of_inputs * variance).sqrt()
