"""Group lasso while a network trains, beside no penalty: the same cut, the same fine-tuning, the same seed.

    python benchmarks/bench_penalties.py
    python benchmarks/bench_penalties.py --data folder-of-fashion-mnist --seeds 3

Without `--data` scikit-learn's digits are used (a small convolutional network); with it, 6000 images of Fashion-MNIST
and a ResNet-20 of widths 8, 16 and 32 with a stride in its first convolution. Dense training, a cut by magnitude to a
share of the multiply-accumulates without a fold, then a few epochs of
fine-tuning without the penalty. Nothing is chosen on the test set: strengths are given.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from tasks import Data, digits, fashion_mnist
from torch import Tensor, nn

from lightning_slim import GroupLasso, Linear, MACs, Magnitude, OneShot, Pruner, Regularizer
from lightning_slim.selection import Scope, Selection

BATCH, RATE = 64, 0.05


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        stride = out // into
        self.c1, self.b1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.c2, self.b2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(into, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.short(x))


def resnet20() -> nn.Module:
    stem = (nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    widths = [8, 8, 8, 8, 16, 16, 16, 32, 32, 32]
    blocks = (Block(into, out) for into, out in pairwise(widths))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def small() -> nn.Module:
    def layer(into: int, out: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()

    body = (*layer(1, 32), *layer(32, 32), nn.MaxPool2d(2), *layer(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(64, 10))


def train(network: nn.Module, data: Data, epochs: int, rate: float, penalise: Callable[[float], None]) -> None:
    """Momentum SGD, its rate on a cosine; `penalise` is called with the progress, behind each backward pass."""
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps, step = epochs * (len(data.x) // BATCH), 0
    for _ in range(epochs):
        order = torch.randperm(len(data.x))
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            network.train()
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            F.cross_entropy(network(data.x[batch]), data.y[batch]).backward()
            penalise(step / steps)
            optimizer.step()
            step += 1


@torch.no_grad()
def accuracy(network: nn.Module, data: Data) -> float:
    network.eval()
    right = [network(x).argmax(1) == y for x, y in zip(data.test_x.split(500), data.test_y.split(500), strict=True)]
    return 100 * float(torch.cat(right).float().mean())


def run(
    make: Callable[[], nn.Module], data: Data, strength: float, left: float, epochs: int, scope: Scope, seed: int
) -> list[float]:
    """Accuracies: dense, as cut, fine-tuned; and the share of the multiply-accumulates that is left."""
    torch.manual_seed(seed)
    network = make()
    regularizer = Regularizer(network, GroupLasso(), verify=False)
    regularizer.prepare({"": data.x[:2]})
    course = Linear(0.0, 0.5)

    def penalise(progress: float) -> None:
        if strength:
            regularizer.add_gradients(network.parameters(), strength * course(progress))

    train(network, data, epochs, RATE, penalise)
    dense = accuracy(network, data)
    budget, schedule = MACs(left), OneShot(0.0)
    settings = {"selection": Selection(scope), "compensate": "none", "verify": False}
    pruner = Pruner(network, Magnitude(), budget, schedule, **settings)
    pruner.prepare(data.x[:2])
    pruner.step(0.0)
    reached = budget.remaining(pruner.costs, pruner.widths)
    cut = accuracy(network, data)
    torch.manual_seed(seed)
    train(network, data, max(1, epochs // 3), RATE / 5, lambda progress: None)
    return [dense, cut, accuracy(network, data), 100 * reached]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--left", type=float, default=0.3, help="share of the multiply-accumulates that stays")
    parser.add_argument("--scope", choices=["local", "global"], default="local")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1e-4, 5e-4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, make, what = digits(Path()), small, "digits"
    data = data._replace(x=data.x[:, None], test_x=data.test_x[:, None])
    if arguments.data is not None:
        full = fashion_mnist(arguments.data)
        data, make, what = (
            full._replace(x=full.x[: arguments.images], y=full.y[: arguments.images]),
            resnet20,
            "fashion",
        )
    began, plain = time.perf_counter(), []
    settings = f"{arguments.epochs} epochs, {arguments.seeds} seeds, {arguments.left:.0%} asked, {arguments.scope}"
    print(f"{what}, {len(data.x)} images, {settings}")
    print("| strength | dense | as cut | fine-tuned | MACs left | fine-tuned, against none, each seed |")
    print("|---|---|---|---|---|---|")
    for strength in [0.0, *arguments.strengths]:
        seeds = range(arguments.seeds)
        results = [run(make, data, strength, arguments.left, arguments.epochs, arguments.scope, seed) for seed in seeds]
        plain = plain or results
        means = " | ".join(f"{statistics.mean(column):.1f}" for column in zip(*results, strict=True))
        paired = ", ".join(f"{ours[2] - theirs[2]:+.2f}" for ours, theirs in zip(results, plain, strict=True))
        print(f"| {strength:g} | {means} | {paired} |", flush=True)
    print(f"{time.perf_counter() - began:.0f} s, one thread")


if __name__ == "__main__":
    main()
