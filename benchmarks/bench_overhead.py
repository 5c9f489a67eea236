"""What recording costs a training step, and what a cut costs beside an epoch. All ratios are of one run, side by side.

    python benchmarks/bench_overhead.py

Steps that are recorded and steps that are not take turns, on one thread, by CPU time; medians. One step in ten is
recorded (the default of the callbacks), so a tenth of the difference counts.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples.digits import DigitSequences, SequenceClassifier
from lightning_slim import Granger, MACs, OneShot, Pruner, Score, Screening, Taylor
from lightning_slim.profile import one_thread, time_side_by_side

EVERY = 10  # steps


def convolutional() -> nn.Module:
    layers: list[nn.Module] = []
    widths = [3, 32, 64, 64, 128]
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.two, self.norm2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.short = nn.Conv2d(a, b, 1, stride, bias=False) if a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.two(F.relu(self.norm1(self.one(x))))) + self.short(x))


def resnet20() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    widths = [16, *[16] * 3, *[32] * 3, *[64] * 3]
    layers += [Residual(a, b, 2 if a < b else 1) for a, b in pairwise(widths)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Recurrent(nn.Module):
    """Two levels of 256 units over 32 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(16, 256, 2, batch_first=True), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "demo (Conv1d, 128 channels)": (lambda: SequenceClassifier(128).net, lambda: torch.rand(64, 1, 64)),
    "Conv2d, 32 to 128 channels": (convolutional, lambda: torch.rand(32, 3, 32, 32)),
    "ResNet-20, 32 x 32, batch 32": (resnet20, lambda: torch.rand(32, 3, 32, 32)),
    "GRU, 2 x 256, 32 steps, batch 64": (Recurrent, lambda: torch.rand(64, 32, 16)),
    "MLP, 784-1024-1024-10": (
        lambda: nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
        lambda: torch.rand(128, 784),
    ),
}


def training_step(network: nn.Module, x: Tensor, y: Tensor, pruner: Pruner | None) -> Callable[[], None]:
    """One training step; with a pruner, it is recorded."""
    optimizer = torch.optim.AdamW(network.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with pruner.recording() if pruner is not None else nullcontext():
            F.cross_entropy(network(x), y).backward()
        if pruner is not None:
            pruner.recorder.hear(labels=y)
            if pruner.score.needs_gradients:
                pruner.recorder.observe_gradients()
        optimizer.step()

    return step


def overhead(name: str, score: Score, seconds: float) -> float:
    """Time of a training step with a recorder that looks at one in ten, over the time without."""
    make, data = NETWORKS[name]
    x, y = data(), torch.randint(0, 10, (len(data()),))
    plain = make()
    watched = copy.deepcopy(plain)
    pruner = Pruner(watched, score, MACs(0.5), OneShot(0.5))
    pruner.prepare(x[:2])
    steps = [training_step(plain, x, y, None), training_step(watched, x, y, pruner)]
    without, recorded = time_side_by_side(steps, seconds=seconds, rounds=200)
    return 1 + (recorded / without - 1) / EVERY


def cut_against_epoch(channels: int) -> tuple[float, float]:
    """CPU seconds of one epoch of the demo's network and of one cut of half its MACs, fold and migration included."""
    data = DigitSequences()
    data.setup("fit")
    network = SequenceClassifier(channels).net
    optimizer = torch.optim.AdamW(network.parameters())
    pruner = Pruner(network, Granger(), MACs(0.5), OneShot(0.5))
    pruner.prepare(torch.rand(2, 1, 64))
    start = time.process_time()
    for step, (x, y) in enumerate(data.train_dataloader()):
        optimizer.zero_grad()
        with pruner.recording() if step % EVERY == 0 else nullcontext():
            F.cross_entropy(network(x), y).backward()
        optimizer.step()
    epoch = time.process_time() - start
    start = time.process_time()
    pruner.step(0.5, [optimizer])
    return epoch, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each ratio")
    seconds = parser.parse_args().seconds
    torch.manual_seed(0)
    print(f"{'training step with the recorder / without':44s} Granger  Taylor  Screening")
    for name in NETWORKS:
        ratios = [overhead(name, score, seconds) for score in (Granger(), Taylor(), Screening())]
        print(f"{name:44s} {ratios[0]:7.3f} {ratios[1]:7.3f} {ratios[2]:10.3f}", flush=True)
    with one_thread():
        epoch, cut = cut_against_epoch(128)
    print(f"\none cut of the demo's network: {cut:.3f} s, one epoch: {epoch:.2f} s, ratio {cut / epoch:.3f}")


if __name__ == "__main__":
    main()
