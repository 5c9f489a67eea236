"""An operation that meets the labels that it met before finds out nothing new: its results are looked up.

A network is recorded in eval and in train mode, and cells and shared modules are called again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from lightning_slim.surgery.operations.labels import Labels, compact, distinct, support
from lightning_slim.surgery.operations.rules import Operation, Rules

BY_STRIDES = {"as_strided"}  # of more than their arguments say


class Memo:
    """What came of operations.

    Args:
        rules: that are asked where nothing is known.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._known: dict[Hashable, tuple[list[Labels], list[Tensor]]] = {}
        self._numbers: dict[Hashable, int] = {}

    def apply(self, op: Operation) -> list[Labels]:
        """The labels of an operation's results, those that say the same only once."""
        key = self._key(op)
        if key in self._known:
            made, self.rules.algebra.indices = self._known[key]
            return made
        made = [Labels(distinct(labels.layers), labels.data) for labels in self.rules.apply(op)]
        if key is not None:
            self._known[key] = made, self.rules.algebra.indices
        return made

    def _key(self, op: Operation) -> Hashable:
        """What the rules go by; None if they may go by more."""
        indexed = any(not tensor.is_floating_point() for tensor in op.tensors)  # by what, they look up
        if indexed or op.name in BY_STRIDES:
            return None
        given = _frozen((op.args, op.kwargs), lambda tensor: (self.number(op.of(tensor)), tuple(tensor.shape)))
        key = (op.function, torch.is_grad_enabled(), len(op.results), op.shape, given)
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def number(self, labels: Labels) -> int:
        """The same for labels that say the same."""
        if labels.number is None:
            layers = tuple((tuple(layer.shape), frozenset(support(layer)), _digest(layer)) for layer in labels.layers)
            labels.number = self._numbers.setdefault((labels.data, layers), len(self._numbers))
        return labels.number


def _digest(layer: Tensor) -> bytes:
    return blake2b(compact(layer).contiguous().numpy().tobytes(), digest_size=16).digest()


def _frozen(value: Any, mark: Callable[[Tensor], Hashable]) -> Hashable:
    """Arguments as something to look up by."""
    if isinstance(value, Tensor):
        return mark(value)
    if isinstance(value, dict):
        return tuple((name, _frozen(each, mark)) for name, each in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_frozen(each, mark) for each in value)
    return type(value), value
