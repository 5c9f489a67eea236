"""Which networks a training step calls, one example of what it gives them, and what they make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_slim.eager import hooked
from lightning_slim.surgery import Example
from lightning_slim.surgery.example import whole


@contextmanager
def capture_calls(model: nn.Module) -> Iterator[dict[str, Example]]:
    """Collects the outermost calls of modules with parameters that happen within: dotted name -> first example.

    A LightningModule that calls `self(x)` is found itself (under the name ""); one that calls `self.net(x)` is found
    as `"net"`; a GAN as its generator and its discriminator.
    """
    calls: dict[str, Example] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.setdefault(name, whole_example(args, kwargs))

    with _outermost(model, before=note):
        yield calls


@contextmanager
def capture_outputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collects what outermost calls return: dotted name -> first floating tensor of the first call.

    It has no gradient; of a network that returns no tensor there is none.
    """
    outputs: dict[str, Tensor] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensors = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        made = next(tensors, None)
        if made is not None:
            outputs.setdefault(name, made.detach().as_subclass(Tensor))

    with _outermost(model, after=note):
        yield outputs


@contextmanager
def capture_results(model: nn.Module) -> Iterator[list[Any]]:
    """Collects what outermost calls return, in the order in which they end."""
    results: list[Any] = []

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        results.append(output)

    with _outermost(model, after=note):
        yield results


Note = Callable[[str, tuple[Any, ...], dict[str, Any], Any], None]


@contextmanager
def _outermost(model: nn.Module, before: Note | None = None, after: Note | None = None) -> Iterator[None]:
    """Notes calls of modules with parameters that are not made within another one."""
    depth: list[bool] = []  # one entry for every call under way: whether it counts

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A backward pass calls checkpointed layers once more.
            counts = not _is_redirected(module) and torch._C._current_graph_task_id() == -1
            if before is not None and counts and not any(depth):
                before(name, args, kwargs, None)
            depth.append(counts)

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            counts = depth.pop()
            if after is not None and counts and not any(depth):
                after(name, args, kwargs, output)

        return hook

    handles = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters()) and not isinstance(module, torch.jit.ScriptModule):  # it has no hooks
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave(name), with_kwargs=True, always_call=True))
    with hooked(handles):
        yield


def _is_redirected(module: nn.Module) -> bool:
    """Whether a call of the module stands for another method: under DDP, Lightning runs `training_step` that way."""
    return "_ForwardRedirection" in getattr(module.forward, "__qualname__", "")


def whole_example(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
    """A detached copy of a call's arguments."""

    return Example(*tree_map(whole, (tuple(args), dict(kwargs))))
