"""Whether scores say anything, and which units are worth keeping whatever the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_slim.arguments import check_fields
from lightning_slim.scores import Calibration, Magnitude, Score
from lightning_slim.statistics import adjusted_log_p


@dataclass(frozen=True)
class Guard:
    """What happens where a score that calibrates itself finds no signal.

    Attributes:
        fallback: scores such groups; None leaves them whole.
    """

    fallback: Score | None = field(default_factory=Magnitude)

    def __post_init__(self) -> None:
        check_fields(self)


def no_signal(calibration: Calibration, columns: int) -> str:
    """Why a selection is worth nothing, with numbers; empty if it is not so.

    Args:
        calibration: of the selection.
        columns: of the units, with their past.
    """
    c = calibration
    if c.rows < columns + 2:
        fewer = " and `lags`" if columns > c.units else ""
        return f"{c.rows:.0f} rows are too few for {columns} columns (lower `record_every_n_steps`{fewer})"
    if c.live < 2:
        return f"{c.units - c.live} of {c.units} units are constant"
    if not c.variance > 0:
        return "what they should predict is constant"
    half = c.live // 2
    if float(c.explained[half - 1]) <= float(c.by_chance[half - 1]):
        return (
            f"the best {half} units explain {float(c.explained[half - 1]):.1%} of what they should predict, and "
            f"{float(c.by_chance[half - 1]):.1%} of what they cannot know"
        )
    return ""


def significant(log_p: Mapping[str, Float[Tensor, "units"]], alpha: float) -> dict[str, Bool[Tensor, "units"]]:
    """Which units are significant: at most `alpha` of those are expected to be so by chance.

    Benjamini and Hochberg (1995), over all groups together.
    """
    if not log_p:
        return {}
    adjusted = adjusted_log_p(torch.cat(list(log_p.values())))
    found = adjusted <= torch.tensor(alpha, dtype=torch.float64).log()
    return dict(zip(log_p, torch.split(found, [len(p) for p in log_p.values()]), strict=True))
