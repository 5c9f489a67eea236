"""Progress of the run in [0, 1] -> share of the removal that is done by then, in [0, 1]."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


class Schedule(ABC):
    """When how much goes. 0 before it starts, 1 from its end on, never falling.

    `start` and `end` are fractions of the run: all of `max_epochs` or `max_steps` is 1. Their defaults are
    the same everywhere: where a YAML file names another class, jsonargparse carries values of the same name over.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"Expected 0 <= start <= end <= 1 (fractions of the run), got start={self.start}, end={self.end}."
            )

    def __call__(self, progress: float) -> float:
        """Share of the removal that is due at `progress`."""
        if progress < self.start:
            return 0.0
        if progress >= self.end:
            return 1.0
        return self.shape((progress - self.start) / (self.end - self.start))

    @abstractmethod
    def shape(self, t: float) -> float:
        """The course between start (`t = 0`) and end (`t = 1`)."""


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at once.

    >>> [OneShot(at=0.5)(t) for t in (0.4, 0.5, 0.6)]
    [0.0, 1.0, 1.0]
    """

    at: float = 0.5

    @property
    def start(self) -> float:  # type: ignore[override]
        return self.at

    @property
    def end(self) -> float:  # type: ignore[override]
        return self.at

    def shape(self, t: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """The same number of units at every step.

    >>> [Linear(start=0.0, end=0.5)(t) for t in (0.0, 0.25, 0.5)]
    [0.0, 0.5, 1.0]
    """

    start: float = 0.1
    end: float = 0.7

    def shape(self, t: float) -> float:
        return t


@dataclass(frozen=True)
class Cubic(Schedule):
    """Automated gradual pruning, `1 - (1 - t)^3`: much at first, little at the end (Zhu and Gupta, 2017).

    >>> [Cubic(start=0.0, end=1.0)(t) for t in (0.0, 0.5, 1.0)]
    [0.0, 0.875, 1.0]
    """

    start: float = 0.1
    end: float = 0.7

    def shape(self, t: float) -> float:
        return 1 - (1 - t) ** 3


@dataclass(frozen=True)
class OneCycle(Schedule):
    """One-cycle pruning, `(1 + e^(b - a)) / (1 + e^(b - a t))`: little, then much, then little (Hubens et al., 2022).

    >>> [round(OneCycle(start=0.0, end=1.0)(t), 3) for t in (0.25, 0.5, 0.75)]
    [0.076, 0.731, 0.989]
    """

    start: float = 0.1
    end: float = 0.7
    alpha: float = 14.0
    beta: float = 6.0

    def shape(self, t: float) -> float:
        return (1 + math.exp(self.beta - self.alpha)) / (1 + math.exp(self.beta - self.alpha * t))
