"""Find what reads the inputs -> gather -> choose -> cut -> migrate. The counterpart of the pruner; no Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer

from lightning_slim.arguments import check_arguments
from lightning_slim.eager import hooked
from lightning_slim.history import ScreeningEvent
from lightning_slim.input_evidence import InputEvidence, Method, choose, test_for
from lightning_slim.payload import opened, sealed
from lightning_slim.ranks import Agree, Gather, alone, only
from lightning_slim.surgery import Example, StructureChange, migrate, remove_units
from lightning_slim.surgery.compensate import fold
from lightning_slim.surgery.inputs import InputError, InputUnits, find_entries, find_inputs
from lightning_slim.surgery.verify import compare
from lightning_slim.transaction import all_or_nothing
from lightning_slim.units import Plan, check_fit, from_state, to_state


class InputScreener:
    """Chooses the inputs of a model while it trains.

    Args:
        model: the module whose tensors the optimizer holds.
        method: the test; `"auto"`: by shapes and types.
        alpha: share of false discoveries that is allowed.
        lags: of series: present and past steps of each input, and past steps of the target.
        overlap: of series: how many windows hold the same step.
        min_inputs: so many inputs stay at least.
        protect: inputs that stay, by name or number.
        names: of the inputs, in their order; their numbers if there are none.
        compensate: `"mean"`: biases take what the removed inputs are on average; `"none"`: nothing does.
        difference: of series: whether first differences are tested, as levels that wander ask for.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        alpha: float,
        lags: int,
        overlap: float,
        min_inputs: int,
        protect: Sequence[int | str],
        names: Sequence[str],
        compensate: Literal["mean", "none"],
        difference: bool = False,
    ) -> None:
        check_arguments(InputScreener, locals())
        self.model, self.method, self.alpha, self.lags, self.overlap = model, method, alpha, lags, overlap
        self.min_inputs, self.protect, self.names, self.compensate = min_inputs, protect, list(names), compensate
        self.difference = difference
        self.calls: dict[str, Example] = {}
        self.found: InputUnits | None = None
        self.evidence: InputEvidence | None = None
        self.event: ScreeningEvent | None = None
        self.last_change: StructureChange | None = None
        self.agree: Agree = alone  # several processes: what rank 0 says
        self.reduce: Callable[[Tensor, str], Tensor] = alone  # several processes: their "sum", "max"
        self.gather: Gather = only  # several processes: what every rank says
        self._means: dict[str, Tensor] = {}  # layer -> sums of its columns, and at the end the number of rows

    # --- look ---

    def find(self, calls: Mapping[str, Example], inputs: Tensor, target: Tensor) -> None:
        """Finds the layers that read the inputs, and the test that fits.

        Args:
            calls: the networks of the model, each with one call.
            inputs: of a batch.
            target: of the batch.

        Raises:
            ValueError: the inputs cannot be removed, or not tested, or `names` and `protect` do not fit them.
        """
        test = test_for(inputs, target, self.method)
        axes = {2: [1], 3: [2, 1]}.get(inputs.ndim, [1])  # (item, step, feature) is tried first
        if not inputs.is_floating_point() or inputs.ndim < 2:
            raise ValueError(
                f"Expected inputs of a floating type, (item, feature, ...), got {inputs.dtype} of shape "
                f"{tuple(inputs.shape)}: check `inputs`."
            )
        fit = [axis for axis in axes if len(self.names) in (0, inputs.shape[axis])]
        if not fit:
            raise ValueError(
                f"Expected a name for every input, got {len(self.names)} names for inputs of shape "
                f"{tuple(inputs.shape)}: correct `names`."
            )
        errors = []
        for axis in fit:
            entries = find_entries(calls, inputs, axis)
            if not entries:
                raise ValueError(
                    f"Expected a network that is called with the inputs, of shape {tuple(inputs.shape)}, got none: the "
                    "step must pass them on as they are, and the network may work on them."
                )
            names = self.names or [str(i) for i in range(inputs.shape[axis])]
            stays = _positions(self.protect, names)
            try:
                found = find_inputs(self.model, calls, entries, ~stays)
            except InputError as error:
                errors.append(error)
                continue
            self.found, axis, self.names = self.agree((found, axis, names))
            self.calls = {name: calls[name] for name in entries}
            self.evidence = InputEvidence(test, axis, self.lags, self.overlap, self.difference)
            break
        else:
            raise errors[0]
        if self.min_inputs > len(self.names):
            raise ValueError(
                f"Expected `min_inputs` of at most {len(self.names)}, the inputs there are, got {self.min_inputs}."
            )

    def update(self, inputs: Tensor, target: Tensor) -> None:
        """Adds a batch to the evidence."""
        assert self.evidence is not None
        self.evidence.update(inputs, target)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """What arrives within at the layers that read the inputs adds to its means."""
        layers = {reader.layer: reader.axis for group in self._groups for reader in group.readers}
        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(self._watch(name, axis), with_kwargs=True)
            for name, axis in layers.items()
        ]
        with hooked(handles):
            yield

    def _watch(self, name: str, axis: int) -> Callable[..., None]:
        @torch.inference_mode(False)
        @torch.no_grad()
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs["input"]
            given = given.data if isinstance(given, PackedSequence) else given
            table = given.detach().movedim(axis, -1).flatten(0, -2)
            sums = torch.cat([table.sum(0, dtype=torch.float64), torch.tensor([float(len(table))]).to(table.device)])
            self._means[name] = self._means.get(name, 0) + sums

        return hook

    @property
    def _groups(self) -> list[Any]:
        return [] if self.found is None else self.found.groups

    @property
    def unit_roots(self) -> list[str]:
        """Names of inputs that look like random walks, of which levels are tested."""
        return [] if self.evidence is None else [self.names[at] for at in self.evidence.unit_roots(self.reduce)]

    # --- cut ---

    @torch.inference_mode(False)
    def step(
        self, optimizers: Iterable[Optimizer] = (), copies: Iterable[nn.Module] = (), global_step: int = 0
    ) -> ScreeningEvent:
        """Chooses the inputs, and cuts the layers that read them.

        Whatever is raised, model, copies, optimizers and books are as they were.

        Args:
            optimizers: all that hold parameters of the model.
            copies: other modules of the same structure, to be folded and cut alike.
            global_step: for the history.

        Raises:
            InputError: the cut network would compute something else than the network that reads nothing of the removed
                inputs.
        """
        assert self.found is not None
        assert self.evidence is not None
        copies, optimizers = list(copies), list(optimizers)
        with all_or_nothing(self, self.model, *copies, *optimizers):
            return self._step(self.found, self.evidence, optimizers, copies, global_step)

    def _step(
        self,
        found: InputUnits,
        evidence: InputEvidence,
        optimizers: list[Optimizer],
        copies: list[nn.Module],
        global_step: int,
    ) -> ScreeningEvent:
        evidence.sum_over_ranks(self.reduce, self.agree)
        every = self.gather({name: len(sums) for name, sums in self._means.items()})
        sizes = {name: size for of_rank in every for name, size in of_rank.items()}
        self._means = {name: self._sum(name, size) for name, size in sorted(sizes.items())}
        stays = _positions(self.protect, self.names) | ~found.read(len(self.names))
        read = [at[at >= 0] for at in found.features.values() if bool((at >= 0).all())]
        test = evidence.result()
        choice = self.agree(choose(test, self.alpha, self.min_inputs, stays, read))
        plan = found.plan(choice.keep)
        if plan:
            self._cut(plan, optimizers, [self.model, *copies])
        named = list(zip(self.names, choice.keep.tolist(), strict=True))
        self.event = ScreeningEvent(
            step=global_step,
            test=evidence.test,
            alpha=self.alpha,
            kept=[name for name, stays in named if stays],
            removed=[name for name, stays in named if not stays],
            adjusted_p=dict(zip(self.names, choice.adjusted_p.tolist(), strict=True)),
            effect=dict(zip(self.names, self.agree(test.effect.tolist()), strict=True)),
            significant=choice.significant,
        )
        self.evidence, self._means, self.calls = None, {}, {}
        return self.event

    def _sum(self, name: str, size: int) -> Tensor:
        """Sums of the columns of a layer over all ranks, of which some may not have passed there."""
        nothing = torch.zeros(size, dtype=torch.float64, device=next(self.model.parameters()).device)
        return self.reduce(self._means.get(name, nothing), "sum").cpu()

    def _cut(self, plan: Plan, optimizers: list[Optimizer], models: list[nn.Module]) -> None:
        for model in models if self.compensate == "mean" else ():
            for group in (group for group in self._groups if group.name in plan):
                for reader in group.readers:
                    sums = self._means[reader.layer]
                    keep = plan[group.name]
                    constant = (sums[:-1] / sums[-1])[~keep]
                    fold(model, reader, keep, (torch.zeros(int(keep.sum()), len(constant)), constant), weight_too=False)
        wrong = self.agree(compare(self.model, self._groups, plan, self.calls)) if self.calls else ""
        if wrong:
            raise InputError(f"Expected a network that can do without inputs, got one of which {wrong}.")
        cuts = [remove_units(model, self._groups, plan) for model in models]
        migrate(optimizers, cuts[0])
        self.last_change = StructureChange(self._groups, plan)

    @property
    def cut_tensors(self) -> list[str]:
        """Names of all tensors that were cut."""
        change = self.last_change
        return [] if change is None else [s.tensor for g in change.groups if g.name in change.plan for s in g.spans]

    # --- save ---

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as tensors and plain data."""
        state: dict[str, Any] = {"event": None if self.event is None else vars(self.event).copy()}
        if self.evidence is not None and self.found is not None:
            state |= {
                "names": list(self.names),
                "groups": [to_state(group) for group in self.found.groups],
                "features": dict(self.found.features),
                "test": self.evidence.test,
                "axis": self.evidence.axis,
                "evidence": self.evidence.state_dict(),
                "means": dict(self._means),
            }
        return sealed(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: it is not as it was stored, or of another model.
        """
        state = opened(state, "a choice of inputs")
        check_fit(self.model, [from_state(group) for group in state.get("groups", ())])
        self.event = None if state["event"] is None else ScreeningEvent(**state["event"])
        if "evidence" in state:
            device = next(self.model.parameters()).device
            features = {name: at.cpu() for name, at in state["features"].items()}
            self.found = InputUnits([from_state(group) for group in state["groups"]], features)
            self.names = list(state["names"])
            self.evidence = InputEvidence(state["test"], state["axis"], self.lags, self.overlap, self.difference)
            self.evidence.load_state_dict(state["evidence"], device)
            self._means = {name: sums.to(device) for name, sums in state["means"].items()}


def _positions(chosen: Sequence[int | str], names: Sequence[str]) -> Tensor:
    """A mask of inputs that are given by name or number.

    Raises:
        ValueError: there is no such input.
    """
    mask = torch.zeros(len(names), dtype=torch.bool)
    for entry in chosen:
        number = names.index(entry) if entry in names else entry
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise ValueError(
                f"Expected names of inputs, or numbers from 0 to {len(names) - 1}, in `protect`, got {entry!r}."
            )
        mask[number] = True
    return mask
