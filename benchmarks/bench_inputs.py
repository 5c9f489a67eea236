"""Which inputs are kept, and what that is worth.

    python benchmarks/bench_inputs.py [--seeds 5]

Planted series: a GRU forecasts one step ahead from 40 inputs (8 causes, 8 echoes of the target, 8 copies of the causes,
16 noise) and the target itself. Digits: a perceptron sees 64 pixels beside 128 noise inputs. Test losses at the end: of
all inputs, of those that are chosen after the first epoch, and of a run that had only the true ones. Then the choice
alone, without training: of planted series, and where nothing is to be found.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_slim import InputScreening
from lightning_slim.input_evidence import Choice, InputEvidence, InputTest, choose
from tests.callbacks.screened import Fit, Recurrent
from tests.statistics.worlds import auc, null_world, planted_inputs


def series(seed: int) -> tuple[TensorDataset, TensorDataset, dict[str, list[int]]]:
    torch.manual_seed(seed)
    x, y, roles = planted_inputs(768, 40)
    x = torch.cat([x, y], -1)[:, :-1].float()
    data = [TensorDataset(x[at], y[at, 1:, 0].float()) for at in (slice(256), slice(256, None))]
    return data[0], data[1], {**{name: [*range(40)[at]] for name, at in roles.items()}, "own past": [40]}


def digits(seed: int, train: int) -> tuple[TensorDataset, TensorDataset, dict[str, list[int]]]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    pixels = torch.tensor(images, dtype=torch.float32)[order] / 16
    x = torch.cat([pixels, torch.randn(len(pixels), 128, generator=generator)], 1)
    y = torch.tensor(labels)[order]
    moving = (pixels[:train].std(0) > 0.05).nonzero().flatten().tolist()
    data = [TensorDataset(x[at], y[at]) for at in (slice(train), slice(1200, None))]
    return data[0], data[1], {"pixel": moving, "noise": [*range(64, 192)]}


def perceptron(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 10))


def only(data: TensorDataset, at: list[int]) -> TensorDataset:
    x, y = data.tensors
    return TensorDataset(x[..., at], y)


def run(network, train: TensorDataset, test: TensorDataset, seed: int, epochs: int, *callbacks) -> Tensor:
    seed_everything(seed, verbose=False)
    lit = Fit(network)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(lit, DataLoader(train, 32, shuffle=True))
    (metrics,) = trainer.test(lit, DataLoader(test, 512), verbose=False)
    return metrics["test_loss"]


def chosen(x: Tensor, y: Tensor, batch: int, test: str = "granger") -> tuple[InputTest, Choice]:
    evidence = InputEvidence(test, x.ndim - 1, lags=2, overlap=1.0)
    for part in zip(x.split(batch), y.split(batch), strict=True):
        evidence.update(*part)
    return evidence.result(), choose(evidence.result(), 0.05, 1, torch.zeros(x.shape[-1]).bool(), [])


def without_training() -> None:
    for items in (128, 256):
        shares, areas, false = [], [], []
        for seed in range(20):
            torch.manual_seed(seed)
            x, y, roles = planted_inputs(items, 40)
            test, choice = chosen(x[:, :-1], y[:, 1:, 0], 32)
            useful = torch.zeros(40).bool()
            useful[roles["causal"]] = useful[roles["copy"]] = True
            shares.append(torch.stack([choice.keep[at].double().mean() for at in roles.values()]))
            areas.append(auc(test.effect, useful))
            false.append(float(choice.keep[~useful].sum() / choice.keep.sum()))
        kept = "  ".join(f"{r} {s:.1%}" for r, s in zip(roles, torch.stack(shares).mean(0).tolist(), strict=True))
        print(f"{items} items: {kept}  AUC {sum(areas) / 20:.3f}  false {sum(false) / 20:.1%}")
    for kind in ("independent", "echo", "feedback", "profile"):
        found = 0
        for seed in range(100):
            torch.manual_seed(1000 + seed)
            x, y = null_world(kind, 128, 33, 20)
            found += chosen(x[:, :-1], y[:, 1:], 32)[1].significant > 0
        print(f"nothing to find, {kind}: something in {found} of 100 runs")
    found = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(1000, 50, generator=generator), torch.randint(0, 10, (1000,), generator=generator)
        found += chosen(x, y, 100, "anova")[1].significant > 0
    print(f"nothing to find, random classes: something in {found} of 200 runs")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    warnings.filterwarnings("ignore")
    worlds = {
        "series": (series, Recurrent, 20, ("causal", "copy", "own past")),
        "digits, 300": (lambda seed: digits(seed, 300), perceptron, 20, ("pixel",)),
        "digits, 1200": (lambda seed: digits(seed, 1200), perceptron, 20, ("pixel",)),
    }
    for name, (make, network, epochs, true) in worlds.items():
        losses, kept = [], []
        for seed in seeds:
            train, test, roles = make(seed)
            width = train.tensors[0].shape[-1]
            right = sorted(i for role in true for i in roles[role])
            screening = InputScreening(print_report=False)
            runs = [(width, [*range(width)], []), (width, [*range(width)], [screening]), (len(right), right, [])]
            losses.append([
                run(partial(network, inputs), only(train, at), only(test, at), seed, epochs, *callbacks)
                for inputs, at, callbacks in runs
            ])  # fmt: skip
            stays = {int(i) for i in screening.event.kept}
            kept.append([len(stays & set(at)) / len(at) for at in roles.values()])
        mean, sd = torch.tensor(losses).mean(0), torch.tensor(losses).std(0)
        shares = dict(zip(roles, torch.tensor(kept).mean(0).tolist(), strict=True))
        print(f"{name}: test loss", *(f"{label} {m:.3f} ± {s:.3f}" for label, m, s in zip(
            ("all inputs", "screened", "true inputs"), mean.tolist(), sd.tolist(), strict=True)), sep="  ")  # fmt: skip
        print("   kept:", "  ".join(f"{role} {share:.1%}" for role, share in shares.items()))
    without_training()


if __name__ == "__main__":
    main()
