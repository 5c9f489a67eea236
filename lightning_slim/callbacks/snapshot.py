"""A run as it stands, in memory, to go back to: weights, structure, optimizers, averages, masks. Clocks run on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_slim.callbacks.base import SlimCallback
from lightning_slim.callbacks.companions import averages, cut_part, follow, monitors
from lightning_slim.checkpoint import cut_tensors, load_state, remember_cut, state_of

SCHEDULED = ("lr", "momentum", "betas")  # what schedulers write into a group of parameters


def take_snapshot(trainer: Trainer, pl_module: LightningModule, owner: Callback) -> dict[str, Any]:
    """All that a cut and the training after it change, as tensors and plain data.

    Not the progress of the loops, nor the random state, nor schedulers that count steps or epochs: time goes on. Of
    schedulers, those that wait for a metric; of callbacks, averages, monitors of a best value
    and those of this package but for the owner.
    """
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    return copy.deepcopy(
        {
            "module": state_of(pl_module, pl_module),
            "averages": [state_of(average, cut_part(average)) for average in averages(trainer)],
            "optimizers": [_optimizer_state(optimizer, names) for optimizer in trainer.optimizers],
            "schedulers": [
                (type(config.scheduler).__name__, config.scheduler.state_dict() if config.reduce_on_plateau else None)
                for config in trainer.lr_scheduler_configs
            ],
            "precision": trainer.precision_plugin.state_dict(),
            "callbacks": {callback.state_key: callback.state_dict() for callback in _others(trainer, owner)},
            "monitors": {callback.state_key: callback.state_dict() for callback in monitors(trainer)},
        }
    )


def roll_back(trainer: Trainer, pl_module: LightningModule, owner: Callback, snapshot: Mapping[str, Any]) -> None:
    """Puts the run back to where it was, to the bit; the snapshot is used up.

    The learning rate goes on by the clock, where a scheduler counts steps or epochs: wound back, a run of one cycle
    would end at a high rate, and its steps would be other steps than those of the run that was planned.

    Groups of parameters that another callback gave an optimizer since then stay, with momentum that begins anew; so
    does a scheduler that another callback put in the place of the old one.
    """
    before = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    load_models(trainer, pl_module, snapshot)
    parameters = dict(pl_module.named_parameters())
    clocked = {
        id(getattr(c.scheduler, "optimizer", None)) for c in trainer.lr_scheduler_configs if not c.reduce_on_plateau
    }
    for optimizer, state in zip(trainer.optimizers, snapshot["optimizers"], strict=True):
        _load_optimizer(optimizer, parameters, before, state, SCHEDULED if id(optimizer) in clocked else ())
    for config, (kind, state) in zip(trainer.lr_scheduler_configs, snapshot["schedulers"], strict=False):
        if state is not None and type(config.scheduler).__name__ == kind:
            config.scheduler.load_state_dict(state)
    trainer.precision_plugin.load_state_dict(snapshot["precision"])
    pl_module.zero_grad()  # what was accumulated belongs to the other structure
    follow(trainer, pl_module, change=None)
    # A resumed run may have other callbacks than the one that took the snapshot.
    for callback in (c for c in _others(trainer, owner) if c.state_key in snapshot["callbacks"]):
        callback.load_state_dict(snapshot["callbacks"][callback.state_key])
        callback.on_train_start(trainer, pl_module)  # to a callback this is what a resume is
    for monitor in (m for m in monitors(trainer) if m.state_key in snapshot["monitors"]):
        monitor.load_state_dict(snapshot["monitors"][monitor.state_key])


def load_models(trainer: Trainer, pl_module: LightningModule, snapshot: Mapping[str, Any]) -> None:
    """Gives the module and its averages the structure and the weights that they had."""
    cut = cut_tensors(pl_module)
    load_state(pl_module, pl_module, snapshot["module"])
    for average, state in zip(averages(trainer), snapshot["averages"], strict=False):  # another fit may have none
        remember_cut(cut_part(average), cut)
        load_state(average, cut_part(average), state)


def _others(trainer: Trainer, owner: Callback) -> list[SlimCallback]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SlimCallback) and callback is not owner]


def _optimizer_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Its state, and the names of the parameters that it holds; "" of one that is not the module's."""
    held = [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
    return {"state": optimizer.state_dict(), "names": held}


def _load_optimizer(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    before: Mapping[int, str],
    state: Mapping[str, Any],
    scheduled: Iterable[str],
) -> None:
    known = state["names"]
    added = [[before.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups[len(known) :]]
    saved, position = state["state"], sum(map(len, known))
    groups = list(saved["param_groups"])
    for group, names in zip(optimizer.param_groups, [*known, *added], strict=True):
        strangers = iter([parameter for parameter in group["params"] if id(parameter) not in before])
        group["params"][:] = [parameters[name] if name else next(strangers) for name in names]
    for names in added:
        groups.append({"params": list(range(position, position + len(names)))})
        position += len(names)
    # What others wrote into a group since then, as SWA its rate, stays beside what is put back.
    groups = [
        {**now, **then, **{name: now[name] for name in scheduled if name in now}}
        for now, then in zip(optimizer.param_groups, groups, strict=True)
    ]
    optimizer.state.clear()
    optimizer.load_state_dict({**saved, "param_groups": groups})
