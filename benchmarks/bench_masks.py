"""Sparse digits: patterns, distributions and scores of single weights beside the dense network, over seeds.

python benchmarks/bench_masks.py [--seeds 3] [--epochs 20] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.digits import DigitSequences, SequenceClassifier
from lightning_slim import (
    NM,
    SET,
    Block,
    ErdosRenyiKernel,
    Global,
    OneShot,
    RigL,
    Uniform,
    WeightLamp,
    WeightMovement,
    WeightPrune,
    WeightSaliency,
    WeightScreening,
    WeightWanda,
)

RUNS = {
    "dense": None,
    "80 %, uniform": lambda: WeightPrune(0.8),
    "90 %, uniform": lambda: WeightPrune(0.9, distribution=Uniform()),
    "90 %, ERK": lambda: WeightPrune(0.9, distribution=ErdosRenyiKernel()),
    "90 %, global": lambda: WeightPrune(0.9, distribution=Global()),
    "90 %, global, saliency": lambda: WeightPrune(0.9, distribution=Global(), score=WeightSaliency()),
    "90 %, global, LAMP": lambda: WeightPrune(0.9, distribution=Global(), score=WeightLamp()),
    "90 %, global, Wanda": lambda: WeightPrune(0.9, distribution=Global(), score=WeightWanda()),
    "90 %, global, movement": lambda: WeightPrune(0.9, distribution=Global(), score=WeightMovement()),
    "90 %, global, screening": lambda: WeightPrune(0.9, distribution=Global(), score=WeightScreening()),
    "90 %, ERK, RigL": lambda: WeightPrune(0.9, distribution=ErdosRenyiKernel(), schedule=OneShot(0.0), regrow=RigL()),
    "90 %, ERK, SET": lambda: WeightPrune(0.9, distribution=ErdosRenyiKernel(), schedule=OneShot(0.0), regrow=SET()),
    "90 %, ERK, at the start": lambda: WeightPrune(0.9, distribution=ErdosRenyiKernel(), schedule=OneShot(0.0)),
    "95 %, uniform": lambda: WeightPrune(0.95, distribution=Uniform()),
    "95 %, global": lambda: WeightPrune(0.95, distribution=Global()),
    "2:4": lambda: WeightPrune(pattern=NM(2, 4), skip=["net.1"]),
    "2:4, Wanda": lambda: WeightPrune(pattern=NM(2, 4), score=WeightWanda(), skip=["net.1"]),
    "1:4": lambda: WeightPrune(pattern=NM(1, 4), skip=["net.1"]),
    "80 %, blocks of 4x1": lambda: WeightPrune(0.8, Block(4, 1)),
    "80 %, blocks of 8x8": lambda: WeightPrune(0.8, Block(8, 8), skip=["net.1"]),
}


def accuracy(name: str, seed: int, epochs: int) -> tuple[float, float]:
    """Test accuracy, and the share of zeros among the weights that are masked."""
    seed_everything(seed, verbose=False)
    model, data, make = SequenceClassifier(channels=32), DigitSequences(), RUNS[name]
    callbacks = [make()] if make is not None else []
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    return metrics["test_acc"], callbacks[0].masker.reached if callbacks else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="Names of runs; all, if none.")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| masks | zeros | test accuracy |\n|---|---:|---:|")
    for name in arguments.only or RUNS:
        results = [accuracy(name, seed, arguments.epochs) for seed in range(arguments.seeds)]
        found = [100 * result[0] for result in results]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        zeros = statistics.mean(result[1] for result in results)
        print(f"| {name} | {zeros:.1%} | {statistics.mean(found):.1f} ± {spread:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
