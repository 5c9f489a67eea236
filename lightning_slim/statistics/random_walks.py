"""Whether series wander: a unit root, tested by sums that stream."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def dickey_fuller_sums(series: Float[Tensor, "items steps features"]) -> Float[Tensor, "sums features"]:
    """Sums over all pairs of steps: their number, levels, differences, and their products."""
    levels, changes = series[:, :-1].double(), series.double().diff(dim=1)
    products = (torch.ones_like(levels), levels, changes, levels * levels, levels * changes, changes * changes)
    return torch.stack([product.sum((0, 1)) for product in products])


def unit_roots(sums: Float[Tensor, "sums features"], overlap: float = 1.0) -> Bool[Tensor, "features"]:
    """Which series look like random walks: no unit root is rejected.

    Dickey and Fuller's (1979) regression of differences on levels, with a constant, of all windows together: a t above
    -2.86 (their 5 % for many steps), or a root above 0.995, however often windows repeat a step. Of one series as a
    whole, `stationarity` tells more.

    Args:
        sums: number of steps, and sums of levels, differences, squared levels, products and squared differences.
        overlap: how many windows hold the same step.
    """
    number, level, change, level_2, product, change_2 = sums
    level_2, change_2 = level_2 - level**2 / number, change_2 - change**2 / number
    slope = (product - level * change / number) / level_2
    residual = (change_2 - slope**2 * level_2).clamp_min(0) / (number - 2)
    t = slope / (residual / level_2).sqrt() / overlap**0.5
    moves = (level_2 > 1e-12 * number) & (change_2 > 0)
    found: Tensor = moves & ((t > -2.86) | (slope > -0.005))
    return found
