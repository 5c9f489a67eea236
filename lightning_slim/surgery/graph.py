"""Finds which channels hang together, by walking torch-pruning's dependency graph.

Every (layer side, channel) is a point, every dependency an edge, and the connected components are what must live or die
together. Of torch-pruning, only the graph is used (see `tracing`); its pruners are never run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_slim.surgery.example import Example
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.surgery.tracing import UntraceableError, trace
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
    owners = {node: _owner(graph, names, node) for node in graph.module2node.values()}
    components = []
    for points, astray in _components(graph):
        reason = "torch-pruning cannot follow its channels" if astray else ""
        if any(role == "out" and node.grad_fn in fixed for node, role, _ in points):
            reason = "it reaches an input or an output of the network"
        channels = [Channel(owner[0], role, c, owner[1]) for node, role, c in points if (owner := owners[node])]
        components.append(Component(channels, reason))
    return Coupling(components, _normalised_by(graph, names))


def _owner(graph: Any, names: Mapping[nn.Module, str], node: Any) -> tuple[str, int | None] | None:
    """The layer of a node, or the parameter and its axis; None if it is an operation such as an addition."""
    if isinstance(node.module, nn.Parameter):
        return graph._param_to_name[node.module].removeprefix("network."), node.pruning_dim
    return (names[node.module], None) if node.module in names else None


def _normalised_by(graph: Any, names: Mapping[nn.Module, str]) -> dict[str, str]:
    return {
        names[module]: names[node.outputs[0].module]
        for module, node in graph.module2node.items()
        if module in names and len(node.outputs) == 1 and isinstance(node.outputs[0].module, _BatchNorm)
    }


Side = tuple[Any, Role]  # a node of the graph, and one side of it
Point = tuple[Any, Role, int]  # one channel of a side


class _Points:
    """Disjoint sets of channels of sides (union-find with path halving)."""

    def __init__(self, single: set[Any]) -> None:
        self.single = single  # nodes of one channel
        self.ids: defaultdict[Side, dict[int, int]] = defaultdict(dict)  # side -> channel -> number of the point
        self.parent: list[int] = []
        self.astray: set[int] = set()  # what they are coupled to could not be found out

    def add(self, side: Side, channel: int) -> bool:
        """Whether the channel is new there."""
        known = self.ids[side]
        if channel in known:
            return False
        if len(self.parent) >= MAX_POINTS:
            raise UntraceableError(f"it has more than {MAX_POINTS} coupled channels: an index mapping went astray")
        known[channel] = len(self.parent)
        self.parent.append(len(self.parent))
        return True

    def find(self, i: int) -> int:
        parent = self.parent
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i


def _components(graph: Any) -> Iterator[tuple[list[Point], bool]]:
    """Every set of channels that must live or die together, and whether some of it may have been missed."""
    points = _Points(_single(graph))
    for module, node in list(graph.module2node.items()):
        makes_channels = type(module) is not nn.Parameter and layer_kind(module) is not None
        if makes_channels:
            _spread(graph, points, node, range(graph.get_out_channels(module) or 0))
    members: defaultdict[int, list[Point]] = defaultdict(list)
    for (node, role), channels in points.ids.items():
        for channel, i in channels.items():
            members[points.find(i)].append((node, role, channel))
    astray = {points.find(i) for i in points.astray}
    yield from ((channels, root in astray) for root, channels in members.items())


def _single(graph: Any) -> set[Any]:
    """Nodes of one channel: layers that make one, and operations on nothing else."""
    known: dict[Any, bool] = {}
    for start in graph.module2node.values():
        stack = [start]
        while stack:
            node = stack[-1]
            unknown = [source for source in node.inputs if source not in known and source not in stack]
            channels = None if isinstance(node.module, nn.Parameter) else graph.get_out_channels(node)
            if node in known or channels is not None or not unknown:
                inputs = [known.get(source, False) for source in node.inputs]
                known.setdefault(node, channels == 1 if channels is not None else bool(inputs) and all(inputs))
                stack.pop()
            else:
                stack += unknown
    return {node for node, single in known.items() if single}


def _broadcasts(single: set[Any], one: Any, other: Any) -> bool:
    """Whether one channel meets many in an operation: a gate, an attention pooling. They are not coupled."""
    wide = other if one in single else one
    is_layer = isinstance(wide.module, nn.Parameter) or layer_kind(wide.module) is not None
    return (one in single) != (other in single) and not is_layer


def _spread(graph: Any, points: _Points, node: Any, channels: Iterable[int]) -> None:
    """Joins channels that a layer makes with all that they are coupled to, however far."""
    role: Role = "out"
    frontier = [(node, role, [c for c in channels if points.add((node, role), c)])]
    while frontier:
        node, role, start = frontier.pop()
        here = points.ids[node, role]
        for target, target_role, pairs in _edges(graph, points, node, role, start):
            side = (target, target_role)
            there, fresh = points.ids[side], []
            for source, reached in pairs:
                if points.add(side, reached):
                    fresh.append(reached)
                points.parent[points.find(here[source])] = points.find(there[reached])
            if fresh:
                frontier.append((target, target_role, fresh))


def _edges(
    graph: Any, points: _Points, node: Any, role: Role, channels: list[int]
) -> Iterator[tuple[Any, Role, Iterable[tuple[int, int]]]]:
    """The neighbours of some channels of one side of a node: (node, side, pairs of channel and neighbour)."""
    from torch_pruning._helpers import _HybridIndex

    trigger = _handler(graph, node, role)
    for dependency in node.dependencies:
        if dependency.trigger == trigger:
            target_role = _role(graph, dependency.target, dependency.handler)
            if "in" not in (role, target_role) and _broadcasts(points.single, node, dependency.target):
                continue
            mappings = [
                mapping
                for mapping in dependency.index_mapping
                if mapping is not None and not _slices_something_else(graph, mapping, node, dependency.target)
            ]
            pairs: Iterable[tuple[int, int]] = zip(channels, channels, strict=True)
            if mappings:
                indices = [_HybridIndex(idx=c, root_idx=c) for c in channels]
                try:
                    for mapping in mappings:
                        indices = mapping(indices)
                except (IndexError, TypeError, ZeroDivisionError):  # its guess at a view or split does not fit
                    points.astray.update(points.ids[node, role][channel] for channel in channels)
                    continue
                pairs = [(i.root_idx, i.idx) for i in indices if i.root_idx is not None]
            yield dependency.target, target_role, pairs
    kind = None if type(node.module) is nn.Parameter else layer_kind(node.module)
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
