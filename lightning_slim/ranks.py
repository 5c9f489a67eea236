"""What several processes that train together ask of each other, and the answer where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Agree = Callable[[Any], Any]  # what rank 0 says


def alone(value: Any, *_: Any) -> Any:
    """There is one process: everybody agrees, and sums and means are the value itself."""
    return value
