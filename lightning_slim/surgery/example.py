"""One call of a network, and how to make it without leaving a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_slim.aside import aside
from lightning_slim.eager import eagerly
from lightning_slim.weight_norm import settle

SAMPLES = 2  # of a batch: enough to trace, small enough to be quick


class Example(NamedTuple):
    """One call of a network: `network(*args, **kwargs)`.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        samples: how many samples of a batch are in it, if that is known; MACs are counted for one.
        also: other calls of the same network, that go other ways: another task, a validation step.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}
    samples: int = 1
    also: tuple[Example, ...] = ()

    @property
    def each(self) -> tuple[Example, ...]:
        """All calls."""
        return (self, *self.also)


class Step(Protocol):
    """A step of training, taken once more and without a trace, in whatever widths and modes the model is."""

    def __call__(self) -> list[Tensor]:
        """What its networks return, and the loss."""

    def calls(self) -> Mapping[str, Example]:
        """What it calls the networks with."""


class Calls(dict[str, Example]):
    """Dotted name of a network -> one call of it.

    Attributes:
        step: calls them all; needed where one of them is called with what another one makes. None: they stand alone.
    """

    def __init__(self, calls: Mapping[str, Example] = MappingProxyType({}), step: Step | None = None) -> None:
        super().__init__(calls)
        self.step = step


def step_of(calls: Mapping[str, Example]) -> Step | None:
    """What makes some calls, if one network is called with what another one makes."""
    return calls.step if isinstance(calls, Calls) else None


Shapes = list[list[int]]  # of the tensors in a call


def shapes_of(call: Example) -> Shapes:
    """Shapes of the tensors in a call, in the order in which they lie there."""
    return [list(leaf.shape) for leaf in tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, Tensor)]


def resized(call: Example, before: Shapes, after: Shapes) -> Example:
    """A call, narrowed, or widened by zeros, along those axes along which another call of the same network was."""
    sizes = iter(zip(before, after, strict=True))

    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for axis, (old, new) in enumerate(zip(*next(sizes), strict=True)):
            if new < old:
                leaf = leaf.narrow(axis, 0, new)
            elif new > old:
                shape = [*leaf.shape[:axis], new - old, *leaf.shape[axis + 1 :]]
                leaf = torch.cat([leaf, leaf.new_zeros(shape)], axis)
        return leaf

    args, kwargs = tree_map(fit, (call.args, dict(call.kwargs)))
    return call._replace(args=args, kwargs=kwargs, also=())


def as_example(inputs: Any) -> Example:
    """The usual forms of example inputs: a tensor, a tuple of arguments, a dict of keyword arguments."""
    if isinstance(inputs, Example):
        return inputs
    if isinstance(inputs, Mapping):
        return Example((), dict(inputs))
    return Example(tuple(inputs)) if isinstance(inputs, tuple | list) else Example((inputs,))


def whole(leaf: Any) -> Any:
    """A copy of a tensor, without its history; anything else is the same."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def workable_calls(model: nn.Module, calls: Mapping[str, Any]) -> Calls:
    """Calls of a model's networks, or example inputs of these, as `workable` makes them."""
    few = {name: workable(model.get_submodule(name), as_example(call)) for name, call in calls.items()}
    return Calls(few, step_of(calls))


def workable(network: nn.Module, call: Example) -> Example:
    """A call, and all that are known beside it, cut down to two samples, and of the network's own floating type."""
    return _workable(network, call)._replace(also=tuple(_workable(network, other) for other in call.also))


def _workable(network: nn.Module, call: Example) -> Example:
    """A call cut down to two samples, if the network takes it so, of the network's own floating type.

    Where the first axis is not the batch everywhere (attention masks, graphs, a single image), the whole call is kept.
    """
    weight = next((p for p in network.parameters() if p.is_floating_point()), None)

    def alike(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_inference():  # a batch of validation: it can never have a gradient
            leaf = leaf.clone()
        # Under autocast, one network's output in bfloat16 may be another one's input.
        half = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
        return leaf.to(weight.dtype) if half and weight is not None else leaf

    args, kwargs = tree_map(alike, (call.args, dict(call.kwargs)))
    call = Example(args, kwargs, call.samples)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    batch = tensors[0].shape[0] if tensors else 0
    if batch <= SAMPLES:
        return call if call.samples > 1 else call._replace(samples=max(batch, 1))

    args, kwargs = few_of((args, kwargs), batch)
    small = Example(args, kwargs, SAMPLES)
    with untouched(network):
        try:
            network(*small.args, **small.kwargs)
        except MemoryError:
            raise
        except Exception:  # whatever a user's forward raises: the whole call, which it took in training, remains
            return call
    return small


def few_of(tree: Any, batch: int) -> Any:
    """Two samples of all tensors in a tree whose first axis is as long as the batch."""

    def few(leaf: Any) -> Any:
        is_batch = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return leaf[:SAMPLES].clone() if is_batch else leaf

    return tree_map(few, tree)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode, and gradients everywhere (tracing wants them); afterwards nothing of it is left."""
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with (
            aside(),
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
        settle(model)
