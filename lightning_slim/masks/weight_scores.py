"""How much each single weight matters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor


class WeightScore(ABC):
    """A frozen dataclass that scores the entries of a weight; the least go first. They may be negative."""

    streamed: ClassVar[bool] = False  # whether it is the mean over steps, at each of which there is a gradient

    @abstractmethod
    def __call__(self, weight: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The scores of one weight; those that are not streamed do not look at `gradient`."""


@dataclass(frozen=True)
class WeightMagnitude(WeightScore):
    """Absolute value (Han et al., 2015)."""

    def __call__(self, weight: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return weight.abs()


@dataclass(frozen=True)
class WeightSaliency(WeightScore):
    """`|weight * gradient|`, the mean over steps: how much the loss changes, to first order (Lee et al., 2019)."""

    streamed: ClassVar[bool] = True

    def __call__(self, weight: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (weight * gradient).abs()
