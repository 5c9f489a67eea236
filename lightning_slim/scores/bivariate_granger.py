"""Bivariate Granger causality of single units: what the literature does, for comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_slim.arguments import check_fields
from lightning_slim.scores.base import Evidence, Need, Score, UnitScores
from lightning_slim.statistics import PanelDesign, PanelGranger, differences, granger_test
from lightning_slim.witness import Gathered, Known, Witness, check_items, in_full

Axis = Literal["sequence", "training_step"]
WINDOW = 512  # training steps


@dataclass(frozen=True)
class Sequences(Witness):
    """Pairs units with the network's outputs, both as series within each item."""

    lags: int
    known: ClassVar[Known | None] = "outputs"

    def hold(self, units: Float[Tensor, "items positions columns"]) -> Tensor:
        return in_full(units).clone()

    def add(self, gathered: PanelGranger | None, held: Tensor, known: Tensor) -> PanelGranger:
        check_items(held, known, "outputs")
        if known.ndim != 3 or known.shape[1] != held.shape[1]:
            raise ValueError(
                f"Expected outputs of (item, step, target) with {held.shape[1]} steps, as the units have, got "
                f'{tuple(known.shape)}: choose `BivariateGranger(axis="training_step")`, or `Granger`.'
            )
        gathered = gathered or PanelGranger(held.shape[2], known.shape[2], PanelDesign(self.lags), device=held.device)
        gathered.update(held, known.detach())
        return gathered

    def blank(self, state: Mapping[str, Tensor]) -> PanelGranger:
        return PanelGranger(0, 0, PanelDesign(self.lags))


class StepWindow:
    """The last training steps: mean activation of each unit, and the loss.

    Means of ranks are those of the whole batch, so ranks are averaged like sums. Nothing fades.

    Args:
        units: number of units.
        device: where the series are kept.
    """

    def __init__(self, units: int, device: torch.device | str = "cpu") -> None:
        self.units: Float[Tensor, "steps units"] = torch.zeros(0, units, dtype=torch.float64, device=device)
        self.losses: Float[Tensor, "steps 1"] = torch.zeros(0, 1, dtype=torch.float64, device=device)

    @property
    def sums(self) -> dict[str, Tensor]:
        """None: one rank's steps are those of rank 0."""
        return {}

    def decay(self, factor: float) -> None:
        """Nothing fades within the window."""

    def append(self, units: Float[Tensor, "units"], loss: Float[Tensor, ""]) -> None:
        """Adds a step; the oldest is forgotten."""
        self.units = torch.cat([self.units, units[None].to(self.units)])[-WINDOW:]
        self.losses = torch.cat([self.losses, loss.view(1, 1).to(self.losses)])[-WINDOW:]

    def keep(self, units: Int[Tensor, "kept"]) -> None:
        """Drops all other units."""
        self.units = self.units[:, units.to(self.units.device)]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors only."""
        return {"units": self.units, "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.units, self.losses = state["units"].clone(), state["losses"].clone()


@dataclass(frozen=True)
class Steps(Witness):
    """Notes the mean activation of each unit in every recorded step, and the loss."""

    lags: int
    known: ClassVar[Known | None] = "losses"

    def hold(self, units: Float[Tensor, "items positions columns"]) -> Tensor:
        return in_full(units).mean((0, 1))

    def add(self, gathered: StepWindow | None, held: Tensor, known: Tensor) -> StepWindow:
        gathered = gathered or StepWindow(len(held), held.device)
        gathered.append(held, known.detach().mean())
        return gathered

    def blank(self, state: Mapping[str, Tensor]) -> Gathered:
        return StepWindow(0)

    def enough(self, gathered: StepWindow) -> bool:
        return len(gathered.losses) >= 8 * (self.lags + 1) + 8


@dataclass(frozen=True)
class BivariateGranger(Score):
    """Granger causality of each unit alone: Geweke's measure, the mean over targets.

    For comparison, not for use. Where we measured it, it ranks units below chance: it asks what a unit's past tells of
    an output beyond the output's own past, when what a network needs is what its units compute together; and copies
    all score alike. The training-step axis carries no signal at all: units of another network, which cannot cause this
    one's loss, reject as often.

    Attributes:
        lags: past steps of the unit, and of the target.
        axis: `"sequence"`: pooled over the items of the batches, for networks with an output for each step
            (`statistics.PanelGranger`, calibrated by exchanged items); `"training_step"`: experimental: series of
            batch means against the loss over the last recorded steps, of differences, with `2 * lags + 4` own lags
            and heteroscedasticity-robust tests. Under DDP, rank 0's series.
    """

    lags: int = 1
    axis: Axis = "sequence"
    needs: ClassVar[frozenset[Need]] = frozenset({"moments"})
    tests: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.lags < 1:
            raise ValueError(f"Expected `lags` of at least 1, got {self.lags}.")

    @property
    def witnesses(self) -> tuple[Witness, ...]:
        return (Sequences(self.lags) if self.axis == "sequence" else Steps(self.lags),)

    def __call__(self, evidence: Evidence) -> UnitScores:
        units = len(evidence.weights)
        effects, log_p = [], []
        for reading in evidence.heard:
            effect, p = self._test(reading.gathered(self.witnesses[0]))
            effects.append(effect.mean(0).view(units, -1).mean(1))
            log_p.append(p.view(len(p), units, -1).movedim(1, 0).flatten(1))
        tested = torch.cat(log_p, 1)
        smallest = tested.min(1).values + math.log(tested.shape[1])
        return UnitScores(torch.stack(effects).mean(0).clamp_min(0).cpu(), smallest.clamp_max(0).cpu())

    def _test(self, gathered: Any) -> tuple[Float[Tensor, "targets units"], Float[Tensor, "targets units"]]:
        if isinstance(gathered, PanelGranger):
            panel = gathered.result()
            return panel.geweke, panel.log_p
        own = 2 * self.lags + 4
        steps = granger_test(differences(gathered.units), differences(gathered.losses), self.lags, own, robust="hc3")
        return steps.effect, steps.log_p
