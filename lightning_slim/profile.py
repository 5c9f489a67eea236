"""Parameters, MACs, bytes and latency of one model."""

from __future__ import annotations

import ctypes
import io
import random
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_slim.eager import eagerly


@dataclass(frozen=True)
class Profile:
    """What a model costs.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates of one forward pass of one sample (normalisations and activations not counted).
        bytes: size of its state dict on disk.
        latency_ms: median CPU time of one forward pass of the example on one thread, milliseconds.
        metrics: name -> value, as far as they are known.
    """

    params: int
    macs: int
    bytes: int
    latency_ms: float
    metrics: dict[str, float] = field(default_factory=dict)


@contextmanager
def _countable() -> Iterator[None]:
    """Fused kernels hide their work from the counter: LSTM in oneDNN and cuDNN, attention in SDPA and its fast path."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
            with (
                sdpa_kernel(SDPBackend.MATH),
                torch.backends.mkldnn.flags(enabled=False),
                torch.backends.cudnn.flags(enabled=False),
                torch.no_grad(),
            ):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and an untouched random state; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), eagerly():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def count_macs(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> dict[str, int]:
    """Multiply-accumulates of `model(*args, **kwargs)`, layer by layer; a layer's children are counted on their own.

    Counted by torch's FlopCounterMode (two FLOPs are one MAC): matrix products, convolutions, attention.

    Example:
        >>> count_macs(nn.Linear(3, 5), (torch.zeros(2, 3),))
        {'': 30}
    """
    counted = count_by_operator(model, args, kwargs)
    return {name: sum(by_operator.values()) for name, by_operator in counted.items()}


def count_by_operator(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, Counter[Any]]:
    """The same, operator by operator."""
    counter = FlopCounterMode(display=False)
    with evaluating(model), _countable(), counter:
        model(*args, **(kwargs or {}))
    # The counter names a module by its path from the class of the outermost one.
    root = type(model).__name__
    totals = {
        name.removeprefix(root).removeprefix("."): Counter({op: flops // 2 for op, flops in by_operator.items()})
        for name, by_operator in counter.get_flop_counts().items()
        if name == root or name.startswith(f"{root}.")
    }
    own = {name: Counter(by_operator) for name, by_operator in totals.items()}
    for name, by_operator in totals.items():
        parent = next((p for p in _parents(name) if p in own), None)
        if parent is not None:
            own[parent].subtract(by_operator)
    return {name: by_operator for name, by_operator in own.items() if any(by_operator.values())}


def _parents(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def bytes_on_disk(model: nn.Module) -> int:
    """Size of the saved state dict."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


@contextmanager
def one_thread() -> Iterator[None]:
    """A single intra-operation thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def steady_memory() -> Iterator[None]:
    """Freed memory stays with the process, so that times do not go by what was freed before.

    Else glibc hands large blocks back to the system, or not: a ResNet-20 at batch 32 took 53 ms with 5,400 page faults,
    or 42 ms with none. Afterwards all of it is handed back, and glibc is as it sets itself when 32 MiB were freed once.
    Other systems are left alone.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    _hand_back_above(libc, 2**30)
    try:
        yield
    finally:
        _hand_back_above(libc, 2**25)
        libc.malloc_trim(0)


def _hand_back_above(libc: ctypes.CDLL, size: int) -> None:
    """Sets glibc's M_MMAP_THRESHOLD, and twice as much for M_TRIM_THRESHOLD."""
    libc.mallopt(-3, size)
    libc.mallopt(-1, 2 * size - 1)


def time_side_by_side(calls: Sequence[Callable[[], Any]], seconds: float = 2.0, rounds: int = 60) -> list[float]:
    """Median CPU time of each call in milliseconds, on one thread, all measured in one run.

    The calls take turns in random order, each with a warm-up of its own, and only time that the processor spent on them
    counts. So a busy machine slows all of them alike, and their ratio can be trusted where a single time cannot.

    Args:
        calls: functions without arguments.
        seconds: stop after this long, but not before five rounds.
        rounds: stop after this many.
    """
    times: list[list[float]] = [[] for _ in calls]
    order, shuffle = list(range(len(calls))), random.Random(0)
    begin = time.perf_counter()
    with one_thread(), steady_memory():
        for done in range(rounds):
            if done >= 5 and time.perf_counter() - begin > seconds:
                break
            shuffle.shuffle(order)
            for i in order:
                calls[i]()
                start = time.process_time()
                calls[i]()
                times[i].append(time.process_time() - start)
    return [1000 * statistics.median(taken) for taken in times]
