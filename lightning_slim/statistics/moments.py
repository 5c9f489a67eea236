"""Streaming second moments: one Gram matrix that serves selection and fold."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_slim.statistics.streaming import Accumulator, Pivoted

FIRST_ROWS = 64  # of the first batch, of which the pivots are medians


class MeanAndCovariance(NamedTuple):
    """First moment, and centred second moment divided by the number of rows."""

    mean: Float[Tensor, "columns"]
    covariance: Float[Tensor, "columns columns"]


class Moments(Pivoted):
    """Number, sum and second moment of rows of columns, in one pass.

    Sums are float64 and about pivots. Each batch is centred before it is multiplied, so the product may run in float32
    without losing small variances beside large means; it runs in float64 where the rows are.

    A column with a value that is not finite counts as dead: its mean and covariances are zero.

    Memory: `8 * columns ** 2` bytes.

    Args:
        columns: number of columns.
        device: where the sums are kept.

    Example:
        >>> moments = Moments(2)
        >>> moments.update(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        >>> moments.mean.tolist(), moments.covariance.tolist()
        ([2.0, 2.0], [[1.0, 2.0], [2.0, 4.0]])
    """

    SUMS: ClassVar = {"count": None, "total": 0, "second": 0}
    PIVOTS: ClassVar = {"pivot": 0}

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(device)
        self.count: Float[Tensor, "1"] = self._zeros(1)
        self.total, self.pivot = self._zeros(columns), self._zeros(columns)
        self.second: Float[Tensor, "columns columns"] = self._zeros(columns, columns)
        self._fading = 1.0  # a decay that is not carried out yet: the next update does it in the same pass

    @torch.no_grad()
    def update(self, rows: Float[Tensor, "rows columns"]) -> None:
        """Adds a batch of rows, of any floating type.

        Raises:
            ValueError: another number of columns.
        """
        self._expect(rows, self.pivot, "units")
        n = len(rows)
        if n == 0:
            return
        rows = rows.detach().float() if rows.dtype != torch.float64 else rows.detach()
        if not self._settled:
            self.pivot = rows[:FIRST_ROWS].median(0).values.to(self.device, torch.float64)
            self._settled = True
        near = self.pivot.to(rows)  # in float32 next to the pivot, and the pivot itself until pivots are moved
        rows = rows - near
        mean = rows.mean(0)
        rows -= mean
        mean = mean.to(self.pivot) + (near.to(self.pivot) - self.pivot)
        self.count.mul_(self._fading).add_(n)
        self.total.mul_(self._fading).add_(mean, alpha=n)
        self.second.addr_(mean, mean, beta=self._fading, alpha=n).add_((rows.T @ rows).to(self.device))
        self._fading = 1.0

    def decay(self, factor: float) -> None:
        """Forgets: what was seen so far counts only `factor` times as much from now on."""
        self._fading *= factor

    def keep(self, units: Int[Tensor, "kept"]) -> None:
        """Drops all other columns: the moments are those of a stream that never had them."""
        super().keep(units)
        self.second = self.second.index_select(1, units.to(self.device))

    @property
    def sums(self) -> dict[str, Tensor]:
        """The tensors that add, themselves and not copies: reduce them over ranks in place."""
        self._fade()
        return super().sums

    @property
    def mean(self) -> Float[Tensor, "columns"]:
        """First moment; zero while nothing was seen."""
        return torch.where(self._defined, self.pivot + self._about_pivot, 0.0)

    @property
    def covariance(self) -> Float[Tensor, "columns columns"]:
        """Centred second moment (divided by the number of rows); zero while nothing was seen."""
        covariance = self.second / self.count.clamp_min(1e-300) - torch.outer(self._about_pivot, self._about_pivot)
        return torch.where(self._defined[:, None] & self._defined, covariance, 0.0)

    @property
    def variance(self) -> Float[Tensor, "columns"]:
        """Diagonal of `covariance`; never negative."""
        variance = self.second.diagonal() / self.count.clamp_min(1e-300) - self._about_pivot.square()
        return torch.where(self._defined, variance, 0.0).clamp_min(0)

    def result(self) -> MeanAndCovariance:
        """The first two moments of everything seen so far."""
        return MeanAndCovariance(self.mean, self.covariance)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, of any number of columns."""
        super().load_state_dict(state)
        self._fading = 1.0

    def _fade(self) -> None:
        if self._fading != 1:
            faded = {name: tensor * self._fading for name, tensor in super().sums.items()}
            vars(self).update(faded, _fading=1.0)

    @property
    def _about_pivot(self) -> Float[Tensor, "columns"]:
        return self.total / self.count.clamp_min(1e-300)

    @property
    def _defined(self) -> Bool[Tensor, "columns"]:
        return self.second.diagonal().isfinite() & self.total.isfinite()

    def _check(self, other: Accumulator) -> None:
        super()._check(other)
        for stream in (self, other):
            if isinstance(stream, Moments):
                stream._fade()  # before a copy with other pivots shares the tensors

    def _shift(self, by: Mapping[str, Tensor]) -> None:
        d = by["pivot"]
        cross = torch.outer(self.total, d)
        self.second = self.second + cross + cross.T + self.count * torch.outer(d, d)
        self.total = self.total + self.count * d


def merged(streams: Sequence[Moments]) -> Moments:
    """One stream of several of the same columns; they are left as they are."""
    result = copy.deepcopy(streams[0])
    for stream in streams[1:]:
        result.merge(stream)
    return result
