"""Forward hooks that gather evidence while the network trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_slim.eager import eagerly
from lightning_slim.statistics import Moments, with_lags
from lightning_slim.surgery.layers.multihead import module_by_module
from lightning_slim.surgery.layers.recurrent import heard
from lightning_slim.units import Reader, UnitGroup, gradients, parameters_of, rows

# Rows of one batch, for each column: a convolution has a row for every pixel, many more than second moments need.
ROWS_PER_COLUMN = 4
MIN_ROWS = 1024

# What becomes of the effects of a unit's weights, one unit a row, in one step.
OF_UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "saliency": lambda effects: effects.sum(1).square(),
    "information": lambda effects: effects.square().sum(1),
}


class Recorder:
    """Streams what scores need: moments of the units as their readers see them, and their effects on the loss.

    Args:
        model: the module that `groups` were found in.
        groups: all groups that will be scored.
        lags: past steps beside the present, where units arrive as series.
        moments: whether to stream moments.
        saliency: whether to stream the squared first-order effect of each unit on the loss.
        information: whether to stream the sum of the squared effects of each unit's weights.
        memory: how much of the past still counts one recorded step later: the weights move, old evidence fades.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        lags: int = 0,
        moments: bool = True,
        saliency: bool = False,
        information: bool = False,
        memory: float = 0.95,
    ) -> None:
        self.model = model
        self.groups = list(groups)
        self.lags, self.memory = lags, memory
        self.wants_moments = moments
        # One entry for each reader; of blocks, one for all.
        self.moments: dict[str, list[Moments | None]] = {
            g.name: [None] * (1 if g.blocks else len(g.readers)) for g in groups
        }
        # What is wanted of the gradients: group -> decayed sum over steps.
        self.effects: dict[str, dict[str, Tensor]] = {
            name: {} for name, wanted in (("saliency", saliency), ("information", information)) if wanted
        }
        self.steps: dict[str, float] = {}  # group -> decayed number of steps

    @property
    def ready(self) -> bool:
        """Whether anything that is wanted was recorded."""
        seen = all(m is not None for group in self.moments.values() for m in group)
        return (seen or not self.wants_moments) and all(
            of_groups.keys() == self.moments.keys() for of_groups in self.effects.values()
        )

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Every forward pass of the model within is recorded, as one step."""
        for moments in (m for group in self.moments.values() for m in group if m is not None):
            moments.decay(self.memory)
        handles = []
        recurrent: dict[nn.RNNBase, list[tuple[str, int, Reader]]] = {}
        if self.wants_moments:
            for group in self.groups:
                for slot, reader in enumerate(group.readers):
                    layer = self.model.get_submodule(reader.layer)
                    if isinstance(layer, nn.RNNBase):
                        recurrent.setdefault(layer, []).append((group.name, slot, reader))
                        continue
                    hook = _Watch(self, group.name, slot, reader)
                    handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
                together = _WatchBlocks(self, group.name, group.blocks)
                for path in group.blocks:
                    block = self.model.get_submodule(path)
                    handles.append(block.register_forward_hook(together.of(path), with_kwargs=True))
        for layer, readers in recurrent.items():
            handles.append(layer.register_forward_pre_hook(_WatchRecurrent(self, readers), with_kwargs=True))
        try:
            with eagerly(), module_by_module(self.model):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe(self, name: str, slot: int, reader: Reader, inputs: Tensor) -> None:
        """Adds what one reader was given to the moments."""
        units = reader.span.index.shape[0]
        moments = self.moments[name][slot]
        lags = self.lags if moments is None else len(moments.total) // units - 1
        table = _rows(inputs.detach(), reader, self._width(reader), lags, skip_short=moments is not None)
        if table is None:
            return
        enough = max(MIN_ROWS, ROWS_PER_COLUMN * table.shape[1] * table.shape[2])
        table = _thinned(table, enough)
        if moments is None:
            moments = self.moments[name][slot] = Moments(units * table.shape[2], inputs.device)
        with torch.autocast(inputs.device.type, enabled=False):  # a forward pass in bfloat16 would compute them so, too
            moments.update(table.flatten(1))

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe_blocks(self, name: str, updates: Sequence[Tensor]) -> None:
        """Adds what every block adds to its input: one column a block, a row for every sample, step and channel."""
        moments = self.moments[name][0]
        if moments is None:
            moments = self.moments[name][0] = Moments(len(updates), updates[0].device)
        enough = max(MIN_ROWS, ROWS_PER_COLUMN * len(updates))
        table = torch.stack([_thinned(update.flatten(), enough).float() for update in updates], 1)
        with torch.autocast(updates[0].device.type, enabled=False):
            moments.update(table)

    @torch.inference_mode(False)
    @torch.no_grad()
    def observe_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Adds the effects of every unit's weights, `weight * gradient`; call it when gradients are whole and unscaled.

        Args:
            parameters: whose gradients are whole now (those of one of several optimizers); all, if None.
        """
        mine = None if parameters is None else {id(p) for p in parameters}
        for group in self.groups:
            if mine is not None and not any(id(p) in mine for p in parameters_of(self.model, group)):
                continue
            self.steps[group.name] = self.memory * self.steps.get(group.name, 0.0) + 1
            effects = rows(self.model, group).float() * gradients(self.model, group).float()
            for name, of_groups in self.effects.items():
                new = OF_UNITS[name](effects)
                past = of_groups.get(group.name)
                of_groups[group.name] = new if past is None else self.memory * past + new

    def synchronise(self, average: Callable[[Tensor], Tensor]) -> None:
        """Lets every rank know what all of them recorded: sums become their mean over ranks."""
        for moments in (m for group in self.moments.values() for m in group if m is not None):
            moments.load_state_dict({key: average(value) for key, value in moments.state_dict().items()})
        for of_groups in self.effects.values():
            of_groups.update({name: average(value) for name, value in of_groups.items()})

    def mean_saliency(self, name: str) -> Float[Tensor, "units"]:
        """`(sum of weight * gradient) ** 2`: mean over recorded steps, recent ones weighing more."""
        return self.effects["saliency"][name] / self.steps[name]

    def mean_information(self, name: str) -> Float[Tensor, "units"]:
        """`sum of (weight * gradient) ** 2`: mean over recorded steps, recent ones weighing more."""
        return self.effects["information"][name] / self.steps[name]

    def keep(self, groups: Sequence[UnitGroup], plan: Mapping[str, Bool[Tensor, "units"]]) -> None:
        """Follows a cut: evidence of the units that stay is kept, of the others dropped."""
        left = {group.name: group for group in groups}
        for group in self.groups:
            if group.name not in left:
                del self.moments[group.name]
                self.steps.pop(group.name, None)
                for of_groups in self.effects.values():
                    of_groups.pop(group.name, None)
            elif not group.blocks:
                stand = {(reader.layer, reader.span.tensor) for reader in left[group.name].readers}
                seen = zip(self.moments[group.name], group.readers, strict=True)
                self.moments[group.name] = [m for m, r in seen if (r.layer, r.span.tensor) in stand]
        self.groups = list(groups)
        for name, mask in ((name, mask) for name, mask in plan.items() if name in left):
            for moments in self.moments[name]:
                if moments is not None:
                    width = len(moments.total) // len(mask)
                    moments.keep(mask.repeat_interleave(width).nonzero().flatten())
            for of_groups in self.effects.values():
                if name in of_groups:
                    of_groups[name] = of_groups[name][mask.to(of_groups[name].device)]

    def _width(self, reader: Reader) -> int:
        """Columns of the reader's weight: a chunk of a grouped convolution's input."""
        weight = self.model.get_parameter(reader.span.tensor)
        return weight.shape[reader.span.axis]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data only."""
        return {
            "moments": {
                name: [None if m is None else m.state_dict() for m in group] for name, group in self.moments.items()
            },
            "effects": {name: dict(of_groups) for name, of_groups in self.effects.items()},
            "steps": dict(self.steps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for name, group in state["moments"].items():
            for slot, values in enumerate(group):
                if values is not None:
                    moments = Moments(0, device)
                    moments.load_state_dict(values)
                    self.moments[name][slot] = moments
        for name, of_groups in self.effects.items():
            of_groups.update({group: v.to(device) for group, v in state["effects"].get(name, {}).items()})
        self.steps = dict(state["steps"])


class _Watch:
    """A forward pre-hook: passes a reader's input on to the recorder."""

    def __init__(self, recorder: Recorder, group: str, slot: int, reader: Reader) -> None:
        self.recorder, self.group, self.slot, self.reader = recorder, group, slot, reader

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor | PackedSequence))
        inputs = inputs.data if isinstance(inputs, PackedSequence) else inputs
        self.recorder.observe(self.group, self.slot, self.reader, inputs)


class _WatchRecurrent:
    """A forward pre-hook on a recurrent layer, whose weights read the input or what other levels and steps make."""

    def __init__(self, recorder: Recorder, readers: Sequence[tuple[str, int, Reader]]) -> None:
        self.recorder, self.readers = recorder, readers

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, nn.RNNBase)
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        read = heard(module, given["input"], given.get("hx"))
        for group, slot, reader in self.readers:
            self.recorder.observe(group, slot, reader, read[reader.span.tensor.rpartition(".")[2]])


class _WatchBlocks:
    """Forward hooks on all blocks of a group: once every one was called, passes on what they added to their inputs."""

    def __init__(self, recorder: Recorder, group: str, blocks: Sequence[str]) -> None:
        self.recorder, self.group, self.blocks = recorder, group, blocks
        self.updates: dict[str, Tensor] = {}

    def of(self, path: str) -> Callable[..., None]:
        """The hook for one block."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            made = result if isinstance(result, Tensor) else result[0]
            self.updates[path] = made.detach() - given.detach()
            if len(self.updates) == len(self.blocks):
                self.recorder.observe_blocks(self.group, [self.updates[path] for path in self.blocks])
                self.updates.clear()

        return hook


def _thinned(table: Float[Tensor, "rows *columns"], enough: int) -> Float[Tensor, "fewer *columns"]:
    """At most `enough` rows, from everywhere.

    Rows come in the order of items and pixels: every n-th, where n shares a factor with the width of an image, is of
    some of its columns only. So the step is coprime to the number of rows, and near its golden section.
    """
    rows = len(table)
    if rows <= enough:
        return table
    step = round(0.618 * rows)
    while math.gcd(step, rows) > 1:
        step += 1
    return table[torch.arange(enough, device=table.device) * step % rows]


def _rows(
    inputs: Tensor, reader: Reader, width: int, lags: int, skip_short: bool
) -> Float[Tensor, "rows units columns"] | None:
    """The units at a reader, one row for every sample, pixel or step, with their past where they arrive as series.

    Several positions of a unit (behind a flatten, or in the chunks of a grouped convolution) are several rows; where
    they are variables of their own (the channels of a head), they are its columns, without a past. A series
    of one step has no past to speak of; where longer ones were seen before, a short one is None if `skip_short`.
    """
    index = torch.cat([reader.span.index + chunk * width for chunk in range(reader.chunks)], dim=1)
    channels = inputs.movedim(reader.axis, -1)
    everything = index.shape == (channels.shape[-1], 1) and torch.equal(index[:, 0], torch.arange(len(index)))
    # ..., units, positions; nothing is gathered where unit u simply is channel u
    units = channels.unsqueeze(-1) if everything else channels[..., index.to(inputs.device)]
    if reader.joint:
        return units.flatten(0, -3)
    # item, step, units, positions: a Conv1d, or a linear layer on (item, step, channel)
    if lags and units.ndim == 4 and (units.shape[1] > 1 or skip_short):
        if units.shape[1] <= lags and skip_short:
            return None
        series = units.permute(0, 3, 1, 2).flatten(0, 1)
        return with_lags(series, lags)
    return units.movedim(-1, 0).flatten(0, -2).unsqueeze(-1)
