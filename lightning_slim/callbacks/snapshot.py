"""A run as it stands, in memory, to go back to: weights, structure, optimizers, schedulers, averages, masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_slim.callbacks.base import SlimCallback
from lightning_slim.callbacks.companions import averages, cut_part, tell
from lightning_slim.checkpoint import cut_tensors, fit_to, remember_cut, sign


def take_snapshot(trainer: Trainer, pl_module: LightningModule, owner: Callback) -> dict[str, Any]:
    """All that a cut and the training after it change, as tensors and plain data.

    Not the progress of the loops, nor the random state: time goes on. Of callbacks, averages and those of this package
    but for the owner.
    """
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    return copy.deepcopy(
        {
            "module": _model_state(pl_module, pl_module),
            "averages": [_model_state(average, cut_part(average)) for average in averages(trainer)],
            "optimizers": [_optimizer_state(optimizer, names) for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "precision": trainer.precision_plugin.state_dict(),
            "callbacks": {callback.state_key: callback.state_dict() for callback in _others(trainer, owner)},
        }
    )


def roll_back(trainer: Trainer, pl_module: LightningModule, owner: Callback, snapshot: Mapping[str, Any]) -> None:
    """Puts the run back to where it was, to the bit; the snapshot is used up."""
    before, cut = {id(parameter) for parameter in pl_module.parameters()}, cut_tensors(pl_module)
    _load_model(pl_module, pl_module, snapshot["module"])
    for average, state in zip(averages(trainer), snapshot["averages"], strict=True):
        remember_cut(cut_part(average), cut)
        _load_model(average, cut_part(average), state)
    parameters = dict(pl_module.named_parameters())
    for optimizer, state in zip(trainer.optimizers, snapshot["optimizers"], strict=True):
        _load_optimizer(optimizer, parameters, before, state)
    for config, state in zip(trainer.lr_scheduler_configs, snapshot["schedulers"], strict=True):
        config.scheduler.load_state_dict(state)
    trainer.precision_plugin.load_state_dict(snapshot["precision"])
    pl_module.zero_grad()  # what was accumulated belongs to the other structure
    tell(trainer, pl_module, change=None)
    for callback in _others(trainer, owner):  # to a callback this is what a resume is
        callback.load_state_dict(snapshot["callbacks"][callback.state_key])
        callback.on_train_start(trainer, pl_module)


def _others(trainer: Trainer, owner: Callback) -> list[SlimCallback]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SlimCallback) and callback is not owner]


def _model_state(model: nn.Module, cut: nn.Module) -> dict[str, Any]:
    """Of a model of which `cut` is the part that is cut: all of it, or what an average wraps."""
    saved = cut.state_dict()
    unsaved = {name: buffer for name, buffer in cut.named_buffers() if name not in saved}
    state: dict[str, Any] = {"whole": model.state_dict(), "state_dict": saved, "unsaved": unsaved}
    sign(cut, state)
    return state


def _load_model(model: nn.Module, cut: nn.Module, state: dict[str, Any]) -> None:
    fit_to(cut, state)
    model.load_state_dict(state["whole"])
    buffers = dict(cut.named_buffers())
    for name, value in state["unsaved"].items():
        buffers[name].copy_(value)


def _optimizer_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Its state, and the names of the parameters that it holds; "" of one that is not the module's."""
    held = [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
    return {"state": optimizer.state_dict(), "names": held}


def _load_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], before: set[int], state: Mapping[str, Any]
) -> None:
    for group, names in zip(optimizer.param_groups, state["names"], strict=True):
        strangers = iter([parameter for parameter in group["params"] if id(parameter) not in before])
        group["params"][:] = [parameters[name] if name else next(strangers) for name in names]
    optimizer.state.clear()
    optimizer.load_state_dict(state["state"])
