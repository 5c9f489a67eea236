"""Scores of single weights that look at what each weight reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.masks.weight_scores import WeightScore
from lightning_slim.statistics import Spread
from lightning_slim.witness import Witness, in_full


class InputScore(WeightScore):
    """`|weight| * size of the input that it reads`. A child is a frozen dataclass that says what that size is."""

    @property
    @abstractmethod
    def witnesses(self) -> tuple[Witness, ...]:
        """Who looks on where inputs arrive."""

    @abstractmethod
    def size(self, told: Mapping[Witness, Any]) -> Float[Tensor, "inputs"]:
        """The size of each input, never negative.

        Args:
            told: witness -> what it gathered.
        """

    def __call__(self, weight: Float[Tensor, "*shape"], beside: Float[Tensor, "..."]) -> Float[Tensor, "*shape"]:
        """The scores of one weight; `beside` it are the sizes, in a shape that broadcasts."""
        return weight.abs() * beside


@dataclass(frozen=True)
class Spreads(Witness):
    """Mean and variance of each input, over items and positions."""

    def hold(self, units: Float[Tensor, "items positions columns"]) -> Float[Tensor, "rows columns"]:
        return in_full(units).flatten(0, 1)

    def hold_tokens(self, tokens: Int[Tensor, "items positions"], number: int) -> Int[Tensor, "number"]:
        """How often each of them comes."""
        return torch.bincount(tokens.flatten(), minlength=number)

    def add(self, gathered: Spread | None, held: Tensor, known: None) -> Spread:
        gathered = gathered or Spread(held.shape[-1], held.device)
        if held.ndim == 1:
            gathered.update_one_hot(held)
        else:
            gathered.update(held)
        return gathered

    def blank(self, state: Mapping[str, Tensor]) -> Spread:
        return Spread(0)
