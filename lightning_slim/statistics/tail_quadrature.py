"""Tails of F and chi-squared with any degrees of freedom: the density in logarithms, and a quadrature of what follows.

The density of the logarithm of either is log-concave and analytic, so its tail is one double exponential quadrature of
positive terms, of a fixed number of nodes whatever the degrees of freedom: no cancellation, no underflow, no iteration
until convergence, no transfer from a GPU.

Sources: Takahasi and Mori (1974), for the quadrature; Loader (2000), for the saddle-point form of the density.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

STEP = 1 / 16  # of the quadrature; halving it changes no digit that float64 has
NODES = torch.arange(-4.25, 4.5, STEP, dtype=torch.float64)
AT_ONCE = 1 << 16  # numbers, of all nodes of a block


def f_by_quadrature(
    F: Float[Tensor, "*tests"], df1: Float[Tensor, "*tests"], df2: Float[Tensor, "*tests"]
) -> Float[Tensor, "*tests"]:
    """log P(F > f), of positive and finite `F` and degrees of freedom from 1 on."""
    a, b = df2 / 2, df1 / 2
    whole, upper = a + b * F, F >= 1
    w, v = b * F / whole, a / whole  # the beta variable and its complement
    peak = (a * b / (2 * math.pi * (a + b))).log() / 2 + _stirling(a + b) - _stirling(a) - _stirling(b)
    density = peak - a * torch.log1p(b * (F - 1) / (a + b)) + b * torch.log1p(a * (F - 1) / whole)
    # Below the mode it is the other tail: there a and b change places, as do w and v.
    a, b, w, v = (torch.where(upper, x, y) for x, y in ((a, b), (b, a), (w, v), (v, w)))
    less, small, part = (torch.where(a < b, x, y) for x, y in ((-1.0, 1.0), (a, -b), (v, w)))
    log_tail = density + _log_tail(
        lambda s: small * s + (a + b) * torch.log1p(part * torch.expm1(less * s)),
        slope=((a + b) * w - b).clamp_min(0),
        curvature=(a + b) * w * v,
    )
    return _of_side(log_tail, upper)


def chi2_by_quadrature(x: Float[Tensor, "*tests"], df: Float[Tensor, "*tests"]) -> Float[Tensor, "*tests"]:
    """log P(X > x), of positive and finite `x` and degrees of freedom from 1 on."""
    h, a = x / 2, df / 2
    upper = h >= a
    sign = torch.where(upper, 1.0, -1.0)
    density = a * torch.log(h / a) - (h - a) + (a / (2 * math.pi)).log() / 2 - _stirling(a)
    log_tail = density + _log_tail(lambda s: h * torch.expm1(sign * s) - sign * a * s, slope=(h - a).abs(), curvature=h)
    return _of_side(log_tail, upper)


def _of_side(log_tail: Tensor, upper: Tensor) -> Tensor:
    return torch.where(upper, log_tail, torch.log1p(-log_tail.clamp_max(0).exp())).clamp_max(0)


def _log_tail(drop: Callable[[Tensor], Tensor], slope: Tensor, curvature: Tensor) -> Tensor:
    """`log integral_0^inf exp(-drop(s)) ds` of a convex drop that begins at 0 with this slope and curvature."""
    scale = 2 / (slope + (slope.square() + 2 * curvature).sqrt())
    total = torch.zeros_like(scale)
    for nodes in NODES.split(max(1, AT_ONCE // max(scale.numel(), 1))):  # type: ignore[no-untyped-call]
        nodes = nodes.to(scale.device).view(-1, *[1] * scale.ndim)
        at = (nodes - (-nodes).exp()).exp()
        weight = STEP * at * (1 + (-nodes).exp())
        total += (weight * torch.exp(-drop(at * scale))).sum(0)
    return (total * scale).log()


def _stirling(z: Tensor) -> Tensor:
    """What Stirling's formula lacks: `lgamma(z) - ((z - 1/2) log z - z + log(2 pi) / 2)`."""
    direct = torch.lgamma(z) - ((z - 0.5) * z.log() - z + math.log(2 * math.pi) / 2)
    r = 1 / z.square()
    series = (1 / 12 - r * (1 / 360 - r * (1 / 1260 - r * (1 / 1680 - r * (1 / 1188 - r * 691 / 360360))))) / z
    return torch.where(z > 12, series, direct)
