"""Record -> score -> select -> cut -> migrate. Reads like a learning-rate scheduler, and needs no Trainer."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_slim.arguments import check_arguments
from lightning_slim.budgets import Budget, Latency, MACs, Significant
from lightning_slim.candidates import Granularity, Wish, find_candidates
from lightning_slim.checkpoint import remember_cut
from lightning_slim.costs import Costs
from lightning_slim.evidence import evidence_of
from lightning_slim.folding import Compensate, fold_iterates, fold_plan
from lightning_slim.guards import Guard, no_signal, significant
from lightning_slim.history import History, PruningEvent
from lightning_slim.latency import LEVELS, best_steps, check_device, measure, steps_of_table
from lightning_slim.patches import with_patches
from lightning_slim.payload import opened, sealed
from lightning_slim.ranks import Agree, Gather, alone, only, together
from lightning_slim.recording import Effect, Recorder
from lightning_slim.schedules import Cubic, Schedule
from lightning_slim.scores import Combined, Evidence, Score, UnitScores
from lightning_slim.selection import Selection, comparable, plan_for, steepness
from lightning_slim.skipping import Skip, check_module, check_skip
from lightning_slim.surgery import (
    Example,
    StructureChange,
    UnknownState,
    check_states,
    dropped,
    find_work,
    forget_blocks,
    migrate,
    remove_units,
)
from lightning_slim.surgery.example import (
    Calls,
    Shapes,
    as_example,
    resized,
    shapes_of,
    step_of,
    untouched,
    workable_calls,
)
from lightning_slim.surgery.layers.norm import norm_scales
from lightning_slim.surgery.verify import compare
from lightning_slim.transaction import all_or_nothing
from lightning_slim.units import (
    MIN_UNITS,
    Plan,
    UnitGroup,
    check_fit,
    from_state,
    most_important_first,
    named_tensors,
    renumber,
    to_state,
)

NOTHING = "It has no layers that can be cut, and no residual blocks"


class NoEffectWarning(UserWarning):
    """What was asked for changes nothing: nothing to remove, no signal, or no past to look back on."""


def level_of_significance(score: Score, budget: Budget | None, protect_significant: float | None) -> float | None:
    """The share of significant units that may be so by chance; None if significance does not matter."""
    if protect_significant is not None and not 0 < protect_significant < 1:
        raise ValueError(f"Expected `protect_significant` between 0 and 1, got {protect_significant}: 0.05 is common.")
    alpha = budget.alpha if isinstance(budget, Significant) else protect_significant
    if alpha is not None and not score.tests:
        raise ValueError(
            f"Expected a score with p-values to find significant units, got {score}: choose `Granger()`, "
            "`Screening()` or `RandomGates()`."
        )
    return alpha


class Pruner:
    """Removes units from a model while it trains.

    Args:
        model: the module whose tensors the optimizer holds.
        score: says how important each unit is.
        budget: the fraction of the original that may remain in the end.
        schedule: how much of the removal is done by when.
        selection: which units go, given their importance.
        module: dotted name of the only part that may be cut; all of it if empty.
        skip: what stays whole: names of layers, patterns such as `"encoder.*"`, or module types (or their names).
        compensate: what becomes of the removed units: `"least_squares"` folds them into those that stay, `"exact"`
            folds convolutions tap by tap (see `Prune`), `"mean"` puts their mean in their place, `"none"` drops them.
        verify: whether to try every group alone before the first cut, and to compare each cut with the network in which
            nothing reads the removed units; what differs is left whole. A cut right after a resume comes before there
            is a call to compare with, and goes by the trial that began the run.
        seed: of scores that draw.
        granularity: what goes: `"units"` of layers, whole residual blocks (`"layers"`), or both under one budget.
        guard: what happens to groups in which a score that calibrates itself (`Granger`) finds no signal; None takes
            every score as it comes.
        protect_significant: units that are significant stay whatever the budget, with at most this share of them
            being so by chance; None protects none.
        open_ended: whether pruning may end before the budget is reached.
        unknown: what becomes of an optimizer's state of a shape that is not understood: `"raise"`, or `"reset"` it.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> pruner = Pruner(net, Magnitude(), Units(0.5), OneShot(at=0.5), compensate="none")
        >>> pruner.prepare(torch.randn(2, 4))
        >>> print(pruner.plan(progress=0.5))
        0: keeps 4 of 8 units
        >>> print(pruner.step(progress=0.5, optimizers=[optimizer]))
        step 0: 4 units removed, 50.0% left (50.0% asked), 30 params, 24 MACs
    """

    def __init__(
        self,
        model: nn.Module,
        score: Score,
        budget: Budget | None = None,
        schedule: Schedule | None = None,
        *,
        selection: Selection | None = None,
        module: str = "",
        skip: Skip = (),
        compensate: Compensate = "least_squares",
        verify: bool = True,
        seed: int = 0,
        granularity: Granularity = "units",
        guard: Guard | None = None,
        protect_significant: float | None = None,
        open_ended: bool = False,
        unknown: UnknownState = "raise",
    ) -> None:
        check_arguments(Pruner, locals())
        if budget is not None and budget.monitored:
            raise ValueError(
                f"Expected a budget that says how much may remain, got {budget}: it goes by a metric, which only the "
                "callback `Prune` hears."
            )
        self.alpha = level_of_significance(score, budget, protect_significant)
        self.model = model
        self.score, self.guard = score, guard
        fallback = guard.fallback if guard is not None else None
        self.witnessed = score if fallback is None else Combined([score, fallback])  # all that must be recorded for
        self.budget = budget or MACs(0.5)
        self.open_ended = open_ended or self.budget.open_ended
        self.schedule = schedule or Cubic()
        self.selection = selection or Selection()
        self.module = module
        self.skip = tuple(skip)
        self.compensate = compensate
        self.verify = verify
        self.seed = seed
        self.granularity = granularity
        self.unknown = unknown
        self.history = History()
        self.last_change: StructureChange | None = None
        self.left_whole: dict[str, str] = {}
        self.groups: list[UnitGroup] = []
        self.given_up: set[str] = set()  # groups that turned out to be impossible to cut
        self.networks: set[str] = set()  # names of the networks that the groups were found in
        self.calls = Calls()  # the networks, each with one call
        self._timed: dict[str, tuple[Example, Shapes]] = {}  # for latency: calls of a whole batch, of what widths
        self.unreached: Sequence[str] = ()  # layers that no call reached
        self._inputs: dict[str, Shapes] = {}  # of the tensors in these calls, before anything was cut
        self._teachers: dict[str, float] = {}  # frozen networks that are not shipped -> a checksum of their weights
        self.agree: Agree = alone  # several processes: what rank 0 says
        self.gather: Gather = only  # several processes: what every rank says
        self.average: Callable[[Tensor], Tensor] = alone  # several processes: the mean over ranks
        self.leads = True  # whether this one measures for all
        self._original_index: dict[str, Tensor] = {}  # group -> original numbers of the units that are there now
        self._original_shapes: dict[str, list[int]] = {}
        self._shapes: dict[str, list[int]] = {}  # as this pruner left them
        self._without_signal: set[str] = set()  # groups that a warning was given for
        self._warned_of_short_series = False
        self._gone: set[str] = set()  # blocks that this pruner took out
        self._costs: Costs | None = None
        self._recorder: Recorder | None = None
        check_skip(model, self.skip)
        check_module(model, module)

    # --- look ---

    @torch.inference_mode(False)
    def prepare(self, example_inputs: Any = None, networks: Mapping[str, Any] | None = None) -> None:
        """Finds what can be removed, and checks that the budget can be reached.

        Args:
            example_inputs: one call of the model: a tensor, a tuple of arguments or a dict of keyword arguments.
            networks: instead, one call for each of several submodules: dotted name -> example inputs.

        Raises:
            ValueError: nothing can be removed, or not enough.
        """
        with all_or_nothing(self.model):
            self._prepare({"": example_inputs} if networks is None else networks)

    def _prepare(self, networks: Mapping[str, Any]) -> None:
        calls = workable_calls(self.model, networks)
        wish = Wish(self.witnessed, self.granularity, self.module, self.skip, self.verify)
        found = find_candidates(self.model, calls, wish, self._decide)
        groups, teachers = found.groups, found.teachers
        self.left_whole, self.unreached = found.left_whole, found.unreached
        if not groups:
            reasons = "; ".join(f"{layer}: {reason}" for layer, reason in self.left_whole.items())
            raise ValueError(f"Nothing can be removed from {type(self.model).__name__}. {reasons or NOTHING}.")
        if "scales" in self.score.needs and not any(norm_scales(self.model, group).shape[1] for group in groups):
            raise ValueError(
                f"Expected units that pass a normalisation with a scale, got none in {type(self.model).__name__}, so "
                f"{type(self.score).__name__} has nothing to go by: choose another score, such as `Magnitude()`."
            )
        if self.compensate == "exact":
            groups = [with_patches(self.model, group) for group in groups]
        work = together(self.gather, lambda: find_work(self.model, calls, teachers))
        costs = Costs.of(self.model, groups, work, teachers, found.products)
        costs = self.selection.bounded(costs, self.model, groups)
        shipped = {name: as_example(call) for name, call in networks.items() if name not in teachers}
        costs = self._measured(costs, groups, Calls(shipped, calls.step))
        self._check_reachable(costs)
        self.calls, self.networks, self.groups, self._costs = calls, set(calls), groups, costs
        self._original_index = {group.name: torch.arange(group.size) for group in groups}
        self._original_shapes = self._shapes = _shapes(self.model, groups)
        self._recorder = self._new_recorder()
        self._teachers = {name: _checksum(self.model.get_submodule(name)) for name in teachers}
        self._inputs = {name: shapes_of(call) for name, call in self.current_calls().items()}
        self._keep_timed(shipped)

    def meet(self, networks: Mapping[str, Any]) -> None:
        """Examples of networks that were prepared before: a checkpoint knows the groups, but holds no training data."""
        known = {name: call for name, call in networks.items() if name in self.networks}
        self.calls = workable_calls(self.model, Calls(known, step_of(networks)))
        self._keep_timed(known)

    def current_calls(self) -> Calls:
        """The networks that are shipped, each with one call of the widths that there are now."""
        calls = self.calls
        if calls.step is not None:
            with untouched(self.model):
                calls = workable_calls(self.model, Calls(calls.step.calls(), calls.step))
        return Calls({name: call for name, call in calls.items() if name not in self._teachers}, calls.step)

    def original_calls(self) -> Calls:
        """The same, of the widths that there were before anything was cut."""
        now = self.current_calls()
        return Calls({name: resized(call, shapes_of(call), self._inputs[name]) for name, call in now.items()})

    def timed_calls(self) -> tuple[Calls, Calls]:
        """Calls of the batch that a budget of latency was measured with, of the original widths, and of those now."""
        shapes = {name: shapes_of(call) for name, call in self.current_calls().items()} if self._timed else {}
        dense = {name: resized(call, then, self._inputs[name]) for name, (call, then) in self._timed.items()}
        slim = {name: resized(call, then, shapes[name]) for name, (call, then) in self._timed.items()}
        return Calls(dense), Calls(slim)

    def _keep_timed(self, whole: Mapping[str, Example]) -> None:
        if isinstance(self.budget, Latency):
            now = self.current_calls()
            self._timed = {name: (as_example(whole[name]), shapes_of(call)) for name, call in now.items()}

    @property
    def in_step(self) -> bool:
        """Whether the model still has the shapes that this pruner left it with."""
        modules = dict(self.model.named_modules())
        stands = all(path in modules for group in self.groups for path in group.layers)
        return stands and self._shapes == _shapes(self.model, self.groups) and self._gone == set(dropped(self.model))

    @property
    def prepared(self) -> bool:
        """Whether the groups are known."""
        return self._costs is not None

    @property
    def costs(self) -> Costs:
        """Costs of any widths."""
        if self._costs is None:
            raise RuntimeError("Expected a prepared pruner: call `prepare` with example inputs first.")
        return self._costs

    @property
    def recorder(self) -> Recorder:
        """Where evidence is gathered."""
        if self._recorder is None:
            raise RuntimeError("Expected a prepared pruner: call `prepare` with example inputs first.")
        return self._recorder

    @property
    def widths(self) -> dict[str, int]:
        """Group -> units left; none of groups that went with their block."""
        return dict.fromkeys(self._original_index, 0) | {group.name: group.size for group in self.groups}

    @property
    def original_shapes(self) -> dict[str, list[int]]:
        """Tensor -> its shape before anything was cut, of every tensor that a group touches, under every name."""
        return self._original_shapes

    @property
    def cut_tensors(self) -> list[str]:
        """Names of all tensors that have another shape than in the original."""
        tensors = named_tensors(self.model)
        shapes = ((name, shape) for name, shape in self._original_shapes.items() if name in tensors)
        return [name for name, shape in shapes if list(tensors[name].shape) != shape]

    def recording(self) -> AbstractContextManager[None]:
        """Every forward pass of the model within is recorded, as one step."""
        return self.recorder.recording()

    def record_anew(self) -> None:
        """Forgets all that was recorded."""
        self._recorder = self._new_recorder()

    def asked(self, progress: float) -> float:
        """Fraction of the original budget that is to remain at `progress`."""
        return 1 - (1 - self.budget.target(self.costs)) * self.schedule(progress)

    def asks(self, progress: float) -> bool:
        """Whether more is left than is asked for at `progress`."""
        return self._more_than(self.asked(progress))

    def _more_than(self, asked: float) -> bool:
        return self.budget.remaining(self.costs, self.widths) > asked + 1e-12

    def plan(self, progress: float) -> Plan:
        """What would go now: look before you cut."""
        return self._plan(self.asked(progress), self._score())

    def importance(self) -> dict[str, Float[Tensor, "units"]]:
        """Group -> how important each of its units is, by what is known now; of groups that may lose some."""
        return {name: found.importance for name, found in self._score().items()}

    # --- cut ---

    @torch.inference_mode(False)
    def step(
        self,
        progress: float,
        optimizers: Iterable[Optimizer] = (),
        copies: Iterable[nn.Module] = (),
        global_step: int = 0,
        asked: float | None = None,
    ) -> PruningEvent | None:
        """Removes what is due at `progress`; the optimizers go along.

        Whatever is raised, model, copies, optimizers and books are as they were.

        Args:
            progress: fraction of the run that is done.
            optimizers: all optimizers that hold parameters of the model.
            copies: other modules of the same structure, such as weight averages, to be folded and cut alike.
            global_step: for the history.
            asked: fraction of the original budget that is to remain, whatever the schedule says.

        Returns:
            What was done; None if nothing was due.
        """
        asked = self.asked(progress) if asked is None else asked
        if not self._more_than(asked):
            return None
        self.check_present()
        copies, optimizers = list(copies), [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
        with all_or_nothing(self, self.model, *copies, *optimizers):
            return self._step(progress, optimizers, copies, global_step, asked)

    def _step(
        self, progress: float, optimizers: list[Optimizer], copies: list[nn.Module], global_step: int, asked: float
    ) -> PruningEvent | None:
        self.recorder.synchronise(self.average, self.gather)
        scores, plan = together(self.gather, lambda: self._proposed(asked))
        plan = self.agree(plan)
        if not plan.removed:
            if self.schedule(progress) == 1 and not self.open_ended:
                warnings.warn(
                    f"Nothing was removed at {progress:.0%} of the run, though only {asked:.1%} should "
                    "remain: every group is as small as `round_to` and its floor allow.",
                    NoEffectWarning,
                    stacklevel=2,
                )
            return None
        models = [self.model, *copies]
        unfold: list[Callable[[], None]] = []

        def folded() -> str:
            unfold.extend(fold_plan(models, self.groups, plan, self.recorder.moments, self.compensate))
            return compare(self.model, self.groups, plan, self.calls) if self.verify and self.calls else ""

        wrong = self._decide(folded)
        if wrong:
            for put_back in reversed(unfold):
                put_back()
            self._give_up(plan, wrong)
            return None

        def cut() -> None:
            fold_iterates(optimizers, self.model, self.groups, plan, self.recorder.moments, self.compensate)
            cuts = [remove_units(model, self.groups, plan) for model in models]
            migrate(optimizers, cuts[0], self.unknown)

        together(self.gather, cut)
        for model in models:
            forget_blocks(model)
        remember_cut(self.model, self.cut_tensors)
        return self._remember(progress, asked, global_step, plan, scores)

    def _proposed(self, asked: float) -> tuple[dict[str, UnitScores], Plan]:
        self.refuse_moving_teachers()
        self._warn_of_short_series()
        scores = self._score()
        return scores, self._plan(asked, scores)

    def _decide(self, work: Callable[[], Any]) -> Any:
        """What rank 0 comes to, if no rank fails."""
        return self.agree(together(self.gather, work))

    def is_ready(self) -> bool:
        """Whether all that is wanted was recorded on some rank, or cannot be any more; all ranks must ask."""
        diverged = any(self.recorder.diverged(group.name) for group in self.groups)
        ranks = self.gather((self.recorder.lacking, diverged))
        return any(stuck for _, stuck in ranks) or not set.intersection(*(lacking for lacking, _ in ranks))

    def check_states(self, optimizers: Iterable[Optimizer]) -> None:
        """Says before the first cut if an optimizer, in which a step was taken, has a state that cannot be cut.

        Raises:
            ValueError: it has, and `unknown` is `"raise"`.
        """
        tensors = named_tensors(self.model)
        if self.unknown == "raise":
            check_states(optimizers, {span.tensor: tensors[span.tensor] for g in self.groups for span in g.spans})

    def check_present(self) -> None:
        """Says before anything is touched if tensors of units are gone from the model.

        Raises:
            ValueError: they are.
        """
        tensors = named_tensors(self.model)
        spans = [*(span for g in self.groups for span in g.spans), *(r.span for g in self.groups for r in g.readers)]
        if missing := sorted({span.tensor for span in spans} - tensors.keys()):
            raise ValueError(
                f"Expected the tensors in which units were found, got {type(self.model).__name__} without "
                f"{', '.join(missing[:3])}: something took them away since, such as a parametrization or another tool "
                "that prunes. Let it begin before the fit does, or leave its layers out with `skip`."
            )

    def refuse_moving_teachers(self) -> None:
        """What follows the weights of a network by itself would mix units after a cut.

        Raises:
            ValueError: a frozen network has changed that is built as one of which units may go.
        """
        modules = {name: self.model.get_submodule(name) for name in self._teachers}
        frozen = [name for name, module in modules.items() if not any(p.requires_grad for p in module.parameters())]
        moved = [name for name in frozen if _checksum(modules[name]) != self._teachers[name]]
        for name in moved:
            alike = _built_alike(self.model, name)
            cut = [group for group in self.groups if any(span.tensor.startswith(alike) for span in group.spans)]
            if not cut and alike:
                continue  # what it follows is not pruned
            both = [f"{part}*" for part in (*alike, f"{name}.")]
            raise ValueError(
                f"Expected frozen weights to stay as they are, got {name}, which changed although it is frozen: it "
                "seems to be the moving average of another network (a momentum or mean teacher, a target network), "
                "which the module updates itself and which a cut would leave behind. Exclude both by "
                f"`skip={both}`, use Lightning's `WeightAveraging` or `EMAWeightAveraging` callback, whose averages "
                "are cut alike, or prune when the teacher has done its work."
            )

    def _warn_of_short_series(self) -> None:
        lags = self.recorder.lags
        if self.recorder.wants_moments and self.recorder.past < lags and not self._warned_of_short_series:
            self._warned_of_short_series = True
            warnings.warn(
                f"Expected series of more than {lags} time steps for lags={lags}, got none: no past is used, only the "
                "current step. Lower `lags`, or train on longer series.",
                NoEffectWarning,
                stacklevel=3,
            )

    def _score(self) -> dict[str, UnitScores]:
        scores = {}
        for group in (group for group in self.groups if group.name not in self.given_up):
            evidence = self._evidence(group)
            whole = all(bool(reading.moments.second.diagonal().isfinite().all()) for reading in evidence.readings)
            if not whole or self.recorder.diverged(group.name):
                raise ValueError(
                    f"Expected finite activations, got NaN or infinity from {group.name}: the run has diverged, or an "
                    "input was not finite. Lower the learning rate, or mend the data."
                )
            found = self._guarded(group, evidence, self.score(evidence))
            if found is None:
                continue
            if not bool(found.importance.isfinite().all()):
                raise ValueError(
                    f"Expected finite importance, got NaN or infinity from {type(self.score).__name__} for "
                    f"{group.name}: look for NaN in the activations or gradients."
                )
            scores[group.name] = found
        return scores

    def _guarded(self, group: UnitGroup, evidence: Evidence, found: UnitScores) -> UnitScores | None:
        """What to go by instead, if a score says that it found nothing; None if that group is to stay whole."""
        if self.guard is None or found.calibration is None:
            return found
        columns = max(len(reading.moments.total) for reading in evidence.heard)
        reason = no_signal(found.calibration, columns)
        if not reason:
            return found
        fallback = self.guard.fallback
        instead = "it stays whole" if fallback is None else f"{type(fallback).__name__} scores it instead"
        if group.name not in self._without_signal:  # the numbers of every cut are in the history
            warnings.warn(f"No signal in {group.name}: {reason}; {instead}.", NoEffectWarning, stacklevel=5)
        self._without_signal.add(group.name)
        return None if fallback is None else UnitScores(fallback(evidence).importance, None, found.calibration)

    def _plan(self, asked: float, scores: Mapping[str, UnitScores]) -> Plan:
        importance = {name: found.importance for name, found in scores.items()}
        across = importance if self.score.absolute else {name: comparable(v) for name, v in importance.items()}
        across |= self._steepness(scores) if self.selection.scope != "local" else {}
        costs = self.costs
        if self.alpha is not None:
            tested = {name: found.log_p for name, found in scores.items() if found.log_p is not None}
            stay = significant(tested, self.alpha)
            floors = {name: max(int(mask.sum()), costs.floors.get(name, MIN_UNITS)) for name, mask in stay.items()}
            costs = replace(costs, floors={**costs.floors, **floors})
            above = {name: stay[name] * (1 + importance[name].max()) for name in stay}
            importance = {name: values + above.get(name, 0.0) for name, values in importance.items()}
        widths = self.selection.fit(asked, self.budget, costs, self.widths, across)
        return plan_for(widths, importance)

    def _steepness(self, scores: Mapping[str, UnitScores]) -> dict[str, Float[Tensor, "units"]]:
        """What units that were chosen greedily add for what they cost, unit by unit."""
        curves = {
            name: found.calibration.explained
            for name, found in scores.items()
            if found.calibration is not None and found.log_p is not None  # else a fallback put them in another order
        }
        widths = self.widths
        whole = self.budget.remaining(self.costs, widths)
        fewer = {name: {**widths, name: widths[name] - 1} for name in curves}
        slopes = steepness(curves, {name: whole - self.budget.remaining(self.costs, fewer[name]) for name in curves})
        of_units = {name: torch.zeros_like(slope) for name, slope in slopes.items()}
        for name, slope in slopes.items():
            of_units[name][most_important_first(scores[name].importance)] = slope
        return of_units

    def _evidence(self, group: UnitGroup) -> Evidence:
        seed = zlib.crc32(f"{self.seed}/{len(self.history.events)}/{group.name}".encode())
        return evidence_of(self.model, group, self.recorder, self.witnessed.needs, torch.Generator().manual_seed(seed))

    def _remember(
        self, progress: float, asked: float, step: int, plan: Plan, scores: Mapping[str, UnitScores]
    ) -> PruningEvent:
        removed = {name: self._original_index[name][~keep].tolist() for name, keep in plan.items()}
        self.last_change = StructureChange(self.groups, plan)
        self._original_index.update({name: self._original_index[name][keep] for name, keep in plan.items()})
        # `without` keeps the order of what is left: that of the groups.
        gone = [path for group in self.groups if group.name in plan for path in group.removed_blocks(plan[group.name])]
        self._costs, self._gone = self.costs.without(gone), self._gone | set(gone)
        self.groups = renumber(self.groups, plan)
        self._shapes = _shapes(self.model, self.groups)
        self.recorder.keep(self.groups, plan)
        event = PruningEvent(
            step=step,
            progress=progress,
            asked=asked,
            reached=self.budget.remaining(self.costs, self.widths),
            params=self.costs.params(self.widths),
            macs=self.costs.macs(self.widths),
            widths=self.widths,
            removed=removed,
            importance={name: found.importance.tolist() for name, found in scores.items()},
            calibration=self._calibrations(plan, scores),
        )
        self.history.events.append(event)
        return event

    def _calibrations(self, plan: Plan, scores: Mapping[str, UnitScores]) -> dict[str, dict[str, float]]:
        """What scores that calibrate themselves found, as plain numbers."""
        told = {}
        for name, (_, log_p, c) in scores.items():
            if c is not None:
                kept = int(plan[name].sum()) if name in plan else c.units
                told[name] = {
                    "rows": c.rows,
                    "live": c.live,
                    "explained": float(c.explained[kept - 1]),
                    "by_chance": float(c.by_chance[kept - 1]),
                    "inflation": c.inflation,
                }
                if log_p is not None:
                    told[name]["significant"] = int(significant({name: log_p}, self.alpha or 0.05)[name].sum())
        return told

    def _give_up(self, plan: Plan, reason: str) -> None:
        """Leaves those groups of a plan whole that cannot be cut alone."""
        alone = self._decide(
            lambda: {name: compare(self.model, self.groups, {name: keep}, self.calls) for name, keep in plan.items()}
        )
        culprits = {name: why for name, why in alone.items() if why} or dict.fromkeys(plan, reason)
        packs = {group.pack: culprits[group.name] for group in self.groups if group.pack and group.name in culprits}
        culprits |= {group.name: packs[group.pack] for group in self.groups if group.pack in packs}
        self.left_whole.update(culprits)
        self.given_up.update(culprits)
        warnings.warn(
            f"A cut was undone before it was made: {reason}. From now on {', '.join(culprits)} stays whole.",
            NoEffectWarning,
            stacklevel=3,
        )

    def _measured(self, costs: Costs, groups: list[UnitGroup], calls: Mapping[str, Example]) -> Costs:
        """The costs with all that has to be measured of this machine, by one process for all."""
        if self.selection.round_to == "auto":
            check_device(self.model)
            steps = best_steps(self.model, groups, calls, costs) if self.leads else {}
            costs = replace(costs, steps=costs.steps | self.agree(steps))
        if isinstance(self.budget, Latency):
            check_device(self.model)
            if self.selection.round_to == 1:
                costs = replace(costs, steps=costs.steps | steps_of_table(costs))
            rows = self.selection.course(costs, LEVELS)
            table = measure(self.model, groups, calls, costs, rows) if self.leads else {}
            costs = replace(costs, table=self.agree(table))
        return costs

    def _smallest(self, costs: Costs) -> dict[str, int]:
        """The smallest widths that are allowed."""
        everything = {name: torch.ones(units) for name, units in costs.original.items()}
        return self.selection.widths(0.0, costs, costs.original, everything)

    def _check_reachable(self, costs: Costs) -> None:
        smallest = self._smallest(costs)
        closest, target = self.budget.remaining(costs, smallest), self.budget.target(costs)
        kind = type(self.budget).__name__
        if target > 1 and not self.open_ended:
            raise ValueError(
                f"Expected a budget below what the model has, got {self.budget}: it has "
                f"{self.budget.whole(costs):,.6g}, so nothing would go."
            )
        if closest > target and not self.open_ended:
            if self.budget.absolute is None:
                least = f"{kind}({math.ceil(1000 * closest) / 1000})"
            else:
                least = f"{kind}(absolute={_rounded_up(self.budget.count(costs, smallest)):,.6g})".replace(",", "_")
            raise ValueError(
                f"Expected a budget that can be reached, got {self.budget}: with everything removable gone, "
                f"{closest:.1%} remains. Ask for at least {least}, skip less, or lower `round_to` or `keep_at_least`. "
                f"Left whole: {'; '.join(f'{layer}: {reason}' for layer, reason in self.left_whole.items())}."
            )
        if not self.budget.open_ended:
            self.selection.check_balance(self.budget, costs)

    def _new_recorder(self) -> Recorder:
        needs = self.witnessed.needs
        return Recorder(
            self.model,
            self.groups,
            self.witnessed.lags,
            moments="moments" in needs or self.compensate != "none",
            effects=[effect for effect in get_args(Effect) if effect in needs],
            gates="gates" in needs,
            witnesses=self.witnessed.witnesses,
            seed=self.seed,
        )

    # --- save ---

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and plain data (`torch.load(weights_only=True)` reads it)."""
        if not self.prepared:
            return {}
        state = {
            "groups": [to_state(group) for group in self.groups],
            "left_whole": dict(self.left_whole),
            "given_up": sorted(self.given_up),
            "networks": sorted(self.networks),
            "inputs": dict(self._inputs),
            "teachers": dict(self._teachers),
            "unreached": list(self.unreached),
            "original_index": dict(self._original_index),
            "original_shapes": dict(self._original_shapes),
            "gone": sorted(self._gone),
            "costs": self.costs.to_state(),
            "history": self.history.to_state(),
            "recorder": self.recorder.state_dict(),
        }
        return sealed(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; the model must have the shapes that it had then.

        Raises:
            ValueError: it is not as it was stored, or of another model; nothing was loaded.
        """
        if not state:
            return
        state = opened(state, "a pruner")
        groups = [from_state(group) for group in state["groups"]]
        check_fit(self.model, groups)
        self.groups = groups
        self.left_whole = dict(state["left_whole"])
        self.given_up, self.networks = set(state["given_up"]), set(state["networks"])
        self._inputs, self._teachers = dict(state["inputs"]), dict(state["teachers"])
        self.unreached = tuple(state["unreached"])
        self._original_index = {name: index.cpu() for name, index in state["original_index"].items()}
        self._original_shapes = dict(state["original_shapes"])
        self._gone = set(state["gone"])
        self._shapes = _shapes(self.model, self.groups)
        self._costs = Costs.from_state(state["costs"])
        self.history = History.from_state(state["history"])
        self._recorder = self._new_recorder()
        self._recorder.load_state_dict(state["recorder"])


def _checksum(module: nn.Module) -> float:
    """Tells whether weights have changed."""
    weights = (p.detach().double() for p in module.parameters())
    return sum(float(p.sum() + p.abs().sum()) for p in weights)


def _built_alike(model: nn.Module, name: str) -> tuple[str, ...]:
    """Where else in a model there is a network with the same tensors as one of its modules, as prefixes of names."""

    def tensors(module: nn.Module) -> dict[str, torch.Size]:
        return {leaf: p.shape for leaf, p in module.named_parameters()}

    mine = tensors(model.get_submodule(name))
    others = (other for other, _ in model.named_modules() if other != name and not other.startswith(f"{name}."))
    return tuple(f"{other}." for other in others if tensors(model.get_submodule(other)) == mine)


def _rounded_up(figure: float) -> float:
    """To three digits."""
    digit: float = 10.0 ** (math.floor(math.log10(figure)) - 2)
    return math.ceil(figure / digit) * digit


def _shapes(model: nn.Module, groups: Iterable[UnitGroup]) -> dict[str, list[int]]:
    """Shapes of all tensors that some groups touch, under every name they have."""
    tensors = named_tensors(model)
    touched = {id(tensors[span.tensor]) for group in groups for span in group.spans}
    return {name: list(tensor.shape) for name, tensor in tensors.items() if id(tensor) in touched}
