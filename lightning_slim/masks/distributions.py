"""How the zeros of a network are shared out among its layers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.arguments import check_fields
from lightning_slim.masks.patterns.base import best


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight as a distribution sees it.

    Attributes:
        shape: of the weight.
        scores: of its pieces (see `Pattern.pool`).
    """

    shape: tuple[int, ...]
    scores: Float[Tensor, "pieces"]

    @property
    def pieces(self) -> int:
        """How many there are."""
        return len(self.scores)


class Distribution(ABC):
    """A frozen dataclass that says how many pieces of each weight go, when a fraction of all is to go."""

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def __call__(self, layers: Mapping[str, Layer], sparsity: float) -> dict[str, int]:
        """Name of a weight -> how many of its pieces go.

        Raises:
            ValueError: more is to stay of single layers than of all together.
        """


@dataclass(frozen=True)
class Uniform(Distribution):
    """The same fraction of every weight."""

    def __call__(self, layers: Mapping[str, Layer], sparsity: float) -> dict[str, int]:
        return {name: round(sparsity * layer.pieces) for name, layer in layers.items()}


@dataclass(frozen=True)
class ErdosRenyiKernel(Distribution):
    """What stays of a weight is proportional to the sum of its axes over their product (Evci et al., 2020).

    Of a convolution of `n` outputs, `m` inputs and a kernel of `w` by `h` stays `e (n + m + w + h) / (n m w h)`, all at
    most; `e` is such that as much stays as is asked for. Of large layers more goes than of small ones.

    Attributes:
        floor: at least this fraction of every weight stays.
    """

    floor: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self)
        _check_floor(self.floor)

    def __call__(self, layers: Mapping[str, Layer], sparsity: float) -> dict[str, int]:
        raw = {name: sum(layer.shape) / math.prod(layer.shape) for name, layer in layers.items()}

        def kept(e: float) -> dict[str, float]:
            return {n: min(max(e * raw[n], self.floor), 1.0) * layer.pieces for n, layer in layers.items()}

        total = sum(layer.pieces for layer in layers.values())
        wanted = total - round(sparsity * total)
        _check_reachable(self.floor, sparsity)
        low, high = 0.0, 1 / min(raw.values())
        for _ in range(200):  # what stays grows with e
            middle = (low + high) / 2
            low, high = (middle, high) if sum(kept(middle).values()) < wanted else (low, middle)
        exact = kept(high)
        counts = {name: math.floor(value + 1e-9) for name, value in exact.items()}
        for name in sorted(exact, key=lambda n: counts[n] - exact[n])[: wanted - sum(counts.values())]:
            counts[name] += 1  # the largest remainders, so that the sum is what was asked for
        return {name: layer.pieces - counts[name] for name, layer in layers.items()}


@dataclass(frozen=True)
class Global(Distribution):
    """One threshold for all weights: the pieces of least score go, wherever they are.

    Attributes:
        floor: at least this fraction of every weight stays, one piece at least.
    """

    floor: float = 0.01

    def __post_init__(self) -> None:
        check_fields(self)
        _check_floor(self.floor)

    def __call__(self, layers: Mapping[str, Layer], sparsity: float) -> dict[str, int]:
        _check_reachable(self.floor, sparsity)
        scores = [
            layer.scores.masked_fill(best(layer.scores, max(1, math.ceil(self.floor * layer.pieces))), torch.inf)
            for layer in layers.values()
        ]
        together = torch.cat(scores)
        gone = ~best(together, len(together) - round(sparsity * len(together)))
        counts = (int(part.sum()) for part in torch.split(gone, [len(part) for part in scores]))
        return dict(zip(layers, counts, strict=True))


def _check_floor(floor: float) -> None:
    if not 0 <= floor < 1:
        raise ValueError(f"Expected `floor` in [0, 1), a fraction of each weight, got {floor}.")


def _check_reachable(floor: float, sparsity: float) -> None:
    if floor > 1 - sparsity:
        raise ValueError(
            f"Expected a `floor` of at most {1 - sparsity:g}, which is all that stays at a sparsity of {sparsity:g}, "
            f"got {floor:g}: lower one of them."
        )
