"""Layers that read the inputs of a network, which nothing makes: what they read no longer is passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class Selection:
    """A forward pre-hook: hands a layer those channels of its input that it reads.

    It is no buffer, for averages of a model average buffers, and the mean of two indices is another index: a checkpoint
    holds it as plain data. Copies of the layer, pickled ones and exported graphs have it.

    Args:
        axis: the channel axis of the layer's input.
        kept: the channels that are read, ascending.
        before: the selection that was there before, of a layer that was cut twice.
    """

    def __init__(self, axis: int, kept: Int[Tensor, "kept"], before: Selection | None = None) -> None:
        self.axis, self.kept, self.before = axis, kept, before

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.of(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": self.of(kwargs["input"])}

    def of(self, x: Any) -> Any:
        """The channels that are read."""
        if isinstance(x, PackedSequence):
            return PackedSequence(self.of(x.data), x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        if self.kept.device != x.device:
            with torch.inference_mode(False):  # a tensor of inference could not be used in training
                self.kept = self.kept.to(x.device)
        return x.index_select(self.axis, self.kept)


def select(layer: nn.Module, axis: int, keep: Bool[Tensor, "channels"]) -> None:
    """From now on a layer is handed these of the channels that it is handed now."""
    before, kept = selection_of(layer), keep.nonzero().flatten()
    _put(layer, Selection(axis, kept if before is None else before.kept.to(kept.device)[kept], before))


def selection_of(layer: nn.Module) -> Selection | None:
    """What a layer selects of its input; None if it reads all of it."""
    return next((hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, Selection)), None)


def selections(model: nn.Module) -> dict[str, tuple[int, list[int]]]:
    """What the layers of a model select: dotted name -> channel axis, channels that are read."""
    found = ((name, selection_of(layer)) for name, layer in model.named_modules())
    return {name: (held.axis, held.kept.tolist()) for name, held in found if held is not None}


def set_selections(model: nn.Module, wanted: Mapping[str, tuple[int, Sequence[int]]]) -> None:
    """The inverse of `selections`: layers that are not named read all of their input."""
    for name, layer in model.named_modules():
        _put(layer, Selection(wanted[name][0], torch.tensor(wanted[name][1])) if name in wanted else None)


def follow_width(layer: nn.Module, channels: int) -> None:
    """Takes back what is selected until it is as many channels as the layer reads: its weight was put back, or grew."""
    held = selection_of(layer)
    while held is not None and len(held.kept) != channels:
        held = held.before
        _put(layer, held)


def _put(layer: nn.Module, selection: Selection | None) -> None:
    """Replaces what a layer selects."""
    for number, hook in [*layer._forward_pre_hooks.items()]:
        if isinstance(hook, Selection):
            del layer._forward_pre_hooks[number], layer._forward_pre_hooks_with_kwargs[number]
    if selection is not None:
        # Before all others: what watches the layer sees what it reads.
        layer.register_forward_pre_hook(selection, with_kwargs=True, prepend=True)
