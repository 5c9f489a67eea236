"""Conditional Granger causality, leave one out: what does each series add to all others and all targets' past?

Of several copies each is useless given the others, and this test says so of all of them: to choose which units stay,
use `forward_selection` or `backward_elimination`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.statistics.distributions import f_log_sf
from lightning_slim.statistics.orthonormal import RANK_TOLERANCE, orthonormalised
from lightning_slim.statistics.own_past import PERFECT
from lightning_slim.statistics.series import LARGEST, as_series, check_series, standardised

COLLINEAR = 1e-6  # of a direction's sum of squares, left by all others: less adds nothing
JITTER = 1e-8  # on the unit diagonal, only where pivots are that small


@dataclass(frozen=True)
class ConditionalTest:
    """Tests of every series for every target given all others, at `[target, series]`.

    Attributes:
        f: F statistic that all coefficients of the series are zero.
        log_p: logarithm of its p-value.
        effect: Geweke's conditional measure, `ln(RSS_without / RSS)`.
        rss_own: residual sum of squares given the past of all targets, in the target's own units.
        rss: given that and the past of all series.
        df_num: directions of a series' past that neither the others nor the targets' past span.
        df_denom: rows less columns of the whole regression.
    """

    f: Float[Tensor, "targets series"]
    log_p: Float[Tensor, "targets series"]
    effect: Float[Tensor, "targets series"]
    rss_own: Float[Tensor, "targets"]
    rss: Float[Tensor, "targets"]
    df_num: Int[Tensor, "targets series"]
    df_denom: int

    @property
    def p(self) -> Float[Tensor, "targets series"]:
        """p-value; below 1e-308 it is 0, and only `log_p` tells."""
        return self.log_p.exp()


class RidgeImportance(NamedTuple):
    """What the penalised fit loses without a series; a score and no test.

    Attributes:
        increase: of `|y - X b|^2 / rows + ridge |b|^2` at its least, over the variance that the targets' past leaves.
        ridge: the penalty, as given or chosen.
    """

    increase: Float[Tensor, "targets series"]
    ridge: float


class _Joint(NamedTuple):
    """A regression on the past of everything, without what the targets' past explains."""

    columns: Tensor  # series lags rows
    residual: Tensor  # rows targets
    kept: Tensor  # series lags
    scale: Tensor  # targets
    floor: Tensor  # targets
    df: int


@torch.no_grad()
def leave_one_out_test(
    series: Float[Tensor, "time *series"],
    targets: Float[Tensor, "time *targets"],
    lags: int,
    own_lags: int | None = None,
) -> ConditionalTest:
    """All conditional Granger tests from one factorisation.

    Each target is regressed on a constant and the past of all targets and all series. With `A` the Gram matrix of the
    series' columns, made orthogonal to the rest, `M = A^-1` and `b = M c`, leaving out series `i` adds exactly
    `b_i' M_ii^-1 b_i` to the residual sum of squares: no refit is needed. Null hypothesis: all coefficients of the
    series are zero.

    A lag that is collinear with the others adds nothing (1e-6 of its sum of squares must be left), the degrees of
    freedom follow, and where nothing is left, as for a dead series or exact copies, effect is 0 and p 1; the other
    tests are then exact to about 1e-6. As of any regression on the past, p is too small near a unit root: of 20 AR(1)
    series with memory 0.9 it rejects 9 % in 512 steps. Take differences of such series.

    Memory: `8 * (2 * rows * series * lags + 3 * (series * lags) ** 2)` bytes.

    Source: Geweke (1984).

    Args:
        series: possible causes, of any floating type; computed in float64. One dimension is one series.
        targets: possible effects, as many steps of them. One dimension is one target.
        lags: steps of the series' past.
        own_lags: steps of the targets' past; as many as `lags` unless given.

    Raises:
        ValueError: fewer rows than columns (`ridge_leave_one_out` needs no more), or as `granger_test`.

    Example:
        >>> x = torch.randn(200, 3, dtype=torch.float64)
        >>> x[:, 1] = x[:, 0].roll(1) + 0.1 * x[:, 1]  # an echo of the first
        >>> y = 0.7 * x[:, :1].roll(1, 0) + torch.randn(200, 1, dtype=torch.float64)
        >>> (leave_one_out_test(x, y, lags=1).p < 1e-4).tolist()
        [[True, False, False]]
    """
    joint = _joint(series, targets, lags, own_lags)
    count, width, rows = joint.columns.shape
    if rows <= joint.df + count * width:
        raise ValueError(
            f"{count} series with {width} lags need more than {joint.df + count * width} rows, got {rows}: "
            "record longer series, lower `lags`, or use `ridge_leave_one_out`."
        )
    columns = joint.columns.flatten(0, 1)
    alone = (~joint.kept).flatten().double()
    gram, cross = columns @ columns.T + alone.diag(), columns @ joint.residual
    root, failed = torch.linalg.cholesky_ex(gram)
    exact = not bool(failed) and bool(root.diagonal().square().min() > COLLINEAR)
    if not exact:
        root = torch.linalg.cholesky(gram + JITTER * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    rank = int(((root.diagonal().square() > COLLINEAR) & joint.kept.flatten()).sum())
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(root, identity, upper=False)  # M = inverse' inverse
    coefficients = inverse.T @ (inverse @ cross)
    halves = inverse.T.reshape(count, width, -1)
    values, vectors = torch.linalg.eigh(halves @ halves.mT)  # of M_ii
    along = (vectors.mT @ coefficients.view(count, width, -1)).square() / values.unsqueeze(-1)
    testable = values * COLLINEAR < 1
    increase = torch.where(testable.unsqueeze(-1), along, 0.0).sum(1).T
    df_num = testable.sum(1) - (~joint.kept).sum(1)

    rss_own = joint.residual.square().sum(0)
    rss = (joint.residual - columns.T @ coefficients).square().sum(0).maximum(joint.floor)
    explained_before = rss_own <= joint.floor  # a target that its own past explains: nothing is left to add
    rss = torch.where(explained_before, rss_own, rss)
    nothing = explained_before[:, None] | (df_num == 0)
    odds = torch.where(nothing, 0.0, increase / rss.clamp_min(1e-300)[:, None])
    df_num = torch.where(nothing, 0, df_num)
    df_denom = rows - joint.df - rank
    f = odds / df_num.clamp_min(1) * df_denom
    log_p = f_log_sf(f, df_num, torch.full_like(df_num, df_denom))
    unit = joint.scale.square().clamp_max(LARGEST)
    return ConditionalTest(f, log_p, odds.log1p(), rss_own * unit, rss * unit, df_num, df_denom)


@torch.no_grad()
def ridge_leave_one_out(
    series: Float[Tensor, "time *series"],
    targets: Float[Tensor, "time *targets"],
    lags: int,
    own_lags: int | None = None,
    ridge: float | None = None,
) -> RidgeImportance:
    """What a ridge regression on the past of everything loses without each series, also with fewer rows than columns.

    The same formula as `leave_one_out_test` with `A + rows * ridge I`. The columns of the series, of unit variance, are
    penalised; the constant and the targets' past are not. With fewer rows than columns the dual form is taken:
    `b = X' K^-1 r` and `M_ii = (I - X_i' K^-1 X_i) / (rows * ridge)` with `K = X X' + rows * ridge I`.

    Memory: `8 * (3 * rows * columns + 3 * min(rows, columns) ** 2)` bytes, with `columns = series * lags`.

    Sources: Hoerl and Kennard (1970); Rasmussen and Williams (2006), 5.4, for the choice of the penalty.

    Args:
        series: possible causes.
        targets: possible effects.
        lags: steps of the series' past.
        own_lags: steps of the targets' past; as many as `lags` unless given.
        ridge: penalty over the variance of a column; unless given, the one with the largest marginal likelihood, all
            targets together, on a grid of 33 from `1e-3 / rows` to `1e5 / rows`.

    Raises:
        ValueError: `ridge` is not positive, or as `granger_test`.

    Example:
        >>> x = torch.randn(60, 100, dtype=torch.float64)
        >>> y = 2 * x[:, 3:4].roll(1, 0) + torch.randn(60, 1, dtype=torch.float64)
        >>> int(ridge_leave_one_out(x, y, lags=1).increase.argmax())
        3
    """
    if ridge is not None and not ridge > 0:
        raise ValueError(f"expected a positive ridge, got {ridge}: `leave_one_out_test` has none.")
    joint = _joint(series, targets, lags, own_lags, within=False)
    count, width, rows = joint.columns.shape
    columns = joint.columns.flatten(0, 1)
    dual = len(columns) > rows
    gram = columns.T @ columns if dual else columns @ columns.T
    if ridge is None:
        ridge = _likeliest_penalty(gram, columns, joint.residual, dual) / rows
    penalty = ridge * rows
    root = torch.linalg.cholesky(gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if dual:
        coefficients = columns @ torch.cholesky_solve(joint.residual, root)
        halves = torch.linalg.solve_triangular(root, columns.T, upper=False).T.reshape(count, width, -1)
        identity = torch.eye(width, dtype=gram.dtype, device=gram.device)
        blocks = (identity - halves @ halves.mT) / penalty
    else:
        identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        coefficients = torch.cholesky_solve(columns @ joint.residual, root)
        halves = torch.linalg.solve_triangular(root, identity, upper=False).T.reshape(count, width, -1)
        blocks = halves @ halves.mT
    b = coefficients.view(count, width, -1)
    increase = (b * torch.linalg.solve(blocks, b)).sum(1).T
    before = joint.residual.square().sum(0)
    share = torch.where((before > joint.floor)[:, None], increase / before.clamp_min(1e-300)[:, None], 0.0)
    return RidgeImportance(share.clamp_min(0.0), ridge)


def _joint(series: Tensor, targets: Tensor, lags: int, own_lags: int | None, within: bool = True) -> _Joint:
    """Columns orthonormal within each series (tests do not depend on the basis), or of unit variance."""
    own_lags = lags if own_lags is None else own_lags
    series, targets = as_series(series), as_series(targets)
    check_series(series, targets, lags, own_lags)
    targets = targets.to(series.device)
    time, skip = len(series), max(lags, own_lags)
    effects, scale = standardised(targets)
    causes, _ = standardised(series)
    past = torch.cat([effects[skip - lag : time - lag] for lag in range(1, own_lags + 1)], 1)
    past = past - past.mean(0)
    left, singular, _ = torch.linalg.svd(past / past.norm(dim=0).clamp_min(1e-300), full_matrices=False)
    left = left[:, singular > RANK_TOLERANCE * singular.amax().clamp_min(1e-300)]
    constant = torch.full((time - skip, 1), (time - skip) ** -0.5, dtype=left.dtype, device=left.device)
    known = torch.cat([constant, left], 1)
    present = effects[skip:]
    residual = present - known @ (known.T @ present)
    residual = residual - known @ (known.T @ residual)
    floor = PERFECT * present.square().sum(0)
    lagged = [causes[skip - lag : time - lag] for lag in range(1, lags + 1)]
    if within:
        columns, kept, _ = orthonormalised(lagged, known)
        return _Joint(columns.permute(2, 0, 1), residual, kept.T, scale, floor, known.shape[1])
    deviation = causes.square().mean(0).sqrt()
    columns = torch.stack(lagged) / torch.where(deviation > 0, deviation, 1.0)
    columns = columns - (known @ (known.T @ columns))
    kept = torch.ones(lags, causes.shape[1], dtype=torch.bool, device=causes.device)
    return _Joint(columns.permute(2, 0, 1), residual, kept.T, scale, floor, known.shape[1])


def _likeliest_penalty(gram: Tensor, columns: Tensor, residual: Tensor, dual: bool) -> float:
    """Of `r ~ N(0, s^2 (I + X X' / penalty))`, with `s` at its best."""
    rows = len(residual)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    if dual:
        along = (vectors.T @ residual).square()
    else:
        along = (vectors.T @ (columns @ residual)).square() / values.clamp_min(1e-300)[:, None]
        along = torch.where((values > 1e-12 * values.max())[:, None], along, 0.0)
    outside = (residual.square().sum(0) - along.sum(0)).clamp_min(0)
    penalties = torch.logspace(-3, 5, 33, dtype=values.dtype).tolist()

    def cost(penalty: float) -> float:
        spread = values / penalty + 1
        variance = ((along / spread[:, None]).sum(0) + outside) / rows
        return float((rows * variance.clamp_min(1e-300).log() + spread.log().sum()).sum())

    return float(min(penalties, key=cost))
