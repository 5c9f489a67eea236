"""Size of the weights, beside those that are no smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lightning_slim.scores.base import Evidence, Score, UnitScores


@dataclass(frozen=True)
class Lamp(Score):
    """Layer-adaptive magnitude: `|w_u|^2 / sum over v, |w_v| >= |w_u|, of |w_v|^2` (Lee et al., 2021).

    There for single weights, here for all weights that a unit owns. Within a group it ranks as `Magnitude` does; the
    largest unit has importance 1 (but for ties, which share), so the scores are compared across groups as they are:
    choose `scope="global"`, for with `"local"` it is `Magnitude`.
    """

    absolute: ClassVar[bool] = True

    def __call__(self, evidence: Evidence) -> UnitScores:
        squares = evidence.weights.detach().double().square().sum(1)
        ascending = squares.sort().values
        sums = ascending.flip(0).cumsum(0).flip(0)  # over a unit and all behind it
        importance = squares / sums[torch.searchsorted(ascending, squares)]
        return UnitScores(importance.where(squares > 0, 0.0).cpu())
