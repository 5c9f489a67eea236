"""What several processes that train together ask of each other, and the answer where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Agree = Callable[[Any], Any]  # what rank 0 says
Gather = Callable[[Any], list[Any]]  # what every rank says, in order
Decide = Callable[[Callable[[], Any]], Any]  # what rank 0 comes to, if no rank fails


def alone(value: Any, *_: Any) -> Any:
    """There is one process: everybody agrees, and sums and means are the value itself."""
    return value


def only(value: Any) -> list[Any]:
    """There is one process, and this is what it says."""
    return [value]


def together(gather: Gather, work: Callable[[], T]) -> T:
    """Does what asks nothing of other ranks on each of them; if one fails, none goes on to wait for it.

    Args:
        gather: what every rank says.
        work: what each does.

    Raises:
        Exception: what it raised here.
        RuntimeError: it raised on another rank, and not here.
    """
    done: list[T] = []
    error: Exception | None = None
    try:
        done.append(work())
    except Exception as raised:
        error = raised
    errors = gather("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if failed := {rank: text for rank, text in enumerate(errors) if text}:
        raise RuntimeError(f"Expected all ranks to go on, got {'; '.join(f'rank {r}: {t}' for r, t in failed.items())}")
    return done[0]
