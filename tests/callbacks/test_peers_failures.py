"""Where other tools fail, and this one does not: each docstring says what happens there.

Torch-Pruning 1.6.1 and Lightning 2.6's `ModelPruning` were run for it, and the few lines of a callback that most people
would write first ("a naive callback"). Ranks that drift apart need two processes: see `test_ddp.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_slim import (
    Granger,
    GrangerPrune,
    Linear,
    MACs,
    Magnitude,
    OneShot,
    Prune,
    Pruner,
    Units,
    find_groups,
    load_from_checkpoint,
)
from tests.callbacks.runs import Lit, loader, trainer
from tests.callbacks.test_resume import run
from tests.callbacks.test_users import half
from tests.networks import Mixed, images, same, take
from tests.surgery.test_optimizer import Strange
from tests.surgery.test_recurrent import Net

FROZEN = {"net.c1.weight", "net.c1.bias", "net.b1.weight", "net.b1.bias", "net.c2.weight"}
RECURRENT = [("LSTM", 1), ("LSTM", 2), ("GRU", 1), ("RNN", 1)]


class Watch(pl.Callback):
    """What a function says at the start and the end of every batch; put behind ours, it sees a cut at the start."""

    def __init__(self, look: Callable[[Any], Any]) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.look(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.look(pl_module))


def values(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def around_the_cut(watch: Watch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All parameters right before and right after the one cut of a run."""
    at = next(i for i, seen in enumerate(watch.seen) if len(seen["net.c1.bias"]) < 8)
    return watch.seen[at - 1], watch.seen[at]


class Sequences(Lit):
    """Classifies series by a recurrent layer between linear ones."""

    def __init__(self, kind: str = "LSTM", layers: int = 1) -> None:
        super().__init__()
        self.net = Net(kind, "last step", num_layers=layers, batch_first=True)  # type: ignore[assignment]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0].reshape(-1, 32, 6)), batch[1] % 3)


class Words(nn.Module):
    """Says the next word; what reads the words in also writes them out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.decoder = nn.Embedding(20, 12), nn.Linear(12, 20)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)
        self.decoder.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        return self.decoder(x + self.down(F.relu(self.up(x))))


class Tied(Lit):
    """`Words`, on sentences made of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Words()  # type: ignore[assignment]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        words = (8 * batch[0].flatten(1)[:, :7].abs()).long() % 20
        return F.cross_entropy(self.net(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


# --- what a trace leaves behind ---


@pytest.mark.parametrize("compensate", ["none", "least_squares"])
def test_frozen_layers_do_not_start_to_train(tmp_path: Path, compensate: str) -> None:
    """Torch-Pruning hands a frozen parameter back with `requires_grad=True`: it trains from then on."""
    lit = Lit()
    for name in FROZEN:
        lit.get_parameter(name).requires_grad_(False)
    before = values(lit)
    frozen = Watch(lambda lit: {name for name, p in lit.named_parameters() if not p.requires_grad})
    watch, callback = Watch(values), half(compensate=compensate)
    trainer(tmp_path, callback, frozen, watch).fit(lit, loader())

    assert all(names == FROZEN for names in frozen.seen)
    history: defaultdict[tuple[str, torch.Size], list[Tensor]] = defaultdict(list)
    for seen in watch.seen:
        for name in FROZEN:
            history[name, seen[name].shape].append(seen[name])
    assert len(history) == 2 * len(FROZEN)  # all were cut, once
    assert all(torch.equal(value, same_shape[0]) for same_shape in history.values() for value in same_shape)
    gone = callback.history.events[0].removed["net.c1"]
    assert torch.equal(lit.net.c1.weight, take(before["net.c1.weight"], ([u for u in range(8) if u not in gone],)))
    assert not torch.equal(watch.seen[-1]["net.up.weight"], watch.seen[-2]["net.up.weight"])


def test_training_and_eval_modes_are_not_lost(tmp_path: Path) -> None:
    """Torch-Pruning leaves the model in eval mode when it has traced it."""
    lit, callback = Lit(), half()
    lit.net.b1.eval()  # as with frozen statistics
    lit.net.up.eval()
    modes = {name: module.training for name, module in lit.named_modules()}
    watch = Watch(lambda lit: {name: module.training for name, module in lit.named_modules()})
    trainer(tmp_path, callback, watch).fit(lit, loader())
    assert len(callback.history.events) == 1
    assert sum(modes.values()) == len(modes) - 2
    assert all(seen == modes for seen in watch.seen)


def test_ties_are_not_undone(tmp_path: Path) -> None:
    """Torch-Pruning cuts a tied embedding and decoder apart: two tensors, of two widths."""
    lit = Tied()
    fit = trainer(tmp_path, half(), ModelCheckpoint(tmp_path, filename="{epoch}"))
    fit.fit(lit, loader())
    weight = lit.net.embed.weight
    assert lit.net.decoder.weight is weight
    assert weight.shape == (20, 6)
    (optimizer,) = fit.optimizers
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sum(p is weight for p in held) == 1
    assert {id(p) for p in held} == {id(p) for p in lit.parameters()} == {id(p) for p in optimizer.state}
    assert optimizer.state[weight]["exp_avg"].shape == (20, 6)
    loaded = load_from_checkpoint(Tied, tmp_path / "epoch=5.ckpt")
    assert loaded.net.decoder.weight is loaded.net.embed.weight
    assert same(loaded.state_dict(), lit.state_dict())


def test_attributes_follow_a_tie_under_all_its_names(tmp_path: Path) -> None:
    """The same, of `in_features`: what is printed, exported and traced again must not be what was once there."""
    lit = Tied()
    trainer(tmp_path, half()).fit(lit, loader())
    assert (lit.net.embed.embedding_dim, lit.net.up.in_features) == (6, 6)
    assert lit.net.decoder.in_features == 6


@pytest.mark.parametrize("within", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_groups_are_found_where_gradients_are_off(within: Callable[[], AbstractContextManager[Any]]) -> None:
    """Torch-Pruning fails inside `torch.no_grad()`, and in inference mode, in which Lightning validates."""
    network, x = Mixed(), images(0)[0]
    pruner = Pruner(network, Granger(), Units(0.5), OneShot(0.5))
    with within():
        pruner.prepare(x)
    assert pruner.widths == {"c1": 8, "c2": 6, "up": 16, "fc1": 20}
    assert not pruner.left_whole.keys() - {"fc2"}


@pytest.mark.parametrize("samples", [16, 2])
def test_inputs_of_inference_mode_are_examples_as_good_as_any(samples: int) -> None:
    """Torch-Pruning cannot trace with a batch that a validation step left."""
    with torch.inference_mode():
        x = images(0, samples)[0].clone()
    pruner = Pruner(Mixed(), Granger(), Units(0.5), OneShot(0.5))
    pruner.prepare(x)
    assert pruner.widths == {"c1": 8, "c2": 6, "up": 16, "fc1": 20}


@pytest.mark.parametrize("within", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_was_cut_where_gradients_are_off_trains_on(within: Callable[[], AbstractContextManager[Any]]) -> None:
    """The same, of a cut: tensors that are made in inference mode can never be trained or changed again."""
    network, (x, y) = Mixed(), images(0)
    optimizer = torch.optim.AdamW(network.parameters())
    pruner = Pruner(network, Granger(), Units(0.5), OneShot(0.5))
    pruner.prepare(x)
    with within():
        with pruner.recording():
            network(x)
        assert pruner.step(0.5, [optimizer]) is not None
    before = values(network)
    with pruner.recording():
        F.cross_entropy(network(x), y).backward()
    optimizer.step()
    assert network.c1.weight.shape == (4, 3, 3, 3)
    assert not torch.equal(before["c1.weight"], network.c1.weight)


# --- recurrent layers ---


@pytest.mark.parametrize(("kind", "layers"), RECURRENT)
def test_recurrent_layers_are_not_corrupted(tmp_path: Path, kind: str, layers: int) -> None:
    """Torch-Pruning raises half-way through an LSTM (`hidden_size` is no longer its tensors') and on any GRU or RNN."""
    lit = Sequences(kind, layers)
    trainer(tmp_path, Prune(Magnitude(), Units(0.5), OneShot(0.5), print_report=False)).fit(lit, loader())
    narrow = Net(kind, "last step", num_layers=layers, batch_first=True)
    narrow.i, narrow.h, narrow.o = nn.Linear(6, 4), nn.Linear(5, 3), nn.Linear(3, 3)
    narrow.r = getattr(nn, kind)(4, 5, num_layers=layers, batch_first=True)
    assert (lit.net.r.input_size, lit.net.r.hidden_size) == (4, 5)
    narrow.load_state_dict(lit.net.state_dict())  # the shapes are those of the narrow layer built by hand
    x = torch.randn(3, 32, 6)
    torch.testing.assert_close(lit.net(x), narrow(x))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_layer_left_whole_does_not_hinder_the_rest(tmp_path: Path, kind: str) -> None:
    """Torch-Pruning cannot prune anything of a model in which there is a GRU or an RNN, even an ignored one."""
    lit = Sequences(kind)
    callback = half(skip=["net.r"])
    lit.net.i = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8))  # type: ignore[assignment]
    trainer(tmp_path, callback).fit(lit, loader())
    assert callback.pruner.widths == {"net.i.0": 6, "net.h": 3}
    assert [p.shape for p in lit.net.r.parameters()] == [p.shape for p in Net(kind).r.parameters()]


def test_an_lstm_is_not_passed_over_by_default(tmp_path: Path) -> None:
    """`ModelPruning` with its defaults prunes the head and leaves the LSTM as it is, without a word."""
    lit, callback = Sequences("LSTM"), GrangerPrune(print_report=False)
    trainer(tmp_path, callback).fit(lit, loader())
    assert callback.pruner.left_whole.keys() == {"net.o"}  # it makes the output
    assert callback.pruner.widths["net.r"] == lit.net.r.hidden_size < 10
    assert callback.history.events[-1].reached <= 0.5


def test_both_levels_of_an_lstm_are_judged(tmp_path: Path) -> None:
    """The same, of two layers: what the upper one hears of the lower is computed anew."""
    lit, callback = Sequences("LSTM", 2), GrangerPrune(print_report=False)
    trainer(tmp_path, callback).fit(lit, loader())
    assert {"net.r", "net.r.l0"} <= callback.history.events[-1].widths.keys()
    assert callback.history.events[-1].reached <= 0.5
    assert lit.net.r.hidden_size < 10


def test_a_budget_that_cannot_be_reached_says_what_stays_whole(tmp_path: Path) -> None:
    callback = GrangerPrune(MACs(0.2), skip=["net.r"], print_report=False)
    with pytest.raises(ValueError, match=r"Left whole: .*net\.r: it is skipped"):
        trainer(tmp_path, callback).fit(Sequences("LSTM", 1), loader())


def test_a_cut_that_fails_half_way_leaves_an_lstm_that_works() -> None:
    """Torch-Pruning's IndexError leaves a model behind whose forward fails as well."""
    network, x = Net("LSTM", batch_first=True), torch.randn(3, 5, 6)
    strange = Strange(network.parameters(), lr=0.1)
    strange.step()
    before = network(x)
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), compensate="none")
    pruner.prepare(x)
    with pytest.raises(ValueError, match="sketch"):
        pruner.step(0.5, [strange])
    assert network.r.hidden_size == 10
    assert torch.equal(network(x), before)


def test_a_norm_of_channels_and_pixels_does_not_hinder_the_rest() -> None:
    """Torch-Pruning raises where a LayerNorm is over (channels, height, width)."""
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm([8, 8, 8]), nn.ReLU()]
    network = nn.Sequential(*first, nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 5))
    pruner, x = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), compensate="none"), images(0)[0]
    pruner.prepare(x)
    assert pruner.left_whole.keys() == {"6"}
    pruner.step(0.5)
    assert network[3].weight.shape == (3, 4, 3, 3)
    assert network(x).shape == (16, 5)


# --- training goes on ---


def test_cut_layers_do_not_stop_training(tmp_path: Path) -> None:
    """Behind a naive callback the optimizer holds dead tensors: every cut layer changes by exactly 0.0 from then on."""
    lit, callback, watch = Lit(), half(), Watch(values)
    fit = trainer(tmp_path, callback, watch)
    fit.fit(lit, loader())
    _, after = around_the_cut(watch)
    end = values(lit)
    cut = [name for name in callback.pruner.cut_tensors if name in end]
    assert set(cut) == end.keys() - {"net.fc2.bias"}
    assert all(float((end[name] - after[name]).abs().max()) > 0 for name in cut)
    (optimizer,) = fit.optimizers
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in lit.parameters()]
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in held)
    assert len(optimizer.state) == len(held)


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_moving_average_does_not_crash_and_resumes(tmp_path: Path, ours_first: bool) -> None:
    """`EMAWeightAveraging` beside `ModelPruning` or a naive callback: size of tensor a (64) must match b (20)."""

    def fit(folder: Path, ckpt_path: Path | None = None) -> tuple[Tied, EMAWeightAveraging]:
        lit, average = Tied(), EMAWeightAveraging(decay=0.9)
        lit.net.up.bias.requires_grad_(False)
        pair = [half(), average] if ours_first else [average, half()]
        checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        trainer(folder, *pair, checkpoints).fit(lit, loader(), ckpt_path=ckpt_path)
        return lit, average

    straight, average = fit(tmp_path)
    assert straight.net.decoder.weight is straight.net.embed.weight
    assert straight.net.embed.weight.shape == (20, 6)
    assert average._average_model is not None
    assert same(average._average_model.module.state_dict(), straight.state_dict())  # Lightning ends with the average
    for epoch in (1, 3):  # before and after the cut
        resumed, _ = fit(tmp_path / f"{epoch}", tmp_path / f"epoch={epoch}.ckpt")
        assert same(resumed.state_dict(), straight.state_dict())


def test_the_head_and_norms_are_not_zeroed(tmp_path: Path) -> None:
    """`ModelPruning` with its defaults zeroes 98 % of the batch norms' weights and the whole bias of the last layer."""
    lit, callback, watch = Lit(), half(compensate="none"), Watch(values)
    trainer(tmp_path, callback, watch).fit(lit, loader())
    before, after = around_the_cut(watch)
    stays = [unit for unit in range(8) if unit not in callback.history.events[0].removed["net.c1"]]
    assert torch.equal(after["net.fc2.bias"], before["net.fc2.bias"])
    assert torch.equal(after["net.b1.weight"], before["net.b1.weight"][stays])
    assert torch.equal(after["net.b1.bias"], before["net.b1.bias"][stays])
    assert lit.net.fc2.out_features == 5
    assert all(bool((p != 0).all()) for p in lit.parameters())


# --- how much goes ---


def test_tensors_really_get_smaller(tmp_path: Path) -> None:
    """After structured `ModelPruning` and `remove` a weight is as large as before, with zeros in it."""
    lit, checkpoints = Lit(), ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, half(), checkpoints).fit(lit, loader())
    narrow = Mixed((4, 6, 8), 10)
    assert [p.shape for p in lit.net.parameters()] == [p.shape for p in narrow.parameters()]
    narrow.load_state_dict(lit.net.state_dict())
    x = images(1)[0]
    assert torch.equal(narrow.eval()(x), lit.net.eval()(x))
    assert (tmp_path / "epoch=5.ckpt").stat().st_size < (tmp_path / "epoch=2.ckpt").stat().st_size


def test_amounts_do_not_compound(tmp_path: Path) -> None:
    """`ModelPruning("l1_unstructured", amount=0.5)` takes half of what is left, every epoch: 0.1 % remains of ten."""
    lit, callback = Lit(), half(schedule=Linear(0.0, 5 / 6), recovery_epochs=0.5, record_every_n_steps=1)
    fit = trainer(tmp_path, callback)
    fit.fit(lit, loader())
    widths = {"net.c1": 4, "net.c2": 3, "net.up": 8, "net.fc1": 10}
    assert len(callback.history.events) > 5
    assert callback.pruner.widths == widths
    assert all(callback.pruner.step(1.0) is None for _ in range(3))
    fit.fit_loop.max_epochs = 8
    fit.fit(lit, loader())
    assert fit.current_epoch == 8
    assert callback.pruner.widths == widths


def macs(network: nn.Module) -> int:
    """Multiply-accumulates of one image, counted by torch alone."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(images(0, 1)[0])
    return counter.get_total_flops() // 2


def test_a_ratio_is_one_of_what_it_says(tmp_path: Path) -> None:
    """Torch-Pruning's `pruning_ratio=0.5` is one of channels: 59 to 73 % of the parameters go."""
    lit = Lit()
    dense = macs(Lit().net)
    trainer(tmp_path, Prune(Magnitude(), MACs(0.5), OneShot(0.5), print_report=False)).fit(lit, loader())
    assert 0.47 < macs(lit.net) / dense <= 0.5
    lit = Lit()
    trainer(tmp_path, half()).fit(lit, loader())
    units = sum(group.size for group in find_groups(lit.net, images(0)[0]))
    assert units == sum(group.size for group in find_groups(Mixed(), images(0)[0])) / 2


# --- checkpoints ---


def test_a_resume_into_a_fresh_dense_module_fits_and_stays_pruned(tmp_path: Path) -> None:
    """A naive callback meets a size mismatch; `ModelPruning` forgets its masks, and what was pruned grows back."""
    straight, _, _ = run(tmp_path, "magnitude")
    for epoch in (2, 4):  # after the first cut, and after the last
        resumed, fit, callback = run(tmp_path / f"{epoch}", "magnitude", tmp_path / f"epoch={epoch}.ckpt")
        assert fit.current_epoch == 6
        assert callback.pruner.widths == {"net.c1": 4, "net.c2": 3, "net.up": 8, "net.fc1": 10}
        assert same(resumed.state_dict(), straight.state_dict())


def test_load_from_checkpoint_fits(tmp_path: Path) -> None:
    """A naive callback's checkpoint meets a size mismatch in `load_from_checkpoint`."""
    lit, _, _ = run(tmp_path, "magnitude")
    with pytest.raises(RuntimeError, match="size mismatch"):
        Lit.load_from_checkpoint(tmp_path / "epoch=5.ckpt")
    loaded = load_from_checkpoint(Lit, tmp_path / "epoch=5.ckpt")
    assert same(loaded.state_dict(), lit.state_dict())
    assert loaded.net.c1.out_channels == 4


def test_a_checkpoint_loads_with_the_defaults_of_torch_load(tmp_path: Path) -> None:
    """Torch-Pruning saves whole pickled models, which `torch.load` refuses by default."""
    lit, _, _ = run(tmp_path, "magnitude")
    checkpoint = torch.load(tmp_path / "epoch=5.ckpt")
    assert same(checkpoint["state_dict"], lit.state_dict())
