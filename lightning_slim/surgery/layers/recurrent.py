"""nn.LSTM, nn.GRU and nn.RNN: hidden units of every layer and direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_slim.surgery.layers.base import LayerKind, Place, every_channel, present
from lightning_slim.surgery.layers.one_node import connect
from lightning_slim.units import Role

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


class Recurrent(LayerKind):
    """A hidden unit is a row of every gate, a recurrent column, and a column of all that reads it.

    Output channel `d * hidden + j` is unit `j` of direction `d` of the last layer. The units of lower layers are not
    seen from outside: they are `inner` groups. A module has one `hidden_size`, so all its layers and directions must
    keep the same number of units; which ones may differ. With `proj_size`, the units are the projections, and the cells
    behind them are units of their own.
    """

    types = (nn.RNNBase,)
    channel_axis: ClassVar[int | None] = -1
    opaque: ClassVar[bool] = True  # unrolled over steps, it would be thousands of nodes

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        assert isinstance(layer, nn.RNNBase)
        if role == "in":
            index = every_channel(layer.input_size)
            return [Place(f"weight_ih_l0{suffix}", 1, index) for suffix in _suffixes(layer)]
        visible = layer.proj_size or layer.hidden_size
        places: list[Place] = []
        for d in range(len(_suffixes(layer))):
            unit = every_channel(visible * len(_suffixes(layer))) - d * visible
            unit = unit.where((unit >= 0) & (unit < visible), -1)
            places += _made(layer, layer.num_layers - 1, d, unit)
        return places

    def inner(self, layer: nn.Module) -> Sequence[tuple[str, Sequence[Place]]]:
        assert isinstance(layer, nn.RNNBase)
        lower = (layer.num_layers - 1) * len(_suffixes(layer))
        # Direction by direction: the order in which they are told of.
        return sorted(self.levels(layer)[:lower], key=lambda level: level[0].endswith("_reverse"))

    def levels(self, layer: nn.RNNBase) -> list[tuple[str, list[Place]]]:
        """Name of every level and direction, from the first level to the last -> where its units live."""
        visible, suffixes = layer.proj_size or layer.hidden_size, _suffixes(layer)
        unit = every_channel(visible)
        levels = []
        for level in range(layer.num_layers):
            for d, suffix in enumerate(suffixes):
                above = suffixes if level + 1 < layer.num_layers else []
                read = [Place(f"weight_ih_l{level + 1}{s}", 1, unit + d * visible, "in") for s in above]
                levels.append((f"l{level}{suffix}", [*_made(layer, level, d, unit), *read]))
        return levels

    def cells(self, layer: nn.Module) -> Sequence[tuple[str, Sequence[Place]]]:
        assert isinstance(layer, nn.RNNBase)
        unit = every_channel(layer.hidden_size)
        suffixes = [f"_l{level}{s}" for level in range(layer.num_layers) for s in _suffixes(layer)]
        return [
            (f"cells{suffix}", [*_gates(layer, suffix, unit), Place(f"weight_hr{suffix}", 1, unit, "in")])
            for suffix in suffixes
            if layer.proj_size
        ]

    def min_cells(self, layer: nn.Module) -> int:
        assert isinstance(layer, nn.RNNBase)
        return layer.proj_size + 1  # torch takes an LSTM of two equal sizes for one without; projections only get fewer

    def pack(self, layer: nn.Module) -> int:
        assert isinstance(layer, nn.RNNBase)
        return layer.num_layers * len(_suffixes(layer)) * (layer.proj_size or layer.hidden_size)

    def bias_of(self, layer: nn.Module, tensor: str) -> str | None:
        assert isinstance(layer, nn.RNNBase)
        return tensor.replace("weight_", "bias_") if layer.bias else None

    def stand_in(self, layer: nn.Module) -> Callable[..., Any]:
        """An initial state is not followed: what hangs on one fails the trial, and is left whole."""
        assert isinstance(layer, nn.RNNBase)
        rnn, directions = layer, len(_suffixes(layer))
        visible = rnn.proj_size or rnn.hidden_size

        def forward(input: Tensor | PackedSequence, hx: Any = None) -> Any:
            packed = input if isinstance(input, PackedSequence) else None
            x = input.data if isinstance(input, PackedSequence) else input
            if packed is not None:
                batch: tuple[int, ...] = (int(packed.batch_sizes[0].item()),)
            else:
                batch = () if x.ndim == 2 else (x.shape[0 if rnn.batch_first else 1],)
            shapes: list[tuple[int, ...]] = [(*x.shape[:-1], directions * visible)]
            sizes = [visible, rnn.hidden_size] if rnn.mode == "LSTM" else [visible]
            shapes += [(directions * rnn.num_layers, *batch, size) for size in sizes]
            made, *state = connect(tuple(x.new_zeros(shape) for shape in shapes), [x])
            output: Tensor | PackedSequence = made
            if packed is not None:
                output = PackedSequence(made, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
            return output, (tuple(state) if rnn.mode == "LSTM" else state[0])

        return forward

    def refresh(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.RNNBase)
        shapes = {name: parameter.shape for name, parameter in layer.named_parameters()}
        layer.input_size = shapes["weight_ih_l0"][1]
        layer.hidden_size = shapes["weight_hh_l0"][0] // GATES[layer.mode]
        if layer.proj_size:
            layer.proj_size = shapes["weight_hr_l0"][0]
        # The forward pass reads this list, not the parameters: a stale one reads freed memory.
        layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]
        layer.flatten_parameters()


class RecurrentCell(LayerKind):
    """One step of an LSTM, GRU or RNN, in a loop of the user's own."""

    types = (nn.RNNCellBase,)

    def places(self, layer: nn.Module, role: Role) -> Sequence[Place]:
        assert isinstance(layer, nn.RNNCellBase)
        if role == "in":
            return [Place("weight_ih", 1, every_channel(layer.input_size))]
        unit = every_channel(layer.hidden_size)
        gates = layer.weight_hh.shape[0] // layer.hidden_size
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        rows = [place for gate in range(gates) for place in present(layer, names, 0, unit + gate * layer.hidden_size)]
        return [*rows, Place("weight_hh", 1, unit, "in")]

    def refresh(self, layer: nn.Module) -> None:
        assert isinstance(layer, nn.RNNCellBase)
        layer.hidden_size, layer.input_size = layer.weight_hh.shape[1], layer.weight_ih.shape[1]


@torch.no_grad()
def heard(
    layer: nn.RNNBase, inputs: Tensor | PackedSequence, state: Any = None, enough: int | None = None
) -> dict[str, Tensor]:
    """What the columns of each weight read, step by step: the input, or hidden units of a level and direction.

    The levels are computed anew, one by one and without the dropout between them. Recurrent columns read the hidden
    units of the step before: the initial state at the first, and never those of the last.

    Args:
        layer: an LSTM, GRU or RNN.
        inputs: what it is called with.
        state: the initial state that it is called with, if any.
        enough: so many steps of all items together will do: of others nothing is computed. Packed sequences are whole.

    Returns:
        Name of a weight -> (batch, steps, columns); of a packed sequence (elements, columns).
    """
    run: Any = getattr(torch._VF, layer.mode.lower())
    directions, packed = len(_suffixes(layer)), isinstance(inputs, PackedSequence)
    x = inputs.data if isinstance(inputs, PackedSequence) else inputs
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(layer.get_parameter("weight_ih_l0").dtype)
        if not packed:
            x = x.unsqueeze(0) if x.ndim == 2 else x if layer.batch_first else x.transpose(0, 1)
        batch = int(inputs.batch_sizes[0]) if isinstance(inputs, PackedSequence) else len(x)
        sizes = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 2 if layer.mode == "LSTM" else 1]
        states = (state,) if isinstance(state, Tensor) else state
        if states is not None and isinstance(inputs, PackedSequence) and inputs.sorted_indices is not None:
            states = tuple(s.index_select(1, inputs.sorted_indices) for s in states)  # as `nn.RNNBase` does
        if enough is not None and not packed and -(-enough // x.shape[1]) < batch:
            batch = -(-enough // x.shape[1])
            items = torch.arange(batch, device=x.device) * len(x) // batch
            x = x[items]
            states = None if states is None else tuple(s.index_select(1, items) for s in states)
        read: dict[str, Tensor] = {}
        weights = len(layer._flat_weights) // layer.num_layers
        for level in range(layer.num_layers):
            read.update({f"weight_ih_l{level}{suffix}": x for suffix in _suffixes(layer)})
            if states is None:
                first = [x.new_zeros(directions, batch, size) for size in sizes]
            else:
                own = slice(level * directions, (level + 1) * directions)
                first = [s.unsqueeze(1)[own] if s.ndim == 2 else s[own] for s in states]
            initial = tuple(first) if layer.mode == "LSTM" else first[0]
            flat = layer._flat_weights[level * weights : (level + 1) * weights]
            rest = (flat, layer.bias, 1, 0.0, False, layer.bidirectional)
            if isinstance(inputs, PackedSequence):
                x = run(x, inputs.batch_sizes, initial, *rest)[0]
                steps = list(x.split(inputs.batch_sizes.tolist()))
            else:
                x = run(x, initial, *rest, True)[0]
                steps = list(x.unbind(1))
            for d, suffix in enumerate(_suffixes(layer)):
                before = _before([step.chunk(directions, -1)[d] for step in steps], first[0][d], backwards=d == 1)
                read[f"weight_hh_l{level}{suffix}"] = torch.cat(before) if packed else torch.stack(before, 1)
    return read


def _before(steps: list[Tensor], initial: Tensor, backwards: bool) -> list[Tensor]:
    """The state that each step begins with; longer sequences come first, so that `steps` may get shorter."""
    if not backwards:
        states = [initial, *steps[:-1]]
        return [state[: len(step)] for state, step in zip(states, steps, strict=True)]
    later = [len(step) for step in steps[1:]] + [0]
    return [
        torch.cat([state[:n], initial[n : len(step)]])
        for state, step, n in zip([*steps[1:], initial], steps, later, strict=True)
    ]


def _suffixes(layer: nn.RNNBase) -> list[str]:
    """Of the tensors of each direction."""
    return ["", "_reverse"] if layer.bidirectional else [""]


def _made(layer: nn.RNNBase, level: int, direction: int, unit: Tensor) -> list[Place]:
    """What makes the visible units of one layer and direction, and the recurrent columns that read them."""
    suffix = f"_l{level}{_suffixes(layer)[direction]}"
    made = [Place(f"weight_hr{suffix}", 0, unit)] if layer.proj_size else _gates(layer, suffix, unit)
    return [*made, Place(f"weight_hh{suffix}", 1, unit, "in")]


def _gates(layer: nn.RNNBase, suffix: str, unit: Tensor) -> list[Place]:
    """The rows of all gates of some units (-1: none)."""
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if layer.bias else [])]
    rows = [unit.where(unit < 0, unit + gate * layer.hidden_size) for gate in range(GATES[layer.mode])]
    return [Place(f"{name}{suffix}", 0, row) for name in names for row in rows]
