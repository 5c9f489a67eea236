"""Time in a run: how long it is, and the points, so many epochs apart, at which a callback acts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_slim.schedules import Schedule


@dataclass(frozen=True)
class Clock:
    """Points in time, counted from the start of a run.

    Attributes:
        every: epochs between two points, fractions allowed.
        argument: the name by which a user sets that.
        what: is done at each point.
    """

    every: float
    argument: str
    what: str

    def __post_init__(self) -> None:
        if self.every <= 0:
            raise ValueError(f"Expected `{self.argument}` above 0, got {self.every}.")

    def point(self, trainer: Trainer, batch_idx: int) -> int:
        """The last point that has come, when a batch begins."""
        epochs = trainer.current_epoch + batch_idx / trainer.num_training_batches
        return math.floor(epochs / self.every + 1e-9)

    def progress(self, trainer: Trainer, point: int) -> float:
        """Fraction of the run that is done at a point."""
        return min(point * self.every / epochs_in_run(trainer), 1.0)

    def follow(self, schedule: Schedule, trainer: Trainer) -> Schedule:
        """A schedule with all times as fractions of the trainer's run.

        Raises:
            MisconfigurationException: it does not end by the last point.
        """
        resolved, run = in_fractions(schedule, trainer), epochs_in_run(trainer)
        last = (math.ceil(run / self.every - 1e-9) - 1) * self.every / run
        if float(resolved.end) > last + 1e-9 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"Expected a schedule that ends by {last:.2f} of the run, the last point at which {self.what} "
                f"({run:g} epochs, {self.every:g} apart), got {schedule}: end it earlier, or lower `{self.argument}`."
            )
        return resolved


def epochs_in_run(trainer: Trainer) -> float:
    """Length of the run in epochs, be it given as `max_epochs` or as `max_steps`.

    Raises:
        MisconfigurationException: the run, or an epoch, has no end.
    """
    batches = trainer.num_training_batches
    if math.isinf(batches):
        raise MisconfigurationException(
            "Expected epochs of a known length, got an iterable data set without one: set `limit_train_batches`."
        )
    limits = []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        limits.append(float(trainer.max_epochs))
    if trainer.max_steps > 0:
        limits.append(trainer.max_steps / math.ceil(batches / trainer.accumulate_grad_batches))
    if not limits:
        raise MisconfigurationException(
            "Expected a run with an end, got max_epochs=-1 and max_steps=-1: a schedule is a fraction of the run."
        )
    return min(limits)


def in_fractions(schedule: Schedule, trainer: Trainer) -> Schedule:
    """A schedule with all times as fractions of the trainer's run.

    Raises:
        MisconfigurationException: its times are not within the run.
    """
    steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    try:
        return schedule.resolve(epochs_in_run(trainer), steps)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
