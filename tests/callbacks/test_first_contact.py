"""Modules as strangers write them: what a step computes is what is looked at."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slim import MACs, Magnitude, OneShot, Prune


def mlp(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Lit(LightningModule):
    """A module with parts of its own, and a loss of these, a batch, its number and the epoch."""

    def __init__(self, loss: Callable[[Lit, Tensor, Tensor, int], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        for name, part in parts.items():
            setattr(self, name, part)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self, batch[0], batch[1], batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)


def fit(tmp_path: Path, lit: Lit, **kwargs: object) -> Prune:
    data = TensorDataset(torch.randn(64, 6), torch.randint(4, (64,)))
    callback = Prune(Magnitude(), MACs(0.5), OneShot(0.5), print_report=True, **kwargs)  # type: ignore[arg-type]
    Trainer(
        max_epochs=2, default_root_dir=tmp_path, callbacks=[callback], logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(lit, DataLoader(data, 8))  # fmt: skip
    return callback


def test_what_one_network_hands_to_another_is_cut(tmp_path: Path) -> None:
    lit = Lit(lambda s, x, y, i: F.cross_entropy(s.head(s.body(x)), y), body=mlp(6, 16, 16), head=mlp(16, 12, 4))
    callback = fit(tmp_path, lit)
    assert callback.pruner.widths.keys() == {"body.0", "body.2", "head.0"}
    assert lit.body[2].out_features == lit.head[0].in_features < 16
    assert (tmp_path / "report.md").exists()  # dense and slim are called with inputs of their own widths


def test_branches_that_take_turns_are_cut_alike(tmp_path: Path) -> None:
    lit = Lit(lambda s, x, y, i: s.heads[i % 2](s.body(x)).square().mean(), body=mlp(6, 16), heads=nn.ModuleList())
    lit.heads.extend([nn.Linear(16, 3), nn.Linear(16, 5)])
    fit(tmp_path, lit)
    assert lit.heads[0].in_features == lit.heads[1].in_features == lit.body[0].out_features < 16


def test_a_layer_that_comes_too_late_is_named_with_the_remedy(tmp_path: Path) -> None:
    def loss(lit: Lit, x: Tensor, y: Tensor, i: int) -> Tensor:
        hidden = lit.body(x)
        return (
            (lit.late(torch.cat([hidden, hidden], 1)) if lit.current_epoch and i > 3 else lit.head(hidden))
            .square()
            .mean()
        )

    lit = Lit(loss, body=mlp(6, 16), head=nn.Linear(16, 3), late=nn.Linear(32, 3))
    with pytest.raises(
        ValueError, match=r"Expected 32 channels in late, .*body\.0 makes, which was cut.*skip=\[\"body\.0\"\]"
    ):
        fit(tmp_path, lit)


def test_a_frozen_teacher_stays_whole_and_counts_in_no_budget(tmp_path: Path) -> None:
    def loss(lit: Lit, x: Tensor, y: Tensor, i: int) -> Tensor:
        with torch.no_grad():
            target = lit.teacher(x)
        return F.mse_loss(lit.student(x), target)

    lit = Lit(loss, student=mlp(6, 16, 16, 3), teacher=mlp(6, 32, 32, 3).requires_grad_(False))
    callback = fit(tmp_path, lit)
    assert [layer.out_features for layer in lit.teacher if isinstance(layer, nn.Linear)] == [32, 32, 3]
    assert callback.pruner.costs.parameters == sum(p.numel() for p in mlp(6, 16, 16, 3).parameters())
    assert callback.history.events[-1].reached <= 0.5


def test_a_teacher_that_the_step_moves_itself_is_refused(tmp_path: Path) -> None:
    class Momentum(Lit):
        @torch.no_grad()
        def on_train_batch_end(self, *args: object) -> None:
            for average, weight in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                average.lerp_(weight, 0.1)

    def loss(lit: Lit, x: Tensor, y: Tensor, i: int) -> Tensor:
        with torch.no_grad():
            target = lit.teacher(x)
        return F.mse_loss(lit.student(x), target)

    lit = Momentum(loss, student=mlp(6, 16, 3), teacher=mlp(6, 16, 3).requires_grad_(False))
    message = r"got teacher, which changed although it is frozen: .*by `skip=\['student.\*', 'teacher.\*'\]`"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, lit)


def test_what_a_target_network_follows_may_be_left_whole(tmp_path: Path) -> None:
    """An actor and a critic, whose target the module moves: only the actor is cut."""

    class ActorCritic(Lit):
        @torch.no_grad()
        def on_train_batch_end(self, *args: object) -> None:
            for average, weight in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                average.lerp_(weight, 0.1)

    def loss(lit: Lit, x: Tensor, y: Tensor, i: int) -> Tensor:
        with torch.no_grad():
            value = lit.target(x)
        return F.mse_loss(lit.critic(x), value) - lit.critic(lit.actor(x)).mean()

    lit = ActorCritic(loss, actor=mlp(6, 32, 32, 6), critic=mlp(6, 8, 3), target=mlp(6, 8, 3).requires_grad_(False))
    callback = fit(tmp_path, lit, skip=["critic.*", "target.*"])
    assert callback.pruner.widths.keys() == {"actor.0", "actor.2"}
    assert callback.history.events[-1].reached <= 0.5


def test_one_that_the_step_itself_moves_is_told_apart_from_a_teacher(tmp_path: Path) -> None:
    def loss(lit: Lit, x: Tensor, y: Tensor, i: int) -> Tensor:
        with torch.no_grad():
            for average, weight in zip(lit.teacher.parameters(), lit.student.parameters(), strict=True):
                average.lerp_(weight, 0.1)
            target = lit.teacher(x)
        return F.mse_loss(lit.student(x), target)

    lit = Lit(loss, student=mlp(6, 16, 3), teacher=mlp(6, 16, 3).requires_grad_(False))
    with pytest.raises(ValueError, match=r"student\.0: a frozen network .* as a moving average of weights does"):
        fit(tmp_path, lit)


def test_a_matrix_of_the_module_itself_reads_a_network(tmp_path: Path) -> None:
    lit = Lit(lambda s, x, y, i: F.cross_entropy(s.body(x) @ s.prototypes, y), body=mlp(6, 16, 16))
    lit.prototypes = nn.Parameter(torch.randn(16, 4))
    fit(tmp_path, lit)
    assert lit.body[2].out_features == len(lit.prototypes) < 16


def test_a_step_that_calls_no_module_is_refused(tmp_path: Path) -> None:
    lit = Lit(lambda s, x, y, i: F.cross_entropy(F.linear(x, s.fc.weight), y), fc=nn.Linear(6, 4))
    with pytest.raises(ValueError, match="Expected a training step that calls modules with parameters, got none"):
        fit(tmp_path, lit)


def test_metrics_do_not_hide_the_network(tmp_path: Path) -> None:
    def loss(lit: Lit, x: Tensor, y: Tensor, i: int) -> Tensor:
        logits = lit.net(x)
        lit.accuracy(logits, y)
        return F.cross_entropy(logits, y)

    accuracy = torchmetrics.MetricCollection([torchmetrics.Accuracy("multiclass", num_classes=4)])
    lit = Lit(loss, net=mlp(6, 16, 4), accuracy=accuracy)
    fit(tmp_path, lit)
    assert lit.net[0].out_features < 16
