"""Which networks a training step calls, and one example of what it gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_slim.surgery import Example

SAMPLES = 2  # of the batch: enough to trace, small enough to keep


@contextmanager
def capture_calls(model: nn.Module) -> Iterator[dict[str, Example]]:
    """Collects the outermost calls of modules with parameters that happen within: dotted name -> first example.

    A LightningModule that calls `self(x)` is found itself (under the name ""); one that calls `self.net(x)` is found
    as `"net"`; a GAN as its generator and its discriminator.
    """
    calls: dict[str, Example] = {}
    depth = 0

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal depth
            if depth == 0 and name not in calls:
                calls[name] = small_example(args, kwargs)
            depth += 1

        return hook

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    handles = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters()):
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def small_example(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
    """A detached copy of a call's arguments, cut down to two samples where the first axis is the batch."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    batch = tensors[0].shape[0] if tensors else 0

    def shrink(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        with torch.no_grad():
            return (leaf[:SAMPLES] if leaf.ndim > 0 and leaf.shape[0] == batch else leaf).detach().clone()

    args, kwargs = tree_map(shrink, (tuple(args), dict(kwargs)))
    return Example(args, kwargs)
