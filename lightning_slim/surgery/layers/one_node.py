"""A layer as a single node of a traced graph, whatever it computes inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class OneNode(torch.autograd.Function):
    """One autograd node for some outputs, whose only parents are some inputs."""

    @staticmethod
    def forward(ctx: Any, outputs: tuple[Tensor, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(output.detach().clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, *([None] * (len(ctx.needs_input_grad) - 1))


def connect(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The outputs as those of a node that reads the inputs; it is one even if none of these has a history."""
    if not any(x.requires_grad for x in inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
    apply: Any = OneNode.apply  # untyped in torch
    connected: tuple[Tensor, ...] = apply(outputs, *inputs)
    return connected


def one_node(forward: Callable[..., Any], channels_in: int, channels_out: int, axis: int) -> Callable[..., Any]:
    """A forward pass that a trace sees as one node: from all arguments with channels to the first output with channels.

    Masks, positions and the like have another width, and so have attention weights beside the output.

    Args:
        forward: what is really computed.
        channels_in: size of the channel axis of arguments that carry channels.
        channels_out: the same, of the output.
        axis: the channel axis.
    """

    def carries(leaf: Any, channels: int) -> bool:
        floats = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 1
        return floats and leaf.shape[axis] == channels

    def traced(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            leaves, structure = tree_flatten(forward(*args, **kwargs))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if carries(leaf, channels_in)]
        at = next((i for i, leaf in enumerate(leaves) if carries(leaf, channels_out)), None)
        if inputs and at is not None:
            (leaves[at],) = connect((leaves[at],), inputs)
        return tree_unflatten(leaves, structure)

    return traced
