"""Granger causality by frequency: at which rhythm does one series tell of another?"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class BivariateVAR(NamedTuple):
    """A vector autoregression of two series, `z_t = constant + sum_a coefficients[a - 1] z_{t - a} + noise`.

    Attributes:
        coefficients: row `i`, column `j` says what series `j` adds to series `i`, lag by lag.
        covariance: of the noise.
        rows: number of rows it was fitted on.
    """

    coefficients: Float[Tensor, "lags 2 2"]
    covariance: Float[Tensor, "2 2"]
    rows: int


class SpectralCausality(NamedTuple):
    """Geweke's measures, frequency by frequency. Their mean over frequencies is the measure in the time domain.

    Attributes:
        frequency: in cycles per step, evenly between 0 and 1/2 (middles of equal bands).
        x_to_y: what `x` tells of `y`, in nats; zero or more.
        y_to_x: the other way round.
        spectrum: of `x` and of `y`, as the autoregression has them: variance per cycle per step, over both signs of
            the frequency.
    """

    frequency: Float[Tensor, "frequencies"]
    x_to_y: Float[Tensor, "frequencies"]
    y_to_x: Float[Tensor, "frequencies"]
    spectrum: Float[Tensor, "2 frequencies"]


def fit_var(x: Float[Tensor, "items steps"], y: Float[Tensor, "items steps"], lags: int) -> BivariateVAR:
    """Ordinary least squares of both series on the past of both, pooled over items; lags never cross them.

    Args:
        x: one series, or several stretches of it.
        y: the other one.
        lags: order of the autoregression.

    Raises:
        ValueError: fewer rows than coefficients.

    Example:
        >>> x = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
        >>> fit_var(x, x.roll(1), lags=1).coefficients.round(decimals=1).abs().tolist()
        [[[0.0, 0.0], [1.0, 0.0]]]
    """
    rows = x.shape[0] * (x.shape[1] - lags)
    if lags < 1 or rows <= 2 * lags + 1:
        raise ValueError(
            f"A bivariate autoregression of {lags} lags needs at least 1 lag and {2 * lags + 2} rows, got "
            f"{max(0, rows)} rows: record longer series or lower `lags`."
        )
    both = torch.stack([x, y], -1).double()
    least = 1e-13 * both.abs().amax((0, 1))  # a spread that is rounding error is none
    both = both - both.mean((0, 1))
    size = both.square().mean((0, 1)).sqrt()
    size = torch.where(size > least, size, 1.0)
    both = torch.where(both.abs().amax((0, 1)) > least, both, 0.0) / size
    steps = both.shape[1]
    past = torch.cat([both[:, lags - lag : steps - lag] for lag in range(1, lags + 1)], -1).flatten(0, 1)
    past = torch.cat([past, torch.ones_like(past[:, :1])], 1)
    now = both[:, lags:].flatten(0, 1)
    weight = torch.linalg.pinv(past, rtol=1e-10) @ now
    noise = now - past @ weight
    coefficients = weight[:-1].view(lags, 2, 2).mT * size[:, None] / size
    covariance = noise.T @ noise / (len(now) - past.shape[1]) * torch.outer(size, size)
    return BivariateVAR(coefficients, covariance, len(now))


def spectral_causality(model: BivariateVAR, frequencies: int = 256) -> SpectralCausality:
    """Geweke's spectral measure of an autoregression.

    `f(w) = log(S_yy(w) / (S_yy(w) - (C_xx - C_xy^2 / C_yy) |H_yx(w)|^2))`: of the spectrum `S = H C H*` of `y`, what is
    not driven by the noise of `x` beyond that which both share. `H(w) = (I - sum_a A_a exp(-2 pi i w a))^-1`, `C` the
    covariance of the noise. Its mean over frequencies is the time-domain measure `log(rss_own / rss_both)`, as long as
    `y` on its own is an autoregression of enough lags, and the model is stable. Source: Geweke (1982).

    Args:
        model: as of `fit_var`.
        frequencies: number of frequencies.

    Example:
        >>> coefficients = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]]).double()  # y is x a step later, and noise
        >>> model = BivariateVAR(coefficients, torch.eye(2).double(), rows=100)
        >>> spectral_causality(model, 2).x_to_y.exp().tolist(), spectral_causality(model, 2).y_to_x.tolist()
        ([2.0, 2.0], [0.0, 0.0])
    """
    A, C = model.coefficients.double(), model.covariance.double()
    # Units of one noise each, so that nothing is too small or too large to be squared.
    unit = C.diagonal().sqrt()
    unit = torch.where(unit > 0, unit, 1.0)
    A, C = A * unit / unit[:, None], C / torch.outer(unit, unit)
    frequency = (torch.arange(frequencies, dtype=A.dtype, device=A.device) + 0.5) / (2 * frequencies)
    lag = torch.arange(1, len(A) + 1, dtype=A.dtype, device=A.device)
    turn = torch.exp(-2j * math.pi * torch.outer(frequency, lag))
    inverse = torch.eye(2, dtype=turn.dtype, device=A.device) - torch.einsum("fa,aij->fij", turn, A.to(turn))
    # H = adjugate / determinant; the determinant cancels from the measure, so a root on the circle does no harm to it.
    H = torch.stack([inverse[:, 1, 1], -inverse[:, 0, 1], -inverse[:, 1, 0], inverse[:, 0, 0]], 1).view(-1, 2, 2)
    S = torch.einsum("fij,jk,fik->fi", H, C.to(H), H.conj()).real.clamp_min(0)
    determinant = (inverse[:, 0, 0] * inverse[:, 1, 1] - inverse[:, 0, 1] * inverse[:, 1, 0]).abs().square()
    spectrum = (S / determinant.clamp_min(1e-300)[:, None] * unit.square()).T
    return SpectralCausality(frequency, _measure(S, H, C, 0, 1), _measure(S, H, C, 1, 0), spectrum)


def _measure(S: Tensor, H: Tensor, C: Tensor, source: int, target: int) -> Tensor:
    new = (C[source, source] - C[source, target].square() / C[target, target].clamp_min(1e-300)).clamp_min(0)
    driven = new * H[:, target, source].abs().square()
    share = torch.where(driven > 0, driven / S[:, target].clamp_min(1e-300), 0.0)
    return -torch.log1p(-share.clamp(0, 1 - torch.finfo(share.dtype).eps))
