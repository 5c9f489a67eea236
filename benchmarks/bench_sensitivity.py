"""How sensitive the layers of the demo's network are, and how random structures of half its MACs compare.

    python benchmarks/bench_sensitivity.py [--seeds 3] [--n 20] [--out FOLDER]

The network is trained for 20 epochs on digits read as sequences. FOLDER gets the pictures of the first seed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from examples.digits import DigitSequences, SequenceClassifier
from lightning_slim import Exploration, Granger, MACs, Magnitude, SensitivityTable, explore, sensitivity


def trained(seed: int) -> SequenceClassifier:
    pl.seed_everything(seed, verbose=False)
    model = SequenceClassifier(channels=32)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(max_epochs=20, accelerator="cpu", **quiet).fit(model, DigitSequences())
    return model


def tell(exploration: Exploration) -> str:
    """One row: dense, the reference and the drawn structures, in % of val_acc."""
    cells = [f"{100 * exploration.dense['val_acc']:.1f}"]
    for when in ("before", "after"):
        reference = getattr(exploration.reference, when)["val_acc"]
        drawn = sorted(getattr(structure, when)["val_acc"] for structure in exploration.drawn)
        low, middle, high = (100 * v for v in (drawn[0], statistics.median(drawn), drawn[-1]))
        cells += [f"{100 * reference:.1f}", f"{middle:.1f} ({low:.1f} to {high:.1f})"]
    return " | ".join([*cells, f"{exploration.percentile:.0%}"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    began = time.perf_counter()
    print(
        "| seed | score | dense | reference, as cut | drawn, as cut | reference, tuned | drawn, tuned | better than |"
    )
    print("|---|---|---|---|---|---|---|---|")
    tables: list[SensitivityTable] = []
    for seed in range(args.seeds):
        model = trained(seed)
        tables.append(sensitivity(model, DigitSequences(), accelerator="cpu"))
        for score in (Magnitude(), Granger()):
            exploration = explore(
                model, DigitSequences(), MACs(0.5), args.n, monitor="val_acc", mode="max", score=score, seed=seed,
                accelerator="cpu",
            )  # fmt: skip
            print(f"| {seed} | {type(score).__name__} | {tell(exploration)} |", flush=True)
            if args.out and seed == 0 and score == Magnitude():
                exploration.plot(args.out / "explore.svg")
                tables[0].plot(args.out / "sensitivity.svg", "val_acc")
                (args.out / "explore.md").write_text(str(exploration))
    for seed, table in enumerate(tables):
        print(f"\nseed {seed}\n\n{table.to_markdown('val_acc')}\n{table.keep_at_least('val_acc', 0.02, 'max')}")
    print(f"{time.perf_counter() - began:.0f} s, one thread")


if __name__ == "__main__":
    main()
