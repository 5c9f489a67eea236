"""Tail probabilities that never underflow: log P(F > f) and log P(chi2 > x)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Num
from torch import Tensor

from lightning_slim.statistics.tail_quadrature import chi2_by_quadrature, f_by_quadrature
from lightning_slim.statistics.tail_sums import chi2_by_sums, f_by_sums

FEW = 16  # degrees of freedom, up to which sums are faster


def f_log_sf(
    F: Float[Tensor, "*shape"], df1: int | float | Num[Tensor, "..."], df2: int | float | Num[Tensor, "..."]
) -> Float[Tensor, "*shape"]:
    """Natural logarithm of the survival function of Fisher's F distribution.

    Few whole degrees of freedom of the numerator, given as integers, make it a finite sum (`tail_sums`), any others a
    quadrature (`tail_quadrature`).

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
    few, df1, df2 = _few(df1), _like(df1, F), _like(df2, F).double()
    untestable = ~((F > 0) & (df1 >= 1) & (df2 >= 1))
    endless = F.isinf() & ~untestable
    F, df2 = torch.where(untestable | endless, 1.0, F), torch.where(untestable, 1.0, df2)
    if few:
        log_p = f_by_sums(F, torch.where(untestable, 0, df1), df2)
    else:
        log_p = f_by_quadrature(F, torch.where(untestable, 1.0, df1.double()), df2)
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
    few, df = _few(df), _like(df, x)
    untestable = ~((x > 0) & (df >= 1))
    endless = x.isinf() & ~untestable
    x = torch.where(untestable | endless, 1.0, x)
    if few:
        log_p = chi2_by_sums(x, torch.where(untestable, 0, df))
    else:
        log_p = chi2_by_quadrature(x, torch.where(untestable, 1.0, df.double()))
    return torch.where(endless, -torch.inf, torch.where(untestable, 0.0, log_p))


def _few(df: int | float | Tensor) -> bool:
    if isinstance(df, Tensor):
        return not df.is_floating_point() and (df.numel() == 0 or int(df.max()) <= FEW)
    return isinstance(df, int) and df <= FEW


def _like(df: int | float | Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(df, device=x.device).expand_as(x)
