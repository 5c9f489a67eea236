"""Traces a network into torch-pruning's dependency graph, and mends what that graph only guesses at.

torch-pruning knows how indices travel through concatenations, splits and flattenings; it never changes the model here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_slim.surgery.example import Example, untouched
from lightning_slim.surgery.forwards import forwards_replaced
from lightning_slim.surgery.layers import LayerKind, layer_kind


class UntraceableError(ValueError):
    """The dependency graph of a network cannot be built."""


def trace(model: nn.Module, example: Example) -> tuple[Any, set[Any]]:
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
    widths: dict[Any, Any] = {_Input: _InputWidth()}
    with untouched(model), _opaque(model) as kinds:
        widths.update({type(m): (_Carried if k.channel_axis is None else _Width)(k) for m, k in kinds.items()})
        network_fails, graph = True, tp.DependencyGraph()

        def forward(*_: Any) -> Any:
            nonlocal network_fails
            # It would guess at views, and divide by zero at a shuffle; their real shapes are known.
            graph._2d_4d = False
            args, kwargs = tree_map(follow, (example.args, dict(example.kwargs)))
            with shapes:
                output = model(*args, **kwargs)
            network_fails = False
            return output

        try:
            graph.build_dependency(
                traced,
                example_inputs=None,
                forward_fn=forward,
                output_transform=tensors,
                verbose=False,
                customized_pruners=widths,
            )
        except MemoryError:
            raise
        except Exception as error:  # whatever torch-pruning stumbles over; what the network itself raises is the user's
            if network_fails:
                raise
            raise UntraceableError(f"it cannot be traced ({type(error).__name__}: {error})") from error
    for node in graph.module2node.values():
        if "SplitBackward" in type(node.grad_fn).__name__ or "SplitWithSizes" in type(node.grad_fn).__name__:
            _mend_split(graph, node)
        if node.grad_fn in shapes.joined:
            _mend_concatenation(graph, node, shapes.joined[node.grad_fn])
        if node.grad_fn in shapes.reshaped:
            _mend_reshape(graph, node, *shapes.reshaped[node.grad_fn])
    if not outputs:
        raise UntraceableError(
            f"Expected {type(model).__name__} to return a tensor that depends on its weights, got none: "
            "prune a submodule whose output does."
        )
    return graph, {tensor.grad_fn for tensor in (*inputs, *outputs)}


class _Shapes(TorchFunctionMode):
    """Watches what torch-pruning can only guess at: which axis is joined, and what is reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.joined: dict[Any, list[int]] = {}  # autograd node -> sizes of the parts along the joined axis
        self.reshaped: dict[Any, tuple[torch.Size, torch.Size]] = {}  # autograd node -> shape before, and after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "glu":  # it looks like an operation on each channel alone
            made, gate = args[0].chunk(2, *args[1:], **(kwargs or {}))
            return made * gate.sigmoid()
        output = func(*args, **(kwargs or {}))
        if func in (torch.cat, torch.concat, torch.concatenate):
            named = {"tensors": args[0] if args else None, "dim": args[1] if len(args) > 1 else 0, **(kwargs or {})}
            self.joined[output.grad_fn] = [part.shape[named.get("axis", named["dim"])] for part in named["tensors"]]
        before: Any = args[0] if args else None
        if func in RESHAPING and isinstance(before, Tensor) and before.shape[:1] == output.shape[:1]:
            self.reshaped[output.grad_fn] = before.shape, output.shape
        return output


RESHAPING = (
    torch.flatten, torch.unflatten, torch.reshape,
    Tensor.flatten, Tensor.unflatten, Tensor.reshape, Tensor.view,
)  # fmt: skip


def _mend_split(graph: Any, node: Any) -> None:
    """Which reader has which part: torch-pruning takes them in the order in which it meets the readers.

    It also takes any axis but the second for one that has no channels.
    """
    from torch_pruning.dependency.index_mapping import _SplitIndexMapping
    from torch_pruning.dependency.shape_infer import infer_out_channels_recursively

    sizes = node.grad_fn._saved_self_sym_sizes
    axis = node.grad_fn._saved_dim if node.grad_fn._saved_dim < len(sizes) else node.grad_fn._saved_dim - 2**64
    widths = [infer_out_channels_recursively(graph, source, [0]) for source in node.inputs]
    if widths != [sizes[axis]]:
        return
    parts = getattr(node.grad_fn, "_saved_split_sizes", None)
    if parts is None:
        size = node.grad_fn._saved_split_size
        parts = [min(size, sizes[axis] - start) for start in range(0, sizes[axis], size)]
    starts = [0, *itertools.accumulate(parts)]
    for reader in dict.fromkeys(node.outputs):
        numbers = [number for source, number in reader.grad_fn.next_functions if source is node.grad_fn]
        forth = [d for d in node.dependencies if d.target is reader]
        back = [d for d in reader.dependencies if d.target is node]
        if len(numbers) == len(forth) == len(back):
            for number, there, here in zip(numbers, forth, back, strict=True):
                place = starts[number : number + 2]
                there.index_mapping[0] = _SplitIndexMapping(offset=place, reverse=False)
                here.index_mapping[0] = _SplitIndexMapping(offset=place, reverse=True)


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


def _mend_reshape(graph: Any, node: Any, before: torch.Size, after: torch.Size) -> None:
    """The positions behind a flatten or view from the shapes around it.

    The channels of (batch, channels, ...) own runs of positions, flattened or not. Of (batch, steps, channels) they do
    not: the trial of the cut finds out which of the two it was. Where several neighbours of (..., neighbours, channels)
    are laid side by side, as patches are when they merge, every neighbour has all channels.
    """
    from torch_pruning.dependency.index_mapping import _FlattenIndexMapping
    from torch_pruning.dependency.shape_infer import infer_out_channels_recursively

    forth: Any = None
    if len(after) == 2 < len(before):
        forth, back = (_FlattenIndexMapping(before[2:].numel(), reverse) for reverse in (False, True))
    elif len(before) == 2 < len(after):
        forth, back = (_FlattenIndexMapping(after[2:].numel(), reverse) for reverse in (True, False))
    elif 2 < len(after) < len(before) and after[:-1] == before[: len(after) - 1]:
        width = before[-1]
        if all(infer_out_channels_recursively(graph, source, [0]) == width for source in node.inputs):
            forth, back = _Tiling(width, after[-1] // width), _Tiling(width, 0)
    if forth is None:
        return
    for dependency in (d for d in node.dependencies if d.target in node.inputs):
        dependency.index_mapping[0] = back
    for source in node.inputs:
        for dependency in (d for d in source.dependencies if d.target is node):
            dependency.index_mapping[0] = forth


class _Tiling(NamedTuple):
    """From channels to their positions in every tile; or back, if no number of tiles is given."""

    width: int
    tiles: int

    def __call__(self, indices: list[Any]) -> list[Any]:
        from torch_pruning._helpers import _HybridIndex

        if not self.tiles:
            return [_HybridIndex(idx=i.idx % self.width, root_idx=i.root_idx) for i in indices]
        starts = [tile * self.width for tile in range(self.tiles)]
        return [_HybridIndex(idx=i.idx + start, root_idx=i.root_idx) for i in indices for start in starts]


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


class _Width:
    """What torch-pruning asks of a layer, of an opaque one."""

    def __init__(self, kind: LayerKind) -> None:
        self.kind = kind

    def prune_out_channels(self, layer: nn.Module, indices: Any) -> nn.Module:
        return layer

    def prune_in_channels(self, layer: nn.Module, indices: Any) -> nn.Module:
        return layer

    def get_out_channels(self, layer: nn.Module) -> int:
        return len(self.kind.places(layer, "out")[0].index)

    def get_in_channels(self, layer: nn.Module) -> int:
        return len(self.kind.places(layer, "in")[0].index)


class _Carried(_Width):
    """The same, of a layer that only carries channels: what goes in comes out."""

    prune_in_channels = _Width.prune_out_channels


@contextmanager
def _opaque(model: nn.Module) -> Iterator[dict[nn.Module, LayerKind]]:
    """While tracing, some layers are single nodes; these, and their kinds, are handed out.

    torch-pruning knows classes, not instances: a class counts if all of its instances in the model are understood.
    """
    kinds = {module: kind for module in model.modules() if (kind := layer_kind(module)) is not None and kind.opaque}
    strange = {type(module) for module in model.modules() if module not in kinds}
    kinds = {module: kind for module, kind in kinds.items() if type(module) not in strange}
    hidden = {m for layer in kinds for m in layer.modules() if m is not layer}
    kinds = {module: kind for module, kind in kinds.items() if module not in hidden}
    with forwards_replaced({layer: kind.stand_in(layer) for layer, kind in kinds.items()}):
        yield kinds


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
