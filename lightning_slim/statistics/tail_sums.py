"""Tails of F and chi-squared with few whole degrees of freedom, as tests of lags have: sums of positive terms."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

TINY = 1e-300


def f_by_sums(
    F: Float[Tensor, "*tests"], df1: Int[Tensor, "*tests"], df2: Float[Tensor, "*tests"]
) -> Float[Tensor, "*tests"]:
    """log P(F > f); 0 where `df1` is 0.

    `P = I_x(df2/2, df1/2)` with `x = df2 / (df2 + df1 f)`. Raising the second argument of the regularised incomplete
    beta function by one adds a positive term, `x^a (1-x)^b / (b B(a, b))`, so the tail is a sum of `df1/2` terms; for
    an odd `df1` it begins with Student's t, `I_x(a, 1/2)`, by a continued fraction.

    Sources: Abramowitz and Stegun (1964), 26.5 and 26.6; Lentz (1976) for the continued fraction.
    """
    return _by_whole_number(df1, _f_log_tail, F, df2 / 2)


def chi2_by_sums(x: Float[Tensor, "*tests"], df: Int[Tensor, "*tests"]) -> Float[Tensor, "*tests"]:
    """log P(X > x); 0 where `df` is 0.

    `P = Q(df/2, y)` with `y = x / 2`: `e^-y sum_j y^j / Gamma(j + 1)` over whole `j < df/2` for an even `df`,
    `erfc(sqrt y)` and the same sum over half numbers for an odd one (Abramowitz and Stegun (1964), 26.4.4 and 26.4.5).
    """
    return _by_whole_number(df, _chi2_log_tail, x)


def _by_whole_number(df: Tensor, tail: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """The tail for every distinct number of degrees of freedom; there are few, and each is another sum."""
    result = torch.zeros_like(arguments[0])
    if not df.numel():
        return result
    least, most = int(df.min()), int(df.max())
    if least == most > 0:
        return tail(most, *arguments).clamp_max(0.0)
    for number in range(max(1, least), most + 1):
        here = df == number
        if not bool(here.any()):
            continue
        result[here] = tail(number, *(argument[here] for argument in arguments)).clamp_max(0.0)
    return result


def _f_log_tail(d1: int, f: Tensor, a: Tensor) -> Tensor:
    odds = d1 * f / (2 * a)  # (1 - x) / x
    log_x, log_rest = -odds.log1p(), (odds / (1 + odds)).clamp_min(TINY).log()
    if d1 % 2:
        total, b = _log_student(a, log_x, log_rest, odds), 0.5
        log_term = a * log_x + 0.5 * log_rest + _log_half_gamma_ratio(a) - math.lgamma(1.5)
    else:
        total, b = torch.full_like(f, -torch.inf), 0.0
        log_term = a * log_x
    for _ in range(d1 // 2):
        total = torch.logaddexp(total, log_term)
        log_term = log_term + log_rest + ((a + b) / (b + 1)).log()
        b += 1
    return total


def _chi2_log_tail(df: int, statistic: Tensor) -> Tensor:
    y = statistic / 2
    log_y = y.clamp_min(TINY).log()
    if df % 2:
        total: Tensor = math.log(2) + torch.special.log_ndtr(-statistic.sqrt())
        j = 0.5
        log_term = 0.5 * log_y - y - math.lgamma(1.5)
    else:
        total, j = torch.full_like(y, -torch.inf), 0.0
        log_term = -y
    for _ in range(df // 2):
        total = torch.logaddexp(total, log_term)
        j += 1
        log_term = log_term + log_y - math.log(j)
    return total


def _log_half_gamma_ratio(a: Tensor) -> Tensor:
    """log(Gamma(a + 1/2) / Gamma(a)): the difference of two lgammas loses digits where `a` is large."""
    inverse = 1 / a
    square = inverse * inverse
    series = 1 / 8 - square * (1 / 192 - square * (1 / 640 - square * (17 / 14336 - square * (31 / 18432))))
    return torch.where(a > 25, 0.5 * a.log() - inverse * series, torch.lgamma(a + 0.5) - torch.lgamma(a))


def _log_student(a: Tensor, log_x: Tensor, log_rest: Tensor, odds: Tensor) -> Tensor:
    """log I_x(a, 1/2)."""
    x, rest = log_x.exp(), odds / (1 + odds)
    swap = x > (a + 1) / (a + 2.5)  # there the fraction of the complement, I_(1-x)(1/2, a), converges faster
    first, second = torch.where(swap, 0.5, a), torch.where(swap, a, 0.5)
    fraction = _beta_fraction(first, second, torch.where(swap, rest, x))
    log_beta = math.lgamma(0.5) - _log_half_gamma_ratio(a)
    result = a * log_x + 0.5 * log_rest - log_beta - first.log() + fraction.log()
    return torch.where(swap, torch.log1p(-result.clamp_max(0.0).exp().clamp_max(1 - 1e-16)), result)


def _beta_fraction(a: Tensor, b: Tensor, x: Tensor, steps: int = 500) -> Tensor:
    """The continued fraction of the incomplete beta function, by Lentz's method."""

    def away_from_zero(value: Tensor) -> Tensor:
        return torch.where(value.abs() < TINY, TINY, value)

    c = torch.ones_like(x)
    d = 1 / away_from_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, steps):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for numerator in (even, odd):
            d = 1 / away_from_zero(1 + numerator * d)
            c = away_from_zero(1 + numerator / c)
            change = c * d
            fraction = fraction * change
        if m % 4 == 0 and bool(((change - 1).abs() < 4e-16).all()):
            break
    return fraction
