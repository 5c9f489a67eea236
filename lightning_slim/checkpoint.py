"""Checkpoints of a cut model load anywhere: into a dense model, a slim one, with or without callbacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from lightning_slim.surgery import resize_to

KEY = "lightning_slim"
VERSION = 1

Module = TypeVar("Module", bound=nn.Module)


def sign(checkpoint: dict[str, Any], cut_tensors: Iterable[str]) -> None:
    """Writes into a checkpoint which tensors were cut; their shapes stand in its state dict."""
    already = checkpoint.get(KEY, {}).get("tensors", [])
    checkpoint[KEY] = {"version": VERSION, "tensors": sorted({*already, *cut_tensors})}


def fit_to(model: nn.Module, checkpoint: dict[str, Any], cut_tensors: Iterable[str] = ()) -> None:
    """Gives a model the shapes of a checkpoint, so that its state dict loads: it shrinks, or grows back.

    Only tensors that were cut, in the checkpoint or in the model, are resized: a checkpoint of another architecture
    fails to load as it always did.

    Args:
        model: the module whose state dict the checkpoint holds.
        checkpoint: as Lightning saves it.
        cut_tensors: names of the model's tensors that are cut now.

    Raises:
        ValueError: the checkpoint was written by a later version.
    """
    signature = checkpoint.get(KEY, {"version": VERSION, "tensors": []})
    if signature["version"] > VERSION:
        raise ValueError(
            f"Expected a checkpoint of version {VERSION} at most, got {signature['version']}: update lightning-slim."
        )
    names = {*signature["tensors"], *cut_tensors} & checkpoint["state_dict"].keys()
    resize_to(model, {name: checkpoint["state_dict"][name].shape for name in names})


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
            fit_to(self, checkpoint)
            super().on_load_checkpoint(checkpoint)

    # Lightning stores and compares the class's own name, not that of a stand-in.
    for attribute in ("__name__", "__qualname__", "__module__"):
        setattr(Resizing, attribute, getattr(module_class, attribute))
    model: Module = Resizing.load_from_checkpoint(checkpoint_path, **kwargs)
    model.__class__ = module_class
    return model
