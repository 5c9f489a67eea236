"""A script, started by a test: two processes prune in step, and write down what they end with.

python ddp_run.py FOLDER KIND:STRATEGY[:CHECKPOINT] ...

Runs follow one another in the same two processes, which take longer to start than to train; each has the folder KIND.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning_slim
from lightning_slim import (
    AccuracyBudget,
    Global,
    Granger,
    GrangerPrune,
    GraSP,
    GroupLasso,
    InputScreening,
    Latency,
    Linear,
    Sensitivity,
    SparsityRegularization,
    Taylor,
    WeightPrune,
    latency,
)
from tests.callbacks.runs import Lit, loader, trainer
from tests.callbacks.screened import Classifier, batches, digits
from tests.callbacks.test_depth import Deep, both
from tests.callbacks.test_end import cut as end_cut
from tests.callbacks.test_latency import granger, unused
from tests.callbacks.test_resume import prune
from tests.callbacks.test_start import cut
from tests.callbacks.test_start import masked as start_masked
from tests.machines import in_packets

ROUNDS = {"start masks": 1, "WeightGraSP": 1, "WeightSynFlow": 100}
STRATEGIES = {
    "plain": {},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
}


class WriteDown(Callback):
    """Weights and optimizer state of this rank, after every batch that follows a cut."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.snapshots = folder, []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        state = [
            value.clone()
            for entries in trainer.optimizers[0].state.values()
            for value in entries.values()
            if isinstance(value, torch.Tensor)
        ]
        self.snapshots.append({"weights": weights, "state": state})

    def on_fit_end(self, trainer, pl_module) -> None:
        torch.save(self.snapshots, self.folder / f"rank{trainer.global_rank}.pt")


def main() -> None:
    torch.set_num_threads(1)
    folder, *runs = sys.argv[1:]
    for run in runs:
        train(Path(folder), *run.split(":"))


def train(folder: Path, kind: str, strategy: str, checkpoint: str | None = None) -> None:
    folder = folder / kind
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "inputs":
        model, callback, data = Classifier(), InputScreening(), batches(Subset(digits()[0], range(1792)))
    elif kind == "blocks":
        model, callback, data = Deep(), both(Granger(0)), loader(64)
    elif kind.startswith("Weight"):
        score = getattr(lightning_slim, kind)()
        how = {"score": score, "distribution": Global(), "schedule": Linear(0.0, 4 / 6), "record_every_n_steps": 3}
        when = "during" if score.flow is None else "start"
        model, callback, data = Lit(), WeightPrune(0.75, update_every=2.0, when=when, **how), loader(64)
    elif kind == "guard":
        budget = AccuracyBudget("val_loss", 0.0, "min", step=0.5, patience=1, reference=0.0)  # no step is good enough
        model, data = Lit(), loader(64)
        callback = GrangerPrune(budget, Linear(0.0, 0.5), record_every_n_steps=3)
    elif kind == "penalty":
        model, callback, data = Lit(), SparsityRegularization(GroupLasso(), 1e-2, Linear(0.0, 0.5)), loader(64)
    elif kind == "sensitivity":
        model, callback, data = Lit(), Sensitivity(1, (0.25, 0.5), Taylor()), loader(64)
    elif kind == "start":
        model, callback, data = Lit(), cut(GraSP(), compensate="least_squares", rounds=2), loader(64)
    elif kind == "start masks":
        model, callback, data = Lit(), start_masked(probe_batches=1, distribution=Global(0.0)), loader(64)
    elif kind == "end":
        model, callback, data = Lit(), end_cut(schedule=Linear(0.0, 2 / 3)), loader(64)
    elif kind == "latency":
        model, callback, data = Lit(), granger(Latency(0.5), round_to="auto"), loader(64)
        latency._times = in_packets(c1=2, c2=2, up=2, fc1=2) if rank_zero_only.rank == 0 else unused
    else:
        model, callback, data = Lit(), prune(kind), loader(64)
    callback.print_report = True
    fit = trainer(
        folder,
        callback,
        WriteDown(folder),
        ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
        strategy=DDPStrategy(process_group_backend="gloo", **STRATEGIES[strategy]),
        devices=2,
        max_epochs=2 if kind in ("inputs", "sensitivity") else 6,
        accumulate_grad_batches=2 if strategy == "views" else 1,
    )
    validated = kind in ("guard", "sensitivity")
    fit.fit(model, data, data if validated else None, ckpt_path=checkpoint)
    if kind == "guard":
        assert len(callback.trials) == 5
    if kind == "sensitivity":
        (folder / f"table{fit.global_rank}.json").write_text(callback.table.to_json())
    if validated or kind == "penalty":
        return
    events = (
        callback.events if isinstance(callback, WeightPrune) else [] if kind == "inputs" else callback.history.events
    )
    assert callback.event if kind == "inputs" else len(events) == ROUNDS.get(kind, 2)


if __name__ == "__main__":
    main()
