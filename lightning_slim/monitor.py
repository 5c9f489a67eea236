"""A metric that is watched, and which way it is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_slim.arguments import check_fields

Mode = Literal["min", "max"]
Metrics = dict[str, float]  # name -> value


@dataclass(frozen=True)
class Monitor:
    """One of the metrics that validation logs.

    Attributes:
        name: as it is logged, such as `"val_acc"`.
        mode: `"max"` if larger is better, `"min"` if smaller is.

    Example:
        >>> Monitor("val_acc", "max").drop({"val_acc": 0.75}, {"val_acc": 0.5})
        0.25
    """

    name: str
    mode: Mode

    def __post_init__(self) -> None:
        check_fields(self)

    def of(self, metrics: Mapping[str, float]) -> float:
        """Its value.

        Raises:
            ValueError: it was not logged.
        """
        if self.name not in metrics:
            raise ValueError(
                f"Expected `monitor` to name a metric that validation logs, got {self.name!r}: "
                f"{'it logs ' + ', '.join(metrics) if metrics else 'it logs none; call `self.log` in validation_step'}."
            )
        return metrics[self.name]

    def goodness(self, metrics: Mapping[str, float]) -> float:
        """Its value, turned so that more is better; what is not a number is worst."""
        return self.turned(self.of(metrics))

    def turned(self, value: float) -> float:
        """A value, turned so that more is better; what is not a number is worst."""
        return -math.inf if math.isnan(value) else value if self.mode == "max" else -value

    def drop(self, before: Mapping[str, float], after: Mapping[str, float]) -> float:
        """How much worse it became, in its own unit; below 0 if it became better."""
        return self.goodness(before) - self.goodness(after)
