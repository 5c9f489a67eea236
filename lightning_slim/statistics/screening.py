"""What a test of single units against labels or targets yields."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.statistics.distributions import chi2_log_sf, f_log_sf

EPS = torch.finfo(torch.float64).eps


class Screening(NamedTuple):
    """A test of every unit on its own. Where nothing can be tested, statistic and effect are 0 and p is 1.

    Attributes:
        statistic: F, chi-squared or H; infinite where units tell classes or targets apart without error.
        p_value: of the null hypothesis that the unit has nothing to do with them; underflows to 0.
        log_p: its natural logarithm, which does not underflow.
        effect: a size of the effect that does not grow with the number of rows, for ranking: see the test. Finite.
        df1: degrees of freedom (of the numerator).
        df2: degrees of freedom of the denominator; infinite for tests that have none.
    """

    statistic: Float[Tensor, "*targets units"]
    p_value: Float[Tensor, "*targets units"]
    log_p: Float[Tensor, "*targets units"]
    effect: Float[Tensor, "*targets units"]
    df1: Float[Tensor, "*targets units"]
    df2: Float[Tensor, "*targets units"]


def f_screening(
    explained: Float[Tensor, "*targets units"],
    left: Float[Tensor, "*targets units"],
    noise: Float[Tensor, "*targets units"],
    df1: Tensor,
    df2: Tensor,
) -> Screening:
    """The F test of explained against unexplained squares: `F = (explained / df1) / (left / df2)`.

    Args:
        explained: sum of squares that is explained.
        left: sum of squares that is left.
        noise: rounding error of both; what is not above it is zero.
        df1: degrees of freedom of `explained`.
        df2: degrees of freedom of `left`.

    Returns:
        With the share of squares that is explained for effect: eta-squared, or r-squared.
    """
    df1, df2 = (df.to(explained).expand_as(explained) for df in (df1, df2))
    explained, left = (torch.where(part > noise, part, 0.0) for part in (explained, left))
    testable = (df1 >= 1) & (df2 >= 1) & (explained > 0) & (explained + left).isfinite()
    explained, left = torch.where(testable, explained, 0.0), torch.where(testable, left, 1.0)
    F = explained / df1.clamp_min(1) / (left / df2.clamp_min(1))
    log_p = f_log_sf(F, df1, df2)
    return Screening(F, log_p.exp(), log_p, explained / (explained + left), df1.clamp_min(0), df2.clamp_min(0))


def chi2_screening(
    statistic: Float[Tensor, "*targets units"], effect: Float[Tensor, "*targets units"], df: Tensor
) -> Screening:
    """The test of a statistic that is chi-squared where there is nothing to find.

    Args:
        statistic: not below 0 but for rounding; non-finite where nothing can be tested.
        effect: size of the effect.
        df: degrees of freedom.
    """
    df = df.to(statistic).expand_as(statistic)
    testable = (df >= 1) & statistic.isfinite() & effect.isfinite() & (statistic > 0)
    statistic, effect = (torch.where(testable, part, 0.0) for part in (statistic, effect))
    log_p = chi2_log_sf(statistic, df)
    return Screening(statistic, log_p.exp(), log_p, effect, df.clamp_min(0), torch.full_like(df, torch.inf))
