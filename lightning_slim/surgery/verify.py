"""A cut network must compute what the network computes when nothing reads the removed units."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_slim.surgery.blocks import without
from lightning_slim.surgery.cut import remove_units, restore
from lightning_slim.surgery.example import Example, step_of, untouched
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.surgery.operations.silence import silenced
from lightning_slim.surgery.ties import untied
from lightning_slim.surgery.unread import unread
from lightning_slim.units import MIN_UNITS, Plan, UnitGroup, positions_gone, renumber
from lightning_slim.weight_norm import settle

LOUDNESS = 1.5  # of a matrix, in units of 1 / sqrt(inputs)
MANY = 8  # units: groups of at least as many may keep equal numbers in one trial, for they keep other units
HARD_CODED = "; if a width is hard-coded, read it off the layer or the tensor: `self.lstm.hidden_size`, `x.shape[1]`"


def vet(model: nn.Module, groups: Sequence[UnitGroup], calls: Mapping[str, Example]) -> dict[str, str]:
    """Tries every group: cuts about half of its units, compares, and puts them back.

    All are tried together first. If that fails, each half of them is, and so on, down to single groups (or packs).
    Groups that are tried together keep different fractions, so that none passes only because another shrinks alike.
    Small weights are made larger for the trial, so that a quiet branch cannot hide a wrong cut.

    Args:
        model: the module that `groups` were found in; left as it was.
        groups: all groups of the model.
        calls: the networks of the model, each with one call.

    Returns:
        Group name -> why it cannot be cut, for those that cannot.
    """
    packs: dict[str, list[UnitGroup]] = {}
    for group in groups:
        packs.setdefault(group.pack or group.name, []).append(group)

    def unfit(together: list[Plan]) -> dict[str, str]:
        plan = Plan({name: keep for each in together for name, keep in each.items()})
        if len(together) == 1:
            plan = _alone([group for group in groups if group.name in plan])
        reason = compare(model, groups, plan, calls)
        if not reason or len(together) == 1:
            return dict.fromkeys(plan, reason) if reason else {}
        middle = len(together) // 2
        return unfit(together[:middle]) | unfit(together[middle:])

    reasons: dict[str, str] = {}
    with loud(model):
        for together in filter(None, _apart(packs.values())):
            reasons |= unfit(together)
    return reasons


def vet_blocks(model: nn.Module, groups: Sequence[UnitGroup], calls: Mapping[str, Example]) -> dict[str, str]:
    """Tries every block alone: without it the network must run, and its outputs keep their shapes.

    Returns:
        Block -> why it cannot be taken out, for those that cannot.
    """
    reasons = {}
    with untouched(model):
        shapes = [output.shape for output in outputs(model, calls)]
        for group in groups:
            for i, path in enumerate(group.blocks):
                with without(model, [group], {group.name: torch.arange(group.size) != i}):
                    try:
                        made = outputs(model, calls)
                    except Exception as error:  # whatever a user's forward raises without a block
                        reasons[path] = _failure(error).replace("them", "it")
                        continue
                if [output.shape for output in made] != shapes:
                    reasons[path] = "the shape of an output changes without it"
                elif not all(bool(output.isfinite().all()) for output in made):
                    reasons[path] = "an output is not finite without it"
    return reasons


def pack_up(
    model: nn.Module, groups: Sequence[UnitGroup], unfit: Mapping[str, str], calls: Mapping[str, Example]
) -> dict[str, str]:
    """Tries groups that cannot be cut alone together with those that may have to shrink with them.

    Attention that is written as `x.view(..., heads, channels // heads)` takes the width of its input for that of its
    heads, and halves of a layer's output (`x.chunk(2)`) must stay halves: they keep the same fraction of their units.

    Args:
        model: the module that `groups` were found in; left as it was.
        groups: all groups of the model.
        unfit: those that cannot be cut alone; what `vet` returned.
        calls: the networks of the model, each with one call.

    Returns:
        Group name -> pack, of those that can be cut together.
    """
    packs: dict[str, str] = {}
    alone = [group for group in groups if group.name in unfit and not group.pack]
    with loud(model):
        for stream in (group for group in alone if group.name not in packs):
            members = [stream, *(group for group in alone if _fills(group, stream) or _beside(group, stream))]
            steps = min(group.size for group in members)
            if len(members) == 1 or steps <= MIN_UNITS or any(group.size % steps for group in members):
                continue
            kept = max(steps // 2, MIN_UNITS)
            plan = {group.name: _spread(group.size, kept * (group.size // steps)) for group in members}
            if not compare(model, groups, plan, calls):
                packs.update(dict.fromkeys(plan, stream.name))
    return packs


def _beside(one: UnitGroup, other: UnitGroup) -> bool:
    """Whether two groups are equal parts of what one layer makes."""
    made = one.name.partition("#")[0] == other.name.partition("#")[0]
    return made and one.size == other.size and one is not other


def _fills(heads: UnitGroup, stream: UnitGroup) -> bool:
    """Whether a group is made of the channels of another one, and is as wide as these."""
    made_of = {span.tensor for span in heads.spans if span.role == "out"}
    reads = any(span.tensor in made_of for span in stream.spans if span.role == "in")
    wide = any(span.index.numel() == stream.size for span in heads.spans if span.role == "in")
    return reads and wide and heads is not stream


def _spread(units: int, kept: int) -> Bool[Tensor, "units"]:
    """Keeps some units, evenly spread."""
    keep = torch.zeros(units, dtype=torch.bool)
    keep[torch.linspace(0, units - 1, kept).round().long()] = True
    return keep


def compare(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    plan: Mapping[str, Bool[Tensor, "units"]],
    calls: Mapping[str, Example],
) -> str:
    """Cuts a plan out of a model, compares it with the model in which nothing reads those units, and puts them back.

    A normalisation that mixes channels only scales and shifts them meanwhile, so the comparison is exact everywhere. It
    is made in eval mode; in the modes the model is in, the cut model must run.

    Returns:
        What is wrong; empty if nothing is.
    """
    modes = {module: module.training for module in model.modules()}
    blocks = {group.name: plan[group.name] for group in groups if group.blocks and group.name in plan}
    standing = renumber(list(groups), blocks)
    left = {group.name for group in standing}
    with untouched(model), without(model, groups, blocks):
        if blocks:
            try:
                outputs(model, calls)
            except Exception as error:  # whatever a user's forward raises without some blocks
                return _failure(error)
        return _compare_units(
            model, standing, {n: m for n, m in plan.items() if n in left - blocks.keys()}, calls, modes
        )


def _failure(error: Exception) -> str:
    """What it says of the cut; where memory ran out, nothing, and it is raised again."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        raise error
    message = (str(error).splitlines() or [""])[0][:100]
    return f"the network fails without them ({type(error).__name__}: {message})"


def _compare_units(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    plan: Mapping[str, Bool[Tensor, "units"]],
    calls: Mapping[str, Example],
    modes: Mapping[nn.Module, bool],
) -> str:
    read = [span.tensor for group in groups if group.name in plan for span in group.spans if span.role == "in"]
    sizes = _Sizes()
    with untied(model, read), unread(model, groups, plan):
        with _unmixed(model, sizes):
            before = outputs(model, calls)
        if not before:  # decoded in eval mode: classes, boxes
            _set_modes(modes if any(modes.values()) else dict.fromkeys(modes, True))
            with _unmixed(model, sizes := _Sizes()):
                before = outputs(model, calls)
        tried = {module: module.training for module in model.modules()}
    cuts = remove_units(model, groups, plan)
    failed = ""
    try:
        with _unmixed(model, sizes.again()):
            after = outputs(model, calls)
        exactly = outputs(model, calls) if _difference(before, after, calls) else []
        if any(modes.values()):
            failed = _failure_in(model, calls, modes)
    except Exception as error:  # whatever a user's forward raises on other widths
        return _failure(error) + HARD_CODED
    finally:
        restore(model, cuts)
        _set_modes(tried)
    if failed and not _failure_in(model, calls, modes):  # else it is not for the cut
        return failed + HARD_CODED
    reason = _difference(before, after, calls)
    if not reason:
        return ""
    # What no matrix reads, and norms that no module computes: the network without those positions, sum by sum.
    with untied(model, read), unread(model, groups, plan), silenced(model, positions_gone(groups, plan)):
        before = outputs(model, calls)
    return reason if _difference(before, exactly, calls) else ""


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def _failure_in(model: nn.Module, calls: Mapping[str, Example], modes: Mapping[nn.Module, bool]) -> str:
    """How the model fails in some modes, empty if it does not: a batch of one, say, has no batch statistics."""
    with untouched(model):
        _set_modes(modes)
        try:
            outputs(model, calls)
        except Exception as error:  # whatever a user's forward raises
            return _failure(error)
    return ""


def _alone(members: Sequence[UnitGroup]) -> Plan:
    """Keeps every other unit, in pairs: neither halves nor a parity hide a mistake. More, where more must stay."""
    plan = Plan()
    for i, group in enumerate(members):
        keep = torch.arange(group.size) % 4 < 2
        keep[(~keep).nonzero().flatten()[: max(group.floor - int(keep.sum()), 0)]] = True
        plan[group.name] = keep.roll(i)
    return plan


def _apart(packs: Iterable[Sequence[UnitGroup]]) -> list[list[Plan]]:
    """Plans for single packs, in rounds: in one round are no two of the same layer, and few that keep the same part."""
    rounds: list[list[Plan]] = []
    turns, draw = Counter[int](), torch.Generator().manual_seed(0)
    for members in packs:
        size, floor = members[0].size, max(group.floor for group in members)
        # A fraction in lowest terms is that of no smaller group. Of one size, the next takes another, or another round.
        counts = sorted(
            range(floor, size), key=lambda n: (math.gcd(n, members[0].size) > 1, abs(2 * n - members[0].size))
        )
        turn, number = divmod(turns[size] // (1 if size < MANY else 4), len(counts))
        turns[size] += 1
        turn += int(members[0].name.partition("#")[2] or 1) - 1
        rounds += [[] for _ in range(turn + 1 - len(rounds))]
        keeps = [torch.randperm(size, generator=draw) < counts[number] for _ in members]
        rounds[turn].append(Plan({group.name: keep for group, keep in zip(members, keeps, strict=True)}))
    return rounds


def outputs(model: nn.Module, calls: Mapping[str, Example]) -> list[Tensor]:
    """What the networks return for their calls, in the modes they are in: tensors of numbers only."""
    made: list[Tensor] = []
    step = step_of(calls)
    if step is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [leaf for leaf in step() if is_real(leaf)]
    for name, call in ((name, each) for name, known in calls.items() for each in known.each):
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):  # a network may take gradients itself
            torch.manual_seed(0)
            output = model.get_submodule(name)(*call.args, **call.kwargs)
            made.extend(leaf.detach() for leaf in tree_leaves(output) if is_real(leaf))
    return made


def is_real(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _difference(before: list[Tensor], after: list[Tensor], calls: Mapping[str, Example]) -> str:
    pairs = list(zip(before, after, strict=False))
    if step_of(calls) is not None and len(before) == len(after):
        pairs = [(a, b) for a, b in pairs if a.shape == b.shape]  # what goes from one network to another may shrink
    elif [t.shape for t in before] != [t.shape for t in after]:
        return "the shape of an output changes with them"
    for a, b in pairs:
        if bool(a.isfinite().all()) and not bool(b.isfinite().all()):
            return "an output is not finite without them"
        error = float((a - b).abs().max()) / (float(a.abs().max()) + 1e-12) if a.numel() else 0.0
        if error > max(1e-3, 8 * torch.finfo(a.dtype).eps):
            return f"the outputs change by {error:.0%} where nothing reads them"
    return ""


class _Sizes:
    """How large signals are where they are normalised, call by call: measured in a first run, and the same in another.

    Divided by it, they neither grow nor fade on their way through many layers, which rounding would not survive.
    """

    def __init__(self) -> None:
        self.known: dict[nn.Module, list[float]] = {}
        self.turns: dict[nn.Module, Iterator[float]] | None = None

    def again(self) -> _Sizes:
        """For another run."""
        self.turns = {module: iter(known) for module, known in self.known.items()}
        return self

    def of(self, module: nn.Module, signal: Tensor) -> float:
        if self.turns is not None:
            return next(self.turns.get(module, iter(())), 1.0)
        transformed = torch._C._functorch.maybe_current_level() is not None  # by `vmap`: it has no size of its own
        size = 1.0 if transformed else float(signal.detach().square().mean().sqrt())
        self.known.setdefault(module, []).append(size if 0 < size < math.inf else 1.0)
        return self.known[module][-1]


@contextmanager
def _unmixed(model: nn.Module, sizes: _Sizes | None = None) -> Iterator[None]:
    """Normalisations that mix channels only scale and shift them, for the time being."""

    def scale_and_shift(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        held = next((p for p in (weight, bias) if p is not None), None)
        first = isinstance(module, nn.GroupNorm) or (held is not None and args[0].shape[-held.ndim :] != held.shape)
        last = not first  # where the channels are: at the end, or at axis 1
        shape = (-1, *[1] * (output.ndim - 2))
        signal = args[0] if sizes is None else args[0] / sizes.of(module, args[0])
        scaled = signal if weight is None else signal * weight.view(weight.shape if last else shape)
        return scaled if bias is None else scaled + bias.view(bias.shape if last else shape)

    mixing = [m for m in model.modules() if (kind := layer_kind(m)) is not None and kind.mixes_channels]
    handles = [module.register_forward_hook(scale_and_shift) for module in mixing]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
@torch.no_grad()
def loud(model: nn.Module) -> Iterator[None]:
    """Makes quiet weights loud, for the time being.

    Zeros become random numbers; matrices get at least the size at which signals neither fade nor explode. Otherwise a
    branch that is multiplied by zero, or attention that is still uniform, could hide a wrong cut.
    """
    noisy: list[tuple[nn.Parameter, Tensor]] = []
    scaled: list[tuple[nn.Parameter, float]] = []
    try:
        with torch.random.fork_rng(devices=[]):
            for p in (p for p in model.parameters() if p.is_floating_point() and p.numel()):
                target = LOUDNESS * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.0)
                size = float(p.square().mean().sqrt())
                if size < 1e-3:
                    noisy.append((p, p.detach().clone()))
                    p.copy_(torch.randn(p.shape) * (target or 0.1))
                elif size < target:  # by a power of two, which is undone to the bit, without a copy
                    scaled.append((p, 2.0 ** math.ceil(math.log2(target / size))))
                    p.mul_(scaled[-1][1])
        yield
    finally:
        for p, value in noisy:
            p.copy_(value)
        for p, factor in scaled:
            p.div_(factor)
        settle(model)
