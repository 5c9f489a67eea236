"""Finds which channels hang together, by walking torch-pruning's dependency graph.

torch-pruning traces the network and knows how indices travel through concatenations, splits and flattenings. It never
changes the model here: its graph is only walked. Every (layer side, channel) is a point, every dependency an edge, and
the connected components are what must live or die together. This is the one file that imports torch_pruning.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from lightning_slim.eager import eagerly
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.units import Role

MAX_POINTS = 2_000_000  # beyond this an index mapping has gone astray; ResNet-152 has about 200,000


class Example(NamedTuple):
    """One call of a network: `network(*args, **kwargs)`.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        samples: how many samples of a batch are in it, if that is known; MACs are counted for one.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}
    samples: int = 1


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
        fixed: an input or an output of the network is among them, so they must live.
    """

    channels: list[Channel]
    fixed: bool


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
    """
    graph, fixed = _trace(model, example)
    names = {module: name for name, module in model.named_modules()}
    components = [
        Component(
            list(_channels(graph, names, points)),
            any(point.role == "out" and point.node.grad_fn in fixed for point in points),
        )
        for points in _components(graph)
    ]
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


# --- tracing ---------------------------------------------------------------------------------------------------------


def _trace(model: nn.Module, example: Example) -> tuple[Any, set[Any]]:
    """torch-pruning's graph, and the autograd nodes whose channels an input or output of the network fixes."""
    import torch_pruning as tp

    traced = _Traced(model)
    inputs: list[Tensor] = []

    def follow(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
            return leaf
        inputs.append(traced.let_in(leaf.detach().requires_grad_()))
        return inputs[-1]

    outputs: list[Tensor] = []

    def tensors(output: Any) -> list[Tensor]:
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        outputs.extend(leaves)
        return leaves

    def forward(*_: Any) -> Any:
        args, kwargs = tree_map(follow, (example.args, dict(example.kwargs)))
        return model(*args, **kwargs)

    for leaf in tree_leaves(tuple(example)):
        traced.announce(leaf)
    with untouched(model):
        graph = tp.DependencyGraph().build_dependency(
            traced,
            example_inputs=None,
            forward_fn=forward,
            output_transform=tensors,
            verbose=False,
            customized_pruners={_Input: _InputWidth()},
        )
    if not outputs:
        raise ValueError(
            f"Expected {type(model).__name__} to return a tensor that depends on its weights, got none: "
            "prune a submodule whose output does."
        )
    return graph, {tensor.grad_fn for tensor in (*inputs, *outputs)}


class _Input(nn.Module):
    """Stands where an input enters: torch-pruning skips leaves, and could not tell what is added to one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class _InputWidth:
    """What torch-pruning asks of a layer, of an input; nothing is ever pruned by it."""

    def prune_out_channels(self, layer: _Input, indices: Any) -> _Input:
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: _Input) -> int:
        return layer.width

    get_in_channels = get_out_channels


class _Traced(nn.Module):
    """A network with its inputs as modules."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.inputs = nn.ModuleList()
        self.entered = 0

    def announce(self, leaf: Any) -> None:
        """Makes room for an input before tracing begins: hooks are set then."""
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            self.inputs.append(_Input(leaf.shape[1] if leaf.ndim > 1 else leaf.numel()))

    def let_in(self, leaf: Tensor) -> Tensor:
        """The next input, as it enters the network."""
        self.entered += 1
        entered: Tensor = self.inputs[self.entered - 1](leaf)
        return entered


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode, and gradients everywhere (tracing wants them); afterwards nothing of it is left."""
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            eagerly(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            model.eval()
            for p in frozen:
                p.requires_grad_(True)
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


# --- components ------------------------------------------------------------------------------------------------------


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

    def add(self, point: _Point) -> bool:
        """Whether the point is new."""
        if point in self.ids:
            return False
        if len(self.parent) >= MAX_POINTS:
            raise RuntimeError(f"More than {MAX_POINTS} coupled channels: an index mapping does not terminate.")
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


def _components(graph: Any) -> list[list[_Point]]:
    """Every set of channels that must live or die together."""
    points = _Points()
    for module, node in list(graph.module2node.items()):
        makes_channels = isinstance(module, nn.Module) and layer_kind(module) is not None
        if makes_channels:
            count = graph.get_out_channels(module) or 0
            _spread(graph, points, node, [_Point(node, "out", channel) for channel in range(count)])
    components: defaultdict[int, list[_Point]] = defaultdict(list)
    for point in points.ids:
        components[points.find(point)].append(point)
    return list(components.values())


def _spread(graph: Any, points: _Points, node: Any, start: list[_Point]) -> None:
    """Joins the points of `start` with all that they are coupled to, however far."""
    role: Role = "out"
    frontier = [(node, role, [p.channel for p in start if points.add(p)])]
    while frontier:
        node, role, channels = frontier.pop()
        for target, target_role, pairs in _edges(graph, node, role, channels):
            fresh = []
            for source, reached in pairs:
                point = _Point(target, target_role, reached)
                if points.add(point):
                    fresh.append(reached)
                points.join(_Point(node, role, source), point)
            if fresh:
                frontier.append((target, target_role, fresh))


def _edges(graph: Any, node: Any, role: Role, channels: list[int]) -> Iterator[tuple[Any, Role, list[tuple[int, int]]]]:
    """The neighbours of some channels of one side of a node: (node, side, pairs of channel and neighbour)."""
    from torch_pruning._helpers import _HybridIndex

    trigger = _handler(graph, node, role)
    for dependency in node.dependencies:
        if dependency.trigger == trigger:
            indices = [_HybridIndex(idx=c, root_idx=c) for c in channels]
            for mapping in dependency.index_mapping:
                indices = indices if mapping is None else mapping(indices)
            pairs = [(i.root_idx, i.idx) for i in indices if i.root_idx is not None]
            yield dependency.target, _role(graph, dependency.target, dependency.handler), pairs
    kind = layer_kind(node.module) if isinstance(node.module, nn.Module) else None
    chunks = kind.chunks(node.module, role) if kind else 1
    if chunks > 1:
        total = graph.get_out_channels(node) if role == "out" else graph.get_in_channels(node)
        step = total // chunks
        yield node, role, [(c, c % step + chunk * step) for c in channels for chunk in range(chunks)]


def _handler(graph: Any, node: Any, role: Role) -> Any:
    pruner = graph.get_pruner_of_module(node.module)
    return pruner.prune_out_channels if role == "out" else pruner.prune_in_channels


def _role(graph: Any, node: Any, handler: Any) -> Role:
    """Layers that carry channels have one side only; it is called "out"."""
    return "out" if handler == _handler(graph, node, "out") else "in"
