"""The effect of all units on the loss at once, by experiment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.scores.base import Evidence, Need, Score, UnitScores
from lightning_slim.statistics import Regression, f_log_sf

RIDGE = 1e-3  # a hundredth of the variance of a gate


@dataclass(frozen=True)
class RandomGates(Score):
    """The causal effect of a unit on the loss, from units gated at random: a regression on randomised treatments.

    On every recorded step the batch is run five times in eval mode: whole, and four times with a tenth of all units
    gated, other ones for each item. How much larger an item's loss is then is regressed on its gates; the coefficient
    of a unit is what its absence costs while a tenth of the others is absent, too. Effects below 0 count as 0.

    p-values are those of a one-sided t test. Groups that a recurrent layer reads stay whole: no gate fits in there.
    Source: Fisher (1935) for randomised experiments; LeCun et al. (1990) for the question.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"gates"})
    tests: ClassVar[bool] = True
    absolute: ClassVar[bool] = True

    def __call__(self, evidence: Evidence) -> UnitScores:
        assert evidence.gates is not None
        rows = float(evidence.gates.count)
        degrees = max(rows - len(evidence.weights) - 1, 1.0)
        effect, error = _effects(evidence.gates.result(), degrees)
        t = effect / error
        two_sided = f_log_sf(t.square(), torch.ones_like(t), torch.full_like(t, degrees))
        return UnitScores(effect.clamp_min(0).cpu(), torch.where(t > 0, two_sided - math.log(2), 0.0).cpu())


def _effects(regression: Regression, degrees: float) -> tuple[Float[Tensor, "units"], Float[Tensor, "units"]]:
    """Coefficients and their standard errors; a unit that was never gated has no effect."""
    gram, cross, variance = regression
    damped = gram + RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.inv(damped)
    effect = (inverse @ cross).squeeze(1)
    left = max(variance - float(effect @ cross.squeeze(1)), 1e-300)
    return effect, (inverse.diagonal() * left / degrees).sqrt()
