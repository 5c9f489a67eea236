"""Time in a run: how long it is, how much of it is over, and the points at which a callback acts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_slim.callbacks.pace import (
    Pace,
    batches_per_epoch,
    elapsed,
    epochs_over,
    pace_of,
    real_epoch,
    steps_taken,
)
from lightning_slim.schedules import Schedule, Time

SQUEEZED = 10  # points in a run, or in its last part, that is too short for points so many epochs apart


@dataclass(frozen=True)
class Clock:
    """Points in time, counted from the start of a run, or of its last part.

    Attributes:
        every: epochs between two points, fractions allowed. Where a schedule would not be over by the last one, they
            are a tenth of the run apart, and one is at the schedule's end.
        argument: the name by which a user sets that.
        what: is done at each point.
        origin: epochs before the first point.
    """

    every: float
    argument: str
    what: str
    origin: float = 0.0

    def __post_init__(self) -> None:
        if self.every <= 0:
            raise ValueError(f"Expected `{self.argument}` above 0, got {self.every}.")

    def check(self, schedule: Schedule, trainer: Trainer, to_its_end: bool = True) -> None:
        """Raises where a schedule that a user wrote is not over by the last point; a default one always fits.

        Args:
            schedule: of the part after the origin.
            trainer: of the run.
            to_its_end: whether it must be over by then, or just be one of the run.

        Raises:
            MisconfigurationException: the run has no end, or the schedule is not over by then.
        """
        run = epochs_in_run(trainer)
        if schedule.by_default or trainer.fast_dev_run or not is_certain(trainer):  # type: ignore[attr-defined]
            return
        part = run - self.origin
        last = self._last(trainer) / part
        if float(in_fractions(schedule, trainer, self.origin).end) > last + 1e-9 and to_its_end:
            raise MisconfigurationException(
                f"Expected a schedule that ends by {last:.2f} of the {'fine-tuning' if self.origin else 'run'}, the "
                f"last point at which {self.what} ({part:g} epochs, {self.every:g} apart), got {schedule}: end it "
                f"earlier, or lower `{self.argument}`."
            )

    def follow(self, schedule: Schedule, trainer: Trainer) -> Schedule:
        """A schedule of the part after the origin, with all times as fractions of the run, by what is known now.

        It is over when the last batch begins: nothing can be done later.
        """
        run = epochs_in_run(trainer)
        if math.isinf(run):
            return schedule
        part = run - self.origin
        fitted = in_fractions(schedule, trainer, self.origin, latest=1 - 1 / (part * batches_per_epoch(trainer)))
        return fitted.within(self.origin / run) if self.origin else fitted

    def due(self, followed: Schedule, trainer: Trainer, batch_idx: int, last: float) -> float | None:
        """The point that has come when a batch begins, in epochs; None if that was the last one already.

        Args:
            followed: what `follow` returned.
            trainer: of the run.
            batch_idx: of the batch.
            last: the point that was dealt with last.
        """
        now, run = epochs_done(trainer, batch_idx), epochs_in_run(trainer)
        if now < self.origin - 1e-9 or math.isinf(run):
            return None
        first, every, end = self.origin, self.every, float(followed.end) * run
        if end > self.origin + self._last(trainer) + 1e-9:
            first, every = end, min(self.every, (run - self.origin) / SQUEEZED)
        point = first + math.floor((now - first) / every + 1e-9) * every
        return point if point > last + every / 2 else None  # of a run whose length is estimated, points move

    def progress(self, trainer: Trainer, point: float) -> float:
        """Fraction of the run that is done at a point."""
        return min(max(point, 0.0) / epochs_in_run(trainer), 1.0)

    def _last(self, trainer: Trainer) -> float:
        """The last point at which a batch begins, after the origin."""
        last_batch = epochs_in_run(trainer) - self.origin - 1 / batches_per_epoch(trainer)
        return math.floor(last_batch / self.every + 1e-9) * self.every


def epochs_done(trainer: Trainer, batch_idx: int) -> float:
    """Epochs that are over, when a batch begins."""
    if math.isinf(trainer.num_training_batches):
        return epochs_over(trainer)
    return trainer.current_epoch + batch_idx / trainer.num_training_batches


def epochs_with_this(trainer: Trainer) -> float:
    """Epochs that are over, when the present one is."""
    return epochs_over(trainer) if math.isinf(trainer.num_training_batches) else trainer.current_epoch + 1.0


def epochs_in_run(trainer: Trainer) -> float:
    """Length of the run in epochs, be it given as `max_epochs`, as `max_steps` or as `max_time`, by what is known now.

    Infinite as long as only a time is given, and none has passed.

    Raises:
        MisconfigurationException: the run, or an epoch, has no end.
    """
    batches, limits = batches_per_epoch(trainer), []
    if not has_end(trainer):
        raise MisconfigurationException(
            "Expected a run with an end, got max_epochs=-1 and max_steps=-1: a schedule is a fraction of the run."
        )
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        # SWA adds an epoch to measure batch norms in, in which nothing trains.
        trained = [
            getattr(callback, "_max_epochs", trainer.max_epochs)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if "StochasticWeightAveraging" in {c.__name__ for c in type(callback).__mro__}
        ]
        limits.append(min([trainer.max_epochs, *trained]) * real_epoch(trainer) / batches)
    if trainer.max_steps > 0:
        limits.append(pace_of(trainer).epoch(trainer.max_steps))
    if (share := elapsed(trainer)) is not None:
        limits.append(epochs_over(trainer) / share if share > 0 and epochs_over(trainer) > 0 else math.inf)
    return min(limits)


def is_certain(trainer: Trainer) -> bool:
    """Whether the length of the run and its steps are known before it begins."""
    automatic = trainer.lightning_module.automatic_optimization
    return automatic and elapsed(trainer) is None and math.isfinite(trainer.num_training_batches)


def has_end(trainer: Trainer) -> bool:
    """Whether the run ends by itself."""
    epochs = trainer.max_epochs is not None and trainer.max_epochs > 0
    return epochs or trainer.max_steps > 0 or elapsed(trainer) is not None


def is_over(trainer: Trainer) -> bool:
    """Whether the run ends with this epoch, when that is over."""
    steps = 0 < trainer.max_steps <= trainer.global_step
    return trainer.should_stop or steps or epochs_with_this(trainer) >= epochs_in_run(trainer) - 1e-9


def steps_left(trainer: Trainer) -> float:
    """Steps that the optimizers will take until the run is over, by what is known now."""
    run = epochs_in_run(trainer)
    return run if math.isinf(run) else pace_of(trainer).step(run) - steps_taken(trainer)


def in_fractions(schedule: Schedule, trainer: Trainer, origin: float = 0.0, latest: float | None = None) -> Schedule:
    """A schedule with all times as fractions of the trainer's run, or of what is left of it after some epochs.

    Args:
        schedule: of the run, or of what is left of it.
        trainer: of the run.
        origin: so many epochs.
        latest: later times are taken for this one; None refuses times that are not within the run.

    Raises:
        MisconfigurationException: its times are not within the run.
    """
    run, pace = epochs_in_run(trainer), pace_of(trainer)

    def fraction(time: Time) -> float:
        if not isinstance(time, str):
            return time
        return (epochs_after(time, pace, origin) - origin) / (run - origin)

    if latest is not None:
        start = min(fraction(schedule.start), latest)
        return schedule.at_times(lambda time: max(min(fraction(time), latest), start))
    try:
        return schedule.at_times(fraction)
    except ValueError as error:
        raise MisconfigurationException(
            f"Expected times within a run of {run - origin:g} epochs of {pace.steps_per_epoch:g} steps, got "
            f"{schedule}: {error}"
        ) from error


def epochs_after(time: str, pace: Pace, origin: float) -> float:
    """Epochs that are over so many epochs or steps after the origin."""
    number, unit = time.split(" ")
    return origin + float(number) if unit.startswith("epoch") else pace.epoch(pace.step(origin) + float(number))


def epochs_before_end(length: Time, trainer: Trainer) -> float:
    """Epochs that are over when so much of the run is left; below 0 if that is more than all of it."""
    run, pace = epochs_in_run(trainer), pace_of(trainer)
    if math.isinf(run):
        return run
    if not isinstance(length, str):
        return (1 - length) * run
    number, unit = length.split(" ")
    if unit.startswith("epoch"):
        return run - float(number)
    step = pace.step(run) - float(number)
    return pace.epoch(step) if step >= 0 else step
