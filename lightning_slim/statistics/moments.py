"""Streaming second moments: one Gram matrix that serves selection and fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Moments:
    """Number, sum and second moment of rows of columns, in one pass and in float64.

    All three are plain sums, so two streams merge by addition. Each batch is centred before it is multiplied, so the
    product may run in float32 without losing small variances beside large means; the rest is float64.

    Memory: `8 * columns ** 2` bytes.

    Example:
        >>> moments = Moments(2)
        >>> moments.update(torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        >>> moments.mean.tolist(), moments.covariance.tolist()
        ([2.0, 2.0], [[1.0, 2.0], [2.0, 4.0]])
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        # MPS has no float64: there the sums are kept on the CPU.
        self.device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        # Shape (1,), not (): a 0-dim float64 buffer that a compiled graph writes to is silently lost (torch 2.13).
        self.count: Float[Tensor, 1] = torch.zeros(1, dtype=torch.float64, device=self.device)
        self.total: Float[Tensor, "columns"] = torch.zeros(columns, dtype=torch.float64, device=self.device)
        self.second: Float[Tensor, "columns columns"] = torch.zeros(
            columns, columns, dtype=torch.float64, device=self.device
        )
        self._fading = 1.0  # a decay that is not carried out yet: the next update does it in the same pass

    @torch.no_grad()
    def update(self, rows: Float[Tensor, "rows columns"]) -> None:
        """Adds a batch of rows, of any floating type."""
        rows = rows.detach().float() if rows.dtype != torch.float64 else rows.detach()
        n = rows.shape[0]
        mean = rows.mean(0)
        centred = rows - mean
        mean = mean.to(self.device, torch.float64)
        self.count.mul_(self._fading).add_(n)
        self.total.mul_(self._fading).add_(mean, alpha=n)
        self.second.addr_(mean, mean, beta=self._fading, alpha=n).add_((centred.T @ centred).to(self.device))
        self._fading = 1.0

    def merge(self, other: Moments) -> None:
        """Adds another stream of the same columns."""
        for mine, theirs in zip(self._settled(), other._settled(), strict=True):
            mine += theirs

    def copy(self) -> Moments:
        """The same sums, on their own."""
        copied = Moments(0, self.device)
        copied.load_state_dict(self.state_dict())
        return copied

    def decay(self, factor: float) -> None:
        """Forgets: what was seen so far counts only `factor` times as much from now on."""
        self._fading *= factor

    def _settled(self) -> tuple[Tensor, Tensor, Tensor]:
        parts = (self.count, self.total, self.second)
        if self._fading != 1:
            for part in parts:
                part.mul_(self._fading)
            self._fading = 1.0
        return parts

    def keep(self, columns: Int[Tensor, "kept"]) -> None:
        """Drops all other columns: the moments are those of a stream that never had them."""
        columns = columns.to(self.device)
        self.total = self.total[columns]
        self.second = self.second[columns][:, columns]

    @property
    def mean(self) -> Float[Tensor, "columns"]:
        """First moment; zero while nothing was seen."""
        return self.total / self.count.clamp_min(1e-300)

    @property
    def covariance(self) -> Float[Tensor, "columns columns"]:
        """Centred second moment (divided by the number of rows); zero while nothing was seen."""
        return self.second / self.count.clamp_min(1e-300) - torch.outer(self.mean, self.mean)

    @property
    def variance(self) -> Float[Tensor, "columns"]:
        """Diagonal of `covariance`; never negative."""
        return (self.second.diagonal() / self.count.clamp_min(1e-300) - self.mean.square()).clamp_min(0)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, as tensors only."""
        return dict(zip(("count", "total", "second"), self._settled(), strict=True))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, of any number of columns."""
        self.count, self.total, self.second = (
            state[key].to(self.device, torch.float64).clone() for key in ("count", "total", "second")
        )
        self._fading = 1.0


def merged(streams: Sequence[Moments]) -> Moments:
    """One stream of several of the same columns; they are left as they are."""
    result = streams[0].copy()
    for stream in streams[1:]:
        result.merge(stream)
    return result
