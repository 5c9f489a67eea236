"""Checkpoints of a cut model load anywhere: into a dense model, a slim one, with or without callbacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_slim.payload import PayloadError, is_dense, opened, sealed
from lightning_slim.surgery import drop, dropped, forget_blocks, grow_back, resize_to, selections, set_selections
from lightning_slim.units import named_tensors

KEY = "lightning_slim"
VERSION = 1
MEMORY = "_slim_cut_tensors"  # on a layer: names of its tensors that were ever cut

UNSIGNED: Mapping[str, Any] = {"tensors": [], "dropped": {}}

Module = TypeVar("Module", bound=nn.Module)


def cut_tensors(model: nn.Module) -> set[str]:
    """Names of the module's tensors that were ever cut, or loaded cut."""
    layers = model.named_modules(remove_duplicate=False)
    return {f"{path}.{name}".lstrip(".") for path, layer in layers for name in vars(layer).get(MEMORY, ())}


def remember_cut(model: nn.Module, names: Iterable[str]) -> None:
    """Lets layers remember which of their tensors were cut, whichever callback did it, and wherever they go then."""
    layers = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        path = name.rpartition(".")[0]
        while path not in layers:  # a block that was taken out
            path = path.rpartition(".")[0]
        tensor = name[len(path) :].lstrip(".")
        layers[path].__dict__[MEMORY] = sorted({*vars(layers[path]).get(MEMORY, ()), tensor})


def sign(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Writes into a checkpoint what was cut, dropped and selected, and what shapes its state dict has there."""
    names, state = sorted(cut_tensors(model)), checkpoint["state_dict"]
    checkpoint[KEY] = sealed(
        {
            "version": VERSION,
            "tensors": names,
            "shapes": {name: list(state[name].shape) for name in names if name in state},
            "dropped": dropped(model),
            "selected": selections(model),
        }
    )


def fit_to(model: nn.Module, checkpoint: dict[str, Any], everything: bool = False) -> None:
    """Gives a model the shapes of a checkpoint, so that its state dict loads: it shrinks, or grows back.

    Only tensors that were cut, in the checkpoint or in the model, are resized: a checkpoint of another architecture
    fails to load as it always did.

    Args:
        model: the module whose state dict the checkpoint holds.
        checkpoint: as Lightning saves it.
        everything: where the checkpoint is not signed (a run without any of our callbacks wrote it), resize whatever
            differs in size but not in its number of axes.

    Raises:
        ValueError: the checkpoint was written by a later version, or of another model, or was changed since; the model
            is as it was.
    """
    state = checkpoint["state_dict"]
    signature = _signature(model, checkpoint[KEY], state) if KEY in checkpoint else UNSIGNED
    names = _fit_blocks(model, signature["dropped"])
    names |= {*signature["tensors"], *cut_tensors(model)}
    if everything and KEY not in checkpoint:
        tensors = {n: t for n, t in named_tensors(model).items() if n in state and not is_lazy(t)}
        names = {n for n, t in tensors.items() if t.ndim == state[n].ndim and t.shape != state[n].shape}
        if strange := [name for name in sorted(names) if 0 in state[name].shape or not is_dense(state[name])]:
            raise PayloadError(f"Expected dense tensors in a checkpoint, got expanded, sparse or empty: {strange}.")
    remember_cut(model, names)
    set_selections(model, signature.get("selected", selections(model)))
    resize_to(model, {name: state[name].shape for name in names & state.keys()})


def _signature(model: nn.Module, signed: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its model, if that is true of its state dict and possible in the model at hand."""
    version = signed.get("version") if isinstance(signed, Mapping) else None
    if isinstance(version, int) and version > VERSION:
        raise ValueError(f"Expected a checkpoint of version {VERSION} at most, got {version}: update lightning-slim.")
    signature = opened(signed, "the cut model")
    for name, shape in signature["shapes"].items():
        if name in state and (list(state[name].shape) != shape or not is_dense(state[name])):
            raise PayloadError(
                f"Expected {name} of shape {shape}, as the checkpoint was signed with, got {tuple(state[name].shape)}: "
                "its `state_dict` was changed since."
            )
    paths, out = dict(model.named_modules()).keys() - {""}, tuple(f"{path}." for path in dropped(model))
    named = [*signature["dropped"], *signature["selected"]]
    if strangers := [path for path in named if path not in paths and not path.startswith(out)]:
        raise ValueError(f"Expected a checkpoint of {type(model).__name__}, got one of a model with {strangers}.")
    return signature


def state_of(model: nn.Module, cut: nn.Module) -> dict[str, Any]:
    """Of a model of which `cut` is the part that is cut: all of it, or what an average wraps."""
    saved = cut.state_dict()
    unsaved = {name: buffer for name, buffer in cut.named_buffers() if name not in saved}
    state: dict[str, Any] = {"whole": model.state_dict(), "state_dict": saved, "unsaved": unsaved}
    sign(cut, state)
    return state


def load_state(model: nn.Module, cut: nn.Module, state: Mapping[str, Any]) -> None:
    """The inverse of `state_of`: the structure and the weights that the model had."""
    fit_to(cut, dict(state))
    model.load_state_dict(state["whole"])
    buffers = dict(cut.named_buffers())
    for name, value in state["unsaved"].items():
        buffers[name].copy_(value)


def _fit_blocks(model: nn.Module, blocks: Mapping[str, int]) -> set[str]:
    """Takes out and puts back blocks, so that a model lacks these; the names of the tensors that came back."""
    lacks = dropped(model)
    for path in lacks.keys() - blocks.keys():
        grow_back(model, path)
    for path in blocks.keys() - lacks.keys():
        drop(model, path, blocks[path])
    forget_blocks(model)
    back = tuple(f"{path}." for path in lacks.keys() - blocks.keys())
    return {name for name in named_tensors(model) if back and name.startswith(back)}


def load_from_checkpoint(module_class: type[Module], checkpoint_path: Any, **kwargs: Any) -> Module:
    """`module_class.load_from_checkpoint(checkpoint_path, **kwargs)` for a pruned checkpoint; needs no callback.

    Args:
        module_class: a LightningModule class, of `lightning` or of `pytorch_lightning`.
        checkpoint_path: as for `LightningModule.load_from_checkpoint`.
        **kwargs: passed on.

    Returns:
        A model of the checkpoint's shapes, of exactly `module_class`.
    """

    class Resizing(module_class):  # type: ignore[valid-type, misc]
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            fit_to(self, checkpoint, everything=True)
            super().on_load_checkpoint(checkpoint)
            fit_to(self, checkpoint, everything=True)  # the user's hook may have renamed what it found

    # Lightning stores and compares the class's own name, not that of a stand-in.
    for attribute in ("__name__", "__qualname__", "__module__"):
        setattr(Resizing, attribute, getattr(module_class, attribute))
    model: Module = Resizing.load_from_checkpoint(checkpoint_path, **kwargs)
    model.__class__ = module_class
    return model
