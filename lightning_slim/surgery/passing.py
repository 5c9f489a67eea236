"""Networks that are called with what other networks make: their inputs narrow as these are cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from jaxtyping import Bool
from torch import Tensor, nn

from lightning_slim.surgery.cut import remove_units, restore
from lightning_slim.surgery.example import Calls, Example, resized, shapes_of, step_of, untouched
from lightning_slim.units import UnitGroup


def calls_after(
    model: nn.Module,
    groups: Iterable[UnitGroup],
    plan: Mapping[str, Bool[Tensor, "units"]],
    calls: Mapping[str, Example],
) -> Mapping[str, Example]:
    """The calls of networks as they are after a plan; of the same batch.

    Args:
        model: left as it was.
        groups: all of its groups.
        plan: what goes.
        calls: of the model as it is.
    """
    step = step_of(calls)
    if step is None:
        return calls
    with untouched(model):
        before = step.calls()
        cuts = remove_units(model, groups, plan)
        try:
            after = step.calls()
        finally:
            restore(model, cuts)
    return Calls(
        {name: resized(call, shapes_of(before[name]), shapes_of(after[name])) for name, call in calls.items()}, step
    )
