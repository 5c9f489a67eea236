"""What a user wants to stay whole: names, patterns and types of layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection

from torch import nn

Skip = Collection[str | type[nn.Module]]


def check_skip(model: nn.Module, skip: Skip) -> None:
    """Raises a ValueError if an entry of `skip` names no layer of the model."""
    modules = dict(model.named_modules())
    for entry in skip:
        if not any(skips(entry, name, module) for name, module in modules.items()):
            raise ValueError(
                f"Expected `skip` to name layers, patterns or types of {type(model).__name__}, got {entry!r}: "
                f"its layers are {', '.join(name for name in modules if name)}."
            )


def check_module(model: nn.Module, module: str) -> None:
    """Raises a ValueError if `module` is not the dotted name of a part of the model; empty is all of it."""
    parts = [name.replace("_orig_mod.", "") for name, _ in model.named_modules()]
    if module not in parts:
        raise ValueError(
            f"Expected `module=` to be the dotted name of a part of {type(model).__name__}, got {module!r}: "
            f"its parts are {', '.join(name for name in parts if name) or 'none'}."
        )


def skips(entry: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    """Whether an entry of `skip` means a layer: by type or its name, by the layer's or a parent's name, by pattern."""
    name = name.replace("_orig_mod.", "")  # a compiled module keeps the original under this name
    if isinstance(entry, type):
        return isinstance(module, entry)
    classes = {n for c in type(module).__mro__[:-1] for n in (c.__name__, f"{c.__module__}.{c.__qualname__}")}
    return entry in classes - {"Module"} or fnmatch.fnmatch(name, entry) or name.startswith(f"{entry}.")
