"""Tail probabilities that never underflow: log P(F > f) and log P(chi2 > x)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Num
from torch import Tensor

STEP = 1 / 16  # of the quadrature; halving it changes no digit that float64 has
NODES = torch.arange(-4.25, 4.5, STEP, dtype=torch.float64).tolist()


def f_log_sf(
    F: Float[Tensor, "*shape"], df1: int | float | Num[Tensor, "..."], df2: int | float | Num[Tensor, "..."]
) -> Float[Tensor, "*shape"]:
    """Natural logarithm of the survival function of Fisher's F distribution.

    The density of `log F` is log-concave and analytic, so its tail is one double exponential quadrature of positive
    terms, of a fixed number of nodes whatever the degrees of freedom: no cancellation, no underflow, no iteration until
    convergence, no transfer from a GPU.

    Source: Takahasi and Mori (1974), for the quadrature; Loader (2000), for the saddle-point form of the density.

    Args:
        F: statistics, zero or more.
        df1: degrees of freedom of the numerator, a number or a tensor that broadcasts to `F`.
        df2: those of the denominator.

    Returns:
        float64, 0 or less, and minus infinity only where `F` is infinite. 0 (a p-value of 1) where `F` is not above 0,
        and where either of the degrees of freedom is below 1: there nothing can be tested.

    Example:
        >>> [round(log_p, 6) for log_p in f_log_sf(torch.tensor([4.0, 1e6]), 1, 100).tolist()]
        [-3.032144, -463.052846]
    """
    F = F.double()
    a = _like(df2, F) / 2
    b = _like(df1, F) / 2
    untestable = ~((F > 0) & (a >= 0.5) & (b >= 0.5))
    endless = F.isinf() & ~untestable
    f = torch.where(untestable | endless, 1.0, F)
    a, b = (torch.where(untestable, 1.0, df) for df in (a, b))

    whole, upper = a + b * f, f >= 1
    w, v = b * f / whole, a / whole  # the beta variable and its complement
    peak = (a * b / (2 * math.pi * (a + b))).log() / 2 + _stirling(a + b) - _stirling(a) - _stirling(b)
    density = peak - a * torch.log1p(b * (f - 1) / (a + b)) + b * torch.log1p(a * (f - 1) / whole)
    # Below the mode it is the other tail: there a and b change places, as do w and v.
    a, b, w, v = (torch.where(upper, x, y) for x, y in ((a, b), (b, a), (w, v), (v, w)))
    less, small, part = (torch.where(a < b, x, y) for x, y in ((-1.0, 1.0), (a, -b), (v, w)))
    log_tail = density + _log_tail(
        lambda s: small * s + (a + b) * torch.log1p(part * torch.expm1(less * s)),
        slope=((a + b) * w - b).clamp_min(0),
        curvature=(a + b) * w * v,
    )
    log_p = torch.where(upper, log_tail, torch.log1p(-log_tail.clamp_max(0).exp())).clamp_max(0)
    return torch.where(endless, -torch.inf, torch.where(untestable, 0.0, log_p))


def chi2_log_sf(x: Float[Tensor, "*shape"], df: int | float | Num[Tensor, "..."]) -> Float[Tensor, "*shape"]:
    """Natural logarithm of the survival function of the chi-squared distribution; see `f_log_sf`.

    Args:
        x: statistics, zero or more.
        df: degrees of freedom, a number or a tensor that broadcasts to `x`.

    Returns:
        float64, 0 or less, and minus infinity only where `x` is infinite. 0 where `x` is not above 0 or `df` below 1.

    Example:
        >>> [round(log_p, 6) for log_p in chi2_log_sf(torch.tensor([3.84, 5000.0]), 1).tolist()]
        [-2.994862, -2504.484588]
    """
    x = x.double()
    a = _like(df, x) / 2
    untestable = ~((x > 0) & (a >= 0.5))
    endless = x.isinf() & ~untestable
    h = torch.where(untestable | endless, 1.0, x / 2)
    a = torch.where(untestable, 1.0, a)

    upper = h >= a
    sign = torch.where(upper, 1.0, -1.0)
    density = a * torch.log(h / a) - (h - a) + (a / (2 * math.pi)).log() / 2 - _stirling(a)
    log_tail = density + _log_tail(lambda s: h * torch.expm1(sign * s) - sign * a * s, slope=(h - a).abs(), curvature=h)
    log_p = torch.where(upper, log_tail, torch.log1p(-log_tail.clamp_max(0).exp())).clamp_max(0)
    return torch.where(endless, -torch.inf, torch.where(untestable, 0.0, log_p))


def _like(df: int | float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(df, dtype=torch.float64, device=x.device).expand_as(x)


def _log_tail(drop: Callable[[Tensor], Tensor], slope: Tensor, curvature: Tensor) -> Tensor:
    """`log integral_0^inf exp(-drop(s)) ds` of a convex drop that begins at 0 with this slope and curvature."""
    scale = 2 / (slope + (slope.square() + 2 * curvature).sqrt())
    total = torch.zeros_like(scale)
    for node in NODES:
        at = math.exp(node - math.exp(-node))
        weight = STEP * at * (1 + math.exp(-node))
        total += weight * torch.exp(-drop(at * scale))
    return (total * scale).log()


def _stirling(z: Tensor) -> Tensor:
    """What Stirling's formula lacks: `lgamma(z) - ((z - 1/2) log z - z + log(2 pi) / 2)`."""
    direct = torch.lgamma(z) - ((z - 0.5) * z.log() - z + math.log(2 * math.pi) / 2)
    r = 1 / z.square()
    series = (1 / 12 - r * (1 / 360 - r * (1 / 1260 - r * (1 / 1680 - r * (1 / 1188 - r * 691 / 360360))))) / z
    return torch.where(z > 12, series, direct)
