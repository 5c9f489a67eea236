"""Which networks a training step calls, and one example of what it gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_slim.eager import eagerly
from lightning_slim.surgery import Example


@contextmanager
def capture_calls(model: nn.Module) -> Iterator[dict[str, Example]]:
    """Collects the outermost calls of modules with parameters that happen within: dotted name -> first example.

    A LightningModule that calls `self(x)` is found itself (under the name ""); one that calls `self.net(x)` is found
    as `"net"`; a GAN as its generator and its discriminator.
    """
    calls: dict[str, Example] = {}
    depth: list[bool] = []  # one entry for every call under way: whether it counts

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            counts = not _is_redirected(module)
            if counts and not any(depth) and name not in calls:
                calls[name] = whole_example(args, kwargs)
            depth.append(counts)

        return hook

    def leave(*_: Any) -> None:
        depth.pop()

    handles = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters()):
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with eagerly():
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def _is_redirected(module: nn.Module) -> bool:
    """Whether a call of the module stands for another method: under DDP, Lightning runs `training_step` that way."""
    return "_ForwardRedirection" in getattr(module.forward, "__qualname__", "")


def whole_example(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
    """A detached copy of a call's arguments."""

    def copy(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    return Example(*tree_map(copy, (tuple(args), dict(kwargs))))
