"""Single weights times the size of what they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from lightning_slim.masks.inputs import InputScore, Spreads
from lightning_slim.witness import Witness


@dataclass(frozen=True)
class WeightWanda(InputScore):
    """`|w_ij| * rms(x_j)`: a weight times the size of the input that it reads (Sun et al., 2024).

    Theirs is the norm of the input; divided by the root of its length, so that layers with many pixels or steps do not
    outweigh others. Within a layer the ranks are the same. Which weights are compared is for pattern and distribution
    to say: `NM()` compares along the inputs of one output, as they do, `Uniform()` within a whole layer.

    A token of an embedding counts as an input that is 1 where the token comes and 0 elsewhere: its size is the root of
    how often it comes.
    """

    @property
    def witnesses(self) -> tuple[Witness, ...]:
        return (Spreads(),)

    def size(self, told: Mapping[Witness, Any]) -> Float[Tensor, "inputs"]:
        mean_square: Tensor = told[Spreads()].mean_square
        return mean_square.sqrt()
