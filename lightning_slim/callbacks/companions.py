"""What else holds the model while it is cut: averages, the distributed wrapper, monitors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel

from lightning_slim.eager import forget_compiled
from lightning_slim.ranks import together
from lightning_slim.surgery import StructureChange
from lightning_slim.transaction import is_ours


def copies(trainer: Trainer) -> list[nn.Module]:
    """Copies of the module that callbacks keep."""
    return [cut_part(average) for average in averages(trainer)]


def averages(trainer: Trainer) -> list[nn.Module]:
    """What callbacks keep copies in: SWA, WeightAveraging and its children name it `_average_model`."""
    found = (getattr(callback, "_average_model", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return [average for average in found if isinstance(average, nn.Module)]


def cut_part(average: nn.Module) -> nn.Module:
    """The copy of the module in an average."""
    return average.module if isinstance(average, AveragedModel) else average


def all_that_changes(trainer: Trainer, pl_module: LightningModule) -> list[object]:
    """Whatever follows a cut of the module: for `all_or_nothing`."""
    ours = [callback for callback in trainer.callbacks if is_ours(callback)]  # type: ignore[attr-defined]
    optimizers, schedulers = trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs]
    plugins = trainer.strategy, trainer.precision_plugin
    return [pl_module, *averages(trainer), *optimizers, *schedulers, *plugins, *monitors(trainer), *ours]


def follow(trainer: Trainer, pl_module: LightningModule, change: StructureChange | None) -> None:
    """Lets what is ours, and the distributed wrapper, follow a cut of the module, or its return (None).

    Its optimizers and copies went along already.
    """
    forget_compiled()
    if is_ddp(trainer.strategy):
        wrap_again(trainer.strategy, pl_module)
    for hook in _hooks(trainer, change, ours=True):
        hook()


def tell(trainer: Trainer, change: StructureChange | None) -> None:
    """Lets a user's callbacks know that the module was cut, or returned to a former structure (None).

    Raises:
        Exception: what their hooks raised, when all have been told.
    """
    with ExitStack() as stack:  # it goes on whatever is raised, from its end to its beginning
        for hook in reversed(_hooks(trainer, change, ours=False)):
            stack.callback(hook)


def _hooks(trainer: Trainer, change: StructureChange | None, ours: bool) -> list[Callable[[], None]]:
    name, told = ("on_structure_restored", ()) if change is None else ("on_structure_change", (change,))
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    hooks = [getattr(callback, name, None) for callback in callbacks if is_ours(callback) is ours]
    return [partial(hook, *told) for hook in hooks if hook is not None]


def undecided(trainer: Trainer) -> bool:
    """Whether another callback is still going to choose the inputs: what is left to remove is known after that."""
    return any(getattr(callback, "undecided", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def is_ddp(strategy: Any) -> bool:
    """Whether a strategy wraps the module in DistributedDataParallel; by name, for both import names of Lightning."""
    return "DDPStrategy" in {c.__name__ for c in type(strategy).__mro__}


def wrap_again(strategy: Any, pl_module: LightningModule) -> None:
    """A new DistributedDataParallel wrapper: the old one's reducer knows the old parameters only."""
    strategy.model = pl_module
    strategy.configure_ddp()
    if hasattr(strategy, "_pl_static_graph_delay_done"):
        strategy._pl_static_graph_delay_done = False


def gathered(strategy: Any, value: Any) -> list[Any]:
    """What every rank says, in order; all must ask."""
    if not is_ddp(strategy):
        return [value]
    answers: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(answers, value)
    return answers


def decided(strategy: Any, work: Callable[[], Any]) -> Any:
    """What rank 0 comes to, if no rank fails."""
    return strategy.broadcast(together(partial(gathered, strategy), work), src=0)


def agree_on_shapes(strategy: Any, module: nn.Module) -> None:
    """Raises a RuntimeError, on all ranks, if some have other shapes than others."""
    shapes = [tuple(tensor.shape) for tensor in module.state_dict().values() if isinstance(tensor, torch.Tensor)]
    if any(others != shapes for others in gathered(strategy, shapes)):
        raise RuntimeError("Expected the same shapes on every rank after a cut, got others on some.")


def reset_monitors(trainer: Trainer) -> None:
    """Lets ModelCheckpoint and EarlyStopping begin anew: what was best before a cut was best of a larger model.

    Files of the old best stay on disk.
    """
    for callback in monitors(trainer, "best_k_models"):
        callback.best_k_models = {}
        callback.best_model_score = None
        callback.kth_best_model_path = ""
        infinite = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        callback.kth_value = infinite
    for callback in monitors(trainer, "wait_count"):
        callback.wait_count = 0
        callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)


def monitors(trainer: Trainer, *attributes: str) -> list[Any]:
    """Callbacks that remember a best value of a monitored metric, under one of these attributes."""
    names = attributes or ("best_k_models", "wait_count")
    return [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if getattr(callback, "monitor", None) is not None and any(hasattr(callback, name) for name in names)
    ]


def average_again(trainer: Trainer, pl_module: LightningModule, owner: Callback) -> None:
    """The module was given other weights when training ended: averages that had their turn before that get another."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks[: callbacks.index(owner)]:
        if isinstance(getattr(callback, "_average_model", None), nn.Module):
            callback.on_train_end(trainer, pl_module)
