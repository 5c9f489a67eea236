"""What recording costs a training step, and what `GrangerPrune` costs whole runs, by CPU time of one thread.

    python benchmarks/bench_overhead.py --only steps
    python benchmarks/bench_overhead.py --only runs

*Steps* that are recorded and steps that are not take turns; medians. One step in ten is recorded (the default of the
callbacks), so a tenth of the difference counts.

*Runs* are fits with all defaults. What is ours is told apart by the clock: preparing (once), the report (once), and
everything else, which is recording, scoring, cutting and logging. The two runs of other packages are left out where
these are not installed (`pip install neuralforecast segmentation-models-pytorch`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).absolute().parent.parent))

from examples.digits import DigitSequences, SequenceClassifier
from lightning_slim import Granger, GrangerPrune, MACs, OneShot, Pruner, Score, Screening, Taylor
from lightning_slim.callbacks import gathering, telling
from lightning_slim.profile import one_thread, time_side_by_side
from lightning_slim.recording import hooks

EVERY = 10  # steps


def convolutional() -> nn.Module:
    layers: list[nn.Module] = []
    widths = [3, 32, 64, 64, 128]
    for a, b in pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.two, self.norm2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        self.short = nn.Conv2d(a, b, 1, stride, bias=False) if a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.two(F.relu(self.norm1(self.one(x))))) + self.short(x))


def resnet20() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    widths = [16, *[16] * 3, *[32] * 3, *[64] * 3]
    layers += [Residual(a, b, 2 if a < b else 1) for a, b in pairwise(widths)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Recurrent(nn.Module):
    """Two levels of 256 units over 32 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(16, 256, 2, batch_first=True), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "demo (Conv1d, 128 channels)": (lambda: SequenceClassifier(128).net, lambda: torch.rand(64, 1, 64)),
    "Conv2d, 32 to 128 channels": (convolutional, lambda: torch.rand(32, 3, 32, 32)),
    "ResNet-20, 32 x 32, batch 32": (resnet20, lambda: torch.rand(32, 3, 32, 32)),
    "GRU, 2 x 256, 32 steps, batch 64": (Recurrent, lambda: torch.rand(64, 32, 16)),
    "MLP, 784-1024-1024-10": (
        lambda: nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
        lambda: torch.rand(128, 784),
    ),
}


def training_step(network: nn.Module, x: Tensor, y: Tensor, pruner: Pruner | None) -> Callable[[], None]:
    """One training step; with a pruner, it is recorded."""
    optimizer = torch.optim.AdamW(network.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with pruner.recording() if pruner is not None else nullcontext():
            F.cross_entropy(network(x), y).backward()
        if pruner is not None:
            pruner.recorder.hear(labels=y)
            if pruner.score.needs_gradients:
                pruner.recorder.observe_gradients()
        optimizer.step()

    return step


def overhead(name: str, score: Score, seconds: float) -> float:
    """Time of a training step with a recorder that looks at one in ten, over the time without."""
    make, data = NETWORKS[name]
    x, y = data(), torch.randint(0, 10, (len(data()),))
    plain = make()
    watched = copy.deepcopy(plain)
    pruner = Pruner(watched, score, MACs(0.5), OneShot(0.5))
    pruner.prepare(x[:2])
    steps = [training_step(plain, x, y, None), training_step(watched, x, y, pruner)]
    without, recorded = time_side_by_side(steps, seconds=seconds, rounds=200)
    return 1 + (recorded / without - 1) / EVERY


class Supervised(LightningModule):
    """Any network, trained to classify."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.net = network

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.binary_cross_entropy_with_logits if batch[1].is_floating_point() else F.cross_entropy
        return loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def trains(network: Callable[[], nn.Module], x: Tensor, y: Tensor, batch: int) -> Callable[[list[Callback]], None]:
    """A fit of five epochs."""

    def fit(callbacks: list[Callback]) -> None:
        torch.manual_seed(0)
        settings: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
        run = Trainer(max_epochs=5, accelerator="cpu", callbacks=callbacks, enable_progress_bar=False, **settings)
        run.fit(Supervised(network()), DataLoader(TensorDataset(x, y), batch))

    return fit


def forecasts(steps: int) -> Callable[[list[Callback]], None]:
    """NHITS of neuralforecast on the passengers of airlines that come with it, an epoch a batch."""

    def fit(callbacks: list[Callback]) -> None:
        from neuralforecast import NeuralForecast
        from neuralforecast.models import NHITS
        from neuralforecast.utils import AirPassengersDF

        settings: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
        sizes = {"h": 12, "input_size": 24, "batch_size": 8, "windows_batch_size": 32, "mlp_units": 3 * [[64, 64]]}
        run = {"max_steps": steps, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
        NeuralForecast([NHITS(callbacks=callbacks or None, **sizes, **run, **settings)], freq="ME").fit(AirPassengersDF)

    return fit


def segments() -> Callable[[list[Callback]], None]:
    """The U-Net of segmentation_models_pytorch, on 64 x 64 pixels."""

    def network() -> nn.Module:
        from segmentation_models_pytorch import Unet

        return Unet("resnet18", encoder_weights=None, classes=1)

    return trains(network, torch.rand(160, 3, 64, 64), (torch.rand(160, 1, 64, 64) > 0.5).float(), 8)


def runs() -> dict[str, Callable[[list[Callback]], None]]:
    """All that can be run here."""
    digits = DigitSequences()
    digits.setup("fit")
    sequences = [torch.cat(part) for part in zip(*digits.train_dataloader(), strict=True)]
    mlp = NETWORKS["MLP, 784-1024-1024-10"][0]
    found = {
        "demo (Conv1d, 128 channels)": trains(lambda: SequenceClassifier(128).net, *sequences, 64),
        "MLP, 784-1024-1024-10, 60,000 samples": trains(
            mlp, torch.rand(60000, 784), torch.randint(0, 10, (60000,)), 128
        ),
    }
    if find_spec("neuralforecast"):
        found |= {f"NHITS of neuralforecast, {steps} steps": forecasts(steps) for steps in (60, 1000)}
    if find_spec("segmentation_models_pytorch"):
        found["U-Net of segmentation_models_pytorch"] = segments()
    return found


class Accounts:
    """CPU time that functions take, without what those take that they call and that are booked, too."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inner = [0.0]

    def booked(self, account: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.process_time() - start
                self.seconds[account] += whole - self._inner.pop()
                self._inner[-1] += whole

        return timed

    @contextmanager
    def of_ours(self) -> Iterator[None]:
        """Books all that a callback of ours does."""
        overridden = [name for name in dir(GrangerPrune) if name in dir(Callback) and not name.startswith("_")]
        functions = [("rest", GrangerPrune, name) for name in overridden if callable(getattr(GrangerPrune, name))]
        functions += [("rest", kind, "__call__") for kind in (hooks.Watch, hooks.WatchRecurrent)]
        functions += [("prepare", owner, name) for owner, name in ((Pruner, "prepare"), (gathering, "looked_at"))]
        functions += [("report", telling, "report")]
        with ExitStack() as stack:
            for account, owner, name in functions:
                stack.enter_context(patch.object(owner, name, self.booked(account, getattr(owner, name))))
            yield


def cost(fit: Callable[[list[Callback]], None]) -> Sequence[float]:
    """Seconds without, and with; of these preparing, the report, and everything else that is ours; and ten steps."""
    accounts, steps = Accounts(), [0]

    class Count(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            steps[0] += 1

    start = time.process_time()
    fit([Count()])
    without = time.process_time() - start
    with accounts.of_ours():
        start = time.process_time()
        fit([GrangerPrune()])
        whole = time.process_time() - start
    return without, whole, *(accounts.seconds[name] for name in ("prepare", "report", "rest")), 10 * without / steps[0]


def print_steps(seconds: float) -> None:
    print(f"{'training step with the recorder / without':44s} Granger  Taylor  Screening")
    for name in NETWORKS:
        ratios = [overhead(name, score, seconds) for score in (Granger(), Taylor(), Screening())]
        print(f"{name:44s} {ratios[0]:7.3f} {ratios[1]:7.3f} {ratios[2]:10.3f}", flush=True)


def print_runs(named: str) -> None:
    print(f"{'whole runs, seconds':44s} without   with  prepare (ten steps)  report   rest  rest / run")
    for name, fit in ((name, fit) for name, fit in runs().items() if named in name):
        without, whole, prepare, report, rest, ten = cost(fit)
        print(
            f"{name:44s} {without:7.1f} {whole:6.1f} {prepare:8.2f} ({ten:9.2f}) {report:7.2f} {rest:6.2f} "
            f"{rest / (whole - prepare - report):10.1%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each ratio of steps")
    parser.add_argument("--only", choices=["steps", "runs"], help="one of both tables")
    parser.add_argument("--run", default="", help="part of the name of the runs to do")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.only != "runs":
        print_steps(args.seconds)
    if args.only != "steps":
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "pytorch_lightning"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with one_thread(), tempfile.TemporaryDirectory() as folder:  # where reports are written
            os.chdir(folder)
            print_runs(args.run)


if __name__ == "__main__":
    main()
