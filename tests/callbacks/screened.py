"""Runs in which inputs are chosen: forecasters of planted series, and digits beside noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.statistics.worlds import planted_inputs


class Recurrent(nn.Module):
    """A GRU and a readout of every step."""

    def __init__(self, inputs: int = 40, hidden: int = 12, bidirectional: bool = False) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, hidden, batch_first=True, bidirectional=bidirectional)
        self.out = nn.Linear(hidden * (1 + bidirectional), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[0]).squeeze(-1)


class Perceptron(nn.Sequential):
    """Two hidden layers; numbers are normalised first."""

    def __init__(self, inputs: int = 96, hidden: int = 16, classes: int = 10) -> None:
        super().__init__(
            nn.BatchNorm1d(inputs),
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )


class Fit(pl.LightningModule):
    """Any network, trained with AdamW on what its output should be: classes, or numbers."""

    def __init__(self, network: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = network()

    def loss(self, batch: list[Tensor]) -> Tensor:
        made = self.net(batch[0])
        return F.mse_loss(made, batch[1]) if batch[1].is_floating_point() else F.cross_entropy(made, batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, amsgrad=True)


class Forecaster(Fit):
    """`Recurrent`, as a class that a checkpoint can name."""

    def __init__(self) -> None:
        super().__init__(Recurrent)


class Classifier(Fit):
    """`Perceptron`."""

    def __init__(self) -> None:
        super().__init__(Perceptron)


@cache
def series(items: int = 256, steps: int = 40) -> tuple[TensorDataset, dict[str, slice]]:
    """Forty planted inputs up to each step, and the target of the step after."""
    torch.manual_seed(1)
    x, y, roles = planted_inputs(items, steps)
    return TensorDataset(x[:, :-1].float(), y[:, 1:, 0].float()), roles


@cache
def digits(noise: int = 32) -> tuple[TensorDataset, dict[str, Tensor]]:
    """Scanned digits with noise inputs among the pixels; which inputs are pixels that often change, and which noise."""
    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.tensor(images, dtype=torch.float32) / 16
    x = torch.cat([pixels, torch.randn(len(pixels), noise, generator=generator) + 3], 1)
    order = torch.randperm(x.shape[1], generator=generator)
    real = torch.cat([pixels.std(0) > 0.05, torch.zeros(noise).bool()])[order]
    return TensorDataset(x[:, order], torch.tensor(labels)), {"real": real, "noise": order >= pixels.shape[1]}


def batches(data: TensorDataset, batch_size: int = 64) -> DataLoader:
    return DataLoader(data, batch_size=batch_size)
