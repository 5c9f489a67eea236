"""Scores side by side on the demo's network: test loss after the same run, pruned while it trains.

    python benchmarks/bench_scores.py --seeds 5 --remaining 0.1

Every arm starts from the same weights and sees the same batches, seed by seed; the dense model is trained as long.
`none`, `fold` and `exact` are `compensate="none"`, `"least_squares"` and `"exact"`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import warnings
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples.digits import DigitSequences, SequenceClassifier
from lightning_slim import Cubic, Granger, MACs, Magnitude, Prune, Random, Taylor

SCORES = {
    "Granger, lags 0": Granger(0),
    "Granger, lags 1": Granger(1),
    "Granger, lags 2": Granger(2),
    "Magnitude": Magnitude(),
    "Taylor": Taylor(),
    "Random": Random(),
}


def train(prune: Prune | None, seed: int, epochs: int, channels: int) -> tuple[float, float]:
    """Test loss and accuracy after one run."""
    seed_everything(seed, verbose=False)
    model, data = SequenceClassifier(channels), DigitSequences()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[prune] if prune else [], **quiet)
    trainer.fit(model, datamodule=data)
    metrics = trainer.test(model, datamodule=data, verbose=False)[0]
    return metrics["test_loss"], metrics["test_acc"]


def summary(results: list[tuple[float, float]]) -> str:
    losses, accuracies = zip(*results, strict=True)
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    return f"{statistics.mean(losses):.4f} ± {spread:.4f}   {statistics.mean(accuracies):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--remaining", type=float, default=0.25, help="fraction of the MACs that may remain")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--channels", type=int, default=64)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    print(f"MACs({args.remaining}), {args.seeds} seeds: test loss (mean ± standard deviation), test accuracy")
    seeds = range(args.seeds)
    print(f"{'dense':24s}{summary([train(None, s, args.epochs, args.channels) for s in seeds])}", flush=True)
    for name, score in SCORES.items():
        for compensate, label in (("none", "none"), ("least_squares", "fold"), ("exact", "exact")):
            results = []
            for seed in seeds:
                prune = Prune(
                    score,
                    MACs(args.remaining),
                    Cubic(0.1, 0.7),
                    compensate=compensate,  # type: ignore[arg-type]
                    record_every_n_steps=2,
                    seed=seed,
                    print_report=False,
                )
                results.append(train(prune, seed, args.epochs, args.channels))
            print(f"{name + ', ' + label:24s}{summary(results)}", flush=True)


if __name__ == "__main__":
    main()
