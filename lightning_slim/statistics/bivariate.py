"""Bivariate Granger causality: does the past of a series say more about a target than the target's own past?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.statistics.distributions import chi2_log_sf, f_log_sf
from lightning_slim.statistics.lagged_products import Shifted, own_products
from lightning_slim.statistics.own_past import OwnPast, own_past
from lightning_slim.statistics.row_wise import from_rows
from lightning_slim.statistics.series import LARGEST, as_series, check_series, standardised

UNSURE = 1e-7  # smaller pivots of a Gram matrix are computed anew from the rows
TARGETS_AT_ONCE = 64


class Tested(NamedTuple):
    """A statistic, its p-value, and the logarithm of that, which does not underflow."""

    statistic: Float[Tensor, "targets series"]
    p: Float[Tensor, "targets series"]
    log_p: Float[Tensor, "targets series"]


@dataclass(frozen=True)
class GrangerTest:
    """Tests of every series for every target, all at `[target, series]`.

    The names of the four tests are those of statsmodels' `grangercausalitytests`. With equal degrees of freedom they
    order the series alike, as `effect` does; to rank, use `effect`, which does not depend on the number of rows.

    Attributes:
        f: the Wald F statistic that all coefficients of the series are zero; by HC3 where the test is robust.
        log_p: logarithm of its p-value.
        effect: Geweke's measure of causality, `ln(RSS_own / RSS_both)`.
        partial_r2: share of what its own past leaves of a target that the series' past explains.
        rss_own: residual sum of squares of each target given its own past, in its own units.
        rss_both: given the past of both.
        df_num: lags of the series that add to the target's own past; 0 for a dead or collinear series.
        df_denom: rows less columns of the larger regression.
        rows: number of rows of each regression.
        robust: whether `f` is by HC3.
    """

    f: Float[Tensor, "targets series"]
    log_p: Float[Tensor, "targets series"]
    effect: Float[Tensor, "targets series"]
    partial_r2: Float[Tensor, "targets series"]
    rss_own: Float[Tensor, "targets"]
    rss_both: Float[Tensor, "targets series"]
    df_num: Int[Tensor, "targets series"]
    df_denom: Int[Tensor, "targets series"]
    rows: int
    robust: bool

    @property
    def p(self) -> Float[Tensor, "targets series"]:
        """p-value of `f`; below 1e-308 it is 0, and only `log_p` tells."""
        return self.log_p.exp()

    @property
    def params_ftest(self) -> Tested:
        """The Wald test of the coefficients: `f`, robust where the test is."""
        return Tested(self.f, self.p, self.log_p)

    @property
    def ssr_ftest(self) -> Tested:
        """F of the two residual sums of squares, never robust."""
        if not self.robust:
            return self.params_ftest
        f = _f(self._odds, self.df_num, self.df_denom)
        log_p = f_log_sf(f, self.df_num, self.df_denom)
        return Tested(f, log_p.exp(), log_p)

    @property
    def ssr_chi2test(self) -> Tested:
        """`rows * (RSS_own - RSS_both) / RSS_both`, chi-square in large samples."""
        return self._chi2(self.rows * self._odds)

    @property
    def lrtest(self) -> Tested:
        """Likelihood ratio, `rows * ln(RSS_own / RSS_both)`, chi-square in large samples."""
        return self._chi2(self.rows * self.effect)

    @property
    def _odds(self) -> Tensor:
        return self.partial_r2 * torch.exp(self.effect)  # explained / RSS_both

    def _chi2(self, statistic: Tensor) -> Tested:
        log_p = chi2_log_sf(statistic, self.df_num)
        return Tested(statistic, log_p.exp(), log_p)


@torch.no_grad()
def granger_test(
    series: Float[Tensor, "time *series"],
    targets: Float[Tensor, "time *targets"],
    lags: int,
    own_lags: int | None = None,
    robust: Literal["none", "hc3"] = "none",
    chunk_bytes: int | None = None,
) -> GrangerTest:
    """Tests for every series and target whether the series Granger-causes the target.

    Two regressions of the target, on a constant and its own past, without and with the past of the series, give
    `F = (RSS_own - RSS_both) / df_num / (RSS_both / df_denom)`. Null hypothesis: all coefficients of the series are
    zero. The gain is computed as such and not as a difference (Frisch and Waugh, 1933), so small effects keep their
    digits; pairs whose Gram matrix is near-singular, and near-perfect fits, are computed anew from the rows.

    Series are centred and scaled first, so offsets and units do not matter. What is not defined otherwise is here:
    a lag of which less than 1e-9 is left by the lags before it and by the target's past adds nothing, and the degrees
    of freedom follow; a series without any such lag, or a dead one, has effect 0 and p 1, as has every series for a
    target that its own past explains perfectly. A perfect fit has a finite effect of at most about 55.

    Series that share a trend "cause" one another: take differences first (`differences`).

    Memory: results, about `64 * targets * series` bytes, and at work `chunk_bytes` and
    `8 * time * 64 * (lags + own_lags)` bytes.

    Sources: Granger (1969); Geweke (1982) for the effect; MacKinnon and White (1985) for HC3.

    Args:
        series: possible causes, of any floating type; computed in float64. One dimension is one series.
        targets: possible effects, as many steps of them. One dimension is one target.
        lags: steps of a series' past.
        own_lags: steps of the target's past; as many as `lags` unless given.
        robust: `"hc3"` allows the residuals' variance to change. It looks at every row of every pair, and is some 50
            times slower. A pair with a row that no other row can predict (leverage 1) has F 0 and p 1.
        chunk_bytes: working memory; 10 MiB on the CPU, near the size of its cache, and 256 MiB elsewhere.

    Raises:
        ValueError: too few steps, numbers of lags below 1, series of other lengths, or values that are not finite.

    Example:
        >>> x = torch.randn(200, 3, dtype=torch.float64)
        >>> y = 0.5 * x[:, :1].roll(1, 0) + torch.randn(200, 1, dtype=torch.float64)
        >>> test = granger_test(x, y, lags=2)
        >>> (test.p < 1e-6).tolist(), test.df_num.tolist()
        ([[True, False, False]], [[2, 2, 2]])
    """
    own_lags = lags if own_lags is None else own_lags
    series, targets = as_series(series), as_series(targets)
    check_series(series, targets, lags, own_lags)
    chunk_bytes = chunk_bytes or (10 << 20 if series.device.type == "cpu" else 1 << 28)
    targets = targets.to(series.device)
    blocks = [
        _block(series, block, lags, own_lags, robust == "hc3", chunk_bytes)
        for block in (targets[:, part] for part in _chunks(targets.shape[1], TARGETS_AT_ONCE))
    ]
    f, effect, partial_r2, rss_both, df_num, df_denom, rss_own = (torch.cat(part) for part in zip(*blocks, strict=True))
    log_p = f_log_sf(f, df_num, df_denom)
    rows = len(series) - max(lags, own_lags)
    return GrangerTest(f, log_p, effect, partial_r2, rss_own, rss_both, df_num, df_denom, rows, robust == "hc3")


def _block(
    series: Tensor, targets: Tensor, lags: int, own_lags: int, robust: bool, chunk_bytes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Results for some targets."""
    skip = max(lags, own_lags)
    own = own_past(targets, own_lags, skip)
    count, number = targets.shape[1], series.shape[1]
    explained = own.rss.new_zeros(count, number)
    rss_both = own.rss[:, None].expand(count, number).clone()
    df_num = torch.zeros(count, number, dtype=torch.int64, device=series.device)
    wald = torch.zeros_like(explained)  # robust only

    each = 8 * (5 * len(series) + count * ((lags + own_lags) + 3 * lags * (own_lags + 2) + 2 * lags * lags))
    shifted = None if robust else Shifted(own.targets, lags, own_lags, skip)
    for part in _chunks(number, chunk_bytes // each):
        causes, _ = standardised(series[:, part])
        unsure = own.rss[:, None].expand(count, causes.shape[1]) > 0
        if shifted is not None:
            explained[:, part], df_num[:, part], certainty = _from_products(causes, own, shifted)
            rss_both[:, part] = own.rss[:, None] - explained[:, part]
            unsure = unsure & ((certainty < UNSURE) | (rss_both[:, part] < 1e-6 * own.rss[:, None]))
        for target in unsure.any(1).nonzero().flatten().tolist():
            which = unsure[target].nonzero().flatten()
            for few in _chunks(len(which), chunk_bytes // (16 * len(series) * (lags + 4))):
                some = which[few]
                at = (target, some + part.start)
                explained[at], rss_both[at], df_num[at], wald[at] = from_rows(
                    causes[:, some], own, target, lags, robust
                )

    nothing = (own.rss == 0)[:, None] | (df_num == 0)
    df_num = torch.where(nothing, 0, df_num)
    df_denom = len(series) - skip - own.df[:, None] - df_num
    explained = torch.where(nothing, 0.0, explained)
    rss_both = torch.where(nothing, own.rss[:, None], rss_both)
    rss_both = torch.maximum(rss_both, torch.minimum(own.floor, own.rss)[:, None])
    share = (explained / own.rss.clamp_min(1e-300)[:, None]).clamp_max(1.0)
    # Of 1 - share no digits are left where the fit is near-perfect.
    rest = rss_both / own.rss.clamp_min(1e-300)[:, None]
    effect = torch.where(nothing, 0.0, torch.where(share < 0.5, -torch.log1p(-share), -rest.clamp_min(1e-300).log()))
    f = wald / df_num.clamp_min(1) if robust else _f(share * effect.exp(), df_num, df_denom)
    unit = own.scale.square().clamp_max(LARGEST)
    return f, effect, share, rss_both * unit[:, None], df_num, df_denom, own.rss * unit


def _chunks(number: int, size: int) -> Iterator[slice]:
    size = max(1, size)
    return (slice(start, min(start + size, number)) for start in range(0, number, size))


def _f(odds: Tensor, df_num: Tensor, df_denom: Tensor) -> Tensor:
    return odds / df_num.clamp_min(1) * df_denom


def _from_products(causes: Tensor, own: OwnPast, shifted: Shifted) -> tuple[Tensor, Tensor, Tensor]:
    """Explained sum of squares, rank, and how many digits are left, from Gram matrices."""
    lags = shifted.lags
    products = shifted.products(causes)  # targets own_lags2 lags series
    projected = (own.transform @ products.flatten(2)).view(products.shape)
    known, cross = projected[:, :-1], projected[:, -1]
    gram = own_products(causes, lags, shifted.skip)

    # Cholesky, elementwise over all pairs at once: LAPACK would be called for each.
    factor: list[list[Tensor]] = []  # its diagonal is kept inverted
    solved: list[Tensor] = []
    explained = torch.zeros_like(cross[:, 0])
    rank = torch.zeros_like(explained, dtype=torch.int64)
    certainty = torch.ones_like(explained)
    for i in range(lags):
        row: list[Tensor] = []
        new = gram[i, : i + 1] - torch.linalg.vecdot(known[:, :, i, None], known[:, :, : i + 1], dim=1)
        for j, entry in enumerate(new.unbind(1)):
            for left, right in zip(row, factor[j] if j < i else row, strict=False):
                entry.addcmul_(left, right, value=-1)
            row.append(entry.mul_(factor[j][j]) if j < i else entry)
        share = row[i] / gram[i, i].clamp_min(1e-300)
        certainty = torch.minimum(certainty, share)
        good = share > UNSURE * UNSURE
        row[i] = row[i].clamp_min_(1e-300).rsqrt_().mul_(good)
        z = cross[:, i]
        for left, right in zip(row, solved, strict=False):
            z = torch.addcmul(z, left, right, value=-1)
        factor.append(row)
        solved.append(z * row[i])
        explained.addcmul_(solved[i], solved[i])
        rank += good
    return explained, rank, certainty.clamp_min_(0).mul_(own.certainty[:, None])
