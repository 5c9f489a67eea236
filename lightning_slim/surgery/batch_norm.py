"""Running statistics of batch normalisations, measured anew after a cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_slim.surgery.example import as_example


def keeping_statistics(model: nn.Module) -> list[_BatchNorm]:
    """Batch normalisations whose running statistics follow the batches that pass."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]


@contextmanager
def recalibrating(model: nn.Module) -> Iterator[None]:
    """Batches that pass within, in training mode, make the running statistics: their plain mean, nothing older.

    Only layers that are in training mode and keep running statistics are touched: a frozen one stays as it is.
    """
    layers = keeping_statistics(model)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch's word for a cumulative mean
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Measures the running statistics anew on some batches; needs no labels, changes no weight.

    Args:
        model: in any modes; they are left as they are.
        batches: inputs of the model: tensors, tuples of arguments or dicts of keyword arguments.
    """
    modes = {module: module.training for module in model.modules()}
    for module in model.modules():
        module.training = isinstance(module, _BatchNorm)
    with recalibrating(model), torch.no_grad():
        for batch in batches:
            call = as_example(batch)
            model(*call.args, **call.kwargs)
    for module, mode in modes.items():
        module.training = mode
