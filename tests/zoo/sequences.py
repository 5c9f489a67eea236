"""Networks for series and text: causal convolutions and recurrent layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_slim.surgery import Example
from tests.zoo.blocks import Builder, conv_norm, image


class TemporalBlock(nn.Module):
    """Two causal convolutions: padded on both sides, then chomped by a slice (Bai et al., 2018)."""

    def __init__(self, inputs: int, outputs: int, dilation: int, normed: bool) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.conv1, self.conv2 = (
            nn.Conv1d(n, outputs, 3, padding=self.padding, dilation=dilation) for n in (inputs, outputs)
        )
        if normed:
            self.conv1, self.conv2 = weight_norm(self.conv1), weight_norm(self.conv2)
        self.drop = nn.Dropout(0.1)
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(F.relu(self.conv1(x)[:, :, : -self.padding].contiguous()))
        h = self.drop(F.relu(self.conv2(h)[:, :, : -self.padding].contiguous()))
        return F.relu(h + self.shortcut(x))


class TCN(nn.Module):
    """Temporal blocks of growing dilation, read at the last step."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        shapes = [(3, 8), (8, 8), (8, 12)]
        self.blocks = nn.Sequential(*[TemporalBlock(a, b, 2**i, normed) for i, (a, b) in enumerate(shapes)])
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, :, -1])


class WaveNet(nn.Module):
    """Gated dilated convolutions with residual and skip sums (van den Oord et al., 2016)."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.input = nn.Conv1d(1, 8, 1)
        self.gated = nn.ModuleList([nn.Conv1d(8, 24, 2, dilation=2**i) for i in range(layers)])
        self.residual = nn.ModuleList([nn.Conv1d(12, 8, 1) for _ in range(layers)])
        self.skip = nn.ModuleList([nn.Conv1d(12, 10, 1) for _ in range(layers)])
        self.output = nn.Sequential(nn.ReLU(), nn.Conv1d(10, 10, 1), nn.ReLU(), nn.Conv1d(10, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.input(x), []
        for i, (gated, residual, skip) in enumerate(zip(self.gated, self.residual, self.skip, strict=True)):
            value, gate = gated(F.pad(x, (2**i, 0))).chunk(2, 1)
            h = torch.tanh(value) * torch.sigmoid(gate)
            x = x + residual(h)
            skips.append(skip(h))
        return self.output(torch.stack(skips).sum(0))


class CRNN(nn.Module):
    """Convolutions, columns as steps, a GRU in both directions (Shi et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_norm(1, 8), nn.MaxPool2d(2), conv_norm(8, 12), nn.MaxPool2d((2, 1)))
        self.recurrent, self.head = nn.GRU(48, 10, bidirectional=True, batch_first=True), nn.Linear(20, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1, 2).transpose(1, 2)
        return self.head(self.recurrent(x)[0]).log_softmax(-1)


class Classifier(nn.Module):
    """Two LSTM layers; the last hidden state is read."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(5, 12, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.recurrent(x)
        return self.head(hidden[-1])


class Tagger(nn.Module):
    """Embedding, an LSTM in both directions, a tag for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 10), nn.Linear(24, 7)
        self.recurrent = nn.LSTM(10, 12, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(x))[0])


class Forecaster(nn.Module):
    """A GRU whose last step is read by one linear layer for the horizon."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(4, 16, batch_first=True), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class LanguageModel(nn.Module):
    """Embedding, two LSTM layers, a decoder that may be tied to the embedding."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(40, 12), nn.Dropout(0.1)
        self.recurrent = nn.LSTM(12, 12, num_layers=2, batch_first=True)
        self.decoder = nn.Linear(12, 40)
        self.decoder.weight = self.embed.weight if tied else self.decoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.drop(self.recurrent(self.drop(self.embed(x)))[0]))


def words() -> Example:
    """Two sentences of nine tokens."""
    return Example((torch.randint(0, 40, (2, 9)),))


SEQUENCES: dict[str, Builder] = {
    "TCN": lambda: (TCN(normed=False), Example((torch.randn(2, 3, 20),))),
    "TCN, weight norm": lambda: (TCN(normed=True), Example((torch.randn(2, 3, 20),))),
    "WaveNet": lambda: (WaveNet(), Example((torch.randn(2, 1, 24),))),
    "CRNN": lambda: (CRNN(), image(1, 16)),
    "LSTM classifier": lambda: (Classifier(), Example((torch.randn(2, 9, 5),))),
    "LSTM tagger, both directions": lambda: (Tagger(), words()),
    "GRU forecaster": lambda: (Forecaster(), Example((torch.randn(2, 9, 4),))),
    "LSTM language model": lambda: (LanguageModel(tied=False), words()),
    "LSTM language model, tied": lambda: (LanguageModel(tied=True), words()),
}
