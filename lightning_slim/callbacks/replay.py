"""A training step once more, without a trace: for experiments on the batch that is about to be trained on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lightning_slim.losses import HearLosses


def replay(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Float[Tensor, "items"]:
    """The losses of a batch's items as the training step computes them; nothing is logged, counted or drawn.

    Raises:
        MisconfigurationException: a module that steps its optimizers itself.
    """
    refuse_manual(module, "Choose a score without experiments, such as `Granger()` or `Taylor()`.")
    with unseen(module), trainer.precision_plugin.train_step_context():
        with HearLosses() as heard:
            loss = loss_of(module, batch, batch_idx)
        losses: Tensor = heard.of_items(loss)
    return losses


def refuse_manual(module: LightningModule, remedy: str) -> None:
    """Raises if the module steps its optimizers itself."""
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "Expected automatic optimization, got a module that steps its optimizers itself: its training step cannot "
            f"be tried out. {remedy}"
        )


def loss_of(module: LightningModule, batch: Any, batch_idx: int) -> Any:
    """What the training step returns as its loss."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    step = module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)
    return step["loss"] if isinstance(step, dict) else step


def validation_of(module: LightningModule, batch: Any) -> Any:
    """What the validation step returns for a first batch."""
    takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
    return module.validation_step(batch, 0) if takes_index else module.validation_step(batch)


@contextmanager
def unseen(module: LightningModule) -> Iterator[None]:
    """What is logged goes nowhere; metrics, buffers, random numbers and what the module collects are put back."""
    metrics = {metric: copy.copy(metric.__dict__) for metric in module.modules() if isinstance(metric, Metric)}
    states = {metric: metric._copy_state_dict() for metric in metrics}
    # Other tensors lie in for the buffers: a graph may hold these, so that they must not be written to afterwards.
    buffers = [(m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    own |= {name: copy.copy(value) for name, value in own.items() if isinstance(value, list | dict | set)}
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    for owner, name, buffer in buffers:
        owner._buffers[name] = buffer.clone()
    try:
        with isolate_rng(include_cuda=False), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer
        for name in [name for name in vars(module) if not name.startswith("_")]:
            del module.__dict__[name]
        module.__dict__.update(own)
        for metric, attributes in metrics.items():
            metric.__dict__.update(attributes)
            for name, value in states[metric].items():
                setattr(metric, name, value)
