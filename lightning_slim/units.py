"""What a unit is and where it lives: the one vocabulary that scores, penalties and surgery share.

A unit is the smallest thing that can be removed: a channel, a neuron, a hidden unit, a head. It owns positions along
axes of several tensors (the row that makes it, its normalisation, the columns that read it). A `Span` says which, so
that no later code has to know a layer type.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lightning_slim.weight_norm import gradient, is_length, layer_of, weight

Role = Literal["out", "in"]

# Of every group at least two units stay: with one filter a channel left, a convolution with several looks depthwise,
# and could not be told apart when it is put back or loaded.
MIN_UNITS = 2


@dataclass(frozen=True, eq=False)
class Span:
    """Where a group's units live along one axis of one tensor.

    Attributes:
        tensor: dotted name, as in `state_dict`.
        axis: the axis of that tensor.
        index: `index[u]` are the positions that unit `u` owns: one for a channel, `H*W` behind a flatten.
        role: `"out"` if the tensor produces or carries the unit, `"in"` if it reads it.
    """

    tensor: str
    axis: int
    index: Int[Tensor, "units width"]
    role: Role = "out"


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group's units: where to watch them arrive, and where to fold them.

    Attributes:
        layer: dotted name of the layer whose input carries the units.
        span: the columns of its weight that read them.
        axis: the channel axis of its input (1 for convolutions, -1 for linear layers).
        chunks: in a grouped convolution the same column reads one channel of each of `chunks` chunks.
        offset: the tensor that can take over a constant input: the layer's bias, or the `running_mean` of the
            batch normalisation that follows it (which is subtracted); None if there is neither.
        joint: whether the positions of a unit are variables of their own, as the channels of a head are, and not
            repetitions of one, as pixels are.
        patches: whether the taps of a convolution's kernel are such positions, too (`joint` is True then).
    """

    layer: str
    span: Span
    axis: int
    chunks: int = 1
    offset: str | None = None
    joint: bool = False
    patches: bool = False


@dataclass(frozen=True)
class UnitGroup:
    """Units of one layer, and of all layers that must lose the same units with it.

    Attributes:
        name: the layer that makes the units.
        spans: where they live; unit `u` is row `u` of every span's index.
        readers: the layers that read them.
        blocks: where a unit is a whole residual block: which; there are no spans then.
        results: of blocks: 0 if they return a tensor, else the number of items of the tuple that they return.
        pack: groups of one pack must keep the same fraction of their units (the layers and directions of an LSTM, say);
            empty: none.
        floor: how many units must stay at least.
    """

    name: str
    spans: tuple[Span, ...]
    readers: tuple[Reader, ...] = ()
    pack: str = ""
    floor: int = MIN_UNITS
    blocks: tuple[str, ...] = ()
    results: int = 0

    @property
    def size(self) -> int:
        """Number of units."""
        return len(self.blocks) if self.blocks else int(self.spans[0].index.shape[0])

    def removed_blocks(self, keep: Bool[Tensor, "units"]) -> list[str]:
        """The blocks that a mask does not keep; none if units are no blocks."""
        return [path for path, stays in zip(self.blocks, keep.tolist(), strict=False) if not stays]

    @property
    def given(self) -> bool:
        """Whether nothing makes the units: they are inputs of the network, which its data go on having."""
        return not self.blocks and all(span.role == "in" for span in self.spans)

    @property
    def layers(self) -> set[str]:
        """Dotted names of the modules that own the group's tensors."""
        if self.blocks:
            return set(self.blocks)
        return {layer_of(span.tensor) for span in self.spans}

    @property
    def makers(self) -> set[str]:
        """Dotted names of the modules that make or carry the units."""
        return set(self.blocks) or {layer_of(span.tensor) for span in self.spans if span.role == "out"}


class Plan(dict[str, Tensor]):
    """Group name -> keep mask (`Bool[Tensor, "units"]`): what stays. Plain data to print, test and log.

    >>> print(Plan({"fc": torch.tensor([True, False, True])}))
    fc: keeps 2 of 3 units
    """

    def __str__(self) -> str:
        lines = (f"{name}: keeps {int(keep.sum())} of {len(keep)} units" for name, keep in self.items())
        return "\n".join(lines) or "nothing is removed"

    @property
    def removed(self) -> int:
        """Number of units that go."""
        return sum(int((~keep).sum()) for keep in self.values())


def most_important_first(importance: Float[Tensor, "units"]) -> list[int]:
    """Numbers of units; of equals, the first comes first."""
    order: list[int] = importance.argsort(descending=True, stable=True).tolist()
    return order


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under every name it has (a tied tensor appears once per name)."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def columns(tensor: Tensor, span: Span) -> Float[Tensor, "units fan"]:
    """The entries of a tensor that each unit of a span owns, one unit a row."""
    index = span.index.to(tensor.device)
    return tensor.movedim(span.axis, 0)[index].flatten(1)


def put_columns(tensor: Tensor, span: Span, values: Float[Tensor, "units fan"]) -> Tensor:
    """Writes what `columns` reads, in place; returns the tensor."""
    along = tensor.movedim(span.axis, 0)
    along[span.index.to(tensor.device)] = values.to(tensor.dtype).view(*span.index.shape, *along.shape[1:])
    return tensor


def rows(model: nn.Module, group: UnitGroup, role: Role | None = "out") -> Float[Tensor, "units fan"]:
    """All weights of a group, one unit a row: the one view for scores and penalties.

    Args:
        model: the module that `group` was found in.
        group: the units.
        role: `"out"`: the weights that make the units; `"in"`: those that read them; None: both.

    Returns:
        Parameters only (no buffers), concatenated over the spans with that role; under weight norm, the weights that
        the layer computes with; a tied one once.
    """
    if group.blocks:
        return _padded([p.detach().flatten() for p in model.get_submodule(path).parameters()] for path in group.blocks)
    return torch.cat(coupled_rows(model, group, role), dim=1)


def coupled_rows(model: nn.Module, group: UnitGroup, role: Role | None = "out") -> list[Float[Tensor, "units fan"]]:
    """The parts of `rows`, one a tensor; not of blocks."""
    return [columns(weight(model, s.tensor), s) for s in weight_spans(model, group, role)]


def gradients(model: nn.Module, group: UnitGroup, role: Role | None = "out") -> Float[Tensor, "units fan"]:
    """The gradients of `rows`, entry for entry; zero where a parameter has none."""
    if group.blocks:
        of_blocks = (model.get_submodule(path).parameters() for path in group.blocks)
        return _padded(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
            for parameters in of_blocks
        )
    return torch.cat([columns(gradient(model, s.tensor), s) for s in weight_spans(model, group, role)], dim=1)


def parameters_of(model: nn.Module, group: UnitGroup) -> list[nn.Parameter]:
    """All parameters that a group's units have entries in."""
    if group.blocks:
        return [p for path in group.blocks for p in model.get_submodule(path).parameters()]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [parameters[span.tensor] for span in group.spans if span.tensor in parameters]


def _padded(pieces: Iterable[list[Tensor]]) -> Float[Tensor, "units fan"]:
    """One unit a row; blocks that were cut unevenly have fewer entries than others."""
    return torch.nn.utils.rnn.pad_sequence([torch.cat(of_unit) for of_unit in pieces], batch_first=True)


def weight_spans(model: nn.Module, group: UnitGroup, role: Role | None) -> Iterator[Span]:
    """The spans that `rows` concatenates: those in weights; what a weight's lengths say, the weight says too."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: set[tuple[int, int]] = set()
    for span in group.spans:
        if span.tensor in parameters and role in (None, span.role) and not is_length(model, span.tensor):
            axis = id(parameters[span.tensor]), span.axis
            if axis not in seen:
                yield span
            seen.add(axis)


def blocks_gone(groups: Iterable[UnitGroup], plan: Mapping[str, Bool[Tensor, "units"]]) -> set[str]:
    """Dotted names of the blocks that a plan takes out."""
    return {path for group in groups if group.name in plan for path in group.removed_blocks(plan[group.name])}


def positions_gone(
    groups: Iterable[UnitGroup], plan: Mapping[str, Bool[Tensor, "units"]]
) -> dict[tuple[str, int], Int[Tensor, "gone"]]:
    """(tensor, axis) -> the positions along it that a plan removes, rising, each once."""
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for group in groups:
        for span in group.spans:
            if group.name in plan:
                positions = span.index[~plan[group.name].to(span.index.device)].flatten()
                gone.setdefault((span.tensor, span.axis), []).append(positions)
    return {place: torch.unique(torch.cat(positions)) for place, positions in gone.items()}


def renumber(groups: list[UnitGroup], plan: Mapping[str, Bool[Tensor, "units"]]) -> list[UnitGroup]:
    """The groups as they stand after `plan` was cut: gone units left out, positions counted anew.

    What lay in a block that is gone goes with it, and so do groups of which nothing is left.

    Args:
        groups: all groups of a model (a tensor may be shared by several of them).
        plan: group name -> keep mask.
    """
    if not plan:
        return list(groups)
    blocks, missing = blocks_gone(groups, plan), positions_gone(groups, plan)

    def stands(name: str) -> bool:
        return not any(name.startswith(f"{path}.") for path in blocks)

    def shift(span: Span, keep: Tensor | None) -> Span:
        index = span.index if keep is None else span.index[keep.to(span.index.device)]
        if (span.tensor, span.axis) in missing:
            index = index - torch.searchsorted(missing[span.tensor, span.axis], index)
        return Span(span.tensor, span.axis, index, span.role)

    def update(group: UnitGroup) -> UnitGroup:
        keep = plan.get(group.name)
        spans = tuple(shift(span, keep) for span in group.spans if stands(span.tensor))
        readers = tuple(replace(r, span=shift(r.span, keep)) for r in group.readers if stands(r.span.tensor))
        left = tuple(path for path in group.blocks if path not in blocks)
        return replace(group, spans=spans, readers=readers, blocks=left)

    return [group for group in map(update, groups) if group.spans or group.blocks]


def to_state(group: UnitGroup) -> dict[str, Any]:
    """A group as plain data and tensors, which `torch.load(weights_only=True)` reads."""
    return {
        "name": group.name,
        "pack": group.pack,
        "floor": group.floor,
        "blocks": list(group.blocks),
        "results": group.results,
        "spans": [vars(span).copy() for span in group.spans],
        "readers": [{**vars(reader), "span": vars(reader.span).copy()} for reader in group.readers],
    }


def check_fit(model: nn.Module, groups: Iterable[UnitGroup]) -> None:
    """Raises a ValueError if groups that were stored are not of this model, as it is now."""
    tensors, layers = named_tensors(model), dict(model.named_modules(remove_duplicate=False))
    for group in groups:
        spans = [*group.spans, *(reader.span for reader in group.readers)]
        wrong = [s.tensor for s in spans if s.tensor not in tensors or not _fits(s, tensors[s.tensor], group.size)]
        wrong += [path for path in (*group.blocks, *(reader.layer for reader in group.readers)) if path not in layers]
        if wrong:
            raise ValueError(
                f"Expected units of {type(model).__name__}, got {group.name}, which is of "
                f"other shapes: {', '.join(wrong)}."
            )


def _fits(span: Span, tensor: Tensor, units: int) -> bool:
    """Whether a span is of so many units, each at places of its own in a tensor."""
    if not -tensor.ndim <= span.axis < tensor.ndim or span.index.ndim != 2 or len(span.index) != units:
        return False
    return bool((span.index >= 0).all()) and bool((span.index < tensor.shape[span.axis]).all())


def from_state(state: Mapping[str, Any]) -> UnitGroup:
    """The inverse of `to_state`."""
    spans = tuple(Span(**span) for span in state["spans"])
    readers = tuple(Reader(**{**reader, "span": Span(**reader["span"])}) for reader in state["readers"])
    kept = {key: state[key] for key in ("name", "pack", "floor", "results")}
    return UnitGroup(spans=spans, readers=readers, blocks=tuple(state["blocks"]), **kept)
