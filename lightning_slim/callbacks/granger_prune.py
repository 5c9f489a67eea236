"""The method the package is named for, with its defaults."""

from __future__ import annotations

from lightning_slim.budgets import Budget, MACs
from lightning_slim.callbacks.prune import Prune
from lightning_slim.pruner import Compensate
from lightning_slim.schedules import Cubic, Schedule
from lightning_slim.scores import Granger
from lightning_slim.selection import Scope
from lightning_slim.skipping import Skip


class GrangerPrune(Prune):
    """Keeps the units whose present and past together best predict what their readers compute, and folds the rest in.

    Conditional Granger selection and least-squares fold come from one Gram matrix per reader, streamed while the model
    trains. The arguments are those of `Prune`; `lags` is that of the `Granger` score.
    """

    def __init__(
        self,
        budget: Budget = MACs(0.5),  # noqa: B008 (frozen)
        schedule: Schedule = Cubic(),  # noqa: B008 (frozen)
        lags: int = 1,
        scope: Scope = "local",
        round_to: int = 1,
        module: str = "",
        skip: Skip = (),
        compensate: Compensate = "least_squares",
        recalibrate_bn: bool = True,
        verify: bool = True,
        recovery_epochs: float = 1.0,
        record_every_n_steps: int = 10,
        reset_monitors: bool = True,
        seed: int = 0,
        print_report: bool = True,
    ) -> None:
        super().__init__(
            Granger(lags),
            budget=budget,
            schedule=schedule,
            scope=scope,
            round_to=round_to,
            module=module,
            skip=skip,
            compensate=compensate,
            recalibrate_bn=recalibrate_bn,
            verify=verify,
            recovery_epochs=recovery_epochs,
            record_every_n_steps=record_every_n_steps,
            reset_monitors=reset_monitors,
            seed=seed,
            print_report=print_report,
        )
