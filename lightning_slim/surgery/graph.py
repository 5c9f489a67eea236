"""Finds which channels hang together, by walking torch-pruning's dependency graph.

Every (layer side, channel) is a point, every dependency an edge, and the connected components are what must live or die
together. Of torch-pruning, only the graph is used (see `tracing`); its pruners are never run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_slim.surgery.layers import layer_kind
from lightning_slim.surgery.tracing import Example, UntraceableError, trace
from lightning_slim.units import Role

MAX_POINTS = 2_000_000  # beyond this an index mapping has gone astray; ResNet-152 has about 200,000


class Channel(NamedTuple):
    """One channel of one side of a layer, or one position of a bare parameter.

    Attributes:
        owner: dotted name of the module, or of the parameter if `axis` is given.
        role: `"out"`: the layer makes or carries it; `"in"`: the layer reads it.
        number: which channel.
        axis: the axis of the parameter; None for a module.
    """

    owner: str
    role: Role
    number: int
    axis: int | None = None


class Component(NamedTuple):
    """Channels that must live or die together.

    Attributes:
        channels: all of them.
        fixed: why they must live, such as that an output of the network is among them; empty if they need not.
    """

    channels: list[Channel]
    fixed: str


@dataclass(frozen=True)
class Coupling:
    """What a traced network says about its channels.

    Attributes:
        components: every channel that was met is in exactly one.
        normalised_by: layer -> the batch normalisation that alone reads its output.
    """

    components: list[Component]
    normalised_by: dict[str, str]


def find_coupling(model: nn.Module, example: Example) -> Coupling:
    """Traces a network and returns which of its channels hang together.

    Args:
        model: the network; its weights, modes, `requires_grad` flags and the random state are left as they are.
        example: one call of it.

    Raises:
        UntraceableError: torch-pruning cannot build the graph.
    """
    graph, fixed = trace(model, example)
    names = {module: name for name, module in model.named_modules()}
    components = []
    for points, astray in _components(graph):
        reason = "torch-pruning cannot follow its channels" if astray else ""
        if any(point.role == "out" and point.node.grad_fn in fixed for point in points):
            reason = "it reaches an input or an output of the network"
        components.append(Component(list(_channels(graph, names, points)), reason))
    return Coupling(components, _normalised_by(graph, names))


def _channels(graph: Any, names: Mapping[nn.Module, str], points: list[_Point]) -> Iterator[Channel]:
    """The points that are layers or parameters; the others are operations such as an addition."""
    for node, role, index in points:
        if isinstance(node.module, nn.Parameter):
            name = graph._param_to_name[node.module].removeprefix("network.")
            yield Channel(name, "out", index, node.pruning_dim)
        elif node.module in names:
            yield Channel(names[node.module], role, index)


def _normalised_by(graph: Any, names: Mapping[nn.Module, str]) -> dict[str, str]:
    return {
        names[module]: names[node.outputs[0].module]
        for module, node in graph.module2node.items()
        if module in names and len(node.outputs) == 1 and isinstance(node.outputs[0].module, _BatchNorm)
    }


class _Point(NamedTuple):
    """One channel of one side of one node of the graph."""

    node: Any
    role: Role
    channel: int


class _Points:
    """Disjoint sets of points (union-find with path halving)."""

    def __init__(self) -> None:
        self.ids: dict[_Point, int] = {}
        self.parent: list[int] = []
        self.astray: set[_Point] = set()  # what they are coupled to could not be found out

    def add(self, point: _Point) -> bool:
        """Whether the point is new."""
        if point in self.ids:
            return False
        if len(self.parent) >= MAX_POINTS:
            raise UntraceableError(f"it has more than {MAX_POINTS} coupled channels: an index mapping went astray")
        self.ids[point] = len(self.parent)
        self.parent.append(len(self.parent))
        return True

    def find(self, point: _Point) -> int:
        i = self.ids[point]
        while self.parent[i] != i:
            self.parent[i] = i = self.parent[self.parent[i]]
        return i

    def join(self, a: _Point, b: _Point) -> None:
        self.parent[self.find(a)] = self.find(b)


def _components(graph: Any) -> Iterator[tuple[list[_Point], bool]]:
    """Every set of channels that must live or die together, and whether some of it may have been missed."""
    points = _Points()
    for module, node in list(graph.module2node.items()):
        makes_channels = isinstance(module, nn.Module) and layer_kind(module) is not None
        if makes_channels:
            count = graph.get_out_channels(module) or 0
            _spread(graph, points, node, [_Point(node, "out", channel) for channel in range(count)])
    components: defaultdict[int, list[_Point]] = defaultdict(list)
    for point in points.ids:
        components[points.find(point)].append(point)
    yield from ((members, not points.astray.isdisjoint(members)) for members in components.values())


def _spread(graph: Any, points: _Points, node: Any, start: list[_Point]) -> None:
    """Joins the points of `start` with all that they are coupled to, however far."""
    role: Role = "out"
    frontier = [(node, role, [p.channel for p in start if points.add(p)])]
    while frontier:
        node, role, channels = frontier.pop()
        for target, target_role, pairs in _edges(graph, points, node, role, channels):
            fresh = []
            for source, reached in pairs:
                point = _Point(target, target_role, reached)
                if points.add(point):
                    fresh.append(reached)
                points.join(_Point(node, role, source), point)
            if fresh:
                frontier.append((target, target_role, fresh))


def _edges(
    graph: Any, points: _Points, node: Any, role: Role, channels: list[int]
) -> Iterator[tuple[Any, Role, list[tuple[int, int]]]]:
    """The neighbours of some channels of one side of a node: (node, side, pairs of channel and neighbour)."""
    from torch_pruning._helpers import _HybridIndex

    trigger = _handler(graph, node, role)
    for dependency in node.dependencies:
        if dependency.trigger == trigger:
            indices = [_HybridIndex(idx=c, root_idx=c) for c in channels]
            try:
                for mapping in dependency.index_mapping:
                    if mapping is not None and not _slices_something_else(graph, mapping, node, dependency.target):
                        indices = mapping(indices)
            except (IndexError, TypeError, ZeroDivisionError):  # torch-pruning's guess at a view or split does not fit
                points.astray.update(_Point(node, role, channel) for channel in channels)
                continue
            pairs = [(i.root_idx, i.idx) for i in indices if i.root_idx is not None]
            yield dependency.target, _role(graph, dependency.target, dependency.handler), pairs
    kind = layer_kind(node.module) if isinstance(node.module, nn.Module) else None
    families = kind.families(node.module, role) if kind else None
    if families is not None:
        members: defaultdict[int, list[int]] = defaultdict(list)
        for channel, family in enumerate(families.tolist()):
            members[family].append(channel)
        known = [c for c in channels if c < len(families)]
        yield node, role, [(c, other) for c in known for other in members[int(families[c])]]


def _slices_something_else(graph: Any, mapping: Any, *nodes: Any) -> bool:
    """Whether a mapping is that of a slice of steps, pixels or samples: torch-pruning takes any for channels."""
    from torch_pruning.dependency.index_mapping import _SliceIndexMapping
    from torch_pruning.dependency.shape_infer import infer_out_channels_recursively

    if not isinstance(mapping, _SliceIndexMapping):
        return False
    node = next(
        node for node in nodes if hasattr(node.grad_fn, "_saved_self_sym_sizes") and hasattr(node.module, "dim")
    )
    sizes = node.grad_fn._saved_self_sym_sizes
    dim = node.module.dim if node.module.dim < len(sizes) else node.module.dim - 2**64 + len(sizes)
    widths = [infer_out_channels_recursively(graph, source, [0]) for source in node.inputs]
    return dim == 0 or any(width is not None and width != sizes[dim] for width in widths)


def _handler(graph: Any, node: Any, role: Role) -> Any:
    pruner = graph.get_pruner_of_module(node.module)
    return pruner.prune_out_channels if role == "out" else pruner.prune_in_channels


def _role(graph: Any, node: Any, handler: Any) -> Role:
    """Layers that carry channels have one side only; it is called "out"."""
    return "out" if handler == _handler(graph, node, "out") else "in"
