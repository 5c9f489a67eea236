"""What the benchmark of scores is trained on: data, a network, and how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from readers import find, read_csv, read_idx, read_ts
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

DAY = 24  # hours


class Data(NamedTuple):
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Task:
    """One network on one data set.

    Attributes:
        load: reads the data from a folder.
        network: makes the dense network.
        steps: of dense training.
        fine_tune: steps behind a cut.
        batch: samples a step.
        rate: learning rate of Adam.
        series: whether units arrive somewhere as series, and not packed, so that lags count.
        classify: cross-entropy and accuracy; the mean squared error if not.
    """

    load: Callable[[Path], Data]
    network: Callable[[], nn.Module]
    steps: int
    fine_tune: int
    batch: int = 64
    rate: float = 3e-3
    series: bool = False
    classify: bool = True

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y) if self.classify else F.mse_loss(output, y)


def digits(_: Path) -> Data:
    """1200 of scikit-learn's digits to train on, 597 to test on: (samples, 8 rows, 8 pixels)."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(bunch.images / 16 - 0.3, dtype=torch.float32)[order], torch.tensor(bunch.target)[order]
    return Data(x[:1200], y[:1200], x[1200:], y[1200:])


def japanese_vowels(folder: Path) -> Data:
    """Nine speakers by 12 cepstral series of 7 to 29 steps; padded with NaN."""
    (x, labels), (test_x, test_labels) = (
        read_ts(find(folder, f"JapaneseVowels_{part}.ts")) for part in ("TRAIN", "TEST")
    )
    classes = sorted(set(labels))
    y, test_y = (torch.tensor([classes.index(v) for v in part]) for part in (labels, test_labels))
    padded = pad_sequence([*x, *test_x], batch_first=True, padding_value=float("nan"))
    return Data(padded[: len(x)], y, padded[len(x) :], test_y)


def etth1(folder: Path) -> Data:
    """The oil temperature of the next day, hour by hour, from all seven series of the last; of unit variance.

    The usual split: 12 months to train on, 4 left out, 4 to test on (every fourth window).
    """
    series = read_csv(find(folder, "ETTh1.csv"))
    series = (series - series[:8640].mean(0)) / series[:8640].std(0)

    def windows(rows: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        all_windows = rows.unfold(0, 2 * DAY, stride).transpose(1, 2)
        return all_windows[:, :DAY].contiguous(), all_windows[:, DAY:, -1].contiguous()

    return Data(*windows(series[:8640], 1), *windows(series[11520 - DAY : 14400], 4))


def fashion_mnist(folder: Path) -> Data:
    """The first 12000 images to train on, the first 5000 of the test set to test on."""
    parts = []
    for part, count in (("train", 12000), ("t10k", 5000)):
        images = read_idx(find(folder, f"{part}-images-idx3-ubyte"))[:count, None].float()
        parts += [(images / 255 - 0.286) / 0.353, read_idx(find(folder, f"{part}-labels-idx1-ubyte"))[:count].long()]
    return Data(*parts)


def fnn() -> nn.Module:
    """64-128-64-10."""
    hidden = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


class LastStep(nn.Module):
    """A recurrent layer of 64 units whose last step is read."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(inputs, 64, batch_first=True), nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Packed(nn.Module):
    """An LSTM of 64 units over sequences of any length, padded with NaN."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(inputs, 64, batch_first=True), nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        lengths = (~x[..., 0].isnan()).sum(1)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.recurrent(packed)[1][0][-1])


class TemporalConvolutions(nn.Module):
    """Three causal convolutions of 32 channels that together see 15 steps; the last step is read."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        widths = [inputs, 32, 32, 32]
        self.layers = nn.ModuleList(nn.Conv1d(a, b, 3, dilation=2**i) for i, (a, b) in enumerate(pairwise(widths)))
        self.head = nn.Linear(32, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for i, layer in enumerate(self.layers):
            x = F.relu(layer(F.pad(x, (2 * 2**i, 0))))
        return self.head(x[..., -1])


def small_vgg() -> nn.Module:
    """Six convolutions with batch norms (16 16 32 32 64 64 channels, the first of stride 2), mean, linear."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate([(1, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]):
        stride = 2 if i == 0 else 1
        layers += [nn.Conv2d(a, b, 3, stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i in (1, 3) else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


TASKS = {
    "digits-fnn": Task(digits, fnn, 500, 80, rate=2e-3),
    "digits-gru": Task(digits, lambda: LastStep(8, 10), 500, 60, rate=5e-3, series=True),
    "vowels-lstm": Task(japanese_vowels, lambda: Packed(12, 9), 200, 40, batch=32, rate=5e-3),
    "etth1-gru": Task(etth1, lambda: LastStep(7, DAY), 200, 40, batch=32, series=True, classify=False),
    "etth1-tcn": Task(etth1, lambda: TemporalConvolutions(7, DAY), 200, 40, batch=32, series=True, classify=False),
    "fashion-vgg": Task(fashion_mnist, small_vgg, 188, 47, batch=128),
}
