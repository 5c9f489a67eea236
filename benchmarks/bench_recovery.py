"""How many steps should lie between two cuts: accuracy on digits where epochs are one batch, means of 5 seeds."""

from __future__ import annotations

import logging
import statistics
import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_slim import MACs, Magnitude, Prune

SEEDS, TRAINED = 5, 1200


class Digits(pl.LightningModule):
    """A perceptron with two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-3)


def run(x: Tensor, y: Tensor, steps: int, epochs: int, seed: int) -> tuple[float, int]:
    """Accuracy on what was not trained on, and the number of cuts."""
    torch.manual_seed(seed)
    module = Digits()
    callback = Prune(Magnitude(), MACs(0.15), recovery_steps=steps, print_report=False)
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger"), False)
    fit = pl.Trainer(max_epochs=epochs, limit_train_batches=1, accelerator="cpu", callbacks=[callback], **quiet)
    fit.fit(module, DataLoader(TensorDataset(x[:TRAINED], y[:TRAINED]), 64, shuffle=True))
    with torch.no_grad():
        right = module.net(x[TRAINED:]).argmax(1) == y[TRAINED:]
    return float(right.float().mean()), len(callback.history.events)


def main() -> None:
    """Prints a table."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    for epochs, between in ((60, (1, 2, 4, 8, 16)), (200, (1, 4, 8, 16, 40)), (1000, (4, 25, 50, 100))):
        for steps in between:
            runs = [run(x, y, steps, epochs, seed) for seed in range(SEEDS)]
            accuracies = [accuracy for accuracy, _ in runs]
            error = statistics.stdev(accuracies) / SEEDS**0.5
            print(
                f"{epochs:4d} epochs, {steps:2d} steps between cuts: {statistics.mean(accuracies):.3f} +- {error:.3f}, "
                f"{runs[0][1]} cuts"
            )


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    main()
