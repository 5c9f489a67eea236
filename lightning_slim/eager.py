"""Modules run eagerly for a while: in a compiled graph or a fused kernel no hook fires, and a trace sees one node."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.hooks import RemovableHandle


@contextmanager
def eagerly() -> Iterator[None]:
    """Nothing compiled runs within, and no transformer layer as one kernel, on nested tensors; nothing is compiled."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if "torch._dynamo" not in sys.modules:  # slow to import, and no module can be compiled without it
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that were registered look on within, at modules that run eagerly, and are removed afterwards."""
    try:
        with eagerly():
            yield
    finally:
        for handle in handles:
            handle.remove()


def forget_compiled() -> None:
    """Drops all compiled graphs: past a limit of eight structures, dynamo would silently run eager instead."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
