"""A script, started by a test: one of two processes does other than the other, run after run.

python ddp_uneven.py FOLDER KIND ...
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_slim import (
    Granger,
    Linear,
    Magnitude,
    Prune,
    Screening,
    Taylor,
    Units,
    WeightPrune,
    WeightSaliency,
    pruner,
)
from tests.callbacks.runs import trainer

SCORES = {"taylor": Taylor(), "magnitude": Magnitude(), "classes": Screening()}


class Uneven(pl.LightningModule):
    """Two layers, beside which rank 1 passes in some steps, and a network that it does not call in the first ones."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.net = nn.ModuleDict({"a": nn.Linear(12, 16), "b": nn.Linear(16, 16), "c": nn.Linear(16, 16)})
        self.out, self.other = nn.Linear(16, 3), nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x, y), first = batch, self.global_rank == 0
        if "empty" in self.kind and not first and batch_idx in (0, 3):
            x, y = x[:0], y[:0]
            return self.out(self.net["c"](self.net["b"](self.net["a"](x)))).sum() * 0 + self.other(x).sum() * 0
        skips = {"late": self.global_step > 0, "early": self.global_step < 14, "never": True, "last": True}
        h = F.relu(self.net["a"](x * float("nan") if "nan" in self.kind and not first else x))
        if first or not any(skip for name, skip in skips.items() if name in self.kind):
            h = h + F.relu(self.net["c"](F.relu(self.net["b"](h))))
        loss = F.cross_entropy(self.out(h), y)
        passes_by = "network" in self.kind and not first and self.global_step < 6
        return loss if passes_by else loss + F.cross_entropy(self.other(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def data(rank: int, kind: str) -> DataLoader:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(96, 12, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 1).long()
    return DataLoader(TensorDataset(x, y.clamp_max(1) if "classes" in kind and rank else y), batch_size=8)


def callback(kind: str) -> pl.Callback:
    if "masks" in kind:
        return WeightPrune(0.5, score=WeightSaliency(), schedule=Linear(0.1, 0.7))
    score = next((score for name, score in SCORES.items() if name in kind), Granger(0))
    settings: dict[str, Any] = {"recovery_epochs": 0.5, "record_every_n_steps": 3, "print_report": False}
    return Prune(score, Units(0.5), Linear(0.1, 0.7), **settings)


def run(folder: Path, kind: str) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        if lit.global_rank == 1:
            raise MemoryError("no room")
        return true(*args, **kwargs)

    name = next((name for name in ("survey_networks", "remove_units", "evidence_of") if name in kind), "evidence_of")
    true = getattr(pruner, name)
    strategy = DDPStrategy(
        process_group_backend="gloo", timeout=datetime.timedelta(seconds=20), find_unused_parameters=True
    )
    lit, ours = Uneven(kind), callback(kind)
    fit = trainer(folder, ours, devices=2, strategy=strategy, max_epochs=3, use_distributed_sampler=False)
    told = ""
    with mock.patch.object(pruner, name, fails if name in kind else true):
        try:
            fit.fit(lit, data(fit.global_rank, kind))
        except (ValueError, RuntimeError, MemoryError) as error:
            told = f"{type(error).__name__}: {error}"
    weights = hashlib.sha1(b"".join(p.detach().numpy().tobytes() for p in lit.parameters())).hexdigest()
    done = {"told": told, "weights": weights, "width": lit.net["b"].out_features}
    done["zeros"] = float((lit.net["b"].weight == 0).float().mean())
    (folder / f"{kind}.{fit.global_rank}.json").write_text(json.dumps(done))


if __name__ == "__main__":
    for each in sys.argv[2:]:
        run(Path(sys.argv[1]), each)
