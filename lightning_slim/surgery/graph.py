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
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_slim.eager import eagerly
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.surgery.layers.recurrent import opaque
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


class UntraceableError(ValueError):
    """The dependency graph of a network cannot be built."""


def find_coupling(model: nn.Module, example: Example) -> Coupling:
    """Traces a network and returns which of its channels hang together.

    Args:
        model: the network; its weights, modes, `requires_grad` flags and the random state are left as they are.
        example: one call of it.

    Raises:
        UntraceableError: torch-pruning cannot build the graph.
    """
    graph, fixed = _trace(model, example)
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


# --- tracing ---------------------------------------------------------------------------------------------------------


def _trace(model: nn.Module, example: Example) -> tuple[Any, set[Any]]:
    """torch-pruning's graph, and the autograd nodes whose channels an input or output of the network fixes."""
    import torch_pruning as tp

    traced, shapes = _Traced(model), _Shapes()
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

    for leaf in tree_leaves(tuple(example)):
        traced.announce(leaf)
    widths = {
        _Input: _InputWidth(),
        **{type(m): _RecurrentWidth() for m in model.modules() if isinstance(m, nn.RNNBase)},
    }
    with untouched(model), opaque(model):
        network_fails = True

        def forward(*_: Any) -> Any:
            nonlocal network_fails
            args, kwargs = tree_map(follow, (example.args, dict(example.kwargs)))
            with shapes:
                output = model(*args, **kwargs)
            network_fails = False
            return output

        try:
            graph = tp.DependencyGraph().build_dependency(
                traced,
                example_inputs=None,
                forward_fn=forward,
                output_transform=tensors,
                verbose=False,
                customized_pruners=widths,
            )
        except Exception as error:  # whatever torch-pruning stumbles over; what the network itself raises is the user's
            if network_fails:
                raise
            raise UntraceableError(f"it cannot be traced ({type(error).__name__}: {error})") from error
    for node in graph.module2node.values():
        if node.grad_fn in shapes.joined:
            _mend_concatenation(graph, node, shapes.joined[node.grad_fn])
        if node.grad_fn in shapes.flattened:
            _mend_flatten(node, shapes.flattened[node.grad_fn])
    if not outputs:
        raise UntraceableError(
            f"Expected {type(model).__name__} to return a tensor that depends on its weights, got none: "
            "prune a submodule whose output does."
        )
    return graph, {tensor.grad_fn for tensor in (*inputs, *outputs)}


class _Shapes(TorchFunctionMode):
    """Watches what torch-pruning can only guess at: which axis is joined, and what is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.joined: dict[Any, list[int]] = {}  # autograd node -> sizes of the parts along the joined axis
        self.flattened: dict[
            Any, torch.Size
        ] = {}  # autograd node -> shape before everything but the batch was flattened

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat, torch.concatenate):
            named = {"tensors": args[0] if args else None, "dim": args[1] if len(args) > 1 else 0, **(kwargs or {})}
            self.joined[output.grad_fn] = [part.shape[named.get("axis", named["dim"])] for part in named["tensors"]]
        before: Any = args[0] if args else None
        flattens = func in FLATTENING and isinstance(before, Tensor) and output.ndim == 2 < before.ndim
        if flattens and output.shape[0] == before.shape[0]:
            self.flattened[output.grad_fn] = before.shape
        return output


FLATTENING = (torch.flatten, torch.reshape, Tensor.flatten, Tensor.reshape, Tensor.view)


def _mend_concatenation(graph: Any, node: Any, widths: list[int]) -> None:
    """Offsets for a concatenation of channels that torch-pruning took for one of steps or samples.

    It compares the width of a concatenation with that of its reader, which is wider behind a flatten. Here the sizes
    along the joined axis decide: they are the widths of what was joined.
    """
    from torch_pruning.dependency.index_mapping import _ConcatIndexMapping
    from torch_pruning.dependency.shape_infer import infer_out_channels_recursively

    inferred = [infer_out_channels_recursively(graph, source, [0]) for source in node.inputs]
    if node.module.offsets is not None or inferred != widths:
        return
    start = 0
    for source, width in zip(node.inputs, widths, strict=True):
        place = [start, start + width]
        start += width
        back = next(d for d in node.dependencies if d.target is source and d.index_mapping[1] is None)
        forth = next(d for d in source.dependencies if d.target is node and d.index_mapping[1] is None)
        back.index_mapping[1] = _ConcatIndexMapping(offset=place, reverse=True)
        forth.index_mapping[1] = _ConcatIndexMapping(offset=place, reverse=False)


def _mend_flatten(node: Any, shape: torch.Size) -> None:
    """The positions behind a flatten from the shape before it; torch-pruning infers them from layers farther away.

    The channels of (batch, channels, ...) own runs of positions. Of (batch, steps, channels) nothing is mended: the
    trial of the cut finds out which of the two it was.
    """
    from torch_pruning.dependency.index_mapping import _FlattenIndexMapping

    stride = shape[2:].numel()
    for dependency in (d for d in node.dependencies if d.target in node.inputs):
        dependency.index_mapping[0] = _FlattenIndexMapping(stride=stride, reverse=True)
    for source in node.inputs:
        for dependency in (d for d in source.dependencies if d.target is node):
            dependency.index_mapping[0] = _FlattenIndexMapping(stride=stride, reverse=False)


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


class _RecurrentWidth:
    """What torch-pruning asks of a layer, of a recurrent one: its own pruners know neither layers nor directions."""

    def prune_out_channels(self, layer: nn.RNNBase, indices: Any) -> nn.RNNBase:
        return layer

    def prune_in_channels(self, layer: nn.RNNBase, indices: Any) -> nn.RNNBase:
        return layer

    def get_out_channels(self, layer: nn.RNNBase) -> int:
        return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)

    def get_in_channels(self, layer: nn.RNNBase) -> int:
        return layer.input_size


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
    chunks = kind.chunks(node.module, role) if kind else 1
    if chunks > 1:
        total = graph.get_out_channels(node) if role == "out" else graph.get_in_channels(node)
        step = total // chunks
        yield node, role, [(c, c % step + chunk * step) for c in channels for chunk in range(chunks)]


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
