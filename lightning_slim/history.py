"""What went, when and why: plain data that prints, saves and loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_slim.payload import PayloadError, opened, sealed


@dataclass(frozen=True)
class PruningEvent:
    """One cut.

    Attributes:
        step: optimizer steps taken before it.
        progress: fraction of the run that was done; of several rounds before training, of these.
        asked: fraction of the original budget that was to remain.
        reached: fraction of the original budget that remains.
        params: parameters left.
        macs: multiply-accumulates left, for one sample.
        widths: group -> units left.
        removed: group -> units removed by this event, in ORIGINAL numbering.
        importance: group -> importance of every unit that was there, in the order of its numbering then.
        calibration: group -> what the selection found and what it finds where there is nothing, of scores that
            calibrate themselves: `rows`, `live` units, `explained` (share of the targets' variance that the units that
            stay explain), `by_chance` (of targets they cannot know), `inflation`, `significant` units.
    """

    step: int
    progress: float
    asked: float
    reached: float
    params: int
    macs: int
    widths: dict[str, int]
    removed: dict[str, list[int]]
    importance: dict[str, list[float]]
    calibration: dict[str, dict[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        gone = sum(map(len, self.removed.values()))
        return (
            f"step {self.step}: {gone} units removed, {self.reached:.1%} left ({self.asked:.1%} asked), "
            f"{self.params:,} params, {self.macs:,} MACs"
        )


@dataclass(frozen=True)
class ScreeningEvent:
    """One choice of inputs.

    Attributes:
        step: optimizer steps taken before it.
        test: which test chose.
        alpha: share of false discoveries that was allowed.
        kept: names of the inputs that are still read.
        removed: names of those that are no longer.
        adjusted_p: name -> p-value, adjusted by Benjamini and Hochberg.
        effect: name -> size of the effect: Geweke's measure in nats, eta-squared or r-squared.
        significant: how many inputs are discoveries.
    """

    step: int
    test: str
    alpha: float
    kept: list[str]
    removed: list[str]
    adjusted_p: dict[str, float]
    effect: dict[str, float]
    significant: int

    def __str__(self) -> str:
        return (
            f"step {self.step}: {len(self.kept)} of {len(self.adjusted_p)} inputs left ({self.test}, "
            f"{self.significant} significant at a false discovery rate of {self.alpha:g}): {', '.join(self.kept)}"
        )

    def to_markdown(self) -> str:
        """A Markdown table of all inputs, those of most effect first."""
        lines = ["| input | stays | adjusted p | effect |", "|---|---|---:|---:|"]
        stays = set(self.kept)
        for name in sorted(self.effect, key=self.effect.__getitem__, reverse=True):
            answer = "yes" if name in stays else "no"
            lines.append(f"| {name} | {answer} | {self.adjusted_p[name]:.3g} | {self.effect[name]:.4f} |")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class MaskEvent:
    """One update of the masks of weights.

    Attributes:
        step: optimizer steps taken before it.
        progress: fraction of the run that was done; of several rounds before training, of these.
        asked: fraction of the weights that was to be zero.
        reached: fraction that is.
        zeros: weight -> how many of its entries are zero.
        weights: weight -> how many entries it has.
        regrown: how many entries came back, for as many others.
    """

    step: int
    progress: float
    asked: float
    reached: float
    zeros: dict[str, int]
    weights: dict[str, int]
    regrown: int = 0

    def __str__(self) -> str:
        zeros, weights = sum(self.zeros.values()), sum(self.weights.values())
        return (
            f"step {self.step}: {zeros:,} of {weights:,} weights are zero, {self.reached:.1%} ({self.asked:.1%} asked)"
        )


@dataclass
class History:
    """All events of a run, in order."""

    events: list[PruningEvent] = field(default_factory=list)

    def to_state(self) -> list[dict[str, Any]]:
        """Plain data, for a checkpoint."""
        return [sealed(asdict(event)) for event in self.events]

    @classmethod
    def from_state(cls, state: list[Mapping[str, Any]]) -> History:
        """The inverse of `to_state`.

        Raises:
            ValueError: an event is not as it was stored.
        """
        if not isinstance(state, list | tuple):
            raise PayloadError(f"Expected a list of events, got {type(state).__name__}: take another checkpoint.")
        return cls([PruningEvent(**opened(event, "an event")) for event in state])

    def to_json(self) -> str:
        """A JSON array, one object an event."""
        return json.dumps([asdict(event) for event in self.events], indent=2)
