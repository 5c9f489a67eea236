"""A script, started by a test: runs that are killed at any moment, and go on from the newest checkpoint until they end.

python killed_run.py FOLDER KILLS
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_slim import AccuracyBudget, GrangerPrune, Linear, Units, WeightPrune
from tests.callbacks.runs import Lit, loader, trainer
from tests.interrupts import differences
from tests.networks import images

EPOCHS, STEPS = 10, 8
X, Y = images(7, 8 * STEPS)


class Counted(Lit):
    """Its batches depend on the step alone, so that any step can be resumed; its metric is what is planned."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        at = 8 * (self.global_step % STEPS)
        return F.cross_entropy(self.net(X[at : at + 8]), Y[at : at + 8])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("planned", 0.5 if self.current_epoch in (3, 6) else 0.9)


class Save(pl.Callback):
    """A checkpoint of every third step; a `ModelCheckpoint` has those of the epochs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 3 == 2 and batch_idx + 1 < STEPS:
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


def train(folder: Path) -> None:
    """From the newest checkpoint to the end; writes down what it came to."""
    folder.mkdir(exist_ok=True)
    found = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))
    budget = AccuracyBudget("planned", 0.05, of=Units(0.2), step=0.3, patience=1)
    prune = GrangerPrune(budget, Linear(0.1, 0.9), record_every_n_steps=2, print_report=False)
    mask = WeightPrune(0.5, schedule=Linear(0.1, 0.8), update_every=0.5)
    epochs = ModelCheckpoint(
        folder,
        filename="{step}",
        save_top_k=-1,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        save_weights_only=False,
    )
    lit, run = Counted(), trainer(folder, prune, mask, Save(folder), epochs, max_epochs=EPOCHS, num_sanity_val_steps=0)
    run.fit(lit, loader(8 * STEPS), loader(16), ckpt_path=found[-1] if found else None)
    end = {
        "weights": lit.state_dict(),
        "optimizer": run.optimizers[0].state_dict(),
        "rates": [config.scheduler.state_dict()["_last_lr"] for config in run.lr_scheduler_configs],
        "history": prune.history.to_state(),
        "trials": [str(trial) for trial in prune.trials],
        "masks": mask.masker.state_dict(),
        "metrics": {name: float(value) for name, value in run.callback_metrics.items()},
    }
    torch.save(end, folder / "end.tmp")
    os.replace(folder / "end.tmp", folder / "end.pt")


def forked(folder: Path, lasts: float | None = None) -> float:
    """Trains in a process of its own, which is killed after so many seconds; returns how long it lived."""
    begun, child = time.monotonic(), os.fork()
    if child == 0:
        code = 1
        try:
            train(folder)
            code = 0
        finally:
            os._exit(code)
    if lasts is not None:
        time.sleep(lasts)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"a run in {folder} ended with {status}"
    return time.monotonic() - begun


if __name__ == "__main__":
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    draw = random.Random(0)
    whole = forked(root / "whole")
    wanted = torch.load(root / "whole" / "end.pt", weights_only=True)
    killed, runs, differ = 0, 0, []
    while killed < kills:
        folder = root / f"run{runs}"
        runs += 1
        while not (folder / "end.pt").exists():
            # Now and then a run goes on to its end, so that ends are killed, too.
            forked(folder, draw.uniform(0.02, 1.1 * whole))
            killed += not (folder / "end.pt").exists()
        end = torch.load(folder / "end.pt", weights_only=True)
        # A run that was killed behind its last checkpoint has nothing left to train, and Lightning logs nothing.
        parts = wanted.keys() - ({"metrics"} if not end["metrics"] else ())
        differ += [f"{folder.name}: {part}" for part in parts if differences(wanted[part], end[part])]
    report = {"killed": killed, "runs": runs, "differ": differ, "trials": wanted["trials"]}
    (root / "report.json").write_text(json.dumps(report))
