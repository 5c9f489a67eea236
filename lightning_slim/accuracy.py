"""As much as costs at most so much accuracy: the budget that names no ratio, and the search for what it comes to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from lightning_slim.arguments import check_fields
from lightning_slim.budgets import Budget, MACs
from lightning_slim.costs import Costs, Widths
from lightning_slim.monitor import Mode, Monitor

Verdict = Literal["wait", "keep", "roll back"]


@dataclass(frozen=True)
class AccuracyBudget(Budget):
    """As little may remain as keeps a metric within `max_drop` of its best.

    Pruning goes step by step. After each step the model has `patience` epochs to recover; as soon as the metric is
    within `max_drop` of the best that the run has seen before, the step is kept and the next one taken. If it is not,
    the run is rolled back to what it was before the step, and a smaller step is tried, or pruning is over.

    Attributes:
        monitor: a metric that the module logs.
        max_drop: by how much it may be worse than its best, in its own unit: 0.01 of an accuracy is one point.
        mode: whether a metric is good when it is large (`"max"`) or small (`"min"`).
        of: what the steps are counted in; its own figure is the least that may remain.
        step: share of what is left that goes with each step.
        patience: epochs to recover after a step.
        on_failure: what comes after a step that was rolled back: `"halve"`: half of that step; `"stop"`: no other.
        min_step: pruning is over when steps would get smaller than this.
        reference: instead of the best that the run has seen, a value of the metric, such as that of a dense model that
            was trained before.

    Example:
        >>> search = AccuracySearch(AccuracyBudget("val_acc", max_drop=0.01, step=0.5))
        >>> search.observe(0.98)
        >>> search.begin(reached=0.5, epoch=1)
        >>> search.observe(0.96)
        >>> search.verdict(epoch=2), search.verdict(epoch=3)
        ('wait', 'roll back')
        >>> search.end("roll back", epoch=3)
        >>> search.left, search.target
        (1.0, 0.75)
    """

    monitor: str
    max_drop: float = 0.01
    mode: Mode = "max"
    of: Budget = MACs(0.05)  # noqa: RUF009 (frozen)
    step: float = 0.2
    patience: int = 2
    on_failure: Literal["halve", "stop"] = "halve"
    min_step: float = 0.02
    reference: float | None = None
    open_ended: ClassVar[bool] = True
    monitored: ClassVar[bool] = True

    @property
    def fraction(self) -> float | None:  # type: ignore[override]
        """The least that may remain; None where that is a figure."""
        return self.of.fraction

    def count(self, costs: Costs, widths: Widths) -> float:
        return self.of.count(costs, widths)

    def __post_init__(self) -> None:
        check_fields(self)
        if not (self.max_drop >= 0 and math.isfinite(self.max_drop)):
            raise ValueError(
                f"Expected a finite `max_drop` of at least 0, in the unit of {self.monitor!r}, got {self.max_drop}."
            )
        if not 0 < self.min_step <= self.step < 1:
            raise ValueError(
                f"Expected 0 < `min_step` <= `step` < 1, shares of what is left, got {self.min_step} and {self.step}."
            )
        if self.patience < 1:
            raise ValueError(f"Expected `patience` of at least 1 epoch, got {self.patience}.")
        if self.of.open_ended:
            raise ValueError(f"Expected a budget that counts in `of`, such as `MACs(0.05)`, got {self.of}.")


@dataclass(frozen=True)
class Trial:
    """One step of the search.

    Attributes:
        epoch: when it was decided on.
        left: fraction of the original that remained after the step.
        value: of the metric then; NaN if there was none.
        reference: what it was compared with.
        kept: whether it was; else the run was rolled back.
    """

    epoch: float
    left: float
    value: float
    reference: float
    kept: bool

    def __str__(self) -> str:
        what = "kept" if self.kept else "rolled back"
        return f"{self.left:.1%} left, {self.value:.4g} against {self.reference:.4g}: {what}"


class AccuracySearch:
    """Which steps are tried, and which are kept; no model and no Trainer.

    Args:
        budget: what is asked for.
    """

    def __init__(self, budget: AccuracyBudget) -> None:
        self.budget = budget
        self.left = 1.0  # of the original, in the last good state
        self.trials: list[Trial] = []
        self.over = False
        self.trying: float | None = None  # what the step under trial leaves; None: there is none
        self._step = budget.step
        self._best: float | None = None
        self._value: float | None = None  # of the step under trial, once it was measured
        self._since = 0.0  # when that step was taken
        self._failed: list[float] = []  # what steps from the last good state left that were rolled back

    @property
    def reference(self) -> float | None:
        """What the metric is compared with; None before there is a value."""
        return self._best if self.budget.reference is None else self.budget.reference

    @property
    def target(self) -> float:
        """Fraction of the original that the next step should leave."""
        return self.left * (1 - self._step)

    def observe(self, value: float) -> None:
        """A new value of the metric."""
        if self.trying is None:
            self._remember(value)
        self._value = value

    def begin(self, reached: float, epoch: float) -> None:
        """A step was taken, which leaves `reached` of the original."""
        self.trying, self._value, self._since = reached, None, epoch

    def verdict(self, epoch: float, last: bool = False) -> Verdict:
        """What becomes of the step under trial: there is time until it has had its `patience`, or the run is over."""
        if self.repeats:
            return "roll back"
        if self._value is not None and self._holds(self._value):
            return "keep"
        measured = self._value is not None and epoch - self._since >= self.budget.patience - 1e-9
        return "roll back" if last or measured else "wait"

    @property
    def repeats(self) -> bool:
        """Whether the step under trial leaves what one left that failed: rounded, half of it may be as much."""
        return self.trying is not None and any(abs(self.trying - left) < 1e-9 for left in self._failed)

    def end(self, verdict: Verdict, epoch: float) -> None:
        """The step under trial is kept, or was rolled back."""
        assert self.trying is not None
        assert self.reference is not None
        kept = verdict == "keep"
        value = math.nan if self._value is None else self._value
        if not self.repeats:
            self.trials.append(Trial(epoch, self.trying, value, self.reference, kept))
        if kept:
            self.left, self._failed = self.trying, []
            self._remember(value)
        else:
            self._failed.append(self.trying)
            self._step /= 2
            self.over = self.budget.on_failure == "stop" or self._step < self.budget.min_step
        self.trying = None

    def _remember(self, value: float) -> None:
        """The best value of a good state."""
        if self._best is None or self._turned(value) > self._turned(self._best):
            self._best = value

    def _holds(self, value: float) -> bool:
        """Whether a value is within the budget; not if it is NaN."""
        assert self.reference is not None
        return self._turned(value) >= self._turned(self.reference) - self.budget.max_drop - 1e-12

    def _turned(self, value: float) -> float:
        """So that more is better."""
        return Monitor(self.budget.monitor, self.budget.mode).turned(value)

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain data."""
        own = {name: value for name, value in vars(self).items() if name not in ("budget", "trials")}
        return {**own, "trials": [asdict(trial) for trial in self.trials]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        vars(self).update({**state, "trials": [Trial(**trial) for trial in state["trials"]]})
