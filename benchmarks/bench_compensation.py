"""What is left right after a one-shot cut, with every kind of compensation: digits, no fine-tuning.

    python benchmarks/bench_compensation.py

A small convolutional network, with and without batch norms, is trained, cut once, and tested as it stands; then again
with the batch norms recalibrated on the training images.
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_slim import Granger, Magnitude, OneShot, Pruner, Random, Score, Units
from lightning_slim.surgery import recalibrate_batch_norm

SCORES = {"Magnitude": Magnitude(), "Granger": Granger(0), "Random": Random()}


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order, None] / 16, torch.tensor(data.target)[order]


def network(batch_norm: bool) -> nn.Sequential:
    def block(a: int, b: int) -> list[nn.Module]:
        norm = [nn.BatchNorm2d(b)] if batch_norm else []
        return [nn.Conv2d(a, b, 3, padding=1, bias=not batch_norm), *norm, nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*block(1, 24), *block(24, 32), nn.MaxPool2d(2), *block(32, 48), *head)


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        for at in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[at]), y[at]).backward()
            optimizer.step()


def cut(model: nn.Module, x: Tensor, score: Score, remaining: float, compensate: str, seed: int) -> nn.Module:
    model = copy.deepcopy(model).eval()
    pruner = Pruner(model, score, Units(remaining), OneShot(0.5), compensate=compensate, seed=seed)  # type: ignore[arg-type]
    pruner.prepare(x[:2])
    for batch in x[:512].split(64):
        with pruner.recording(), torch.no_grad():
            model(batch)
    pruner.step(0.5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    x, y = digits()

    def accuracy(model: nn.Module) -> float:
        return 100 * float((model.eval()(x[1200:]).argmax(1) == y[1200:]).float().mean())

    for batch_norm in (True, False):
        models = []
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(network(batch_norm))
            train(models[-1], x[:1200], y[:1200])
        dense = statistics.mean(map(accuracy, models))
        print(f"\n{'with' if batch_norm else 'without'} batch norms, dense {dense:.1f} %: as cut | recalibrated")
        for name, score in SCORES.items():
            for remaining in (0.5, 0.3):
                cells = []
                for compensate in ("none", "mean", "least_squares"):
                    slim = [
                        cut(m, x[:1200], score, remaining, compensate, s) for s, m in zip(seeds, models, strict=True)
                    ]
                    plain = statistics.mean(map(accuracy, slim))
                    for model in slim:
                        recalibrate_batch_norm(model, x[:1200].split(128))
                    cells.append(f"{compensate} {plain:5.1f} | {statistics.mean(map(accuracy, slim)):5.1f}")
                print(f"{name:10s} {remaining:.0%} remain   " + "    ".join(cells))


if __name__ == "__main__":
    main()
