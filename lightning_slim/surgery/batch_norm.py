"""Running statistics of batch normalisations, measured anew after a cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_slim.surgery.example import as_example


def keeping_statistics(model: nn.Module) -> list[_BatchNorm]:
    """Batch normalisations whose running statistics follow the batches that pass."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]


def begin_recalibrating(model: nn.Module) -> dict[str, float | None]:
    """From now on batches that pass in training mode make the running statistics: their plain mean, nothing older.

    Only layers that are in training mode and keep running statistics are touched: a frozen one stays as it is.

    Returns:
        Their dotted names -> the momentum that `end_recalibrating` gives back. Plain data, for a checkpoint.
    """
    keeping = keeping_statistics(model)
    for layer in keeping:
        layer.reset_running_stats()
    return pause_momentum(model, [path for path, module in model.named_modules() if module in keeping])


def pause_momentum(model: nn.Module, paths: Iterable[str]) -> dict[str, float | None]:
    """Batches count alike in the running statistics of some layers; returns the momentum of each that there is."""
    layers = _batch_norms(model, paths)
    momenta = {path: layer.momentum for path, layer in layers.items()}
    for layer in layers.values():
        layer.momentum = None  # torch's word for a cumulative mean
    return momenta


def end_recalibrating(model: nn.Module, momenta: Mapping[str, float | None]) -> None:
    """Newer batches count for more again; of layers that a cut dropped, nothing is left to do."""
    for path, layer in _batch_norms(model, momenta).items():
        layer.momentum = momenta[path]


def _batch_norms(model: nn.Module, paths: Iterable[str]) -> dict[str, _BatchNorm]:
    modules = dict(model.named_modules())
    return {path: m for path in paths if isinstance(m := modules.get(path), _BatchNorm)}


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Measures the running statistics anew on some batches; needs no labels, changes no weight.

    Args:
        model: in any modes; they are left as they are.
        batches: inputs of the model: tensors, tuples of arguments or dicts of keyword arguments.
    """
    modes = {module: module.training for module in model.modules()}
    for module in model.modules():
        module.training = isinstance(module, _BatchNorm)
    momenta = begin_recalibrating(model)
    try:
        with torch.no_grad():
            for batch in batches:
                call = as_example(batch)
                model(*call.args, **call.kwargs)
    finally:
        end_recalibrating(model, momenta)
        for module, mode in modes.items():
            module.training = mode
