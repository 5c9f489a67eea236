"""Raises at lines of the package, one after the other, and tells whether anything is left half done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import lightning_slim

PACKAGE = str(Path(lightning_slim.__file__).parent)
ERRORS = (KeyboardInterrupt, MemoryError)


class Lines:
    """Counts the lines of the package that are run within, and raises at one of them.

    Args:
        at: the number of the line that raises; None: none does.
        error: what it raises.
    """

    def __init__(self, at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.at, self.error, self.count, self.where = at, error, 0, ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.where = f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
                raise self.error(f"injected at {self.where}")
        return self

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


def spread(lines: int, number: int) -> list[int]:
    """Line numbers, evenly spread, all different."""
    return sorted({1 + round(i * (lines - 1) / max(number - 1, 1)) for i in range(number)})


def state_of(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Any]:
    """All that a cut changes of a model and its optimizers, as values."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        "values": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "trains": {name: p.requires_grad for name, p in model.named_parameters()},
        "modes": {name: (module.training, _plain(module)) for name, module in model.named_modules()},
        "hooks": {
            name: [len(value) for key, value in sorted(vars(module).items()) if "hooks" in key and value is not None]
            for name, module in model.named_modules()
        },
        "of parameters": {name: [*map(len, _hooks(p))] for name, p in model.named_parameters()},
        "held": [[names.get(id(p), "a stranger") for p in g["params"]] for o in optimizers for g in o.param_groups],
        "momentum": [
            {names.get(id(p), "a stranger"): {**state} for p, state in optimizer.state.items()}
            for optimizer in optimizers
        ],
        "random": torch.random.get_rng_state(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }


def _plain(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if type(value) in (int, float, bool, str)}


def _hooks(parameter: nn.Parameter) -> list[Any]:
    return [parameter._backward_hooks or (), getattr(parameter, "_post_accumulate_grad_hooks", None) or ()]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two states of tensors and plain data differ, to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
        return [] if same else [path]
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} entries"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b or (a != a and b != b) else [f"{path}: {a!r} and {b!r}"]


class Tally:
    """Counts injections.

    Attributes:
        raised: how many came out again.
        absorbed: how many did not: a trial takes an error for one of the network's.
        harmed: where something was left half done, and what.
        where: the last one was.
    """

    def __init__(self) -> None:
        self.raised, self.absorbed, self.harmed, self.where = 0, 0, list[str](), ""

    @contextmanager
    def injected(self, line: int) -> Iterator[None]:
        """Raises at one line of what is done within; errors of different kinds take turns."""
        lines = Lines(line, ERRORS[(self.raised + self.absorbed) % len(ERRORS)])
        try:
            with lines.watching():
                yield
        except ERRORS as error:
            if "injected" not in str(error):
                raise
            self.raised += 1
        else:
            self.absorbed += 1
        self.where = f"{lines.error.__name__} at {lines.where}"

    def __str__(self) -> str:
        number = self.raised + self.absorbed
        return f"{number} injections, {len(self.harmed)} harmed ({self.absorbed} taken for errors of the network)"
