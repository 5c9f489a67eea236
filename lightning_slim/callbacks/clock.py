"""Time in a run: how long it is, and the points, so many epochs apart, at which a callback acts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from lightning_slim.schedules import Schedule


@dataclass(frozen=True)
class Clock:
    """Points in time, counted from the start of a run, or of its last part.

    Attributes:
        every: epochs between two points, fractions allowed.
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

    def point(self, trainer: Trainer, batch_idx: int) -> int:
        """The last point that has come, when a batch begins; negative before the first."""
        return math.floor((epochs_done(trainer, batch_idx) - self.origin) / self.every + 1e-9)

    def progress(self, trainer: Trainer, point: int) -> float:
        """Fraction of the run that is done at a point."""
        return min((self.origin + point * self.every) / epochs_in_run(trainer), 1.0)

    def follow(self, schedule: Schedule, trainer: Trainer, to_its_end: bool = True) -> Schedule:
        """A schedule with all times as fractions of the trainer's run; it was one of the part after the origin.

        Args:
            schedule: of the part after the origin.
            trainer: of the run.
            to_its_end: whether it must end by the last point.

        Raises:
            MisconfigurationException: it does not end by the last point.
        """
        resolved, run = in_fractions(schedule, trainer, self.origin), epochs_in_run(trainer)
        part = run - self.origin
        last = (math.ceil(part / self.every - 1e-9) - 1) * self.every / part
        late = to_its_end and float(resolved.end) > last + 1e-9
        if late and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"Expected a schedule that ends by {last:.2f} of the {'fine-tuning' if self.origin else 'run'}, the "
                f"last point at which {self.what} ({part:g} epochs, {self.every:g} apart), got {schedule}: end it "
                f"earlier, or lower `{self.argument}`."
            )
        return resolved.within(self.origin / run) if self.origin else resolved


def epochs_done(trainer: Trainer, batch_idx: int) -> float:
    """Epochs that are over, when a batch begins."""
    return trainer.current_epoch + batch_idx / trainer.num_training_batches


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
        # SWA adds an epoch to measure batch norms in, in which nothing trains.
        trained = [
            getattr(callback, "_max_epochs", trainer.max_epochs)
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if "StochasticWeightAveraging" in {c.__name__ for c in type(callback).__mro__}
        ]
        limits.append(float(min([trainer.max_epochs, *trained])))
    if trainer.max_steps > 0:
        limits.append(trainer.max_steps / math.ceil(batches / trainer.accumulate_grad_batches))
    if not limits:
        raise MisconfigurationException(
            "Expected a run with an end, got max_epochs=-1 and max_steps=-1: a schedule is a fraction of the run."
        )
    return min(limits)


def steps_per_epoch(trainer: Trainer) -> int:
    """Steps of the optimizer in an epoch."""
    return math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)


def in_fractions(schedule: Schedule, trainer: Trainer, origin: float = 0.0) -> Schedule:
    """A schedule with all times as fractions of the trainer's run, or of what is left of it after some epochs.

    Raises:
        MisconfigurationException: its times are not within the run.
    """
    try:
        return schedule.resolve(epochs_in_run(trainer) - origin, steps_per_epoch(trainer))
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
