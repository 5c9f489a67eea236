"""Experiments: what becomes of a batch's losses if units are taken away, one by one or at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_slim.surgery.blocks import without
from lightning_slim.surgery.example import untouched
from lightning_slim.surgery.layers.multihead import module_by_module
from lightning_slim.surgery.unread import unread
from lightning_slim.units import Reader, UnitGroup

Losses = Callable[[], Float[Tensor, "items"]]
RATE = 0.1  # of units that are gated at a time
DRAWS = 4  # of gates for each batch


def ablate(model: nn.Module, groups: Sequence[UnitGroup], losses: Losses) -> dict[str, Float[Tensor, "units"]]:
    """How much larger the mean loss of a batch is without each unit: one forward pass a unit.

    Args:
        model: the module that `groups` were found in.
        groups: all groups.
        losses: computes the losses of the batch.
    """
    more = {}
    with untouched(model), torch.no_grad():
        base = losses().double().mean()
        for group in groups:
            of_units = []
            for unit in range(group.size):
                plan = {group.name: torch.arange(group.size) != unit}
                with without(model, groups, plan), unread(model, groups, plan):
                    of_units.append(losses().double().mean() - base)
            more[group.name] = torch.stack(of_units)
    return more


def gate(
    model: nn.Module, groups: Sequence[UnitGroup], losses: Losses, generator: torch.Generator
) -> dict[str, tuple[Float[Tensor, "items units"], Float[Tensor, "items"]]]:
    """Gates units at random, others for each item, in all groups at once; no reader hears a gated unit.

    Args:
        model: the module that `groups` were found in.
        groups: all groups; no recurrent layer may read them.
        losses: computes the losses of a batch, one an item.
        generator: draws the gates.

    Returns:
        Group -> which units were gated (1 where it was), and how much larger the loss of the item was then.
    """
    gone: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    more = []
    with untouched(model), torch.no_grad(), module_by_module(model):
        base = losses()
        for _ in range(DRAWS):
            drawn = {
                group.name: torch.rand(len(base), group.size, generator=generator).lt(RATE).to(base) for group in groups
            }
            with ExitStack() as gates:
                for group in groups:
                    for reader in group.readers:
                        width = model.get_parameter(reader.span.tensor).shape[reader.span.axis]
                        shut = _shutter(reader, width, drawn[group.name])
                        layer = model.get_submodule(reader.layer)
                        gates.callback(layer.register_forward_pre_hook(shut, with_kwargs=True).remove)
                    for i, path in enumerate(group.blocks):
                        bypass = _bypass(drawn[group.name][:, i])
                        block = model.get_submodule(path)
                        gates.callback(block.register_forward_hook(bypass, with_kwargs=True).remove)
                more.append(losses() - base)
            for name, of_group in drawn.items():
                gone[name].append(of_group)
    return {name: (torch.cat(of_draws), torch.cat(more)) for name, of_draws in gone.items()}


def _shutter(reader: Reader, width: int, gone: Float[Tensor, "items units"]) -> Callable[..., Any]:
    """A forward pre-hook that lets a reader hear nothing of gated units."""
    index = torch.cat([reader.span.index + chunk * width for chunk in range(reader.chunks)], dim=1).to(gone.device)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        def shut(inputs: Tensor) -> Tensor:
            if len(inputs) != len(gone):
                raise ValueError(
                    f"Expected {len(gone)} items at {reader.layer}, as there are losses, got {len(inputs)}: units can "
                    "be gated item by item only where the first axis is the batch."
                )
            open_channels = torch.ones(len(gone), inputs.shape[reader.axis], device=gone.device, dtype=inputs.dtype)
            open_channels[:, index.flatten()] = 1 - gone.repeat_interleave(index.shape[1], 1).to(inputs.dtype)
            shape = [len(gone), *[1] * (inputs.ndim - 1)]
            shape[reader.axis] = -1
            return inputs * open_channels.view(shape)

        if args and isinstance(args[0], Tensor):
            return (shut(args[0]), *args[1:]), kwargs
        name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
        return args, {**kwargs, name: shut(kwargs[name])}

    return hook


def _bypass(gone: Float[Tensor, "items"]) -> Callable[..., Any]:
    """A forward hook after which a block only hands gated items on."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> Any:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        made = result if isinstance(result, Tensor) else result[0]
        share = gone.view(-1, *[1] * (made.ndim - 1)).to(made)
        mixed = made + share * (given - made)
        return mixed if isinstance(result, Tensor) else (mixed, *result[1:])

    return hook
