"""How much each single weight matters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_slim.arguments import check_fields
from lightning_slim.flows import Flow


class WeightScore(ABC):
    """A frozen dataclass that scores the entries of a weight; the least go first. They may be negative."""

    streamed: ClassVar[bool] = False  # whether it is the sum over steps, at each of which there is a gradient
    forgets: ClassVar[bool] = True  # whether that sum begins anew when the masks were updated
    flow: ClassVar[Flow | None] = None  # what that gradient is before training, if it is not that of the loss

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def __call__(self, weight: Float[Tensor, "*shape"], beside: Float[Tensor, "..."]) -> Float[Tensor, "*shape"]:
        """The scores of one weight; `beside` it is its gradient, which those that are not streamed do not look at."""


@dataclass(frozen=True)
class WeightMagnitude(WeightScore):
    """Absolute value (Han et al., 2015)."""

    def __call__(self, weight: Float[Tensor, "*shape"], beside: Float[Tensor, "..."]) -> Float[Tensor, "*shape"]:
        return weight.abs()


@dataclass(frozen=True)
class WeightLamp(WeightScore):
    """`w^2 / sum over v, |v| >= |w|, of v^2`, within one weight (Lee et al., 2021).

    What removing an entry would distort, relative to what is left once all smaller ones are gone. Within a weight it
    ranks as `WeightMagnitude` does; the largest entry has 1 (but for ties, which share): with `Global()` the fractions
    of layers are those of LAMP.
    """

    def __call__(self, weight: Float[Tensor, "*shape"], beside: Float[Tensor, "..."]) -> Float[Tensor, "*shape"]:
        squares = weight.double().square().flatten()
        ascending = squares.sort().values
        sums = ascending.flip(0).cumsum(0).flip(0)  # over an entry and all behind it
        return torch.where(squares > 0, squares / sums[torch.searchsorted(ascending, squares)], 0.0).view(weight.shape)


@dataclass(frozen=True)
class WeightSaliency(WeightScore):
    """`|weight * gradient|`, summed over steps: how much the loss changes, to first order (Lee et al., 2019)."""

    streamed: ClassVar[bool] = True

    def __call__(self, weight: Float[Tensor, "*shape"], beside: Float[Tensor, "..."]) -> Float[Tensor, "*shape"]:
        return (weight * beside).abs()


@dataclass(frozen=True)
class WeightMovement(WeightScore):
    """`-weight * gradient`, summed over all steps of the run: what moves away from zero stays (Sanh et al., 2020).

    What moves toward zero is negative, however large it is: for fine-tuning, where magnitudes are those of another
    task. Unlike theirs, what is gone stays gone.
    """

    streamed: ClassVar[bool] = True
    forgets: ClassVar[bool] = False

    def __call__(self, weight: Float[Tensor, "*shape"], beside: Float[Tensor, "..."]) -> Float[Tensor, "*shape"]:
        return -weight * beside
