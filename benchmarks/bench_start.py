"""Sparse and slim digits: pruned before training, after it and during it, over seeds.

python benchmarks/bench_start.py [--seeds 3] [--epochs 20] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.digits import DigitSequences, SequenceClassifier
from lightning_slim import (
    Global,
    GraSP,
    MACs,
    Magnitude,
    OneShot,
    Prune,
    Random,
    SynFlow,
    Taylor,
    WeightGraSP,
    WeightMagnitude,
    WeightPrune,
    WeightSaliency,
    WeightSynFlow,
)


def masks(**kwargs: Any) -> Callback:
    """90 % of the weights go, wherever they are."""
    return WeightPrune(0.9, distribution=Global(), **kwargs)


def units(score: Any, **kwargs: Any) -> Callback:
    """70 % of the multiply-accumulates go."""
    return Prune(score, MACs(0.3), scope="global", print_report=False, **kwargs)


SNIP = Taylor(of="weights")
RUNS = {
    "dense": lambda: None,
    "masks, start, magnitude": lambda: masks(when="start", score=WeightMagnitude()),
    "masks, start, SNIP": lambda: masks(when="start", score=WeightSaliency()),
    "masks, start, GraSP": lambda: masks(when="start", score=WeightGraSP()),
    "masks, start, SynFlow": lambda: masks(when="start", score=WeightSynFlow()),
    "masks, during, magnitude": lambda: masks(),
    "masks, end, magnitude, one shot": lambda: masks(when="end", schedule=OneShot(0.0)),
    "masks, end, magnitude, gradual": lambda: masks(when="end"),
    "units, start, random": lambda: units(Random(), when="start", compensate="none"),
    "units, start, magnitude": lambda: units(Magnitude(), when="start", compensate="none"),
    "units, start, SNIP": lambda: units(SNIP, when="start", compensate="none"),
    "units, start, SNIP, folded": lambda: units(SNIP, when="start"),
    "units, start, GraSP": lambda: units(GraSP(), when="start", compensate="none"),
    "units, start, SynFlow": lambda: units(SynFlow(), when="start", compensate="none"),
    "units, start, SynFlow, 10 rounds": lambda: units(SynFlow(), when="start", compensate="none", rounds=10),
    "units, during, SNIP": lambda: units(SNIP),
    "units, end, SNIP, one shot": lambda: units(SNIP, when="end", schedule=OneShot(0.0)),
}


class Stopwatch(Callback):
    """Seconds from the start of the first batch to its first backward pass: what is pruned at the start goes there."""

    seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.perf_counter()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self.seconds = self.seconds or time.perf_counter() - self.began


def run(name: str, seed: int, epochs: int) -> tuple[float, float, float]:
    """Test accuracy, parameters that are not zero, and seconds until the first backward pass."""
    seed_everything(seed, verbose=False)
    model, data, callback, watch = SequenceClassifier(channels=32), DigitSequences(), RUNS[name](), Stopwatch()
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[watch, *([callback] if callback else [])],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    return metrics["test_acc"], float(sum(int((p != 0).sum()) for p in model.parameters())), watch.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="Names of runs; all, if none.")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| what, when, by what | parameters left | test accuracy | s before training |\n|---|---:|---:|---:|")
    for name in arguments.only or RUNS:
        results = [run(name, seed, arguments.epochs) for seed in range(arguments.seeds)]
        found = [100 * result[0] for result in results]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        left, seconds = (statistics.mean(result[i] for result in results) for i in (1, 2))
        print(f"| {name} | {left:,.0f} | {statistics.mean(found):.1f} ± {spread:.1f} % | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
