"""Running statistics after recalibration are those of the data, and nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lightning_slim import Granger, Magnitude, OneShot, Prune, Pruner, Score, Units
from lightning_slim.surgery import recalibrate_batch_norm
from tests.callbacks.runs import Lit, loader, trainer


def test_running_statistics_are_the_means_over_the_batches() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    network(torch.randn(8, 3, 6, 6) * 100)
    before = copy.deepcopy(network.state_dict())
    batches = [torch.randn(8, 3, 6, 6) for _ in range(5)]
    recalibrate_batch_norm(network, batches)
    outputs = [network[0](x) for x in batches]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variance = torch.stack([y.var((0, 2, 3), unbiased=True) for y in outputs]).mean(0)
    torch.testing.assert_close(network[1].running_mean, mean)
    torch.testing.assert_close(network[1].running_var, variance)
    assert network[1].momentum == 0.1
    assert network.training
    assert torch.equal(before["0.weight"], network[0].weight)


def test_frozen_layers_keep_their_statistics_during_training(tmp_path: Path) -> None:
    class Frozen(Lit):
        def on_train_epoch_start(self) -> None:
            self.net.b1.eval()

    class Watch(pl.Callback):
        momenta: list[Any]

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.momenta.append((pl_module.net.b1.momentum, pl_module.net.b3.momentum))

    watch, lit = Watch(), Frozen()
    watch.momenta = []
    callback = Prune(Magnitude(), Units(0.5), OneShot(0.5), print_report=False)
    trainer(tmp_path, callback, watch).fit(lit, loader())
    assert watch.momenta == [(0.1, 0.1)] * 12 + [(0.1, None)] * 4 + [(0.1, 0.1)] * 8


def test_mean_compensation_by_hand() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    pruner = Pruner(network, Magnitude(), Units(2 / 3), OneShot(0.5), compensate="mean")
    x = torch.randn(100, 2)
    pruner.prepare(x)
    with pruner.recording():
        network(x)
    weight, bias = network[1].weight.detach().clone(), network[1].bias.detach().clone()
    mean = network[0](x).mean(0).detach()
    event = pruner.step(0.5)
    (gone,) = event.removed["0"]  # type: ignore[union-attr]
    kept = [i for i in range(3) if i != gone]
    torch.testing.assert_close(network[1].weight, weight[:, kept])
    torch.testing.assert_close(network[1].bias, bias + weight[:, gone] * mean[gone])


def accuracy_after(score: Score, compensate: Any, recalibrate: bool) -> float:
    """Of a convolutional digits network with batch norms, right after half of its units went."""
    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    widths, layers = [1, 24, 32, 48], []
    for i in range(3):
        layers += [
            nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[i + 1]),
            nn.ReLU(),
        ]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(120):
        at = torch.arange(step * 60, step * 60 + 60) % 1200
        optimizer.zero_grad()
        F.cross_entropy(network(x[at]), y[at]).backward()
        optimizer.step()
    network.eval()
    pruner = Pruner(network, score, Units(0.5), OneShot(0.5), compensate=compensate)
    pruner.prepare(x[:2])
    for batch in x[:512].split(64):
        with pruner.recording(), torch.no_grad():
            network(batch)
    pruner.step(0.5)
    recalibrate_batch_norm(network, x[:1200].split(200) if recalibrate else [])
    return float((network(x[1200:]).argmax(1) == y[1200:]).float().mean())


def test_fold_and_recalibration_keep_a_network_with_batch_norms_alive() -> None:
    assert accuracy_after(Granger(0), "least_squares", recalibrate=True) > 0.85
    assert accuracy_after(Granger(0), "none", recalibrate=False) < 0.6
