"""Whatever is raised at whatever line of a cut, or of the trials before it: nothing is left half done."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slim import Granger, Magnitude, OneShot, Prune, Pruner, Units, WeightPrune
from lightning_slim.callbacks.companions import copies
from lightning_slim.surgery import StructureChange
from lightning_slim.transaction import all_or_nothing
from tests.callbacks.runs import Lit, loader, trainer
from tests.interrupts import Lines, Tally, differences, spread, state_of
from tests.zoo.test_zoo import build, call, train

NETWORKS = {
    "ResNet-18": "both",
    "U-Net": "units",
    "LSTM classifier": "units",
    "GRU forecaster": "units",
    "GPT, tied": "units",
    "TCN, weight norm": "units",
    "ViT, MultiheadAttention": "units",
    "MLP, batch norm": "units",
    "tabular": "units",
}
FEW, MANY = 4, 120  # injections of each network


def ready_to_cut(name: str) -> tuple[nn.Module, list[torch.optim.Optimizer], Pruner]:
    network, example = build(name)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(network.parameters())]
    for _ in range(2):
        train(network, optimizers[0], example)
    pruner = Pruner(network, Granger(), Units(0.5), OneShot(0.5), granularity=NETWORKS[name])  # type: ignore[arg-type]
    pruner.prepare(example)
    with pruner.recording():
        network(*example.args, **example.kwargs)
    return network, optimizers, pruner


def state(made: tuple[nn.Module, list[torch.optim.Optimizer], Pruner]) -> dict[str, Any]:
    network, optimizers, pruner = made
    return {**state_of(network, optimizers), "books": pruner.state_dict(), "in step": pruner.in_step}


def interrupt_cuts(name: str, number: int) -> Tally:
    pristine = ready_to_cut(name)
    once, lines = copy.deepcopy(pristine), Lines()
    before = state(once)
    with lines.watching():
        assert once[2].step(0.5, once[1]) is not None
    after, tally = state(once), Tally()
    current = copy.deepcopy(pristine)
    for line in spread(lines.count, number):
        with tally.injected(line):
            current[2].step(0.5, current[1])
        now = state(current)
        if (half := differences(before, now)) and (half := differences(after, now)):
            tally.harmed.append(f"{tally.where}: {half[:3]}")
        if differences(before, now):
            current = copy.deepcopy(pristine)
    return tally


def interrupt_preparing(name: str, number: int) -> Tally:
    network, example = build(name)
    lines, before, tally = Lines(), state_of(network, []), Tally()
    with lines.watching():
        Pruner(network, Magnitude(), Units(0.5), OneShot(0.5)).prepare(example)
    for line in spread(lines.count, number):
        pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5))
        with tally.injected(line):
            pruner.prepare(example)
        if half := differences(before, state_of(network, [])):
            tally.harmed.append(f"{tally.where}: {half[:3]}")
    return tally


class Zoo(pl.LightningModule):
    """A network of the zoo, trained as its tests do."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net, self.example = build(name)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.stack([output.square().mean() for output in call(self.net, self.example)]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Run:
    """A fit of three epochs of four steps, in whose middle a cut is made, with all that follows it.

    Args:
        name: of the network.
        cut: is called in the place of the callback's cut, which it is handed, with this run.
    """

    def __init__(self, name: str, cut: Callable[[Run, Callable[[], Any]], Any]) -> None:
        granularity: Any = NETWORKS[name]
        self.lit, self.averaging = Zoo(name), EMAWeightAveraging(decay=0.9)
        self.prune = Prune(
            *(Granger(), Units(0.5), OneShot(0.5)),
            **{"granularity": granularity, "record_every_n_steps": 1, "print_report": False},
        )
        self.beside = [self.prune, self.averaging, ModelCheckpoint(save_last=False)]
        if "weight norm" not in name:  # of such weights there are no masks
            self.beside.append(WeightPrune(0.3, schedule=OneShot(0.1), update_every=0.5))
        self.stands = False
        true = self.prune._cut
        self.prune._cut = lambda *args, **kwargs: cut(self, lambda: true(*args, **kwargs))  # type: ignore[method-assign]

    def fit(self, folder: Path) -> None:
        data = DataLoader(TensorDataset(torch.zeros(4, 1)), batch_size=1)
        self.trainer = trainer(folder, *self.beside, max_epochs=3)
        self.trainer.fit(self.lit, data)

    @property
    def early(self) -> bool:
        """Whether nothing is to be cut yet, or no more."""
        return self.stands or self.trainer.global_step < 6

    def state(self) -> dict[str, Any]:
        ours = {callback.state_key: callback.state_dict() for callback in self.beside}
        averages = copies(self.trainer)
        average = {str(i): average.state_dict() for i, average in enumerate(averages)}
        return copy.deepcopy({**state_of(self.lit, self.trainer.optimizers), **ours, "average": average})


def interrupt_callbacks(name: str, number: int) -> Tally:
    """Injections follow one another in one fit, as long as they leave it as it was."""
    lines, tally, whole = Lines(), Tally(), list[dict[str, Any]]()

    def undisturbed(run: Run, cut: Callable[[], Any]) -> Any:
        if run.early:
            return None
        with lines.watching():
            event = cut()
        whole.append(run.state())
        return event

    def disturbed(run: Run, cut: Callable[[], Any]) -> Any:
        while left and not run.early:
            before = run.state()
            with tally.injected(left.pop(0)):
                cut()
            if differences(before, run.state()):  # it stands
                if half := differences(whole[0], run.state()):
                    tally.harmed.append(f"{tally.where}: {half[:3]}")
                run.stands = True
                break

    with tempfile.TemporaryDirectory() as folder:
        Run(name, undisturbed).fit(Path(folder))
        left = spread(lines.count, number)
        while left:
            Run(name, disturbed).fit(Path(folder))
    return tally


NUMBERS = [FEW, pytest.param(MANY, marks=pytest.mark.slow)]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("interrupt", [interrupt_cuts, interrupt_preparing, interrupt_callbacks])
def test_an_interrupt_leaves_nothing_half_done(interrupt: Callable[[str, int], Tally], name: str, number: int) -> None:
    tally = interrupt(name, number)
    print(f"{name}: {tally}")  # noqa: T201 - shown by `pytest -rP`: the count is the result
    assert tally.harmed == []


def test_within_another_one_the_outer_one_puts_back() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()

    def change() -> None:
        with all_or_nothing(layer):
            with all_or_nothing(layer), torch.no_grad():
                layer.weight.zero_()
            assert not layer.weight.any()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change()
    assert torch.equal(layer.weight, before)


class Listener(Callback):
    """A user's callback that hears of cuts, and may fail then."""

    def __init__(self, error: type[BaseException] | None = None) -> None:
        self.error, self.heard = error, 0

    def on_structure_change(self, change: StructureChange) -> None:
        self.heard += 1
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_all_hear_of_a_cut_though_one_of_them_fails(tmp_path: Path, error: type[BaseException]) -> None:
    first, last = Listener(error), Listener()
    prune = Prune(Magnitude(), Units(0.5), schedule=OneShot(0.3), print_report=False)
    mask = WeightPrune(0.3, schedule=OneShot(0.1))
    lit = Lit()
    with pytest.raises((error, SystemExit)):
        trainer(tmp_path, first, prune, mask, last).fit(lit, loader())
    assert (first.heard, last.heard) == (1, 1)
    assert prune.pruner.in_step
    assert mask.masker.in_step
    assert len(prune.history.events) == 1
