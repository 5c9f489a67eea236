"""What is left of a GRU right after 70 % of its hidden units went: digits, row by row, no fine-tuning.

    python benchmarks/bench_recurrent.py

Eight steps of eight pixels are read by a GRU of one or two levels of 64 units. The test loss is the mean over seeds.
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

ARMS: dict[str, tuple[Score, str]] = {
    "Granger, fold": (Granger(0), "least_squares"),
    "Granger with a lag, fold": (Granger(1), "least_squares"),
    "Magnitude, fold": (Magnitude(), "least_squares"),
    "Random, fold": (Random(), "least_squares"),
    "Granger, no fold": (Granger(0), "none"),
    "Magnitude, no fold": (Magnitude(), "none"),
}


class Classifier(nn.Module):
    def __init__(self, levels: int) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(8, 64, levels, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.images, dtype=torch.float32)[order] / 16, torch.tensor(data.target)[order]


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        for at in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[at]), y[at]).backward()
            optimizer.step()


@torch.no_grad()
def cut(model: nn.Module, x: Tensor, score: Score, compensate: str, seed: int) -> nn.Module:
    model = copy.deepcopy(model)
    pruner = Pruner(model, score, Units(0.3), OneShot(0.5), compensate=compensate, seed=seed)  # type: ignore[arg-type]
    pruner.prepare(x[:2])
    for batch in x.split(64):
        with pruner.recording():
            model(batch)
    pruner.step(0.5)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    images, labels = digits()
    x, y, test_x, test_y = images[:1300], labels[:1300], images[1300:], labels[1300:]
    for levels in (1, 2):
        losses: dict[str, list[float]] = {"dense": [], **{name: [] for name in ARMS}}
        for seed in seeds:
            torch.manual_seed(seed)
            model = Classifier(levels)
            train(model, x, y)
            slim = {"dense": model} | {name: cut(model, x, *arm, seed) for name, arm in ARMS.items()}
            with torch.no_grad():
                for name, network in slim.items():
                    losses[name].append(F.cross_entropy(network(test_x), test_y).item())
        print(f"GRU of {levels} levels, {len(seeds)} seeds: test loss with 30 % of the hidden units")
        for name, values in losses.items():
            print(f"  {name:26s} {statistics.mean(values):.3f}")


if __name__ == "__main__":
    main()
