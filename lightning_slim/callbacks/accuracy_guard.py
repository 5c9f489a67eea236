"""Hears the metric that a search goes by, and holds the run as it was before the step under trial."""

from __future__ import annotations

from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_slim.accuracy import AccuracyBudget, AccuracySearch, Verdict
from lightning_slim.callbacks.base import metrics_of
from lightning_slim.payload import opened, sealed
from lightning_slim.pruner import NoEffectWarning


class AccuracyGuard:
    """What a pruning callback needs for a search: values of a metric, and a way back.

    Args:
        budget: what is asked for.
    """

    def __init__(self, budget: AccuracyBudget) -> None:
        self.monitor = budget.monitor
        self.search = AccuracySearch(budget)
        self.snapshot: dict[str, Any] | None = None  # of the last good state, while a step is under trial
        self.metrics: dict[str, float] = {}  # of the state that a run was rolled back to, until there are new ones
        self._logged: dict[str, float] = {}  # all metrics, when this one was read last
        self._before: dict[str, float] = {}  # of the state before the step under trial
        self._validated = False  # whether there was a validation in this epoch
        self._source: Literal["validation", "training"] | None = None  # of the metric; Lightning keeps old values

    def after_validation(self, trainer: Trainer) -> None:
        """Hears the metrics of a validation."""
        self._validated = True
        self._hear(trainer, "validation")

    def after_epoch(self, trainer: Trainer) -> None:
        """Hears the metrics of an epoch of training.

        Raises:
            MisconfigurationException: neither that nor the validation in it logged the monitor, or there is none.
        """
        self._hear(trainer, "training")
        logged = trainer.callback_metrics
        if (self._validated or not trainer.enable_validation) and self.monitor not in logged:
            raise MisconfigurationException(
                f"Expected the module to log {self.monitor!r}, which `AccuracyBudget` monitors, got "
                f"{', '.join(sorted(map(repr, logged))) or 'no metric at all'}: name one of those, or log it in "
                "`validation_step`."
            )
        self._validated = False

    def free(self, epochs_left: float) -> bool:
        """Whether the next step may be taken: no other is under trial, and there is time for this one to recover."""
        search = self.search
        idle = search.trying is None and search.reference is not None and not search.over
        return idle and epochs_left + 1e-9 >= search.budget.patience

    def begin(self, before: dict[str, Any], reached: float | None, epoch: float) -> None:
        """A step was taken.

        Args:
            before: the run as it was then.
            reached: fraction of the original that the step leaves; None if nothing could go.
            epoch: now.
        """
        if reached is None:
            self.search.over = True
        else:
            self.snapshot, self._before = before, self.metrics or self._logged
            self.search.begin(reached, epoch)

    def decide(self, trainer: Trainer, epoch: float, last: bool) -> tuple[Verdict, dict[str, Any]]:
        """What becomes of the step under trial, and the run as it was before it."""
        if self.snapshot is None:
            return "wait", {}
        verdict = self.search.verdict(epoch, last)
        before = self.snapshot
        if verdict != "wait":
            self.search.end(verdict, epoch)
            self.snapshot = None
        if verdict == "roll back":
            self.metrics = self._before
        return verdict, before

    def forget_trial(self) -> None:
        """Another fit: the step under trial, if there is one, is neither kept nor counts as failed."""
        self.search.trying, self.snapshot, self._source = None, None, None

    def _hear(self, trainer: Trainer, source: Literal["validation", "training"]) -> None:
        """A value counts when what logs it is over; that is where it came from first."""
        logged = trainer.callback_metrics
        if self.monitor in logged and self._source in (None, source):
            self._source, self.metrics, self._logged = source, {}, metrics_of(trainer)
            self.search.observe(float(trainer.strategy.broadcast(float(logged[self.monitor]), src=0)))

    def warn_if_idle(self) -> None:
        """Says so where a run tried nothing."""
        if not self.search.trials:
            rank_zero_warn(
                "No step was tried: the run ended before the schedule began, before the metric was logged, or before "
                "anything was recorded.",
                category=NoEffectWarning,
            )

    def state_dict(self) -> dict[str, Any]:
        """The search, and the way back."""
        state = {
            "search": self.search.state_dict(),
            "metrics": dict(self.metrics),
            "logged": dict(self._logged),
            "before": dict(self._before),
            "validated": self._validated,
            "source": self._source,
        }
        return {**sealed(state), "snapshot": self.snapshot}  # what is in that has seals of its own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        snapshot = state["snapshot"]
        state = opened({key: value for key, value in state.items() if key != "snapshot"}, "a search")
        self.search.load_state_dict(state["search"])
        self.snapshot, self.metrics, self._before = snapshot, dict(state["metrics"]), dict(state["before"])
        self._logged, self._source, self._validated = dict(state["logged"]), state["source"], state["validated"]
