"""What else hangs on a module or a Trainer works beside ours, or is refused with a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LambdaCallback, ModelPruning, Timer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from lightning_slim import GrangerPrune, Linear, Units, WeightPrune
from tests.callbacks.runs import trainer
from tests.callbacks.test_odd_data import Odd, data

HANGS: dict[str, Callable[[nn.Sequential], Any]] = {
    "forward hook": lambda net: net[2].register_forward_hook(lambda *_: None),
    "hook that computes": lambda net: net[2].register_forward_pre_hook(lambda _, args: (args[0] * 1.0,)),
    "backward hook": lambda net: net[2].register_full_backward_hook(lambda *_: None),
    "hook of a parameter": lambda net: net[2].weight.register_hook(lambda gradient: gradient * 0.5),
}
BESIDE: dict[str, dict[str, Any]] = {
    "simple profiler": {"profiler": "simple"},
    "advanced profiler": {"profiler": "advanced"},
    "anomalies": {"detect_anomaly": True},
    "loaders made anew": {"reload_dataloaders_every_n_epochs": 1},
    "overfit": {"overfit_batches": 4},
}
TAKEN: dict[str, Callable[[nn.Sequential], Any]] = {
    "torch.nn.utils.prune": lambda net: torch_prune.l1_unstructured(net[2], "weight", 0.3),
    "spectral norm": lambda net: parametrizations.spectral_norm(net[2]),
    "orthogonal": lambda net: parametrizations.orthogonal(net[2]),
}


def ours() -> tuple[GrangerPrune, WeightPrune]:
    prune = GrangerPrune(Units(0.5), Linear(0.1, 0.7), record_every_n_steps=1, print_report=False)
    return prune, WeightPrune(0.5, schedule=Linear(0.1, 0.7))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*HANGS, *BESIDE, "callbacks"])
def test_it_works_beside_ours(tmp_path: Path, name: str) -> None:
    lit, (prune, mask) = Odd(""), ours()
    HANGS.get(name, lambda net: None)(lit.net)
    others = [Timer(duration="00:00:10:00"), GradientAccumulationScheduler({1: 2})] if name == "callbacks" else []
    settings = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1, **BESIDE.get(name, {})}
    trainer(tmp_path, prune, mask, *others, max_epochs=4, **settings).fit(lit, data())
    assert lit.net[2].out_features == 8
    assert mask.masker.reached == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("which", [0, 1])
def test_what_computes_weights_is_named_in_the_first_batch(tmp_path: Path, name: str, which: int) -> None:
    lit, callback = Odd(""), ours()[which]
    TAKEN[name](lit.net)
    run = trainer(tmp_path, callback, max_epochs=4)
    with pytest.raises(ValueError, match=r"net\.2 is (parametrized|under)|net\.2, which is (parametrized|under)"):
        run.fit(lit, data())
    assert run.global_step <= 1


@pytest.mark.parametrize("which", [0, 1])
def test_another_callback_that_prunes_is_refused_at_the_start(tmp_path: Path, which: int) -> None:
    others = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.3)
    with pytest.raises(MisconfigurationException, match="one tool that prunes"):
        trainer(tmp_path, ours()[which], others).fit(Odd(""), data())


def test_what_is_parametrized_in_the_middle_is_named(tmp_path: Path) -> None:
    def parametrize(run: pl.Trainer, lit: Odd) -> None:
        if run.current_epoch == 1:
            torch_prune.identity(lit.net[2], "weight")

    lit = Odd("")
    before = lit.net[0].out_features
    prune = GrangerPrune(Units(0.5), Linear(0.5, 0.7), record_every_n_steps=1, print_report=False)
    run = trainer(tmp_path, prune, LambdaCallback(on_train_epoch_start=parametrize), max_epochs=4)
    with pytest.raises(ValueError, match=r"without net\.2\.weight: something took them away"):
        run.fit(lit, data())
    assert lit.net[0].out_features == before
    assert torch.isfinite(lit.net[0].weight).all()
