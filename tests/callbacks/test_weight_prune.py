"""Masks in a run: zeros at every step, resume to the bit, averages, other ways to optimise, structural cuts."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_slim import (
    NM,
    Block,
    Global,
    Linear,
    Magnitude,
    Masker,
    NoEffectWarning,
    OneShot,
    Prune,
    RigL,
    Units,
    WeightMagnitude,
    WeightPrune,
    WeightSaliency,
    WeightScore,
    WeightScreening,
    WeightWanda,
    load_from_checkpoint,
)
from lightning_slim.masks import InputScore
from tests.callbacks.runs import Lit, loader, trainer
from tests.callbacks.test_companions import AVERAGES
from tests.masks.test_contract import SCORES
from tests.networks import same, same_optimizer_state


def masks(**kwargs: Any) -> WeightPrune:
    """Three quarters go by 4 / 6 of the run, at two updates an epoch."""
    return WeightPrune(**{"sparsity": 0.75, "schedule": Linear(0.0, 4 / 6), "update_every": 0.5, **kwargs})


class Zeros(pl.Callback):
    """Checks at the end of every batch that what is masked is zero, and counts these batches."""

    def __init__(self, callback: WeightPrune) -> None:
        self.callback, self.seen = callback, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert hold(self.callback, pl_module)
        self.seen += bool(self.callback.events)


def hold(callback: WeightPrune, module: nn.Module) -> bool:
    """Whether all that is masked is zero."""
    kept = callback.masker.masks.items()
    return all(bool((module.get_parameter(name)[~mask] == 0).all()) for name, mask in kept)


MASKED = {f"net.{name}.weight" for name in ("c1", "c2", "dw", "up", "fc1")}  # not the head


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3}])
def test_a_run_ends_with_what_was_asked_for(tmp_path: Path, settings: dict[str, Any]) -> None:
    lit, callback = Lit(), masks()
    zeros = Zeros(callback)
    trainer(tmp_path, callback, zeros, **settings).fit(lit, loader(), loader())
    assert callback.masker.masks.keys() == MASKED
    for name in MASKED:
        weight = lit.get_parameter(name)
        assert int((weight == 0).sum()) == round(0.75 * weight.numel())
    assert bool((lit.net.fc2.weight != 0).all())
    assert zeros.seen > 15
    assert [event.reached for event in callback.events] == sorted(event.reached for event in callback.events)
    assert [*lit.state_dict()] == [*Lit().state_dict()]


OTHER = {"score": WeightSaliency(), "distribution": Global()}
REGROWN = {"schedule": OneShot(0.0), "regrow": RigL(end=1.0)}


@pytest.mark.parametrize("kwargs", [{}, OTHER, REGROWN], ids=["plain", "other", "regrown"])
def test_stop_after_any_epoch_and_resume_bitwise(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    """`ModelPruning` forgets its masks: 2208 zeros in the weights are none after a resume, without a warning."""

    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Lit, Any, WeightPrune]:
        lit, callback = Lit(), masks(**kwargs)
        fit = trainer(folder, callback, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1))
        fit.fit(lit, loader(), loader(), ckpt_path=ckpt_path)
        return lit, fit, callback

    straight, trained, callback = run(tmp_path)
    assert callback.masker.reached == pytest.approx(0.75, abs=1e-3)
    for epoch in range(5):
        resumed, fit, again = run(tmp_path / f"{epoch}", tmp_path / f"epoch={epoch}.ckpt")
        assert same(straight.state_dict(), resumed.state_dict()), epoch
        assert same_optimizer_state(trained.optimizers[0].state_dict(), fit.optimizers[0].state_dict())
        assert same(callback.masker.masks, again.masker.masks)
        assert callback.events == again.events
    checkpoint = torch.load(tmp_path / "epoch=5.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == Lit().state_dict().keys()
    assert same(load_from_checkpoint(Lit, tmp_path / "epoch=5.ckpt").state_dict(), straight.state_dict())


@pytest.mark.parametrize("kind", SCORES)
def test_every_score_masks_and_resumes_bitwise(tmp_path: Path, kind: type[WeightScore]) -> None:
    """What was heard since the last update goes through the checkpoint, too."""

    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Lit, WeightPrune]:
        when = "during" if kind().flow is None else "start"
        lit, callback = Lit(), masks(score=kind(), distribution=Global(), record_every_n_steps=3, when=when)
        checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        fit = trainer(folder, callback, checkpoints, Zeros(callback), max_epochs=4)
        fit.fit(lit, loader(), ckpt_path=ckpt_path)
        return lit, callback

    straight, callback = run(tmp_path)
    assert callback.masker.reached == pytest.approx(0.75, abs=1e-3)
    assert not any(module._forward_pre_hooks for module in straight.modules())
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    state = checkpoint["callbacks"][callback.state_key]["masker"]
    assert bool(state["sums"]) == (kind.streamed and kind().flow is None)
    if issubclass(kind, InputScore):
        assert state["inputs"]["net.fc1.weight"][0][0]["count"] > 0
    resumed, again = run(tmp_path / "again", tmp_path / "epoch=1.ckpt")
    assert same(straight.state_dict(), resumed.state_dict())
    assert same(callback.masker.masks, again.masker.masks)
    assert callback.events == again.events


def test_inputs_are_heard_in_every_nth_batch_and_where_something_is_due(tmp_path: Path, monkeypatch: Any) -> None:
    heard = []
    monkeypatch.setattr(Masker, "hear", lambda self, labels: heard.append(self.model.trainer.global_step))
    lit = Lit()
    callback = masks(score=WeightWanda(), schedule=OneShot(0.5), update_every=1.0, record_every_n_steps=7)
    trainer(tmp_path, callback).fit(lit, loader())
    # The first batch finds the weights; then batches 1 and 12, as nothing was heard yet, or since the update, 7, ...
    assert heard == [2, 8, 13, 15, 22]


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("ours_first", [True, False])
def test_averages_are_masked(tmp_path: Path, name: str, ours_first: bool) -> None:
    """`ModelPruning` and `EMAWeightAveraging` crash: parameters are paired by position, and it adds some."""
    lit, callback = Lit(), masks()
    pair = [callback, AVERAGES[name]()]
    trainer(tmp_path, *(pair if ours_first else pair[::-1])).fit(lit, loader(), loader())
    assert hold(callback, lit)  # the average's weights are the module's by now
    assert int((lit.net.fc1.weight == 0).sum()) == round(0.75 * lit.net.fc1.weight.numel())


def test_zeros_do_not_compound_and_norms_biases_and_head_stay(tmp_path: Path) -> None:
    """`ModelPruning("l1_unstructured", amount=0.5)` for ten epochs: 99.94 % are gone, norms and head among them."""
    lit, callback = Lit(), WeightPrune(0.5, schedule=Linear(0.0, 0.9), update_every=1.0)
    trainer(tmp_path, callback, max_epochs=10).fit(lit, loader())
    assert len(callback.events) == 9
    for name in MASKED:
        weight = lit.get_parameter(name)
        assert int((weight == 0).sum()) == round(0.5 * weight.numel())
    others = {name: p for name, p in lit.named_parameters() if name not in MASKED}
    assert all(bool((p != 0).all()) for p in others.values())


class Words(Lit):
    """An embedding and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict(  # type: ignore[assignment]
            {"embed": nn.Embedding(20, 8), "rnn": nn.LSTM(8, 12, 2, batch_first=True), "out": nn.Linear(12, 5)}
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        words = (8 * batch[0].flatten(1)[:, :7].abs()).long() % 20
        return F.cross_entropy(self.net["out"](self.net["rnn"](self.net["embed"](words))[0][:, -1]), batch[1])


@pytest.mark.parametrize("pattern", [NM(2, 4), Block(4, 1)], ids=str)
def test_recurrent_layers_and_embeddings_are_masked(tmp_path: Path, pattern: Any) -> None:
    """`ModelPruning` leaves all weights of an LSTM as they are, and says nothing."""
    lit, callback = Words(), masks(sparsity=0.5, pattern=pattern)
    trainer(tmp_path, callback, Zeros(callback)).fit(lit, loader())
    for name in ("embed.weight", *(f"rnn.weight_{side}_l{level}" for side in ("ih", "hh") for level in (0, 1))):
        weight = lit.get_parameter(f"net.{name}")
        assert int((weight == 0).sum()) * 2 == weight.numel(), name
    assert bool((lit.net["out"].weight != 0).all())


def test_manual_optimisation_with_two_optimizers(tmp_path: Path) -> None:
    class Manual(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                self.clip_gradients(optimizer, 0.1, "norm")
                optimizer.step()

        def configure_optimizers(self) -> Any:
            parts = (
                [p for n, p in self.named_parameters() if "fc" in n],
                [p for n, p in self.named_parameters() if "fc" not in n],
            )
            return [torch.optim.SGD(part, 1e-2, momentum=0.9) for part in parts]

    lit, callback = Manual(), masks(score=WeightSaliency())
    zeros = Zeros(callback)
    trainer(tmp_path, callback, zeros).fit(lit, loader())
    assert zeros.seen > 15
    assert callback.masker.reached == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("score", [WeightMagnitude(), WeightWanda(), WeightScreening()], ids=str)
def test_mixed_precision(tmp_path: Path, score: WeightScore) -> None:
    lit, callback = Lit(), masks(score=score)
    trainer(tmp_path, callback, Zeros(callback), precision="bf16-mixed").fit(lit, loader())
    assert callback.masker.masks.keys() == MASKED
    assert callback.masker.reached == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("score", [WeightMagnitude(), WeightScreening()], ids=str)
@pytest.mark.parametrize("ours_first", [True, False])
def test_masks_go_through_structural_cuts(tmp_path: Path, ours_first: bool, score: WeightScore) -> None:
    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Lit, WeightPrune]:
        lit, callback = Lit(), masks(score=score)
        cuts = Prune(Magnitude(), Units(0.5), OneShot(0.5), record_every_n_steps=3, print_report=False)
        pair = [callback, cuts] if ours_first else [cuts, callback]
        checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        extra = [Zeros(callback), EMAWeightAveraging(decay=0.9), checkpoints]
        trainer(folder, *pair, *extra).fit(lit, loader(), loader(), ckpt_path=ckpt_path)
        return lit, callback

    lit, callback = run(tmp_path)
    assert lit.net.c1.out_channels == 4
    assert hold(callback, lit)
    assert callback.masker.reached == pytest.approx(0.75, abs=2e-3)
    resumed, again = run(tmp_path / "b", tmp_path / "epoch=3.ckpt")
    assert same(resumed.state_dict(), lit.state_dict())
    assert same(again.masker.masks, callback.masker.masks)


def test_the_callback_and_a_masked_module_are_pickled(tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(masks(pattern=NM(1, 4))))
    assert (again.pattern, again.sparsity) == (NM(1, 4), 0.75)
    lit = Lit()
    trainer(tmp_path, masks()).fit(lit, loader())
    lit.trainer = None
    assert same(pickle.loads(pickle.dumps(lit.net)).state_dict(), lit.net.state_dict())


def test_sparsity_is_logged(tmp_path: Path) -> None:
    lit, callback = Lit(), masks()
    fit = trainer(tmp_path, callback)
    fit.fit(lit, loader())
    assert float(fit.callback_metrics["slim/sparsity"]) == pytest.approx(callback.masker.reached)
    assert float(fit.callback_metrics["slim/sparsity/net.fc1.weight"]) == 0.75


def test_training_on_keeps_the_zeros_and_a_new_model_starts_afresh(tmp_path: Path) -> None:
    lit, callback = Lit(), masks()
    fit = trainer(tmp_path, callback, Zeros(callback))
    fit.fit(lit, loader())
    before = dict(callback.masker.masks)
    fit.fit_loop.max_epochs = 8
    fit.fit(lit, loader())
    assert same(callback.masker.masks, before)
    assert hold(callback, lit)
    other = Lit()
    trainer(tmp_path, callback).fit(other, loader())
    assert callback.masker.model is other
    assert hold(callback, other)


def test_an_early_end_is_told(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    with pytest.warns(NoEffectWarning, match="Masking is not finished"):
        trainer(tmp_path, masks(), Stop()).fit(Lit(), loader(), loader())


@pytest.mark.parametrize("score", [WeightWanda(), WeightSaliency()], ids=str)
def test_a_layer_that_is_never_used_is_named_after_an_epoch(tmp_path: Path, score: WeightScore) -> None:
    def with_spare() -> Lit:
        lit = Lit()
        lit.spare = nn.Linear(8, 8)
        return lit

    lit = with_spare()
    callback = masks(score=score, schedule=Linear(1 / 6, 4 / 6))
    with pytest.raises(ValueError, match=r"got nothing to score \['spare\.weight'\] by: leave these layers out"):
        trainer(tmp_path, callback).fit(lit, loader())
    assert lit.trainer.current_epoch == 2
    assert all(bool(mask.all()) for mask in callback.masker.masks.values())
    trainer(tmp_path, masks(score=score, skip=["spare"])).fit(with_spare(), loader())


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sparsity in \(0, 1\)"):
        WeightPrune(1.5)
    with pytest.raises(ValueError, match="`update_every` above 0"):
        WeightPrune(0.5, update_every=0)
    with pytest.raises(MisconfigurationException, match=r"ends by 0\.83 of the run"):
        trainer(tmp_path, WeightPrune(schedule=OneShot(0.9), update_every=1.0)).fit(Lit(), loader())
    with pytest.raises(MisconfigurationException, match=r"at 2 of a batch, got NoneType .* set `labels`"):
        trainer(tmp_path, masks(score=WeightScreening(), labels=2)).fit(Lit(), loader())
    with pytest.raises(ValueError, match="`record_every_n_steps` of at least 1"):
        masks(record_every_n_steps=0)
    lit = Lit()
    before = {name: value.clone() for name, value in lit.state_dict().items() if "num_batches" not in name}
    with pytest.raises(
        ValueError, match=r"multiple of 4 inputs for 2:4, got 3: pad them, or skip it \(net\.c1\.weight"
    ):
        trainer(tmp_path, WeightPrune(pattern=NM())).fit(lit, loader())
    assert all(torch.equal(lit.state_dict()[n], v) for n, v in before.items() if "running" not in n)
