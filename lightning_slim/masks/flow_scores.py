"""How much each single weight matters before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lightning_slim.arguments import check_fields
from lightning_slim.flows import Flow, GradientFlow, SynapticFlow
from lightning_slim.masks.weight_scores import WeightScore


@dataclass(frozen=True)
class WeightSynFlow(WeightScore):
    """What flows through a weight: `|w| * dR/d|w|` (Tanaka et al., 2020); see `SynapticFlow`. For `when="start"` only.

    Made for `distribution=Global()`: in many rounds (`rounds`), no layer is emptied.
    """

    streamed: ClassVar[bool] = True
    flow: ClassVar[Flow | None] = SynapticFlow()

    def __call__(self, weight: Float[Tensor, "*shape"], beside: Float[Tensor, "..."]) -> Float[Tensor, "*shape"]:
        return (weight * beside).abs()


@dataclass(frozen=True)
class WeightGraSP(WeightScore):
    """What a weight adds to the norm of the gradient: `w * (Hg)` (Wang et al., 2020). For `when="start"` only.

    Weights without which the network would learn no slower, or faster, go first: theirs are negative. Made for
    `distribution=Global()`.

    Attributes:
        temperature: divides the networks' outputs; see `GradientFlow`.
    """

    temperature: float = 200.0
    streamed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        GradientFlow(self.temperature)  # says what is wrong with it

    @property
    def flow(self) -> Flow:  # type: ignore[override]
        """The gradient flow, at this temperature."""
        return GradientFlow(self.temperature)

    def __call__(self, weight: Float[Tensor, "*shape"], beside: Float[Tensor, "..."]) -> Float[Tensor, "*shape"]:
        return weight * beside
