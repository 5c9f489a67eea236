"""Dynamic sparse training: some of what stays goes, as much of what is gone comes back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.arguments import check_fields


class Regrowth(ABC):
    """A frozen dataclass that says how much is exchanged when, and scores what may come back; it comes back as zero."""

    needs_gradients: ClassVar[bool] = False  # of all entries, also of those that are zero
    fraction: float
    end: float

    def __post_init__(self) -> None:
        check_fields(self)
        if not (0 < self.fraction < 1 and 0 < self.end <= 1):
            raise ValueError(
                f"Expected `fraction` in (0, 1) and `end` in (0, 1], got {self.fraction} and {self.end}: a fraction of "
                "what stays is exchanged, until that fraction of the run."
            )

    def share(self, progress: float) -> float:
        """The share of what stays that is exchanged at `progress`: `fraction / 2 * (1 + cos(pi * progress / end))`."""
        return self.fraction / 2 * (1 + math.cos(math.pi * progress / self.end)) if progress < self.end else 0.0

    @abstractmethod
    def __call__(self, gradient: Float[Tensor, "*shape"], generator: torch.Generator) -> Float[Tensor, "*shape"]:
        """Scores of entries that may come back; they may be negative."""


@dataclass(frozen=True)
class RigL(Regrowth):
    """What has the largest gradient comes back (Evci et al., 2020).

    >>> [round(RigL(fraction=0.3, end=0.8).share(t), 2) for t in (0.0, 0.4, 0.8)]
    [0.3, 0.15, 0.0]
    """

    needs_gradients: ClassVar[bool] = True
    fraction: float = 0.3
    end: float = 0.75

    def __call__(self, gradient: Float[Tensor, "*shape"], generator: torch.Generator) -> Float[Tensor, "*shape"]:
        return gradient.abs()


@dataclass(frozen=True)
class SET(Regrowth):
    """Anything may come back, by chance (Mocanu et al., 2018); unlike theirs, the share falls, as that of `RigL`."""

    fraction: float = 0.3
    end: float = 0.75

    def __call__(self, gradient: Float[Tensor, "*shape"], generator: torch.Generator) -> Float[Tensor, "*shape"]:
        return torch.rand(gradient.shape, generator=generator).to(gradient.device)
