"""Pruning before training: what is asked for goes before the first step, and nothing else is touched."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slim import (
    Ablation,
    BivariateGranger,
    Combined,
    Global,
    Granger,
    GrangerPrune,
    GraSP,
    MACs,
    Magnitude,
    Prune,
    RigL,
    Screening,
    SynFlow,
    Taylor,
    Units,
    WeightGraSP,
    WeightMagnitude,
    WeightPrune,
    WeightSaliency,
    WeightScreening,
    WeightSynFlow,
    WeightWanda,
    load_from_checkpoint,
)
from tests.callbacks.runs import Lit, loader, trainer
from tests.networks import images, same, same_optimizer_state
from tests.variants import variants

SCORES = {"magnitude": Magnitude(), "snip": Taylor(of="weights"), "grasp": GraSP(), "synflow": SynFlow()}
OF_WEIGHTS = {
    "magnitude": WeightMagnitude(),
    "snip": WeightSaliency(),
    "grasp": WeightGraSP(),
    "synflow": WeightSynFlow(),
    "wanda": WeightWanda(),
    "screening": WeightScreening(),
}


def cut(score: Any = None, **kwargs: Any) -> Prune:
    settings = {"budget": Units(0.5), "when": "start", "compensate": "none", "print_report": False}
    return Prune(score or Taylor(of="weights"), **{**settings, **kwargs})


def masked(score: Any = None, **kwargs: Any) -> WeightPrune:
    settings = {"sparsity": 0.75, "distribution": Global(), "when": "start"}
    return WeightPrune(score=score or WeightSaliency(), **{**settings, **kwargs})


class First(pl.Callback):
    """What the module is when the first step of the optimizer is about to be taken."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 0:
            self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


class Awkward(Lit):
    """Draws, counts, collects, logs, and keeps a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.seen, self.means = nn.Dropout(0.2), torchmetrics.MeanMetric(), []
        self.register_buffer("average", torch.zeros(()))
        self.steps = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self.steps += 1
        x = x + float(np.random.rand()) + 0.1 * torch.randn_like(x)  # noqa: NPY002 (the global state is meant)
        loss = F.cross_entropy(self.drop(self.net(x)), y)
        self.seen.update(loss.detach())
        self.means.append(loss.item())
        self.average = 0.9 * self.average + 0.1 * loss.detach()
        self.log("loss", loss)
        self.log("seen", self.seen, on_step=False, on_epoch=True)
        return loss


class Noisy(torch.utils.data.Dataset):
    """Augments by numpy's random numbers, in the process that trains."""

    def __init__(self) -> None:
        self.x, self.y = images(7, 32)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.1 * float(np.random.randn()), self.y[i]  # noqa: NPY002 (the global state is meant)


def noisy(**kwargs: Any) -> DataLoader:
    return DataLoader(Noisy(), 8, shuffle=True, **kwargs)


NOTHING = {
    "snip": lambda: cut(budget=Units(1.0)),
    "grasp": lambda: cut(GraSP(), budget=Units(1.0), rounds=1),
    "synflow": lambda: cut(SynFlow(), budget=Units(1.0)),
    "everything": lambda: cut(
        Combined([Granger(), Screening(), Ablation(), Taylor(), SynFlow()]), budget=Units(1.0), compensate="exact"
    ),
    "masks": lambda: masked(sparsity=1e-9),
    "masks, grasp": lambda: masked(WeightGraSP(), sparsity=1e-9),
    "masks, synflow": lambda: masked(WeightSynFlow(), sparsity=1e-9, rounds=2),
}


@pytest.mark.parametrize(("name", "own_generator"), variants(list(NOTHING), [False, True], every=2))
def test_a_probe_that_removes_nothing_leaves_no_trace(tmp_path: Path, name: str, own_generator: bool) -> None:
    def run(*callbacks: pl.Callback) -> tuple[Any, Any]:
        pl.seed_everything(3, verbose=False)
        lit = Awkward()
        fit = trainer(tmp_path, *callbacks, max_epochs=2)
        fit.fit(lit, noisy(generator=torch.Generator().manual_seed(1) if own_generator else None))
        return lit, fit

    callback = NOTHING[name]()
    plain, trained = run()
    probed, fit = run(callback)
    assert same(plain.state_dict(), probed.state_dict())
    assert same_optimizer_state(trained.optimizers[0].state_dict(), fit.optimizers[0].state_dict())
    assert (plain.means, plain.steps) == (probed.means, probed.steps)
    logged = {name: float(value) for name, value in fit.callback_metrics.items() if not name.startswith("slim/")}
    assert logged == {name: float(value) for name, value in trained.callback_metrics.items()}
    assert callback._point == 0


@pytest.mark.parametrize("rounds", [None, 3])
@pytest.mark.parametrize("name", SCORES)
def test_units_go_before_the_first_step(tmp_path: Path, name: str, rounds: int | None) -> None:
    callback, first, lit = cut(SCORES[name], rounds=rounds or (4 if name == "synflow" else None)), First(), Lit()
    trainer(tmp_path, callback, first, max_epochs=2).fit(lit, loader())
    assert callback.pruner.widths == {"net.c1": 4, "net.c2": 3, "net.up": 8, "net.fc1": 10}
    assert first.weights["net.c1.weight"].shape == (4, 3, 3, 3)
    stays = [u for u in range(8) if not any(u in e.removed.get("net.c1", []) for e in callback.history.events)]
    assert torch.equal(first.weights["net.c1.weight"], Lit().net.c1.weight[stays])
    assert {event.step for event in callback.history.events} == {0}
    assert not torch.equal(lit.net.c1.weight, first.weights["net.c1.weight"])


def test_rounds_leave_the_same_fraction_each(tmp_path: Path) -> None:
    callback = cut(SynFlow(), budget=MACs(0.25), rounds=4, scope="global")
    trainer(tmp_path, callback, max_epochs=1).fit(Lit(), loader())
    asked = [event.asked for event in callback.history.events]
    assert asked == pytest.approx([0.25 ** (k / 4) for k in (1, 2, 3, 4)])
    assert callback.history.events[-1].reached <= 0.25


def test_structural_snip_is_the_sum_over_the_weights_that_make_a_unit(tmp_path: Path) -> None:
    lit = Lit()
    callback = cut(probe_batches=1)
    trainer(tmp_path, callback, max_epochs=1).fit(lit, loader())
    fresh, (x, y) = Lit(), images(7, 32)
    F.cross_entropy(fresh.net(x[:8]), y[:8]).backward()
    net = fresh.net
    made = [net.c1.weight, net.c1.bias, net.b1.weight, net.b1.bias]
    expected = sum((p.detach() * p.grad).abs().flatten(1 if p.ndim > 1 else 0).view(8, -1).sum(1) for p in made)
    found = torch.tensor(callback.history.events[0].importance["net.c1"])
    torch.testing.assert_close(found.float(), expected)


@pytest.mark.parametrize("name", OF_WEIGHTS)
def test_weights_are_masked_before_the_first_step(tmp_path: Path, name: str) -> None:
    callback, first, lit = masked(OF_WEIGHTS[name], rounds=5 if name == "synflow" else None), First(), Lit()
    trainer(tmp_path, callback, first, max_epochs=2).fit(lit, loader())
    assert callback.masker.reached == pytest.approx(0.75, abs=1e-3)
    assert callback.masker.masks.keys() == {f"net.{name}.weight" for name in ("c1", "c2", "dw", "up", "fc1")}
    fresh = Lit()
    for weight, mask in callback.masker.masks.items():
        assert torch.equal(first.weights[weight], fresh.get_parameter(weight) * mask)
        assert bool((lit.get_parameter(weight)[~mask] == 0).all())
    assert [event.step for event in callback.events] == [0] * (5 if name == "synflow" else 1)


def test_masked_snip_keeps_the_largest_of_one_batch(tmp_path: Path) -> None:
    callback = masked(probe_batches=1, distribution=Global(0.0))
    trainer(tmp_path, callback, max_epochs=1).fit(Lit(), loader())
    fresh, (x, y) = Lit(), images(7, 32)
    F.cross_entropy(fresh.net(x[:8]), y[:8]).backward()
    names = list(callback.masker.masks)
    scores = torch.cat([(fresh.get_parameter(n) * fresh.get_parameter(n).grad).abs().flatten() for n in names])
    kept = torch.cat([callback.masker.masks[n].flatten() for n in names])
    assert scores[kept].min() >= scores[~kept].max()


def test_synflow_in_rounds_empties_no_layer_where_one_shot_does(tmp_path: Path) -> None:
    """Layer collapse (Tanaka et al., 2020): at high sparsity one round leaves nothing of the widest layer."""

    class Deep(Lit):
        def __init__(self) -> None:
            super().__init__()
            widths = [192, 64, 256, 64, 5]
            layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
            self.net = nn.Sequential(nn.Flatten(), *layers[:-1])  # type: ignore[assignment]

    def least(rounds: int | None) -> int:
        callback = masked(WeightSynFlow(), sparsity=0.995, distribution=Global(0.0), mask_last=True, rounds=rounds)
        trainer(tmp_path, callback, max_epochs=1).fit(Deep(), loader())
        assert len(callback.events) == (rounds or 100)
        return min(int(mask.sum()) for mask in callback.masker.masks.values())

    assert least(None) > 3 * least(1)


@pytest.mark.parametrize("make", [lambda: cut(), lambda: cut(SynFlow(), rounds=2), lambda: masked()])
def test_stop_after_any_epoch_and_resume_without_a_second_probe(tmp_path: Path, make: Any) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Lit, Any, Any]:
        lit, callback = Lit(), make()
        fit = trainer(folder, callback, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1), max_epochs=4)
        fit.fit(lit, loader(), loader(), ckpt_path=ckpt_path)
        return lit, fit, callback

    straight, trained, callback = run(tmp_path)
    for epoch in (0, 2):
        resumed, fit, again = run(tmp_path / f"{epoch}", tmp_path / f"epoch={epoch}.ckpt")
        assert same(straight.state_dict(), resumed.state_dict()), epoch
        assert same_optimizer_state(trained.optimizers[0].state_dict(), fit.optimizers[0].state_dict())
        if isinstance(callback, Prune):
            assert again.history.to_json() == callback.history.to_json()
        else:
            assert again.events == callback.events
    assert same(load_from_checkpoint(Lit, tmp_path / "epoch=3.ckpt").state_dict(), straight.state_dict())


def test_training_on_does_not_probe_again(tmp_path: Path) -> None:
    lit, callback = Lit(), cut()
    fit = trainer(tmp_path, callback, max_epochs=1)
    fit.fit(lit, loader())
    fit.fit_loop.max_epochs = 2
    fit.fit(lit, loader())
    assert len(callback.history.events) == 1


@pytest.mark.parametrize("make", [lambda: cut(print_report=True), lambda: masked()])
def test_fast_dev_run(tmp_path: Path, make: Any) -> None:
    lit, callback = Lit(), make()
    trainer(tmp_path, callback, fast_dev_run=True, max_epochs=None).fit(lit, loader(), loader())
    assert len(callback.history.events if isinstance(callback, Prune) else callback.events) == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("make", [lambda: cut(), lambda: cut(GraSP()), lambda: masked(WeightSynFlow(), rounds=2)])
def test_other_precisions(tmp_path: Path, make: Any, precision: Any) -> None:
    callback = make()
    trainer(tmp_path, callback, max_epochs=1, precision=precision).fit(Lit(), loader())
    assert callback._point == 0
    left = callback.pruner.widths["net.c1"] / 8 if isinstance(callback, Prune) else 2 * (1 - callback.masker.reached)
    assert left == pytest.approx(0.5, abs=1e-3)


def test_persistent_workers_go_on(tmp_path: Path) -> None:
    """A second pass over a loader with persistent workers would start their one iterator anew."""
    data = DataLoader(TensorDataset(*images(7, 32)), 8, num_workers=1, persistent_workers=True)
    plain, probed = Lit(), Lit()
    trainer(tmp_path, max_epochs=2).fit(plain, data)
    trainer(tmp_path, cut(budget=Units(1.0)), max_epochs=2).fit(probed, data)
    assert same(plain.state_dict(), probed.state_dict())


@pytest.mark.parametrize("make", [cut, masked])
def test_data_of_unknown_length(tmp_path: Path, make: Any) -> None:
    """Nothing here is a fraction of the run."""

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(zip(*images(7, 32), strict=True))

    callback = make()
    trainer(tmp_path, callback, max_epochs=-1, max_steps=6).fit(Lit(), DataLoader(Endless(), 8))
    assert callback._point == 0


def test_several_loaders_hooks_and_a_step_without_index(tmp_path: Path) -> None:
    class Two(Lit):
        def training_step(self, batch: dict[str, Any]) -> dict[str, Tensor]:  # type: ignore[override]
            losses = [F.cross_entropy(self.net(x), y) for x, y in batch.values()]
            return {"loss": torch.stack(losses).mean()}

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {name: (2 * x, y) for name, (x, y) in batch.items()}

    callback = cut(probe_batches=2)
    trainer(tmp_path, callback, max_epochs=1).fit(Two(), {"a": loader(), "b": loader(16)})
    assert len(callback.history.events) == 1
    assert float(callback.pruner.calls["net"].args[0].abs().max()) > 5  # twice what is in the data


def test_averages_and_both_callbacks_together(tmp_path: Path) -> None:
    lit, units, weights = Lit(), cut(), masked(sparsity=0.5)
    trainer(tmp_path, weights, units, EMAWeightAveraging(decay=0.9), max_epochs=2).fit(lit, loader())
    assert lit.net.c1.out_channels == 4
    for name, mask in weights.masker.masks.items():
        assert mask.shape == lit.get_parameter(name).shape
        assert bool((lit.get_parameter(name)[~mask] == 0).all())


def test_exchanges_go_on_from_a_mask_of_snip(tmp_path: Path) -> None:
    callback = masked(regrow=RigL(end=1.0), update_every=0.5)
    trainer(tmp_path, callback, max_epochs=3).fit(Lit(), loader())
    assert [event.step for event in callback.events][:2] == [0, 2]
    assert sum(event.regrown for event in callback.events) > 0
    assert {round(event.reached, 6) for event in callback.events} == {round(callback.events[0].reached, 6)}


def test_granger_prune_at_the_start(tmp_path: Path) -> None:
    callback = GrangerPrune(Units(0.5), when="start", print_report=False)
    trainer(tmp_path, callback, max_epochs=1).fit(Lit(), loader())
    assert [event.step for event in callback.history.events] == [0]


# --- refused ---


@pytest.mark.parametrize("when", ["during", "end"])
@pytest.mark.parametrize("make", [lambda **k: cut(SynFlow(), **k), lambda **k: masked(WeightGraSP(), **k)])
def test_scores_of_what_is_not_trained_want_the_start(make: Any, when: str) -> None:
    with pytest.raises(ValueError, match=r'Expected `when="start"` with .*, got'):
        make(when=when)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"when": "before"}, 'Expected `when` to be "during", "start" or "end", got .before.'),
        ({"probe_batches": 0}, "`probe_batches` and `rounds` of at least 1, got 0 and None"),
        ({"rounds": 0}, "`probe_batches` and `rounds` of at least 1, got 8 and 0"),
    ],
)
@pytest.mark.parametrize("make", [cut, masked])
def test_bad_arguments(make: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_exchanges_by_a_score_that_ends_with_the_start() -> None:
    with pytest.raises(ValueError, match="that goes on while the network trains"):
        masked(WeightSynFlow(), regrow=RigL())


def test_two_flows_at_once() -> None:
    with pytest.raises(ValueError, match="one score that is taken before training"):
        Combined([SynFlow(), GraSP()])


@pytest.mark.parametrize("make", [cut, masked])
def test_manual_optimisation_is_refused_before_anything_goes(tmp_path: Path, make: Any) -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    lit = Manual()
    before = {name: p.detach().clone() for name, p in lit.named_parameters()}
    with pytest.raises(MisconfigurationException, match="Prune it while it trains"):
        trainer(tmp_path, make()).fit(lit, loader())
    assert same(before, dict(lit.named_parameters()))


def test_a_step_without_a_loss(tmp_path: Path) -> None:
    class Skips(Lit):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.net(batch[0])

    with pytest.raises(MisconfigurationException, match="Expected a loss of the training step, got None"):
        trainer(tmp_path, cut()).fit(Skips(), loader())


def test_too_few_batches_for_a_score(tmp_path: Path) -> None:
    fit = trainer(tmp_path, cut(BivariateGranger(axis="training_step"), probe_batches=3))
    with pytest.raises(MisconfigurationException, match="Expected 3 batches to tell something of every unit"):
        fit.fit(Lit(), loader())
