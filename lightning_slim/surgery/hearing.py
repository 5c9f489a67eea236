"""What still hears units that nothing should read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_slim.surgery.example import Example, untouched
from lightning_slim.surgery.layers import layer_kind
from lightning_slim.surgery.unread import unread
from lightning_slim.surgery.verify import is_real, loud, outputs
from lightning_slim.units import UnitGroup


def hearing(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    plan: Mapping[str, Bool[Tensor, "units"]],
    calls: Mapping[str, Example],
    changed: Mapping[str, Example],
) -> str:
    """What still hears units that are given to a model when the columns that read them are zero.

    Args:
        model: left as it was.
        groups: the columns that read what is given.
        plan: which of them are not zero.
        calls: the networks of the model, each with one call.
        changed: the same calls with other values in the units that are not read.

    Returns:
        The first layer that does more than carry them, or else the network; empty if nothing hears them.
    """
    own = {reader.layer for group in groups for reader in group.readers}
    kinds = {name: layer_kind(layer) for name, layer in model.named_modules()}
    inner = {name for name, layer in model.named_modules() if any(True for _ in layer.parameters())}
    inner -= {name for name in inner if kinds[name] is None and any(True for _ in model.get_submodule(name).children())}
    seen: dict[str, list[Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: object, kwargs: object, result: object) -> None:
            seen.setdefault(name, []).extend(x for x in tree_leaves((args, kwargs)) if is_real(x))

        return hook

    handles = [model.get_submodule(n).register_forward_hook(watch(n), with_kwargs=True) for n in inner - own]
    try:
        with untouched(model), loud(model), unread(model, groups, plan):
            before, heard = outputs(model, calls), dict(seen)
            seen.clear()
            after = outputs(model, changed)
    finally:
        for handle in handles:
            handle.remove()
    if not any(_differs(a, b) for a, b in zip(before, after, strict=True)):
        return ""
    for name, given in heard.items():
        kind = kinds[name]
        carries = kind is not None and kind.channel_axis is None and not kind.mixes_channels
        if not carries and any(_differs(a, b) for a, b in zip(given, seen[name], strict=True)):
            return f"{name} ({type(model.get_submodule(name)).__name__}), too"
    return f"an output of {', '.join(name or type(model).__name__ for name in calls)}, too"


def _differs(a: Tensor, b: Tensor) -> bool:
    """By more than rounding."""
    return bool(a.numel()) and float((a - b).abs().max()) > 1e-5 * float(a.abs().max())
