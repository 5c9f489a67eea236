"""What went, when and why: plain data that prints, saves and loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class PruningEvent:
    """One cut.

    Attributes:
        step: optimizer steps taken before it.
        progress: fraction of the run that was done.
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


@dataclass
class History:
    """All events of a run, in order."""

    events: list[PruningEvent] = field(default_factory=list)

    def to_state(self) -> list[dict[str, Any]]:
        """Plain data, for a checkpoint."""
        return [asdict(event) for event in self.events]

    @classmethod
    def from_state(cls, state: list[Mapping[str, Any]]) -> History:
        """The inverse of `to_state`."""
        return cls([PruningEvent(**event) for event in state])

    def to_json(self) -> str:
        """A JSON array, one object an event."""
        return json.dumps(self.to_state(), indent=2)
