"""Select and fold reach the numbers that the method was chosen by: digits, cut once, no fine-tuning, means of 5 seeds.

The prototype's settings and results (its own selection and fold, in masks): an FNN without 85 % of both hidden layers
has a test loss of 0.146, by magnitude 0.202; a GRU without 70 % of its hidden units 0.337, by magnitude 0.703.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_slim import Granger, Magnitude, OneShot, Pruner, Score, Units

SAMPLES = 1200  # for training and recording; the rest is for testing
Losses = dict[str, float]


class Rows(nn.Module):
    """Reads a picture row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x.unflatten(1, (8, 8)))[0][:, -1])


def fnn() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images / 16 - 0.3, dtype=torch.float32)[order], torch.tensor(labels)[order]


def train(network: nn.Module, x: Tensor, y: Tensor, seed: int, rate: float, cosine: bool) -> None:
    """500 steps; the GRU with a cosine to zero and clipped gradients."""
    optimizer = torch.optim.Adam(network.parameters(), rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(500):
        if cosine:
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / 500))
        batch = torch.randint(SAMPLES, (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(network(x[batch]), y[batch]).backward()
        if cosine:
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


def loss_after_cut(network: nn.Module, score: Score, budget: Units, x: Tensor, y: Tensor) -> float:
    network = copy.deepcopy(network)
    pruner = Pruner(network, score, budget, OneShot(0.5), compensate="least_squares")
    pruner.prepare(x[:2])
    with pruner.recording(), torch.no_grad():
        for batch in x[:SAMPLES].split(128):
            network(batch)
    pruner.step(0.5)
    with torch.no_grad():
        return F.cross_entropy(network(x[SAMPLES:]), y[SAMPLES:]).item()


def means(make: Callable[[], nn.Module], budget: Units, rate: float, cosine: bool) -> Losses:
    """Test losses, of the dense network, too."""
    x, y = digits()
    losses: dict[str, list[float]] = {"dense": [], "Granger": [], "Magnitude": []}
    for seed in range(5):
        torch.manual_seed(seed)
        network = make()
        train(network, x, y, seed, rate, cosine)
        with torch.no_grad():
            losses["dense"].append(F.cross_entropy(network(x[SAMPLES:]), y[SAMPLES:]).item())
        for score in (Granger(0), Magnitude()):
            losses[type(score).__name__].append(loss_after_cut(network, score, budget, x, y))
    return {name: statistics.mean(values) for name, values in losses.items()}


@pytest.mark.slow
def test_an_fnn_without_85_percent_of_its_units() -> None:
    loss = means(fnn, Units(30 / 192), rate=2e-3, cosine=False)  # 20 of 128 and 10 of 64 units
    assert loss["dense"] == pytest.approx(0.099, abs=0.005)  # the setting is that of the prototype, of its 10 seeds
    assert loss["Granger"] <= 0.146
    assert loss["Granger"] < loss["Magnitude"] - 0.04


@pytest.mark.slow
def test_a_gru_without_70_percent_of_its_units() -> None:
    loss = means(Rows, Units(19 / 64), rate=5e-3, cosine=True)
    assert loss["dense"] == pytest.approx(0.119, abs=0.005)
    assert loss["Granger"] <= 0.337
    assert loss["Granger"] < loss["Magnitude"] - 0.2
