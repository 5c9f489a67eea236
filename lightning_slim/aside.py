"""Passes that are made aside, to look at a network or to try a cut: no recorder takes them for training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

under_way: list[None] = []


@contextmanager
def aside() -> Iterator[None]:
    """Whatever the network computes within is not a part of the run."""
    under_way.append(None)
    try:
        yield
    finally:
        under_way.pop()


def is_aside() -> bool:
    """Whether that is so now."""
    return bool(under_way)
