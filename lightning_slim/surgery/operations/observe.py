"""What hangs together in a network, by what it computes: the positions of its tensors that live or die together."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_slim.costs import Factor, Product
from lightning_slim.surgery.example import untouched
from lightning_slim.surgery.operations.positions import Axis, Positions
from lightning_slim.surgery.operations.record import Watcher, slowly
from lightning_slim.surgery.operations.recurrent import unrolled

LEAVES = "it reaches an input or an output of the network"
STATE = (
    "it is the hidden state of a recurrent layer, which the network returns: code outside may feed it back at its old "
    "width; to prune the layer, do not return its state"
)

Run = Callable[[], Any]


class Place(NamedTuple):
    """Positions of components along one axis.

    Attributes:
        axis: of which tensor.
        at: (components, positions): a row for each, rising.
        made: whether they are what a weight makes.
        read: whether they are what a weight reads.
    """

    axis: Axis
    at: Tensor
    made: bool
    read: bool


@dataclass(frozen=True)
class Bundle:
    """Components along the same axes; the positions of a component live or die together.

    Attributes:
        places: where they are.
        fixed: of each, why it must live; empty if it need not.
    """

    places: list[Place]
    fixed: list[str]


@dataclass(frozen=True)
class Observation:
    """What a network showed while it computed.

    Attributes:
        bundles: of all positions that something makes.
        normalised_by: name of a layer's weight -> name of a weight of the batch norm that alone takes in what it makes.
        positions: what is known of each.
        alone: by label, its component before the rows of one axis (heads, groups) had to lose the same columns.
        parts: grids of labels: equal parts of an axis that is split, every one of which must lose as many.
        products: module -> what it carried out itself in eval mode.
    """

    bundles: list[Bundle]
    normalised_by: dict[str, str]
    positions: Positions
    alone: Tensor
    parts: list[Tensor]
    products: dict[str, list[Product]]

    def labels(self, tensor: str, axis: int) -> Tensor:
        """Of all positions along an axis; none along one of size 1."""
        found = self._axes.get((tensor, axis))
        return torch.zeros(0, dtype=torch.long) if found is None else found.labels

    def first_name(self, tensor: str, axis: int) -> str:
        """Of a tensor's names."""
        found = self._axes.get((tensor, axis))
        return tensor if found is None else found.names[0]

    @cached_property
    def touched(self) -> set[str]:
        """Names of the tensors that any operation took in."""
        held = self.positions.of_tensor.items()
        return {name for key, axes in held if key in self.positions.touched for axis in axes for name in axis.names}

    def is_used(self, tensor: str, axis: int) -> bool:
        """Whether anything was made or read along an axis."""
        labels = self.labels(tensor, axis)
        return bool((self.positions.made | self.positions.read)[labels].any())

    def trains(self, tensor: str, axis: int) -> bool:
        """Whether anything was made or read along an axis while gradients were on."""
        return bool(self.positions.trained[self.labels(tensor, axis)].any())

    def places(self, labels: Tensor) -> set[tuple[str, int, int]]:
        """(tensor, axis, position) of labels, under the first name of each tensor."""
        held = ((label, self._holders[label]) for label in labels.flatten().tolist() if label > 0)
        return {(axis.names[0], axis.number, label - axis.first) for label, axis in held}

    def beside(self, tensor: str, axis: int, at: Tensor) -> dict[tuple[str, int], list[int]]:
        """(tensor, axis) -> positions that hang together with some positions of a tensor, these included."""
        roots = set(self.alone[self.labels(tensor, axis)[at]].tolist())
        found: dict[tuple[str, int], list[int]] = {}
        for label in (label for root in roots for label in self._members[root]):
            held = self._holders[label]
            for name in held.names:
                found.setdefault((name, held.number), []).append(label - held.first)
        return found

    @property
    def sites(self) -> Iterable[tuple[str, int]]:
        """(tensor, axis) of all that is labelled."""
        return self._axes.keys()

    @cached_property
    def _axes(self) -> dict[tuple[str, int], Axis]:
        return {(name, axis.number): axis for axis in self.positions.axes for name in axis.names}

    @cached_property
    def _holders(self) -> dict[int, Axis]:
        return {label: axis for axis in self.positions.axes for label in range(axis.first, axis.first + axis.size)}

    @cached_property
    def _members(self) -> dict[int, list[int]]:
        members: dict[int, list[int]] = {}
        for label, root in enumerate(self.alone.tolist()):
            members.setdefault(root, []).append(label)
        return members


def observe(model: nn.Module, runs: Sequence[Run], networks: Sequence[str] = ("",)) -> Observation:
    """Lets a network compute, and looks on.

    Args:
        model: whose positions are followed; its weights, modes, buffers and the random state are left as they are.
        runs: each lets it compute once, in the modes that it sets.
        networks: names of the modules whose outputs are used as they are, unless another of them reads these.

    Raises:
        Exception: whatever the first run raises. A later one may fail: then all is known that came before.
    """
    watcher = Watcher(model)
    with (
        untouched(model),
        slowly(),
        unrolled(model, watcher),
        _placed(model, watcher),
        _leaving(model, watcher, networks),
    ):
        for number, run in enumerate(runs):
            try:
                with warnings.catch_warnings(), watcher:
                    warnings.simplefilter("ignore")
                    run()
            except Exception as error:  # noqa: PERF203 - in train mode, say, a batch of one has no statistics
                if number == 0 or isinstance(error, MemoryError):
                    raise
    alone = watcher.positions.find(watcher.positions.parent).clone()
    parts = list(watcher.algebra.parts.values())
    bundles = _bundles(watcher)
    return Observation(bundles, watcher.normalised(), watcher.positions, alone, parts, _products(watcher))


def _products(watcher: Watcher) -> dict[str, list[Product]]:
    """Module -> its products, with the indices that go with positions."""
    axes = watcher.positions.axes
    firsts = torch.tensor([axis.first for axis in axes])
    found: dict[str, list[Product]] = {}
    for module, macs, indices in watcher.products:
        factors = []
        for labels in indices:
            flat = labels.flatten()
            held = torch.searchsorted(firsts, flat[flat > 0], right=True) - 1
            at = {
                (axes[i].names[0], axes[i].number): flat[flat > 0][held == i] - axes[i].first
                for i in held.unique().tolist()  # type: ignore[no-untyped-call]
            }
            factors.append(Factor(flat.numel(), at))
        if macs:
            found.setdefault(module, []).append(Product(macs, factors))
    return found


@contextmanager
def _placed(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    """The watcher knows which module is running."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # has no such hooks: what holds it is running
                continue

            def enter(_: nn.Module, args: Any, name: str = name) -> None:
                watcher.within.append(name)

            def leave(_: nn.Module, args: Any, output: Any) -> None:
                watcher.within.pop()

            for handle in (
                module.register_forward_pre_hook(enter, prepend=True),
                module.register_forward_hook(leave, always_call=True),
            ):
                stack.callback(handle.remove)
        yield


@contextmanager
def _leaving(model: nn.Module, watcher: Watcher, networks: Sequence[str]) -> Iterator[None]:
    """What the networks return must stay, unless another one is called with it."""
    positions = watcher.positions
    told, passed, states = (torch.zeros_like(positions.made) for _ in range(3))
    depth = [0]

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if depth[0] == 0:
            note(passed, (args, kwargs))
        depth[0] += 1

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        depth[0] -= 1
        if depth[0] == 0:
            note(told, output)

    def note(flags: Tensor, value: Any) -> None:
        with _disable_current_modes():
            for tensor in (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
                for layer in watcher.of(tensor).layers:
                    positions.note(flags, layer)
                    if flags is told and watcher.is_state(tensor):
                        positions.note(states, layer)

    with ExitStack() as stack:
        for name in networks:
            module = model.get_submodule(name)
            for handle in (
                module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
                module.register_forward_hook(leave, always_call=True),
            ):
                stack.callback(handle.remove)
        yield
    beyond = _read_beyond(positions, tuple(f"{name}." if name else "" for name in networks))
    leaves = told & ~passed & ~beyond
    positions.block((leaves & states).nonzero().flatten(), STATE)
    positions.block(leaves.nonzero().flatten(), LEAVES)


def _read_beyond(positions: Positions, inside: tuple[str, ...]) -> Tensor:
    """By label, whether a weight that is in no network reads it: it is no output then."""
    beyond, found = (torch.zeros_like(positions.made) for _ in range(2))
    for axis in positions.axes:
        if not axis.names[0].startswith(inside):
            beyond[axis.first : axis.first + axis.size] = True
    roots = positions.find(positions.parent)
    found[roots[beyond & positions.read]] = True
    return found[roots]


def _in_step(positions: Positions, grid: Tensor) -> None:
    """Every row must lose the same columns."""
    for row in grid[1:]:
        positions.unite(grid[0], row, "view")


def _bundles(watcher: Watcher) -> list[Bundle]:
    """Of everything that a weight makes."""
    positions = watcher.positions
    for grid in watcher.algebra.rows.values():
        roots = positions.find(grid)
        if not bool((roots == roots[:, :1]).all()):  # else whole rows go
            _in_step(positions, grid)
    for grid in watcher.algebra.parts.values():
        roots = positions.find(grid)
        if len(set(roots.flatten().tolist())) < roots.numel() or bool(
            (grid <= 0).any()
        ):  # some of one part hang on another one
            _in_step(positions, grid)
    roots = positions.find(positions.parent)
    made, summed = (torch.zeros_like(positions.made) for _ in range(2))
    made[roots[positions.made]] = True
    summed[roots[positions.summed]] = True
    reasons, taken_in = positions.reasons(), summed.tolist()

    def fixed(root: int) -> str:
        return reasons.get(root, "" if taken_in[root] else "no sum takes it in: it leaves by a way that was not seen")

    found = [
        (int(root[0]), Bundle(places, list(map(fixed, root.tolist()))))
        for root, places in _alike(positions, roots, made)
    ]
    return [bundle for _, bundle in sorted(found, key=lambda each: each[0])]


def _alike(positions: Positions, roots: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, list[Place]]]:
    """The roots of components along the same axes, and where these components are."""
    owners, at, codes = [], [], []  # of every position: its root, where it is, and of what axis and what use
    used = torch.zeros_like(wanted)
    for number, axis in enumerate(positions.axes):
        own = slice(axis.first, axis.first + axis.size)
        mine = roots[own]
        chosen = wanted[mine].nonzero().flatten()
        code = torch.full_like(chosen, 4 * number)
        for bit, flags in ((1, positions.made), (2, positions.read)):
            used[mine[flags[own]]] = True
            code += bit * used[mine[chosen]]
            used[mine] = False
        owners.append(mine[chosen])
        at.append(chosen)
        codes.append(code)
    order = torch.cat(owners).argsort(stable=True) if owners else torch.zeros(0, dtype=torch.long)
    if not len(order):
        return
    owner, where, code = (torch.cat(each)[order] for each in (owners, at, codes))
    root, counts = owner.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
    ends = counts.cumsum(0)
    for count in counts.unique().tolist():
        of_count = counts == count
        rows = ends[of_count, None] - count + torch.arange(count)
        kinds, kind = torch.unique(code[rows], dim=0, return_inverse=True)
        by_kind = kind.argsort(stable=True).split(torch.bincount(kind).tolist())
        for axes, members in zip(kinds.tolist(), by_kind, strict=True):
            places, begin = [], 0
            for key, width in Counter(axes).items():
                held = where[rows[members, begin : begin + width]]
                places.append(Place(positions.axes[key // 4], held, bool(key & 1), bool(key & 2)))
                begin += width
            yield root[of_count][members], places
