"""What a penalty is: a function of the entries that the units of one group own, one unit a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from lightning_slim.arguments import check_fields

Entries = Literal["all", "made", "scales"]


class Penalty(ABC):
    """What is added to the loss for one group of units. A child is a frozen dataclass in a file of its own.

    Attributes:
        of: which entries of a unit count: `"all"` of them, in every coupled tensor; `"made"`: those that make or carry
            the unit, and not those that read it; `"scales"`: its scales in the normalisations that it passes.
    """

    of: ClassVar[Entries] = "all"

    def __post_init__(self) -> None:
        check_fields(self)

    @abstractmethod
    def value(self, rows: Float[Tensor, "units fan"]) -> Float[Tensor, ""]:
        """The penalty of one group at strength 1."""

    @abstractmethod
    def gradient(self, rows: Float[Tensor, "units fan"]) -> Float[Tensor, "units fan"]:
        """The gradient of `value` in closed form; zero where there is none."""


class Proximal(Penalty):
    """A penalty whose proximal step has a closed form, and so gives exact zeros."""

    @abstractmethod
    def shrinkage(self, rows: Float[Tensor, "units fan"], threshold: float) -> Float[Tensor, "units fan"]:
        """What each entry is multiplied by, in [0, 1].

        `rows * shrinkage` is the `x` with the least `|x - rows|^2 / 2 + threshold * value(x)`.

        Args:
            rows: entries of the units.
            threshold: strength times learning rate.
        """
