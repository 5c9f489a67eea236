"""Steps of the optimizers, as a run takes them: how many in how many epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Pace:
    """Epochs <-> steps of the optimizers.

    Attributes:
        batches: in an epoch.
        accumulated: from which epoch on how many batches make a step, ascending.
        whole: whether the last batch of an epoch ends a step.
        ahead: steps that the run is ahead of that.

    Example:
        >>> pace = Pace(8, [(0, 4), (4, 1)])
        >>> pace.step(4.0), pace.epoch(10.0)
        (8.0, 4.25)
    """

    batches: float
    accumulated: Sequence[tuple[float, float]]
    whole: bool = True
    ahead: float = 0.0

    def epoch(self, step: float) -> float:
        """How many epochs are over when so many steps are taken."""
        left = max(step - self.ahead, 0.0)
        for first, last, factor in self._parts():
            each = self._steps(factor)
            if left < (last - first) * each:
                epochs, rest = divmod(left, each)
                return first + epochs + min(rest * factor / self.batches, 1.0)
            left -= (last - first) * each
        raise AssertionError("the last part has no end")

    def step(self, epochs: float) -> float:
        """How many steps are taken when so many epochs are over."""
        steps = self.ahead
        for first, last, factor in self._parts():
            over, rest = divmod(max(min(epochs, last) - first, 0.0), 1.0)
            steps += over * self._steps(factor) + rest * self.batches / factor
        return steps

    @property
    def steps_per_epoch(self) -> float:
        """Of the first epoch."""
        return self._steps(self.accumulated[0][1])

    def _steps(self, factor: float) -> float:
        return math.ceil(self.batches / factor) if self.whole else self.batches / factor

    def _parts(self) -> list[tuple[float, float, float]]:
        ends = [*(first for first, _ in self.accumulated[1:]), math.inf]
        return [(first, last, factor) for (first, factor), last in zip(self.accumulated, ends, strict=True)]


def pace_of(trainer: Trainer) -> Pace:
    """What a run has come to by now, and what a `GradientAccumulationScheduler` says of the rest."""
    batches = batches_per_epoch(trainer)
    if not trainer.lightning_module.automatic_optimization:
        return Pace(batches, [(0, _batches_per_step(trainer))], whole=False)
    if math.isinf(trainer.num_training_batches):
        pace = Pace(batches, [(0, _batches_per_step(trainer))], whole=False)
    else:
        pace = Pace(batches, _accumulated(trainer))
    return Pace(
        batches, pace.accumulated, pace.whole, steps_taken(trainer) - math.floor(pace.step(epochs_over(trainer)) + 1e-9)
    )


def batches_per_epoch(trainer: Trainer) -> float:
    """Batches in an epoch; of a loader without length, those between two validations, or as many as there were before,
    or in the first epoch those of the run.

    Raises:
        MisconfigurationException: none of these has an end.
    """
    for batches in (trainer.num_training_batches, trainer.val_check_batch, real_epoch(trainer)):
        if batches is not None and math.isfinite(batches):
            return batches
    if trainer.max_steps > 0:
        return trainer.max_steps * _batches_per_step(trainer)
    raise MisconfigurationException(
        "Expected epochs of a known length, got an iterable data set without one: set `limit_train_batches` or "
        "`max_steps`."
    )


def real_epoch(trainer: Trainer) -> float:
    """Batches in an epoch; of a loader without length, as many as there were before, or infinite in the first one."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if math.isfinite(trainer.num_training_batches) or trainer.current_epoch == 0:
        return trainer.num_training_batches
    return (progress.total.completed - progress.current.completed) / trainer.current_epoch


def epochs_over(trainer: Trainer) -> float:
    """Epochs that are over between two batches."""
    progress, batches = trainer.fit_loop.epoch_loop.batch_progress, batches_per_epoch(trainer)
    if math.isinf(trainer.num_training_batches):
        return progress.total.completed / batches
    epochs: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    in_epoch = progress.current.completed
    return epochs + (in_epoch / batches if in_epoch < batches else 0.0)


def steps_taken(trainer: Trainer) -> int:
    """Steps of the optimizers; batches, where a module takes them behind Lightning's back, as on raw optimizers."""
    if trainer.global_step or trainer.lightning_module.automatic_optimization:
        return int(trainer.global_step)
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)


def elapsed(trainer: Trainer) -> float | None:
    """Fraction of `max_time` that is over; None without one. The same on all ranks."""
    shares = [
        callback.time_elapsed() / callback._duration
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if "Timer" in {c.__name__ for c in type(callback).__mro__} and callback._duration
    ]
    return float(trainer.strategy.broadcast(max(shares), src=0)) if shares else None


def _accumulated(trainer: Trainer) -> list[tuple[float, float]]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if "GradientAccumulationScheduler" in {c.__name__ for c in type(callback).__mro__}:
            return sorted(callback.scheduling.items())
    return [(0, trainer.accumulate_grad_batches)]


def _batches_per_step(trainer: Trainer) -> float:
    """By now; a module that steps its optimizers itself steps each of them once a batch before it was seen."""
    if trainer.lightning_module.automatic_optimization:
        return trainer.accumulate_grad_batches
    batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
    return batches / max(steps_taken(trainer), 1) if batches else 1 / max(len(trainer.optimizers), 1)
