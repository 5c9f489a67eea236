"""Progress of the run in [0, 1] -> share of the removal that is done by then, in [0, 1]."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import pairwise

from lightning_slim.arguments import check_fields

Time = float | str  # 0.3 of the run, "3 epochs" or "500 steps" of the optimizer

TIMES = ("at", "start", "end")
_COUNTED = re.compile(r"(\d+(?:\.\d+)?) (epoch|step)s?")


def check_time(time: Time, where: str = "") -> None:
    """Raises unless it is a fraction or a number of epochs or steps."""
    if isinstance(time, str) and _COUNTED.fullmatch(time) is None:
        raise ValueError(
            f'Expected a fraction of the run, "3 epochs" or "500 steps", got {time!r}{where}: '
            "write a number, a space and `epochs` or `steps`."
        )


def fraction_of(time: Time, epochs: float, steps_per_epoch: int) -> float:
    """A time as a fraction of a run.

    >>> fraction_of("2 epochs", epochs=10, steps_per_epoch=100), fraction_of("500 steps", 10, 100)
    (0.2, 0.5)
    """
    if not isinstance(time, str):
        return time
    number, unit = time.split(" ")
    return float(number) / (epochs if unit.startswith("epoch") else epochs * steps_per_epoch)


class Schedule(ABC):
    """When how much goes. 0 before it starts, 1 from its end on, never falling.

    `start` and `end` are fractions of the run (all of `max_epochs`, `max_steps` or `max_time` is 1), or `"3 epochs"`,
    or `"500 steps"` of the optimizer. Their defaults are the same everywhere: where a YAML file names another class,
    jsonargparse carries values of the same name over.
    """

    start: Time
    end: Time

    def __post_init__(self) -> None:
        check_fields(self)
        for time in (self.start, self.end):
            check_time(time, f" in {self}")
        times = [time for time in (0.0, self.start, self.end, 1.0) if not isinstance(time, str)]
        if not all(a <= b for a, b in pairwise(times)):
            raise ValueError(
                f"Expected 0 <= start <= end <= 1 (fractions of the run), got start={self.start}, end={self.end}."
            )

    @property
    def by_default(self) -> bool:
        """Whether its times are those of its class: nobody chose them."""
        own = [each for each in fields(self) if each.name in TIMES]  # type: ignore[arg-type]
        return all(getattr(self, each.name) == each.default for each in own)

    def __call__(self, progress: float) -> float:
        """Share of the removal that is due at `progress`."""
        if isinstance(self.start, str) or isinstance(self.end, str):
            raise ValueError(
                f"Expected times that are fractions of the run, got {self}: without a Trainer, call "
                "`schedule.resolve(epochs, steps_per_epoch)` first."
            )
        if progress < self.start - 1e-9:
            return 0.0
        if progress >= self.end - 1e-9:
            return 1.0
        return self.shape(max(progress - self.start, 0.0) / (self.end - self.start))

    def resolve(self, epochs: float, steps_per_epoch: int) -> Schedule:
        """The schedule with all times as fractions of a run.

        >>> Linear("2 epochs", "500 steps").resolve(epochs=10, steps_per_epoch=100)
        Linear(start=0.2, end=0.5)

        Args:
            epochs: length of the run.
            steps_per_epoch: of the optimizer.

        Raises:
            ValueError: a time is after the end of the run, or the start is after the end.
        """
        try:
            return self.at_times(lambda time: fraction_of(time, epochs, steps_per_epoch))
        except ValueError as error:
            raise ValueError(
                f"Expected times within a run of {epochs:g} epochs of {steps_per_epoch} steps, got {self}: {error}"
            ) from error

    def within(self, start: float) -> Schedule:
        """The schedule, of which all times are fractions of the run, squeezed into the part of it after `start`.

        >>> Linear(0.0, 0.5).within(0.5)
        Linear(start=0.5, end=0.75)
        """
        return self.at_times(lambda time: min(start + (1 - start) * float(time), 1.0))

    def at_times(self, change: Callable[[Time], float]) -> Schedule:
        """The schedule with each of its times changed.

        >>> Linear(0.1, 0.9).at_times(lambda time: min(time, 0.5))
        Linear(start=0.1, end=0.5)
        """
        own = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        times = {name: change(time) for name, time in own.items() if name in TIMES}
        return replace(self, **times)  # type: ignore[type-var]

    @abstractmethod
    def shape(self, t: float) -> float:
        """The course between start (`t = 0`) and end (`t = 1`)."""


@dataclass(frozen=True)
class OneShot(Schedule):
    """Everything at once.

    >>> [OneShot(at=0.5)(t) for t in (0.4, 0.5, 0.6)]
    [0.0, 1.0, 1.0]
    """

    at: Time = 0.5

    @property
    def start(self) -> Time:  # type: ignore[override]
        return self.at

    @property
    def end(self) -> Time:  # type: ignore[override]
        return self.at

    def shape(self, t: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Constant(Schedule):
    """All of it from `start` on.

    >>> [Constant(start=0.2)(t) for t in (0.1, 0.2, 0.9)]
    [0.0, 1.0, 1.0]
    """

    start: Time = 0.1

    @property
    def end(self) -> Time:  # type: ignore[override]
        return self.start

    def shape(self, t: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """The same number of units at every step.

    >>> [Linear(start=0.0, end=0.5)(t) for t in (0.0, 0.25, 0.5)]
    [0.0, 0.5, 1.0]
    """

    start: Time = 0.1
    end: Time = 0.7

    def shape(self, t: float) -> float:
        return t


@dataclass(frozen=True)
class Cubic(Schedule):
    """Automated gradual pruning, `1 - (1 - t)^3`: much at first, little at the end (Zhu and Gupta, 2017).

    >>> [Cubic(start=0.0, end=1.0)(t) for t in (0.0, 0.5, 1.0)]
    [0.0, 0.875, 1.0]
    """

    start: Time = 0.1
    end: Time = 0.7

    def shape(self, t: float) -> float:
        return 1 - (1 - t) ** 3


@dataclass(frozen=True)
class OneCycle(Schedule):
    """One-cycle pruning, `(1 + e^(b - a)) / (1 + e^(b - a t))`: little, then much, then little (Hubens et al., 2022).

    >>> [round(OneCycle(start=0.0, end=1.0)(t), 3) for t in (0.25, 0.5, 0.75)]
    [0.076, 0.731, 0.989]
    """

    start: Time = 0.1
    end: Time = 0.7
    alpha: float = 14.0
    beta: float = 6.0

    def shape(self, t: float) -> float:
        return (1 + math.exp(self.beta - self.alpha)) / (1 + math.exp(self.beta - self.alpha * t))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine, `(1 - cos(pi t)) / 2`: slow at both ends.

    >>> [round(Cosine(start=0.0, end=1.0)(t), 3) for t in (0.25, 0.5, 0.75)]
    [0.146, 0.5, 0.854]
    """

    start: Time = 0.1
    end: Time = 0.7

    def shape(self, t: float) -> float:
        return (1 - math.cos(math.pi * t)) / 2


@dataclass(frozen=True)
class Exponential(Schedule):
    """What is still to go decays exponentially, `(1 - e^(-r t)) / (1 - e^(-r))`.

    Attributes:
        rate: r, above 0; close to 0 it is a straight line.

    >>> [round(Exponential(start=0.0, end=1.0)(t), 3) for t in (0.25, 0.5, 0.75)]
    [0.718, 0.924, 0.983]
    """

    start: Time = 0.1
    end: Time = 0.7
    rate: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rate > 0:
            raise ValueError(f"Expected `rate` above 0, got {self.rate}: 5 leaves 8 % to go at half time.")

    def shape(self, t: float) -> float:
        return math.expm1(-self.rate * t) / math.expm1(-self.rate)


@dataclass(frozen=True)
class Stepwise(Schedule):
    """Equal steps, `ceil(n t) / n`: the k-th of them right after `(k - 1) / n` of the time.

    Attributes:
        steps: n.

    >>> [round(Stepwise(start=0.0, end=1.0, steps=4)(t), 3) for t in (0.0, 0.1, 0.25, 0.3, 0.9)]
    [0.0, 0.25, 0.25, 0.5, 1.0]
    """

    start: Time = 0.1
    end: Time = 0.7
    steps: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"Expected `steps` of at least 1, got {self.steps}.")

    def shape(self, t: float) -> float:
        return math.ceil(self.steps * t - 1e-9) / self.steps


@dataclass(frozen=True)
class Annealing(Schedule):
    """Feature selection with annealing, `1 - (1 - t) / (1 + mu t)`: most at first (Barbu et al., 2017).

    The paper's course of N iterations is over at N / 2, which is `end` here: its `2 e / N` is t.

    Attributes:
        mu: 0 is a straight line.

    >>> [round(Annealing(start=0.0, end=1.0, mu=10.0)(t), 3) for t in (0.1, 0.5, 0.9)]
    [0.55, 0.917, 0.99]
    """

    start: Time = 0.1
    end: Time = 0.7
    mu: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mu >= 0:
            raise ValueError(f"Expected `mu` of at least 0, got {self.mu}.")

    def shape(self, t: float) -> float:
        return 1 - (1 - t) / (1 + self.mu * t)


def in_rounds(remaining: float, rounds: int) -> list[tuple[Schedule, float]]:
    """Where each of several rounds leaves the same fraction of what the one before left (Tanaka et al., 2020).

    >>> [round(1 - 0.75 * schedule(progress), 3) for schedule, progress in in_rounds(remaining=0.25, rounds=2)]
    [0.5, 0.25]

    Args:
        remaining: what is left after the last, as a fraction.
        rounds: how many there are.

    Returns:
        For each round, a schedule and the progress in it.
    """
    if rounds == 1 or not 0 < remaining < 1:
        return [(OneShot(0.0), 0.0)]
    course = Exponential(0.0, 1.0, rate=-math.log(remaining))
    return [(course, (number + 1) / rounds) for number in range(rounds)]
