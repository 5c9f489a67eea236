"""Which weights make what a loss is computed from: the last layers, found in the autograd graph of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# Nodes that multiply activations with a weight, by the beginning of their names.
PRODUCTS = ("Addmm", "Mm", "Bmm", "Linear", "Convolution", "Mkldnn", "CudnnRnn", "MiopenRnn", "Embedding")


def find_last(loss: Tensor, weights: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of the weights between which and a loss no other product with a weight lies.

    Products with other matrices than `weights`, as those of layers that are not masked, are passed by only if they hold
    no parameter at all. A penalty on a weight is not taken for its product.

    Args:
        loss: a tensor with its graph, before the backward pass.
        weights: dotted name -> parameter.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> weights = {"0.weight": net[0].weight, "2.weight": net[2].weight}
        >>> find_last(net(torch.ones(1, 2)).sum(), weights)
        {'2.weight'}
    """
    names = {id(parameter): name for name, parameter in weights.items()}
    found: set[str] = set()
    queue: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None}
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        following = [next_node for next_node, _ in node.next_functions]
        held = [p for p in map(_parameter, following) if p is not None and p.ndim > 1] if _is_product(node) else []
        found |= {names[id(p)] for p in held if id(p) in names}
        if not held:
            queue += following
    return found


def _is_product(node: Any) -> bool:
    return bool(node.name().startswith(PRODUCTS))


def _parameter(node: Any) -> Tensor | None:
    """The parameter that an operand of a product is, perhaps transposed, viewed or in another precision."""
    while node is not None and not hasattr(node, "variable"):
        if len(node.next_functions) != 1 or _is_product(node):
            return None
        node = node.next_functions[0][0]
    return None if node is None else node.variable
