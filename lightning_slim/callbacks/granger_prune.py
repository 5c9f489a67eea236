"""The method the package is named for, with its defaults."""

from __future__ import annotations

from typing import Any

from lightning_slim.arguments import check_arguments
from lightning_slim.budgets import Budget, MACs
from lightning_slim.callbacks.prune import Prune
from lightning_slim.guards import Guard
from lightning_slim.schedules import Cubic, Schedule
from lightning_slim.scores import Granger, Magnitude, Score


class GrangerPrune(Prune):
    """Keeps the units that together best predict what their readers compute, and folds the rest into them.

    Conditional Granger selection and least-squares fold come from one Gram matrix per reader, streamed while the model
    trains. Each cut says how much of what the readers compute the units that stay explain, and how much of what they
    cannot know (another item's): where that is no less, or there is nothing to go by, it warns with numbers.

    Args:
        budget: the fraction of the original that may remain in the end; `Significant()` removes until nothing
            insignificant is left, `AccuracyBudget(monitor=...)` as long as a metric is kept.
        schedule: how much of the removal is done by which fraction of the run.
        lags: past steps of each unit beside its present; see `Granger`.
        fallback: scores groups in which there is no signal; None leaves them whole.
        **kwargs: all other arguments of `Prune`.
    """

    def __init__(
        self,
        budget: Budget = MACs(),  # noqa: B008 (frozen)
        schedule: Schedule = Cubic(),  # noqa: B008 (frozen)
        lags: int = 0,
        fallback: Score | None = Magnitude(),  # noqa: B008 (frozen)
        **kwargs: Any,
    ) -> None:
        check_arguments(GrangerPrune, locals())
        if "score" in kwargs:
            raise TypeError(
                f"Expected no `score` of GrangerPrune, which scores by `Granger`, got {kwargs['score']!r}: write "
                "`Prune(score=...)`."
            )
        super().__init__(score=Granger(lags), budget=budget, schedule=schedule, **kwargs)
        self.guard = Guard(fallback)
