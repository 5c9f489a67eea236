"""A script, started by a test: two processes prune in step, and write down what they end with.

python ddp_run.py FOLDER KIND STRATEGY [CHECKPOINT]
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

from lightning_slim import Global, Granger, InputScreening, Latency, Linear, WeightPrune, WeightSaliency, latency
from tests.callbacks.runs import Lit, loader, trainer
from tests.callbacks.screened import Classifier, batches, digits
from tests.callbacks.test_depth import Deep, both
from tests.callbacks.test_latency import granger, unused
from tests.callbacks.test_resume import prune
from tests.machines import in_packets

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
    folder, kind, strategy, *checkpoint = sys.argv[1:]
    if kind == "inputs":
        model, callback, data = Classifier(), InputScreening(), batches(Subset(digits()[0], range(1792)))
    elif kind == "blocks":
        model, callback, data = Deep(), both(Granger(0)), loader(64)
    elif kind == "masks":
        how = {"score": WeightSaliency(), "distribution": Global(), "schedule": Linear(0.0, 4 / 6)}
        model, callback, data = Lit(), WeightPrune(0.75, update_every=2.0, **how), loader(64)
    elif kind == "latency":
        model, callback, data = Lit(), granger(Latency(0.5), round_to="auto"), loader(64)
        latency._times = in_packets(c1=2, c2=2, up=2, fc1=2) if rank_zero_only.rank == 0 else unused
    else:
        model, callback, data = Lit(), prune(kind), loader(64)
    callback.print_report = True
    fit = trainer(
        folder,
        callback,
        WriteDown(Path(folder)),
        ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1),
        strategy=DDPStrategy(process_group_backend="gloo", **STRATEGIES[strategy]),
        devices=2,
        max_epochs=2 if kind == "inputs" else 6,
        accumulate_grad_batches=2 if strategy == "views" else 1,
    )
    fit.fit(model, data, ckpt_path=checkpoint[0] if checkpoint else None)
    events = callback.events if kind == "masks" else [] if kind == "inputs" else callback.history.events
    assert callback.event if kind == "inputs" else len(events) == 2


if __name__ == "__main__":
    main()
