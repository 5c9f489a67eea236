"""Forward hooks that gather evidence while the network trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_slim.eager import hooked
from lightning_slim.patches import patches
from lightning_slim.ranks import Gather, only
from lightning_slim.recording.experiments import Losses, ablate, gate
from lightning_slim.recording.hooks import Watch, WatchBlocks, WatchRecurrent
from lightning_slim.recording.rows import items_at, rows_at
from lightning_slim.statistics import Accumulator, JointMoments, Moments, Pivoted, thinned
from lightning_slim.surgery.layers.multihead import module_by_module
from lightning_slim.units import Reader, UnitGroup, gradients, parameters_of, rows
from lightning_slim.witness import Gathered, Known, Witness

# Rows of one batch, for each column: a convolution has a row for every pixel, many more than second moments need.
ROWS_PER_COLUMN = 4
MIN_ROWS = 1024

Effect = Literal["saliency", "information", "sensitivity", "ablation", "flow"]

# What becomes of the effects of a unit's weights, one unit a row, in one step.
OF_UNITS: dict[Effect, Callable[[Tensor], Tensor]] = {
    "saliency": lambda effects: effects.sum(1).square(),
    "information": lambda effects: effects.square().sum(1),
    "sensitivity": lambda effects: effects.abs().sum(1),
}


class _Held(NamedTuple):
    """What a witness holds of one arrival until the step is over."""

    witness: Witness
    group: str
    slot: int
    units: Tensor


_Key = tuple[str, str, int]  # what is streamed, of which group, at which of its readers


class Recorder:
    """Streams what scores need: how units arrive at their readers, and their effects on the loss.

    Args:
        model: the module that `groups` were found in.
        groups: all groups that will be scored.
        lags: past steps beside the present, where units arrive as series.
        moments: whether to stream moments.
        effects: which effects on the loss to stream: `"saliency"`, the squared first-order effect of each unit,
            `"information"` and `"sensitivity"`, the sums of the squared and of the absolute effects of its weights,
            `"ablation"`, what the loss is more without the unit, or `"flow"`; see `observe_flow`.
        gates: whether to gate units at random; see `experiment`.
        witnesses: what else looks on where units arrive.
        memory: how much of the past still counts one recorded step later: the weights move, old evidence fades.
        seed: of random gates.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        lags: int = 0,
        moments: bool = True,
        effects: Collection[Effect] = (),
        gates: bool = False,
        witnesses: Collection[Witness] = (),
        memory: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.groups = list(groups)
        self.lags, self.memory = lags, memory
        self.ranks = 1  # whose rows evidence counts
        self.wants_moments, self.wants_gates = moments, gates
        # One entry for each reader; of blocks, one for all.
        self.moments: dict[str, list[Moments | None]] = {
            g.name: [None] * (1 if g.blocks else len(g.readers)) for g in groups
        }
        self.gathered: dict[Witness, dict[str, list[Gathered | None]]] = {
            witness: {g.name: [None] * len(g.readers) for g in groups if not g.blocks} for witness in witnesses
        }
        # Effect -> group -> decayed sum over steps.
        self.effects: dict[Effect, dict[str, Tensor]] = {effect: {} for effect in effects}
        self.steps: dict[Effect, dict[str, float]] = {effect: {} for effect in effects}  # decayed numbers of steps
        self.gates: dict[str, JointMoments] = {}  # group -> which units were gated, and what the loss was more then
        self.known: frozenset[Known] = frozenset(w.known for w in self.gathered if w.known is not None)
        self.generator = torch.Generator().manual_seed(seed)
        self._held: list[_Held] = []
        self._unfit: dict[tuple[str, int], int] = {}  # (group, reader) -> batches in a row that were not finite

    @property
    def experiments(self) -> bool:
        """Whether `experiment` has something to find out."""
        return self.wants_gates or "ablation" in self.effects

    @property
    def attends(self) -> bool:
        """Whether training steps tell it anything that is wanted."""
        return self.wants_moments or bool(self.gathered) or self.wants_gates or any(e != "flow" for e in self.effects)

    @property
    def ready(self) -> bool:
        """Whether anything that is wanted was recorded."""
        return not self.lacking

    @property
    def lacking(self) -> set[tuple[str, str, int]]:
        """What is wanted and was not recorded yet: what, of which group, at which of its readers."""
        lacks = {key for key, stream in self._slots().items() if stream is None}
        for i, (witness, of_groups) in enumerate(self.gathered.items()):
            few = [(n, at) for n, g in of_groups.items() for at, s in enumerate(g) if s and not witness.enough(s)]
            lacks |= {(f"witness {i}", name, at) for name, at in few}
        wanted = {effect: self.moments.keys() - of_groups.keys() for effect, of_groups in self.effects.items()}
        return lacks | {(effect, name, 0) for effect, names in wanted.items() for name in names}

    @property
    def past(self) -> int:
        """Past steps that moments hold beside the present: `lags` if units arrived as longer series anywhere, or 0."""
        columns = [
            len(moments.total) // len(reader.span.index)
            for group in self.groups
            for moments, reader in zip(self.moments[group.name], group.readers, strict=False)
            if moments is not None and not reader.joint and not reader.patches
        ]
        return max(columns, default=1) - 1

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Every forward pass of the model within is recorded, as one step."""
        for stream in self._streams():
            stream.decay(self.memory)
        self._held.clear()
        handles = []
        recurrent: dict[nn.RNNBase, list[tuple[str, int, Reader]]] = {}
        if self.wants_moments or self.gathered:
            for group in self.groups:
                for slot, reader in enumerate(group.readers):
                    layer = self.model.get_submodule(reader.layer)
                    if isinstance(layer, nn.RNNBase):
                        recurrent.setdefault(layer, []).append((group.name, slot, reader))
                        continue
                    hook = Watch(self, group.name, slot, reader)
                    handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
                together = WatchBlocks(self, group.name, group.blocks)
                for path in group.blocks:
                    block = self.model.get_submodule(path)
                    handles.append(block.register_forward_hook(together.of(path), with_kwargs=True))
        for layer, readers in recurrent.items():
            handles.append(layer.register_forward_pre_hook(WatchRecurrent(self, readers), with_kwargs=True))
        with hooked(handles), module_by_module(self.model):
            yield

    @torch.inference_mode(False)
    @torch.no_grad()
    def hear(self, **known: Any) -> None:
        """What became known in the step that was recorded last; nothing need be said if no witness asks.

        Args:
            **known: for each item of the batch: `labels`, a tensor; `outputs`, a tensor or dict of network ->
                tensor; `losses`, a tensor.

        Raises:
            ValueError: what a witness asks for is missing, or is not there once for each item.
        """
        held, self._held = self._held, []
        for each in held:
            if known.get(each.witness.known or "") is None:
                raise ValueError(
                    f"Expected {each.witness.known} of the step that was recorded, got none: "
                    f"{type(each.witness).__name__} compares units with them. Pass them to `recorder.hear`."
                )
            self._add(each, known[each.witness.known or ""])

    @torch.inference_mode(False)
    def experiment(self, losses: Losses) -> None:
        """Tries units out: what becomes of a batch's losses without them.

        Args:
            losses: computes the losses of one batch, one an item, and the same each time but for what is changed here.
        """
        if "ablation" in self.effects:
            for name, more in ablate(self.model, self.groups, losses).items():
                self._observe("ablation", name, more)
        if self.wants_gates:
            for name, (gone, more) in gate(self.model, self.groups, losses, self.generator).items():
                if name not in self.gates:
                    self.gates[name] = JointMoments(gone.shape[1], 1, device=gone.device)
                self.gates[name].update(gone, more[:, None])

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe(self, name: str, slot: int, reader: Reader, inputs: Tensor) -> None:
        """Adds what one reader was given to the moments."""
        inputs = inputs.detach().as_subclass(Tensor)  # batches may be of a kind of tensor that cannot be copied
        if not self._takes(name, slot, inputs):
            return
        if self.gathered:
            arrived = items_at(inputs, reader, self._width(reader))
            for witness in self.gathered:
                held = _Held(witness, name, slot, witness.hold(arrived))
                if witness.known is None:
                    self._add(held, None)
                else:
                    self._held.append(held)
        if not self.wants_moments:
            return
        units = reader.span.index.shape[0]
        moments = self.moments[name][slot]
        if reader.patches:
            taps = self.model.get_parameter(reader.span.tensor).shape[2:].numel()
            enough = _enough(reader.span.index.numel() * taps)
            table = patches(self.model.get_submodule(reader.layer), inputs, reader.span.index, enough)
        else:
            lags = self.lags if moments is None else len(moments.total) // units - 1
            everything = rows_at(inputs, reader, self._width(reader), lags, skip_short=moments is not None)
            if everything is None:
                return
            table = thinned(everything, _enough(everything.shape[1] * everything.shape[2]))
        if moments is None:
            moments = self.moments[name][slot] = Moments(units * table.shape[2], inputs.device)
        with torch.autocast(inputs.device.type, enabled=False):  # a forward pass in bfloat16 would compute them so, too
            moments.update(table.flatten(1))

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe_blocks(self, name: str, updates: Sequence[Tensor]) -> None:
        """Adds what every block adds to its input: one column a block, a row for every sample, step and channel."""
        if not all(self._takes(name, 0, update) for update in updates):
            return
        moments = self.moments[name][0]
        if moments is None:
            moments = self.moments[name][0] = Moments(len(updates), updates[0].device)
        table = torch.stack([thinned(update.flatten(), _enough(len(updates))).float() for update in updates], 1)
        with torch.autocast(updates[0].device.type, enabled=False):
            moments.update(table)

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Adds the effects of every unit's weights, `weight * gradient`; call it when gradients are whole and unscaled.

        Args:
            parameters: whose gradients are whole now (those of one of several optimizers); all, if None.
        """
        mine = None if parameters is None else {id(p) for p in parameters}
        of_gradients = [effect for effect in self.effects if effect in OF_UNITS]
        for group in self.groups:
            if mine is not None and not any(id(p) in mine for p in parameters_of(self.model, group)):
                continue
            effects = self._of_weights(group)
            for name in of_gradients:
                self._observe(name, group.name, OF_UNITS[name](effects))

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe_flow(self) -> None:
        """Adds the sum of `weight * gradient` over every unit's weights; call it when gradients are those of a flow."""
        for group in self.groups:
            self._observe("flow", group.name, self._of_weights(group).sum(1))

    def synchronise(self, average: Callable[[Tensor], Tensor], gather: Gather = only) -> None:
        """Lets every rank know what all of them recorded: sums become their mean over ranks, its share of them.

        A rank that recorded nothing of a group, as its batches did not pass there, takes part with nothing.

        Args:
            average: the mean of a tensor over ranks.
            gather: what every rank says.

        Raises:
            ValueError: ranks saw different numbers of classes, targets or steps; on all of them.
        """
        kinds = gather({key: _shapes(stream) for key, stream in self._slots().items() if stream is not None})
        self.ranks = len(kinds)
        for key in sorted(set[_Key]().union(*kinds)):
            if len({repr(kind[key]) for kind in kinds if key in kind}) > 1:
                raise ValueError(
                    f"Expected the same shapes on all ranks, got {[kind.get(key) for kind in kinds]} at {key[1]}: some "
                    "saw fewer classes, or shorter series. Let all ranks see batches of one kind."
                )
            owner = next(rank for rank, kind in enumerate(kinds) if key in kind)
            if not all(key in kind for kind in kinds):
                self._take_part(key, gather(self._slots()[key])[owner])
        self._average_effects(average, gather)
        for _, stream in sorted(self._slots().items(), key=lambda item: item[0]):
            if stream is None:
                continue
            if isinstance(stream, Pivoted):
                stream.move_pivots({name: average(pivot) for name, pivot in stream.pivots.items()})
            for sums in stream.sums.values():
                sums.copy_(average(sums))

    def _average_effects(self, average: Callable[[Tensor], Tensor], gather: Gather) -> None:
        sizes = gather({effect: {name: len(value) for name, value in g.items()} for effect, g in self.effects.items()})
        steps = gather(self.steps)
        for effect, of_groups in self.effects.items():
            units = {name: number for of_rank in sizes for name, number in of_rank[effect].items()}
            for name, number in sorted(units.items()):
                of_groups[name] = average(of_groups.get(name, torch.zeros(number, device=self._device)))
                self.steps[effect][name] = sum(of_rank[effect].get(name, 0.0) for of_rank in steps) / len(steps)

    def _take_part(self, key: _Key, example: Any) -> None:
        """Begins a stream, of nothing, that another rank has."""
        what, group, at = key
        if self._slots()[key] is not None:
            return
        for stream in (example, *vars(example).values()):
            if isinstance(stream, Accumulator):
                for name, tensor in stream.state_dict().items():
                    setattr(stream, name, tensor.to(self._device))
                stream.device = self._device
        for sums in example.sums.values():
            sums.zero_()
        if what == "gates":
            self.gates[group] = example
        else:
            held: Any = self.moments if what == "moments" else list(self.gathered.values())[int(what.split()[1])]
            held[group][at] = example

    @property
    def _device(self) -> torch.device:
        device = next(self.model.parameters()).device
        return torch.device("cpu") if device.type == "mps" else device

    def mean(self, effect: Effect, group: str) -> Float[Tensor, "units"]:
        """An effect of each unit of a group: mean over recorded steps, recent ones weighing more."""
        return self.effects[effect][group] / self.steps[effect][group]

    def diverged(self, group: str) -> bool:
        """Whether what arrives of a group's units is not finite any more, or never was; one such batch may happen."""
        slots = self._slots()
        of_group = [(at, count) for (name, at), count in self._unfit.items() if name == group]
        return any(count > 1 or slots.get(("moments", group, at), 0) is None for at, count in of_group)

    def _takes(self, name: str, slot: int, inputs: Tensor) -> bool:
        """Whether a batch tells something: not if it is empty, or not finite."""
        if is_finite(inputs):
            self._unfit.pop((name, slot), None)
            return inputs.numel() > 0
        self._unfit[name, slot] = self._unfit.get((name, slot), 0) + 1
        return False

    def seen(self, group: str) -> list[Moments | None]:
        """Moments at each reader of a group, of all ranks."""
        return [self._of_all(moments) for moments in self.moments[group]]

    def told(self, group: str, slot: int) -> dict[Witness, Gathered]:
        """What every witness gathered at one reader of a group, of all ranks."""
        seen = {witness: of_groups[group][slot] for witness, of_groups in self.gathered.items() if group in of_groups}
        return {witness: self._of_all(gathered) for witness, gathered in seen.items() if gathered is not None}

    def gated(self, group: str) -> JointMoments | None:
        """Which units of a group were gated, and what the losses were more then, of all ranks."""
        gates: JointMoments | None = self._of_all(self.gates.get(group))
        return gates

    def keep(self, groups: Sequence[UnitGroup], plan: Mapping[str, Bool[Tensor, "units"]]) -> None:
        """Follows a cut: evidence of the units that stay is kept, of the others dropped."""
        left = {group.name: group for group in groups}
        by_group: list[dict[str, Any]] = [*self.effects.values(), *self.steps.values(), self.gates]
        by_reader: list[dict[str, list[Any]]] = [self.moments, *self.gathered.values()]
        for group in self.groups:
            if group.name not in left:
                for of_groups in (*by_group, *by_reader):
                    of_groups.pop(group.name, None)
            elif not group.blocks:
                stand = {(reader.layer, reader.span.tensor) for reader in left[group.name].readers}
                for of_readers in by_reader:
                    seen = zip(of_readers[group.name], group.readers, strict=True)
                    of_readers[group.name] = [m for m, r in seen if (r.layer, r.span.tensor) in stand]
        self.groups = list(groups)
        for name, mask in ((name, mask) for name, mask in plan.items() if name in left):
            for moments in self.moments[name]:
                if moments is not None:
                    moments.keep(_columns(mask, len(moments.total)))
            for of_readers in self.gathered.values():
                for gathered, reader in zip(of_readers.get(name, ()), left[name].readers, strict=False):
                    if gathered is not None:
                        channels = reader.span.index.shape[1] if reader.joint else 1
                        gathered.keep(_columns(mask, len(mask) * channels))
            if name in self.gates:
                self.gates[name].keep(mask.nonzero().flatten())
            for of_groups in self.effects.values():
                if name in of_groups:
                    of_groups[name] = of_groups[name][mask.to(of_groups[name].device)]

    def _of_weights(self, group: UnitGroup) -> Float[Tensor, "units fan"]:
        """First-order effects of the weights that make the units."""
        return rows(self.model, group).float() * gradients(self.model, group).float()

    def _add(self, held: _Held, known: Any) -> None:
        at_readers = self.gathered[held.witness][held.group]
        if isinstance(known, Mapping):
            network = max((name for name in known if f"{held.group}.".startswith(name and f"{name}.")), key=len)
            known = known[network]
        with torch.autocast(held.units.device.type, enabled=False):
            at_readers[held.slot] = held.witness.add(at_readers[held.slot], held.units, known)

    def _observe(self, effect: Effect, group: str, new: Float[Tensor, "units"]) -> None:
        """Adds one step's effects to those of a group; a step whose gradients are not finite tells nothing."""
        if not is_finite(new):
            return
        past, steps = self.effects[effect].get(group), self.steps[effect].get(group, 0.0)
        self.effects[effect][group] = new if past is None else self.memory * past + new
        self.steps[effect][group] = self.memory * steps + 1

    def _of_all(self, mean: Any) -> Any:
        """A statistic of all ranks, of their mean: each holds its share of the sums."""
        if self.ranks == 1 or mean is None:
            return mean
        whole = copy.copy(mean)
        for name, sums in mean.sums.items():
            setattr(whole, name, self.ranks * sums)
        return whole

    def _streams(self) -> list[Gathered]:
        """All streaming statistics that there are."""
        return [stream for stream in self._slots().values() if stream is not None]

    def _slots(self) -> dict[_Key, Any]:
        """All streaming statistics that are wanted; None where there is none yet."""
        kinds: dict[str, Mapping[str, list[Any]]] = {"moments": self.moments if self.wants_moments else {}}
        kinds |= {f"witness {i}": of_groups for i, of_groups in enumerate(self.gathered.values())}
        slots = {(w, n, at): s for w, g in kinds.items() for n, seen in g.items() for at, s in enumerate(seen)}
        gates = self.moments if self.wants_gates else ()
        return slots | {("gates", name, 0): self.gates.get(name) for name in gates}

    def enough(self, reader: Reader) -> int:
        """Rows of one batch that the moments at a reader need."""
        return _enough(reader.span.index.numel() * (self.lags + 1))

    def _width(self, reader: Reader) -> int:
        """Columns of the reader's weight: a chunk of a grouped convolution's input."""
        weight = self.model.get_parameter(reader.span.tensor)
        return weight.shape[reader.span.axis]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data only."""
        return {
            "moments": {name: [_state(m) for m in group] for name, group in self.moments.items()},
            "effects": {name: dict(of_groups) for name, of_groups in self.effects.items()},
            "steps": copy.deepcopy(self.steps),
            "unfit": [(*key, count) for key, count in self._unfit.items()],
            "gates": {name: gates.state_dict() for name, gates in self.gates.items()},
            "gathered": [
                {name: [_state(g) for g in group] for name, group in of_groups.items()}
                for of_groups in self.gathered.values()
            ],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for name, group in state["moments"].items():
            self.moments[name] = [_loaded(Moments(0, device), values) for values in group]
        for (witness, of_groups), values in zip(self.gathered.items(), state["gathered"], strict=False):
            of_groups.update(
                {name: [v and _loaded(witness.blank(v), v) for v in group] for name, group in values.items()}
            )
        self.gates = {name: _loaded(JointMoments(0, 1), values) for name, values in state["gates"].items()}
        for effect, of_effect in self.effects.items():
            of_effect.update({group: v.to(device) for group, v in state["effects"].get(effect, {}).items()})
            self.steps[effect] = dict(state["steps"].get(effect, {}))
        self._unfit = {(name, at): count for name, at, count in state["unfit"]}
        self.generator.set_state(state["generator"].cpu())


def is_finite(values: Tensor) -> bool:
    """Whether there is no NaN and no infinity; one pass, where that is so."""
    return not values.is_floating_point() or bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _enough(columns: int) -> int:
    """Rows of one batch for as many columns."""
    return max(MIN_ROWS, ROWS_PER_COLUMN * columns)


def _state(gathered: Moments | Gathered | None) -> dict[str, Tensor] | None:
    return None if gathered is None else gathered.state_dict()


def _loaded(blank: Any, state: Mapping[str, Tensor] | None) -> Any:
    """One that was empty, with a state; None if there is none."""
    if state is None:
        return None
    blank.load_state_dict(state)
    return blank


def _columns(keep: Bool[Tensor, "units"], columns: int) -> Int[Tensor, "kept"]:
    """The columns of the units that stay."""
    return keep.repeat_interleave(columns // len(keep)).nonzero().flatten()


def _shapes(stream: Gathered) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in stream.state_dict().items()}
