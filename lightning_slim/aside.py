"""Passes that are made aside, to look at a network or to try a cut: no recorder takes them for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_under_way: list[None] = []


@contextmanager
def aside() -> Iterator[None]:
    """Whatever the network computes within is not a part of the run."""
    _under_way.append(None)
    try:
        yield
    finally:
        _under_way.pop()


def is_aside() -> bool:
    """Whether that is so now."""
    return bool(_under_way)
