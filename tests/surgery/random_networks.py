"""Networks that nobody thought of: random programs of layers, functions and bare parameters, on sequences."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS, FEATURES, WORDS = 5, 4, 11
WIDTHS = (6, 8, 12)


class Program(nn.Module):
    """Values of shape (items, steps, width), each made of earlier ones by an operation that is drawn.

    Args:
        seed: of what is drawn.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.layers = nn.ModuleDict()
        self.steps: list[Callable[[dict[int, Tensor]], Tensor]] = []
        self.told: list[str] = []
        first = self._width()
        self.two = self.draw.random() < 0.3
        self.embed = nn.Embedding(WORDS, first)
        self.enter = nn.Linear(FEATURES, first)
        self.widths = {0: first}
        for _ in range(self.draw.randint(2, 7)):
            self._extend()
        last = self.widths[len(self.widths) - 1]
        self.head = nn.Sequential(nn.Linear(last, self._width()), nn.ReLU())
        self.out = nn.Linear(self.head[0].out_features, 3)
        self.form = self.draw.choice(["tensor", "tensor", "tuple", "dict", "two heads"])
        self.aux = nn.Linear(last, 2) if self.form == "two heads" else None

    def forward(self, x: Tensor, words: Tensor | None = None) -> Any:
        values = {0: self.enter(x) if words is None else self.enter(x) + self.embed(words)}
        for number, step in enumerate(self.steps):
            values[number + 1] = step(values)
        last = values[len(self.steps)]
        logits = self.out(self.head(last.mean(1)))
        if self.form == "tuple":
            return logits, last.detach().square().mean(-1)
        if self.form == "dict":
            return {"logits": logits, "features": {"last": last}}
        return (logits, self.aux(last)) if self.aux is not None else logits

    def inputs(self) -> tuple[Tensor, ...]:
        """One call."""
        x = torch.randn(3, STEPS, FEATURES)
        return (x, torch.randint(WORDS, (3, STEPS))) if self.two else (x,)

    # --- what is drawn ---

    def _width(self) -> int:
        return self.draw.choice(WIDTHS)

    def _layer(self, layer: nn.Module) -> nn.Module:
        self.layers[f"n{len(self.layers)}"] = layer
        return layer

    def _vector(self, width: int, buffer: bool = False) -> str:
        name = f"v{len(self.told)}_{len(self._parameters) + len(self._buffers)}"
        value = 1 + 0.3 * torch.randn(width)
        if buffer:
            self.register_buffer(name, value)
        else:
            self.register_parameter(name, nn.Parameter(value))
        return name

    def _extend(self) -> None:
        at = self.draw.choice(list(self.widths)[-3:])
        width = self.widths[at]
        name = self.draw.choice(OPERATIONS)
        made = getattr(self, f"_{name}")(at, width)
        if made is None:  # there is nothing that it fits
            name, made = "linear", self._linear(at, width)
        step, new = made
        self.told.append(f"{name}({at})")
        self.steps.append(step)
        self.widths[len(self.widths)] = new

    def _linear(self, at: int, width: int) -> Any:
        layer, new = nn.Linear(width, n := self._width(), bias=self.draw.random() < 0.7), n
        act = self.draw.choice([F.relu, F.gelu, torch.tanh, F.silu, lambda x: F.leaky_relu(x, 0.1)])
        self._layer(layer)
        return lambda v: act(layer(v[at])), new

    def _nested(self, at: int, width: int) -> Any:
        new, inner = self._width(), self._width()
        layer = nn.Sequential(
            nn.Linear(width, inner), nn.Sequential(nn.PReLU(inner), nn.Dropout(0.1)), nn.Linear(inner, new)
        )
        self._layer(layer)
        return (lambda v: layer(v[at].transpose(1, 2).transpose(1, 2).flatten(0, 1)).unflatten(0, v[at].shape[:2])), new

    def _shared(self, at: int, width: int) -> Any:
        fitting = [m for m in self.layers.values() if isinstance(m, nn.Linear) and m.in_features == width]
        if not fitting:
            return None
        layer = self.draw.choice(fitting)
        return lambda v: layer(v[at]), layer.out_features

    def _residual(self, at: int, width: int) -> Any:
        norm = self.draw.choice(
            [nn.LayerNorm(width), nn.LayerNorm(width, bias=False), nn.RMSNorm(width), nn.Identity()]
        )
        layer = nn.ModuleList([norm, nn.Linear(width, 2 * width), nn.Linear(2 * width, width)])
        self._layer(layer)
        return lambda v: v[at] + layer[2](F.gelu(layer[1](layer[0](v[at])))), width

    def _bare(self, at: int, width: int) -> Any:
        new = self._width()
        name = f"w{len(self.told)}"
        self.register_parameter(name, nn.Parameter(torch.randn(width, new) / width**0.5))
        if self.draw.random() < 0.5:
            return lambda v: v[at] @ getattr(self, name), new
        return lambda v: torch.einsum("ntc,cd->ntd", v[at], getattr(self, name)), new

    def _scale(self, at: int, width: int) -> Any:
        name, other = self._vector(width), self._vector(width, buffer=True)
        return lambda v: torch.addcmul(getattr(self, other), v[at], getattr(self, name)), width

    def _hand_norm(self, at: int, width: int) -> Any:
        kind = self.draw.choice(["l2", "rms", "standard", "softmax"])
        name = self._vector(width)

        def run(v: dict[int, Tensor]) -> Tensor:
            x = v[at]
            if kind == "l2":
                return F.normalize(x, dim=-1) * getattr(self, name)
            if kind == "rms":
                return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * getattr(self, name)
            if kind == "standard":
                return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3)
            return x.softmax(-1)

        return run, width

    def _batch_norm(self, at: int, width: int) -> Any:
        layer = self._layer(
            self.draw.choice([nn.BatchNorm1d(width), nn.InstanceNorm1d(width, affine=True), nn.GroupNorm(1, width)])
        )
        return lambda v: layer(v[at].transpose(1, 2)).transpose(1, 2), width

    def _add(self, at: int, width: int) -> Any:
        others = [k for k, w in self.widths.items() if w == width and k != at]
        if not others:
            return None
        other = self.draw.choice(others)
        how = self.draw.choice([torch.add, torch.mul, torch.maximum, lambda a, b: torch.stack([a, b]).sum(0)])
        return lambda v: how(v[at], v[other]), width

    def _gate(self, at: int, width: int) -> Any:
        a, b = self._layer(nn.Linear(width, n := self._width())), self._layer(nn.Linear(width, n))
        return lambda v: torch.tanh(a(v[at])) * torch.sigmoid(b(v[at])), n

    def _glu(self, at: int, width: int) -> Any:
        layer = self._layer(nn.Linear(width, 2 * (n := self._width())))
        return lambda v: F.glu(layer(v[at]), -1), n

    def _cat(self, at: int, width: int) -> Any:
        other = self.draw.choice(list(self.widths))
        return lambda v: torch.cat([v[at], torch.relu(v[other])], -1), width + self.widths[other]

    def _halves(self, at: int, width: int) -> Any:
        layer = self._layer(nn.Linear(width, 2 * (n := self._width())))

        def run(v: dict[int, Tensor]) -> Tensor:
            a, b = layer(v[at]).chunk(2, -1)
            return torch.relu(a) * b

        return run, n

    def _conv(self, at: int, width: int) -> Any:
        new, k = self._width(), self.draw.choice([1, 3])
        layer = self._layer(nn.Conv1d(width, new, k, padding=k // 2, groups=2 if self.draw.random() < 0.3 else 1))
        return lambda v: torch.relu(layer(v[at].transpose(1, 2))).transpose(1, 2), new

    def _depthwise(self, at: int, width: int) -> Any:
        layer = self._layer(nn.Conv1d(width, width, 3, padding=2, dilation=2, groups=width))
        return lambda v: layer(v[at].permute(0, 2, 1)).permute(0, 2, 1), width

    def _attention(self, at: int, width: int) -> Any:
        heads = self.draw.choice([1, 2, 3])
        queries, keys, contents = (self._layer(nn.Linear(width, 4 * heads)) for _ in range(3))
        o = self._layer(nn.Linear(4 * heads, width))

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        def run(v: dict[int, Tensor]) -> Tensor:
            a, b, c = split(queries(v[at])), split(keys(v[at])), split(contents(v[at]))
            mixed = ((a @ b.transpose(-1, -2)) * 0.5).softmax(-1) @ c
            return v[at] + o(mixed.transpose(1, 2).flatten(2))

        return run, width

    def _recurrent(self, at: int, width: int) -> Any:
        kind = self.draw.choice([nn.GRU, nn.LSTM])
        both = self.draw.random() < 0.3
        layer = self._layer(kind(width, n := self._width(), batch_first=True, bidirectional=both))
        return lambda v: layer(v[at])[0], n * (1 + both)

    def _cell(self, at: int, width: int) -> Any:
        layer = self._layer(nn.GRUCell(width, n := self._width()))

        def run(v: dict[int, Tensor]) -> Tensor:
            state, made = v[at].new_zeros(len(v[at]), layer.hidden_size), []
            for x in v[at].unbind(1):
                state = layer(x, state)
                made.append(state)
            return torch.stack(made, 1)

        return run, n

    def _squeeze(self, at: int, width: int) -> Any:
        down, up = self._layer(nn.Linear(width, 4)), self._layer(nn.Linear(4, width))
        return lambda v: v[at] * torch.sigmoid(up(F.relu(down(v[at].mean(1, keepdim=True))))), width

    def _pad(self, at: int, width: int) -> Any:
        return lambda v: F.pad(v[at], (0, 0, 1, 0))[:, :-1].flip(1), width

    def _mix_steps(self, at: int, width: int) -> Any:
        layer = self._layer(nn.Linear(STEPS, STEPS))
        return lambda v: v[at] + layer(v[at].transpose(1, 2)).transpose(1, 2), width

    def _maxout(self, at: int, width: int) -> Any:
        layer = self._layer(nn.Linear(width, 2 * (n := self._width())))
        return lambda v: layer(v[at]).unflatten(-1, (2, -1)).amax(-2), n

    def _low_rank(self, at: int, width: int) -> Any:
        a, b = f"a{len(self.told)}", f"b{len(self.told)}"
        layer = self._layer(nn.Linear(width, n := self._width()))
        self.register_parameter(a, nn.Parameter(torch.randn(3, width) / 3))
        self.register_parameter(b, nn.Parameter(torch.randn(n, 3) / 3))
        return lambda v: layer(v[at]) + F.linear(v[at], getattr(self, b) @ getattr(self, a)), n


OPERATIONS = sorted(
    name[1:]
    for name, made in vars(Program).items()
    if name.startswith("_") and not name.startswith("__") and name not in ("_width", "_layer", "_vector", "_extend")
)
