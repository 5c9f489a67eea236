"""When in a run something goes: before training, during it, or in a last phase of a lower learning rate."""

from __future__ import annotations

from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_slim.callbacks.clock import epochs_before_end, epochs_done, epochs_in_run, is_certain
from lightning_slim.callbacks.pace import batches_per_epoch, pace_of
from lightning_slim.flows import Flow
from lightning_slim.schedules import Time, check_time

When = Literal["during", "start", "end"]
HELD = "lr before fine-tuning"  # in a group of an optimizer, while this takes a step


def check_when(when: str, score: Any, flow: Flow | None, probe_batches: int, rounds: int | None) -> None:
    """Raises unless a score can be taken then, and arguments make sense."""
    if flow is not None and when != "start":
        raise ValueError(
            f'Expected `when="start"` with {score}, which scores what has not been trained yet, got {when!r}: choose '
            "that, or another score."
        )
    if probe_batches < 1 or (rounds is not None and rounds < 1):
        raise ValueError(
            f"Expected `probe_batches` and `rounds` of at least 1, got {probe_batches} and {rounds}: one round is "
            "all at once."
        )


class FineTuning:
    """The last phase of a run: every step of every optimizer is taken at a fraction of the run's base rate.

    The rate is that of a step only: before and after it, optimizers hold what schedulers say, so that these, monitors
    and checkpoints know nothing of it.

    Args:
        length: of the phase.
        factor: of the base rate: `max_lr` of a parameter group where its scheduler has one, else `initial_lr`, else
            the rate that it had when the run began.
    """

    def __init__(self, length: Time, factor: float) -> None:
        check_time(length)
        if not isinstance(length, str) and not 0 < length <= 1:
            raise ValueError(
                f"Expected `finetune` to be a fraction of the run in (0, 1], epochs or steps, got {length}."
            )
        if not factor > 0:
            raise ValueError(f"Expected `finetune_lr` above 0, a factor of the base rate, got {factor}.")
        self.length, self.factor = length, factor
        self.rates: list[list[float]] = []  # of every group of every optimizer, when the run began
        self.begins = 0.0  # at so many epochs
        self._under_way = False
        self._optimizers: list[Optimizer] = []
        self._handles: list[RemovableHandle] = []

    def attach(self, trainer: Trainer) -> float:
        """Waits for the phase; returns at how many epochs it begins.

        Raises:
            MisconfigurationException: it is longer than the run.
        """
        self.close()
        self.begins = epochs_before_end(self.length, trainer)
        if self.begins < -1e-9 and is_certain(trainer) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise MisconfigurationException(
                f"Expected `finetune` within a run of {epochs_in_run(trainer):g} epochs of "
                f"{pace_of(trainer).steps_per_epoch:g} steps, got {self.length}: shorten it, or train longer."
            )
        self.begins = self._begin(trainer)
        self._optimizers = list(trainer.optimizers)
        if not self.rates:
            self.rates = [[float(group["lr"]) for group in o.param_groups] for o in self._optimizers]
        for number, optimizer in enumerate(self._optimizers):
            rates = self.rates[number]
            self._handles.append(optimizer.register_step_pre_hook(lambda o, *_, rates=rates: self._lower(o, rates)))
            self._handles.append(optimizer.register_step_post_hook(lambda o, *_: put_back(o)))
        return self.begins

    def follow(self, trainer: Trainer, batch_idx: int) -> bool:
        """A batch begins; nothing happens unless the phase is waited for. Whether it is."""
        if self._handles and not self._under_way:
            self.begins = self._begin(trainer)
            self._under_way = epochs_done(trainer, batch_idx) > self.begins - 1e-9
        return bool(self._handles)

    def close(self) -> None:
        """Optimizers are as they were, whatever a step came to."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self._optimizers:
            put_back(optimizer)
        self._handles, self._optimizers, self._under_way = [], [], False

    @property
    def scalars(self) -> dict[str, float]:
        """The rate of the first group, while the phase is under way."""
        if not self._under_way:
            return {}
        return {"slim/finetune_lr": self._rate(self._optimizers[0].param_groups[0], self.rates[0][0])}

    def _begin(self, trainer: Trainer) -> float:
        """By what is known now; there is one batch in it at least."""
        last_batch = epochs_in_run(trainer) - 1 / batches_per_epoch(trainer)
        return max(min(epochs_before_end(self.length, trainer), last_batch), 0.0)

    def _lower(self, optimizer: Optimizer, rates: list[float]) -> None:
        if self._under_way:
            for number, group in enumerate(optimizer.param_groups):
                group.setdefault(HELD, group["lr"])
                group["lr"] = self._rate(group, rates[number] if number < len(rates) else group[HELD])

    def _rate(self, group: dict[str, Any], at_first: float) -> float:
        return self.factor * float(group.get("max_lr", group.get("initial_lr", at_first)))


def put_back(optimizer: Optimizer) -> None:
    """The rates that a scheduler knows of."""
    for group in optimizer.param_groups:
        if HELD in group:
            group["lr"] = group.pop(HELD)
