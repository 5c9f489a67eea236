"""Handwritten digits read as sequences: the network and the data of the demo.

The images are scikit-learn's 1,797 real scans of 8 x 8 pixels. They are read pixel by pixel, as 64 steps of one value.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class DigitSequences(LightningDataModule):
    """Training, validation and test digits in a fixed shuffle (1,197 / 300 / 300)."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits

        images, digits = load_digits(return_X_y=True)
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        series = (torch.tensor(images, dtype=torch.float32) / 16)[order].unsqueeze(1)
        labels = torch.tensor(digits)[order]
        self.train, self.val, self.test = (
            TensorDataset(*parts)
            for parts in zip(series.split([1197, 300, 300]), labels.split([1197, 300, 300]), strict=True)
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, 300)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, 300)


class SequenceClassifier(LightningModule):
    """Dilated causal convolutions over time, and a linear readout of their mean."""

    def __init__(self, channels: int = 64, layers: int = 5, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        widths = [1] + [channels] * layers
        self.net = nn.Sequential()
        for i in range(layers):
            dilation = 2**i
            self.net.extend(
                [
                    nn.ConstantPad1d((2 * dilation, 0), 0.0),
                    nn.Conv1d(widths[i], widths[i + 1], kernel_size=3, dilation=dilation, bias=False),
                    nn.BatchNorm1d(widths[i + 1]),
                    nn.ReLU(),
                ]
            )
        self.net.extend([nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, 10)])

    def forward(self, series: Tensor) -> Tensor:
        return self.net(series)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        logits = self(batch[0])
        self.log(f"{stage}_loss", F.cross_entropy(logits, batch[1]))
        self.log(f"{stage}_acc", (logits.argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
