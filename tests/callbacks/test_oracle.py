"""Inside Lightning too, a network cut in mid-run trains on as the narrow one built by hand: bitwise."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slim import find_groups, migrate, remove_units
from lightning_slim.units import Plan
from tests.callbacks.runs import trainer
from tests.networks import Mixed, images, mixed_plan, narrow_copy, narrow_optimizer_state, same, same_optimizer_state

STEPS, BEFORE = 40, 10


class CutOnce(pl.Callback):
    """Cuts a fixed plan at one batch, and keeps what the hand-built oracle starts from."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != self.batch:
            return
        wide = pl_module.net
        self.narrow = narrow_copy(wide)
        self.state = narrow_optimizer_state(wide, copy.deepcopy(trainer.optimizers[0].state_dict()))
        self.schedule = copy.deepcopy(trainer.lr_scheduler_configs[0].scheduler.state_dict())
        groups = find_groups(wide, images(0)[0])
        migrate(trainer.optimizers, remove_units(wide, groups, mixed_plan(groups)))
        self.gradients = {
            name: None if p.grad is None else p.grad.clone() for name, p in pl_module.net.named_parameters()
        }


class Lit(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Mixed()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer, schedule = optimizer_and_schedule(self.net)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def optimizer_and_schedule(net: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, amsgrad=True)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)


@pytest.mark.parametrize(
    ("clip", "accumulate", "precision", "cut_at"),
    [
        (None, 1, "32-true", BEFORE),
        (0.1, 1, "32-true", BEFORE),
        (None, 2, "32-true", BEFORE),
        (0.1, 2, "32-true", BEFORE + 1),  # in the middle of an accumulation window
        (0.1, 2, "bf16-mixed", BEFORE + 1),
    ],
)
def test_clipping_accumulation_one_cycle_and_bf16(
    tmp_path: Any, clip: float | None, accumulate: int, precision: str, cut_at: int
) -> None:
    x, y = images(3, STEPS * 8)
    cutter, lit = CutOnce(cut_at), Lit()
    settings = {"max_epochs": 1, "gradient_clip_val": clip, "accumulate_grad_batches": accumulate}
    run = trainer(tmp_path, cutter, precision=precision, **settings)
    run.fit(lit, DataLoader(TensorDataset(x, y), batch_size=8))

    narrow = cutter.narrow.train()
    optimizer, schedule = optimizer_and_schedule(narrow)
    optimizer.load_state_dict(cutter.state)
    schedule.load_state_dict(cutter.schedule)
    for name, p in narrow.named_parameters():
        p.grad = cutter.gradients[name]
    for batch in range(cut_at, STEPS):
        at = slice(batch * 8, batch * 8 + 8)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = F.cross_entropy(narrow(x[at]), y[at])
        if batch % accumulate == 0:
            optimizer.zero_grad()  # as Lightning does: at the start of a window, not at the end of a step
        (loss / accumulate).backward()
        if (batch + 1) % accumulate == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(narrow.parameters(), clip)
            optimizer.step()
            schedule.step()

    assert same(lit.net.state_dict(), narrow.state_dict())
    assert same_optimizer_state(run.optimizers[0].state_dict(), optimizer.state_dict())


def test_gradients_in_mid_window_are_those_of_the_kept_units(tmp_path: Any) -> None:
    """The oracle above takes its gradients from the cut itself; here they are checked against a slice by hand."""
    lit, seen = Lit(), {}

    class Check(CutOnce):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == self.batch:
                seen["before"] = pl_module.net.fc1.bias.grad.clone()
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    cutter = Check(1)
    run = trainer(tmp_path, cutter, max_epochs=1, accumulate_grad_batches=2)
    run.fit(lit, DataLoader(TensorDataset(*images(3, 32)), batch_size=8))
    kept = [i for i in range(20) if i not in (0, 7, 19)]
    assert torch.equal(cutter.gradients["fc1.bias"], seen["before"][kept])


class Pair(nn.Module):
    """A generator and a critic, each with one hidden layer."""

    def __init__(self, generator: int = 10, critic: int = 12) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, generator), nn.ReLU(), nn.Linear(generator, 4))
        self.critic = nn.Sequential(nn.Linear(4, critic), nn.ReLU(), nn.Linear(critic, 1))

    def losses(self, real: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        fake = self.generator(noise)
        critic = F.softplus(self.critic(fake.detach())).mean() + F.softplus(-self.critic(real)).mean()
        return critic, F.softplus(-self.critic(fake)).mean()


def pair_optimizers(pair: Pair) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    return (
        torch.optim.Adam(pair.generator.parameters(), lr=1e-2),
        torch.optim.RMSprop(pair.critic.parameters(), lr=1e-2, momentum=0.9),
    )


class LitPair(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.pair = Pair()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        generator, critic = self.optimizers()  # type: ignore[misc]
        self.toggle_optimizer(critic)
        critic.zero_grad()
        self.manual_backward(self.pair.losses(*batch)[0])
        self.clip_gradients(critic, 0.5, "norm")
        critic.step()
        self.untoggle_optimizer(critic)
        self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward(self.pair.losses(*batch)[1])
        generator.step()
        self.untoggle_optimizer(generator)

    def configure_optimizers(self) -> Any:
        return list(pair_optimizers(self.pair)), []


def test_manual_optimisation_with_two_optimizers(tmp_path: Any) -> None:
    real, noise = torch.randn(STEPS * 8, 4), torch.randn(STEPS * 8, 3)
    keep = {"generator": [0, 2, 3, 5, 6, 7, 9], "critic": [1, 2, 3, 4, 6, 8, 10, 11]}
    start: dict[str, Any] = {}

    def cut_by_hand(state: dict, optimizer: torch.optim.Optimizer, name: str) -> dict:
        at = torch.tensor(keep[name])
        for i, entries in state["state"].items():
            axis = {0: 0, 1: 0, 2: 1}.get(i)
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.ndim and axis is not None:
                    entries[key] = value.index_select(axis, at).clone()
        return state

    class Cut(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx != BEFORE:
                return
            pair, narrow = pl_module.pair, Pair(7, 8)
            for name in ("generator", "critic"):
                at, wide, slim = torch.tensor(keep[name]), getattr(pair, name), getattr(narrow, name)
                slim[0].weight.data, slim[0].bias.data = wide[0].weight.data[at], wide[0].bias.data[at]
                slim[2].weight.data, slim[2].bias.data = wide[2].weight.data[:, at], wide[2].bias.data.clone()
            optimizers = pair_optimizers(narrow)
            for optimizer, live, name in zip(optimizers, trainer.optimizers, keep, strict=True):
                optimizer.load_state_dict(cut_by_hand(copy.deepcopy(live.state_dict()), live, name))
            start.update(narrow=narrow, optimizers=optimizers)
            for name, inputs in (("generator", noise[:2]), ("critic", real[:2])):
                network = getattr(pair, name)
                groups = find_groups(network, inputs)
                mask = torch.tensor([i in keep[name] for i in range(groups[0].size)])
                migrate(trainer.optimizers, remove_units(network, groups, Plan({groups[0].name: mask})))

    lit = LitPair()
    trainer(tmp_path, Cut(), max_epochs=1).fit(lit, DataLoader(TensorDataset(real, noise), batch_size=8))

    narrow, (generator, critic) = start["narrow"], start["optimizers"]
    for batch in range(BEFORE, STEPS):
        at = slice(batch * 8, batch * 8 + 8)
        critic.zero_grad()
        narrow.losses(real[at], noise[at])[0].backward()
        torch.nn.utils.clip_grad_norm_(narrow.critic.parameters(), 0.5)
        critic.step()
        generator.zero_grad()
        loss = narrow.losses(real[at], noise[at])[1]
        gradients = torch.autograd.grad(loss, list(narrow.generator.parameters()))
        for p, gradient in zip(narrow.generator.parameters(), gradients, strict=True):
            p.grad = gradient
        generator.step()
    assert same(lit.pair.state_dict(), narrow.state_dict())
