"""Layers that no call has reached yet: what becomes of them when one does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from lightning_slim.pruner import Pruner
from lightning_slim.surgery.layers import layer_kind


class Arrivals:
    """Waits for calls of such layers.

    Attributes:
        any: whether one was called since the last `wait`.
    """

    def __init__(self) -> None:
        self.any = False
        self._hooks = ExitStack()

    def wait(self, pruner: Pruner) -> None:
        """From now on for those that a pruner has not seen called."""
        self.close()
        self.any = False
        modules = dict(pruner.model.named_modules())
        for name in modules.keys() & set(pruner.unreached):
            layer = modules[name]
            self._hooks.callback(layer.register_forward_pre_hook(self._hook(pruner, name)).remove)

    def close(self) -> None:
        """No longer."""
        self._hooks.close()

    def _hook(self, pruner: Pruner, name: str) -> Callable[[nn.Module, Any], None]:
        def arrive(layer: nn.Module, args: Any) -> None:  # a function: copies of the model do not copy what it knows
            self.any = True
            if args and isinstance(args[0], Tensor) and pruner.history.events:
                _check(pruner, name, layer, args[0])

        return arrive


def _check(pruner: Pruner, name: str, layer: nn.Module, given: Tensor) -> None:
    """Raises where a layer that is called for the first time after a cut gets fewer channels than it reads."""
    kind = layer_kind(layer)
    if kind is None or kind.channel_axis is None or given.dim() < abs(kind.channel_axis):
        return
    expected, got = len(kind.places(layer, "in")[0].index), given.shape[kind.channel_axis]
    widths = pruner.widths
    for group, original in pruner.costs.original.items():
        now = widths[group]
        each, rest = divmod(expected, original)
        if now < original and not rest and got == each * now:
            raise ValueError(
                f"Expected {expected} channels in {name}, got {got}: {name} reads what {group} makes, which was cut to "
                f"{now} of {original} units before {name} was called for the first time. Leave it whole: "
                f'`skip=["{group}"]`.'
            )
