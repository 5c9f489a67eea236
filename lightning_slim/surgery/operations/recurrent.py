"""Recurrent layers as one operation each: unrolled over their steps, they would be thousands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from lightning_slim.surgery.forwards import forwards_replaced
from lightning_slim.surgery.layers.base import Place
from lightning_slim.surgery.layers.recurrent import Recurrent
from lightning_slim.surgery.operations.labels import Labels, along, compact, fixed, removable, support
from lightning_slim.surgery.operations.record import Watcher

KIND = Recurrent()


@contextmanager
def unrolled(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    """Recurrent layers tell the watcher what they did, for the time being."""
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase) and _is_plain(m)]
    with forwards_replaced({layer: _told(layer, layer.forward, watcher) for layer in layers}):
        yield


def _is_plain(layer: nn.RNNBase) -> bool:
    """Whether its weights are parameters of its own, and computed of no others."""
    return all(name in layer._parameters for name in layer._flat_weights_names)


def _told(layer: nn.RNNBase, forward: Callable[..., Any], watcher: Watcher) -> Callable[..., Any]:
    def run(input: Any, hx: Any = None) -> Any:
        with _disable_current_modes():
            output, state = forward(input, hx)
            _Steps(layer, watcher).follow(input, hx, output, state)
        return output, state

    return run


class _Steps:
    """What one call of a recurrent layer does to labels."""

    def __init__(self, layer: nn.RNNBase, watcher: Watcher) -> None:
        self.layer, self.watcher, self.positions = layer, watcher, watcher.positions

    def follow(self, given: Any, initial: Any, output: Any, state: Any) -> None:
        self._read(given.data if isinstance(given, PackedSequence) else given, KIND.places(self.layer, "in"))
        visible, cells = self._units()
        states = [initial] if isinstance(initial, Tensor) else list(initial or ())
        for tensor, units in zip(states, (visible, cells), strict=False):
            self._begin(tensor, units)
        made = output.data if isinstance(output, PackedSequence) else output
        last = visible[-(2 if self.layer.bidirectional else 1) :].flatten()
        rest = fixed(made.shape, range(made.dim() - 1))
        self.watcher.put(made, Labels([along(made.dim() - 1, last, made.shape), *rest], data=True))
        for tensor, units in zip(tree_leaves(state), (visible, cells), strict=False):
            grid = units if tensor.dim() == 2 else units[:, None]
            rest = fixed(tensor.shape, [1]) if tensor.dim() == 3 else []
            self.watcher.put_state(tensor, Labels([grid.expand(tensor.shape), *rest], data=True))

    def _labels(self, place: Place) -> Tensor:
        tensor = self.layer.get_parameter(place.tensor)
        self.positions.touched.add(id(tensor))
        axis = next(a for a in self.positions.of_tensor[id(tensor)] if a.number == place.axis)
        return axis.labels[place.index.clamp(min=0)]

    def _read(self, x: Tensor, places: Sequence[Place]) -> None:
        """Weights read the last axis."""
        axis = x.dim() - 1
        layers = self.watcher.of(x).layers
        if any(support(layer) == {axis} and removable(layer) for layer in layers):  # beside pixels of fixed number, say
            layers = [layer for layer in layers if support(layer) != {axis} or removable(layer)]
        for layer in layers:
            if support(layer) - {axis} and removable(layer):
                self.positions.block(layer, "a recurrent layer takes steps along it")
            elif axis in support(layer):
                self.positions.note(self.positions.summed, layer)
                for place in places:
                    self.positions.unite(compact(layer).flatten(), self._labels(place), "a recurrent layer")
        for place in places:
            self.positions.note(self.positions.read, self._labels(place))

    def _begin(self, tensor: Tensor, units: Tensor) -> None:
        """The initial state meets the units of every level and direction."""
        grid = (units if tensor.dim() == 2 else units[:, None]).expand(tensor.shape)
        for layer in self.watcher.of(tensor).layers:
            if tensor.dim() - 1 in support(layer):
                self.positions.unite(layer, grid, "the initial state")
            elif 0 in support(layer):
                self.positions.block(layer, "it is a level or direction of a recurrent layer")

    def _units(self) -> tuple[Tensor, Tensor]:
        """Labels of what each level and direction hands on, and of its cells: (levels * directions, units)."""
        visible = torch.stack([self._united(places) for _, places in KIND.levels(self.layer)])
        cells = [self._united(places) for _, places in KIND.cells(self.layer)]
        return visible, torch.stack(cells) if cells else visible

    def _united(self, places: Sequence[Place]) -> Tensor:
        """Labels of units, one each, of what makes and reads them."""
        first = self._labels(places[0])
        for place in places:
            labels = self._labels(place)
            self.positions.unite(first, labels, "a recurrent layer")
            reads = place.role == "in"
            self.positions.note(self.positions.read if reads else self.positions.made, labels)
            if torch.is_grad_enabled():
                self.positions.note(self.positions.trained, labels)
            if reads:
                self.positions.note(self.positions.summed, labels)
        return first
