"""One call of a network, and how to make it without leaving a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_slim.eager import eagerly
from lightning_slim.weight_norm import settle

SAMPLES = 2  # of a batch: enough to trace, small enough to be quick


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


def as_example(inputs: Any) -> Example:
    """The usual forms of example inputs: a tensor, a tuple of arguments, a dict of keyword arguments."""
    if isinstance(inputs, Example):
        return inputs
    if isinstance(inputs, Mapping):
        return Example((), dict(inputs))
    return Example(tuple(inputs)) if isinstance(inputs, tuple | list) else Example((inputs,))


def workable(network: nn.Module, call: Example) -> Example:
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

    def shrink(leaf: Any) -> Any:
        is_batch = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return leaf[:SAMPLES].clone() if is_batch else leaf

    args, kwargs = tree_map(shrink, (args, kwargs))
    small = Example(args, kwargs, SAMPLES)
    with untouched(network), torch.no_grad():
        try:
            network(*small.args, **small.kwargs)
        except Exception:  # whatever a user's forward raises: the whole call, which it took in training, remains
            return call
    return small


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
        settle(model)
