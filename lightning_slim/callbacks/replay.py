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
from torch import Tensor
from torchmetrics import Metric

from lightning_slim.losses import HearLosses


def replay(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Float[Tensor, "items"]:
    """The losses of a batch's items as the training step computes them; nothing is logged, counted or drawn.

    Raises:
        MisconfigurationException: a module that steps its optimizers itself.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "Expected automatic optimization, got a module that steps its optimizers itself: its training step cannot "
            "be tried out. Choose a score without experiments, such as `Granger()` or `Taylor()`."
        )
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with _unlogged(module), torch.random.fork_rng(devices=devices), trainer.precision_plugin.train_step_context():
        with HearLosses() as heard:
            step = module.training_step(batch, batch_idx)
        losses: Tensor = heard.of_items(step["loss"] if isinstance(step, dict) else step)
    return losses


@contextmanager
def _unlogged(module: LightningModule) -> Iterator[None]:
    """What is logged goes nowhere, and metrics are put back."""
    metrics = {metric: copy.copy(metric.__dict__) for metric in module.modules() if isinstance(metric, Metric)}
    states = {metric: metric._copy_state_dict() for metric in metrics}
    module.log = module.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del module.log, module.log_dict
        for metric, attributes in metrics.items():
            metric.__dict__.update(attributes)
            for name, value in states[metric].items():
                setattr(metric, name, value)
