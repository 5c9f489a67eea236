"""What is left after a one-shot cut, with every kind of compensation, and what that costs: digits.

    python benchmarks/bench_compensation.py

A small convolutional network, with and without batch norms, is trained, cut once, and tested as it stands; then again
with the batch norms recalibrated on the training images, and after two epochs of fine-tuning. Costs are those of a
wider network on random images.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import statistics
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_slim import Granger, Magnitude, OneShot, Pruner, Random, Score, Units
from lightning_slim.surgery import recalibrate_batch_norm

COMPENSATIONS = ("none", "mean", "least_squares", "exact")
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


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float) -> None:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
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


def costs(compensate: str, score: Score, batch: int = 64) -> str:
    """Seconds of a training step, of what recording adds to it, and of a cut; bytes of the moments."""
    torch.manual_seed(0)
    widths = (3, 64, 128, 256, 256)
    layers = [
        part
        for a, b in itertools.pairwise(widths)
        for part in (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 4, 10))
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    pruner = Pruner(model, score, Units(0.5), OneShot(0.5), compensate=compensate, verify=False)  # type: ignore[arg-type]
    pruner.prepare(x[:2])

    def step(record: bool) -> float:
        begin = time.perf_counter()
        with pruner.recording() if record else contextlib.nullcontext():
            F.cross_entropy(model(x), y).backward()
        return time.perf_counter() - begin

    step(True)
    pairs = [(step(False), step(True)) for _ in range(5)]
    plain = statistics.median(without for without, _ in pairs)
    recorded = statistics.median(with_ for _, with_ in pairs)
    size = sum(moments.second.nbytes for group in pruner.recorder.moments.values() for moments in group if moments)
    begin = time.perf_counter()
    pruner.step(0.5)
    cutting = time.perf_counter() - begin
    return f"step {plain:.3f} s, recording {recorded - plain:+.3f} s, cut {cutting:.3f} s, moments {size / 1e6:.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    x, y = digits()

    @torch.no_grad()
    def test(models: list[nn.Module]) -> tuple[float, float]:
        """Mean accuracy and loss."""
        outputs = [model.eval()(x[1200:]) for model in models]
        right = [float((output.argmax(1) == y[1200:]).float().mean()) for output in outputs]
        return 100 * statistics.mean(right), statistics.mean(float(F.cross_entropy(o, y[1200:])) for o in outputs)

    for batch_norm in (True, False):
        models = []
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(network(batch_norm))
            train(models[-1], x[:1200], y[:1200], epochs=12, lr=2e-3)
        norms = "with" if batch_norm else "without"
        print(f"\n{norms} batch norms, dense {test(models)[0]:.1f} %: as cut | recalibrated | fine-tuned (loss)")
        for name, score in SCORES.items():
            for remaining in (0.5, 0.3):
                cells = []
                for compensate in COMPENSATIONS:
                    slim = [
                        cut(m, x[:1200], score, remaining, compensate, s) for s, m in zip(seeds, models, strict=True)
                    ]
                    plain = test(slim)[0]
                    for model in slim:
                        recalibrate_batch_norm(model, x[:1200].split(128))
                    recalibrated = test(slim)[0]
                    for model in slim:
                        train(model, x[:1200], y[:1200], epochs=2, lr=1e-3)
                    tuned, loss = test(slim)
                    cells.append(f"{compensate} {plain:4.1f} | {recalibrated:4.1f} | {tuned:4.1f} ({loss:.3f})")
                print(f"{name:10s} {remaining:.0%} remain   " + "    ".join(cells), flush=True)

    print("\ncosts: 64, 128, 256, 256 channels, images of 32 x 32, batches of 64, one thread")
    for name, score in (("Granger", Granger(0)), ("Magnitude", Magnitude())):
        for compensate in ("least_squares", "exact"):
            print(f"{name:10s} {compensate:14s} {costs(compensate, score)}", flush=True)


if __name__ == "__main__":
    main()
