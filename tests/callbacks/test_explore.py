"""Structures drawn at random, cut, fine-tuned and compared; the model does not notice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_slim import Exploration, MACs, Random, explore, load_from_checkpoint
from lightning_slim.profile import count_macs
from lightning_slim.selection import Selection
from tests.callbacks.runs import Lit, loader, trainer
from tests.callbacks.test_sensitivity import Digits
from tests.networks import images, same


def explored(module: Lit, n: int, **changes: Any) -> Exploration:
    settings: dict[str, Any] = {"train_dataloaders": loader(), "val_dataloaders": loader(), "record_batches": 4}
    settings |= {"monitor": "val_loss", "mode": "min", "accelerator": "cpu", **changes}
    return explore(module, None, MACs(0.5), n, **settings)


def macs_of(network: nn.Module) -> int:
    with torch.no_grad():
        return sum(count_macs(network.eval(), (images(7)[0][:1],), {}).values())


def test_every_structure_meets_the_budget_and_the_best_is_kept(tmp_path: Path) -> None:
    module = Lit()
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    found = explored(module, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(module.state_dict(), before)
    dense = macs_of(copy.deepcopy(module.net))
    assert len(found.drawn) == 3
    assert all(0.49 <= structure.macs / dense <= 0.5 for structure in found.drawn)
    assert all(structure.remaining == pytest.approx(structure.macs / dense, abs=1e-6) for structure in found.drawn)
    losses = [structure.after["val_loss"] for structure in [found.reference, *found.drawn]]
    assert len(set(losses)) == 4
    best = found.best_structure
    assert best.after["val_loss"] == min(losses)
    (again,) = trainer(tmp_path).validate(found.best, loader(), verbose=False)
    assert again == best.after
    assert macs_of(found.best.net) == best.macs
    assert sum(p.numel() for p in found.best.parameters()) == best.params
    # it is a module like any other one: it trains, and its checkpoint loads
    run = trainer(tmp_path, max_epochs=1)
    run.fit(found.best, loader())
    run.save_checkpoint(tmp_path / "best.ckpt")
    loaded = load_from_checkpoint(Lit, tmp_path / "best.ckpt")
    assert same(loaded.state_dict(), found.best.state_dict())


def test_the_reference_is_what_the_selection_gives() -> None:
    reference = explored(Lit(), 1).reference
    # the same fraction of 8, 6 (pairs), 16 and 20 units, as far as whole units go
    shares = [width / size for width, size in zip(reference.widths.values(), (8, 6, 16, 20), strict=True)]
    assert max(shares) - min(shares) < 0.2
    floors = explored(Lit(), 1, selection=Selection(keep_at_least={"net.c1": 1.0}))
    assert [structure.widths["net.c1"] for structure in [floors.reference, *floors.drawn]] == [8, 8]


def test_a_seed_decides_everything() -> None:
    runs = []
    for _ in range(2):
        torch.rand(3)
        settings = {"monitor": "val_loss", "mode": "min", "score": Random(), "seed": 1, "record_batches": 4}
        runs.append(explore(Lit(), Digits(), MACs(0.5), 1, **settings, accelerator="cpu"))
    assert runs[0].to_json() == runs[1].to_json()
    assert same(runs[0].best.state_dict(), runs[1].best.state_dict())


def test_batch_statistics_are_measured_anew_before_it_is_validated() -> None:
    module = Lit()
    module.net.b1.running_mean.fill_(100.0)  # far from what passes: the dense network suffers from it
    good, bad = explored(Lit(), 1), explored(module, 1)
    assert bad.dense["val_loss"] != good.dense["val_loss"]
    assert bad.reference.before == good.reference.before


def test_a_monitor_that_is_never_logged_is_named_before_anything_trains() -> None:
    with pytest.raises(ValueError, match=r"Expected `monitor` to name a metric .* got 'val_acc': it logs val_loss\."):
        explored(Lit(), 1, monitor="val_acc", finetune_epochs=-1)
    with pytest.raises(ValueError, match="Expected `n` of at least 1"):
        explored(Lit(), 0)
