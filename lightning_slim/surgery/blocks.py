"""Depth: whole residual blocks that can be left out, because without their weights they hand their input on."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lightning_slim.surgery.example import Example, untouched
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.units import UnitGroup
from lightning_slim.weight_norm import settle, weight_norms

ALIKE = 0.5  # cosine of what comes out of a block without weights and what went in; normalisations turn it a little


class Dropped(nn.Module):
    """Stands where a block was, and hands its first input on.

    Args:
        block: what was there. It is no submodule: its tensors belong to the model no longer.
        results: 0 if the block returned a tensor; of a tuple, how many items (all but the first were None).
    """

    def __init__(self, block: nn.Module, results: int = 0) -> None:
        super().__init__()
        self.results = results
        self._block = (block,)

    @property
    def block(self) -> nn.Module:
        """What was there; once the drop is final, without the values of its parameters."""
        return self._block[0]

    def forget(self) -> None:
        """Lets go of the block's parameters; what remains can be grown back, and takes no memory."""
        empty = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in self.block.parameters()
        }
        self._block = (copy.deepcopy(self.block, empty),)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        passed = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return (passed, *[None] * (self.results - 1)) if self.results else passed

    def extra_repr(self) -> str:
        return type(self.block).__name__


def drop(model: nn.Module, path: str, results: int = 0) -> None:
    """Takes a block out of a model."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = Dropped(model.get_submodule(path), results)


def put_back(model: nn.Module, path: str) -> None:
    """The inverse of `drop`."""
    parent, _, name = path.rpartition(".")
    dropped = model.get_submodule(path)
    assert isinstance(dropped, Dropped)
    model.get_submodule(parent)._modules[name] = dropped.block


def dropped(model: nn.Module) -> dict[str, int]:
    """The blocks that a model has lost -> their number of results."""
    return {path: module.results for path, module in model.named_modules() if isinstance(module, Dropped)}


@torch.no_grad()
def grow_back(model: nn.Module, path: str) -> None:
    """Puts a block back whose parameters were forgotten: it gets small random ones, until a checkpoint is loaded."""
    put_back(model, path)
    block = model.get_submodule(path)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                value = torch.randn(parameter.shape, dtype=parameter.dtype, device=device) / 50
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)


class _Call(NamedTuple):
    """One call of a block."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any

    @property
    def given(self) -> Tensor | None:
        """The first tensor that went in."""
        return next((value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)), None)

    @property
    def results(self) -> int:
        """0 for a tensor, the number of items of a tuple that holds one and nothing else, -1 for anything else."""
        if isinstance(self.result, Tensor):
            return 0
        alone = type(self.result) is tuple and all(item is None for item in self.result[1:])
        return len(self.result) if alone and isinstance(self.result[0], Tensor) else -1

    @property
    def made(self) -> Tensor:
        """The tensor that came out."""
        made: Tensor = self.result[0] if self.results else self.result
        return made


def find_blocks(network: nn.Module, call: Example, prefix: str = "") -> list[UnitGroup]:
    """Groups of residual blocks: units of a group are blocks that follow each other.

    A block stands in a sequence, or beside others of its class; it is called once, returns a tensor of its first
    input's shape (or a tuple that holds nothing else), and hands this input on when its weights are zero.

    Args:
        network: left as it is.
        call: one call of it.
        prefix: put before every name.
    """
    modules = dict(network.named_modules())
    candidates = {path: module for path, module in modules.items() if path and _may_be_block(modules, path)}
    calls: list[tuple[str, _Call]] = []  # in the order in which they end

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            calls.append((path, _Call(args, kwargs, result)))

        return hook

    with untouched(network), torch.no_grad():
        handles = [m.register_forward_hook(watch(path), with_kwargs=True) for path, m in candidates.items()]
        try:
            network(*call.args, **call.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        times = Counter(path for path, _ in calls)
        blocks = {path: made for path, made in calls if times[path] == 1 and _hands_on(candidates[path], made)}
    outer = [path for path in blocks if not any(path.startswith(f"{other}.") for other in blocks)]
    groups: list[UnitGroup] = []
    for paths in _in_rows({path: blocks[path] for path in outer}):
        name = prefix + _around(paths) or "layers"
        taken = sum(group.name.split("#")[0] == name for group in groups)
        in_order = tuple(prefix + path for path in paths)
        results = blocks[paths[0]].results
        unique = f"{name}#{taken + 1}" if taken else name
        groups.append(UnitGroup(unique, (), floor=0, blocks=in_order, results=results))
    return groups


def _around(paths: Sequence[str]) -> str:
    """The innermost module that holds all of some modules."""
    levels = takewhile(lambda names: len(set(names)) == 1, zip(*(path.split(".")[:-1] for path in paths), strict=False))
    return ".".join(names[0] for names in levels)


def _in_rows(blocks: Mapping[str, _Call]) -> list[list[str]]:
    """Blocks that hand the same stream on: one's output is the next one's input, or they stand side by side."""
    rows: list[list[str]] = []
    for path, call in blocks.items():
        for row in rows:
            last = blocks[row[-1]]
            alike = (last.made.shape, last.results) == (call.made.shape, call.results)
            if alike and (call.given is last.made or path.rpartition(".")[0] == row[-1].rpartition(".")[0]):
                row.append(path)
                break
        else:
            rows.append([path])
    return rows


def _may_be_block(modules: Mapping[str, nn.Module], path: str) -> bool:
    module, parent = modules[path], modules[path.rpartition(".")[0]]
    plain = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or layer_kind(module) is not None
    in_row = isinstance(parent, nn.Sequential | nn.ModuleList)
    twins = sum(type(other) is type(module) for other in parent.children()) > 1
    return (in_row or twins) and not plain and any(p.ndim > 1 for p in module.parameters())


def _hands_on(block: nn.Module, call: _Call) -> bool:
    """Whether a block hands its first input on when its weights are zero."""
    given = call.given
    if given is None or call.results < 0 or call.made.shape != given.shape or not given.is_floating_point():
        return False
    with _silent(block):
        through = _Call((), {}, block(*call.args, **call.kwargs)).made
    cosine = torch.cosine_similarity(through.flatten().double(), given.flatten().double(), dim=0)
    return bool(cosine > ALIKE)


@contextmanager
def _silent(block: nn.Module) -> Iterator[None]:
    """Weights are zero meanwhile, and normalisations neither scale nor shift."""
    saved = [(tensor, tensor.clone()) for tensor in (*block.parameters(), *block.buffers())]
    directions = {id(norm.v) for norm in weight_norms(block).values()}  # without a length, these count for nothing
    try:
        for module in block.modules():
            norm = "Norm" in type(module).__name__
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in directions:
                    parameter.fill_(1.0 if norm and name == "weight" else 0.0)
            for name, buffer in module.named_buffers(recurse=False):
                if name in ("running_mean", "running_var"):
                    buffer.fill_(0.0 if name == "running_mean" else 1.0)
        settle(block)
        yield
    finally:
        for tensor, value in saved:
            tensor.copy_(value)
        settle(block)


@contextmanager
def without(model: nn.Module, groups: Sequence[UnitGroup], plan: Mapping[str, Bool[Tensor, "units"]]) -> Iterator[None]:
    """Leaves out the blocks that a plan removes, for the time being."""
    gone = [
        (path, group.results)
        for group in groups
        if group.name in plan
        for path in group.removed_blocks(plan[group.name])
    ]
    for path, results in gone:
        drop(model, path, results)
    try:
        yield
    finally:
        for path, _ in gone:
            put_back(model, path)
