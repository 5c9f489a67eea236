"""What a run is told of pruning: lines in its log, scalars of its loggers, warnings, the report."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_slim.history import PruningEvent
from lightning_slim.pruner import NoEffectWarning, Pruner
from lightning_slim.report import Report, batch_sizes, report, size_in_words
from lightning_slim.surgery import dropped, grow_back, resize_to
from lightning_slim.weight_norm import settle


@contextmanager
def warned_of_files() -> Iterator[None]:
    """A run that is over does not fail because a file cannot be written."""
    try:
        yield
    except OSError as error:
        rank_zero_warn(f"The report could not be saved: {error}")


def announce(pruner: Pruner) -> None:
    """What can be removed, and what not."""
    costs = pruner.costs
    groups = ", ".join(f"{name} ({units})" for name, units in costs.original.items())
    rank_zero_info(f"slim: {costs.parameters:,} params, {costs.macs(costs.original):,} MACs; can shrink: {groups}")
    if pruner.selection.round_to == "auto":
        steps = ", ".join(f"{name} {step}" for name, step in costs.steps.items())
        rank_zero_info(f"slim: widths will be multiples of what suits this machine: {steps}")
    if timed := pruner.timed_calls()[0]:
        took = costs.milliseconds(costs.original)
        rank_zero_info(f"slim: latency before any cut: {took:.3f} ms ({size_in_words(batch_sizes(timed))})")
    for layer, reason in pruner.left_whole.items():
        rank_zero_info(f"slim: {layer} stays whole: {reason}")


def announce_cut(pruner: Pruner, trainer: Trainer, event: PruningEvent) -> None:
    """What went, and what the selection found."""
    rank_zero_info(f"slim: epoch {trainer.current_epoch}, {event}")
    if told := _calibration(pruner):
        rank_zero_info(
            f"slim: what stays explains {told['slim/explained']:.1%} of what readers of the units compute, and "
            f"{told['slim/by_chance']:.1%} of what it cannot know; single tests are inflated "
            f"{told['slim/inflation']:.1f} times"
        )


def log(trainer: Trainer, scalars: dict[str, float]) -> None:
    """Scalars at once, and not at the end of the epoch."""
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step=trainer.global_step)


def scalars_of(pruner: Pruner) -> dict[str, float]:
    """What is left, of what was asked for."""
    costs, widths, events = pruner.costs, pruner.widths, pruner.history.events
    params, macs = costs.params(widths), costs.macs(widths)
    return {
        "slim/params": params,
        "slim/macs": macs,
        "slim/params_left": params / costs.parameters,
        "slim/macs_left": macs / costs.whole.macs(costs.original),
        "slim/asked": events[-1].asked if events else 1.0,
        "slim/reached": pruner.budget.remaining(costs, widths),
        **{f"slim/units/{name}": units for name, units in widths.items()},
        **_calibration(pruner),
    }


def warn_if_short(pruner: Pruner) -> None:
    """Says so where more is left than was asked for."""
    left, target = pruner.budget.remaining(pruner.costs, pruner.widths), pruner.budget.target(pruner.costs)
    if left > target + 1e-9 and not pruner.open_ended:
        why = "the run stopped before the schedule ended" if pruner.recorder.ready else "nothing was recorded"
        rank_zero_warn(
            f"Pruning is not finished: {left:.1%} remains, {target:.1%} was asked for. Perhaps {why}.",
            category=NoEffectWarning,
        )


def dense_beside_slim(
    pruner: Pruner, slim_metrics: dict[str, float], dense_metrics: dict[str, float] | None = None
) -> Report:
    """Measures a model as it is now beside the model as it was."""
    slim = pruner.model
    settle(slim)  # a weight with a graph behind it cannot be copied
    dense = copy.deepcopy(slim)
    for path in dropped(dense):
        grow_back(dense, path)
    resize_to(dense, pruner.original_shapes)
    return report(
        dense,
        slim,
        networks=pruner.original_calls(),
        slim_networks=pruner.current_calls(),
        timed=pruner.timed_calls(),
        dense_metrics=dense_metrics,
        slim_metrics=slim_metrics,
        left_whole=pruner.left_whole,
    )


def _calibration(pruner: Pruner) -> dict[str, float]:
    """What the last selection found, beside what it finds where there is nothing: means over groups."""
    events = pruner.history.events
    told = list(events[-1].calibration.values()) if events else []
    names = ("explained", "by_chance", "inflation") if told else ()
    return {f"slim/{name}": sum(of_group[name] for of_group in told) / len(told) for name in names}
