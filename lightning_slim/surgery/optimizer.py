"""The optimizer goes along: every state tensor follows its parameter."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_slim.surgery.cut import Cut

UnknownState = Literal["raise", "reset"]


@torch.inference_mode(False)
def migrate(
    optimizers: Optimizer | Iterable[Optimizer],
    cuts: Sequence[Cut],
    unknown: UnknownState = "raise",
) -> None:
    """Puts the cut parameters in the place of the old ones, with their state cut alike; what is gone is taken out.

    No optimizer is told apart by name: a state tensor of its parameter's shape is cut as the parameter is; one whose
    axes are either full or 1 (Adafactor's factored moments) is cut along its full axes; a flat one of as many entries
    (Prodigy's) as its parameter; scalars stay. `param_groups` are edited in place, so learning-rate schedulers,
    clipping and gradient scalers go on. LBFGS keeps its history as flat vectors: it is reset, with a warning.

    All new states are made before the first is put in place, so that a failure leaves every optimizer as it was.

    Args:
        optimizers: one optimizer or several.
        cuts: what `remove_units` returned.
        unknown: what to do with a state of unknown shape: `"raise"`, or `"reset"` the state of that parameter.

    Raises:
        ValueError: a state has a shape that is not understood, and `unknown` is `"raise"`.
    """
    optimizers = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    # A LightningOptimizer stands before the real one and shares its state.
    optimizers = [getattr(optimizer, "_optimizer", optimizer) for optimizer in optimizers]
    follow = {id(cut.old): cut for cut in cuts if isinstance(cut.old, nn.Parameter)}
    states = [_new_states(optimizer, follow, unknown) for optimizer in optimizers]
    for optimizer, new_states in zip(optimizers, states, strict=True):
        _commit(optimizer, follow, new_states)


def _new_states(optimizer: Optimizer, follow: dict[int, Cut], unknown: str) -> dict[int, dict[str, Any]]:
    if isinstance(optimizer, LBFGS):
        return {}
    return {
        id(p): _cut_state(optimizer, state, follow[id(p)], unknown)
        for p, state in optimizer.state.items()
        if id(p) in follow and follow[id(p)].new is not None
    }


def _cut_state(optimizer: Optimizer, state: dict[str, Any], cut: Cut, unknown: str) -> dict[str, Any]:
    new = {key: _follow(value, cut) for key, value in state.items()}
    strange = [key for key, value in new.items() if value is NotImplemented]
    if strange and unknown == "raise":
        raise _strange(optimizer, cut.tensor, cut.old, {key: state[key] for key in strange})
    return {} if strange else new


def check_states(optimizers: Iterable[Optimizer], parameters: Mapping[str, Tensor]) -> None:
    """Raises what `migrate` would, before anything is cut.

    Args:
        optimizers: in which steps were taken, so that there are states.
        parameters: name -> a parameter that may be cut.

    Raises:
        ValueError: a state has a shape that is not understood.
    """
    names = {parameter: name for name, parameter in parameters.items()}
    for optimizer in (getattr(optimizer, "_optimizer", optimizer) for optimizer in optimizers):
        for p, state in optimizer.state.items():
            whole = Cut(names.get(p, ""), p, p, {})
            strange = {key: value for key, value in state.items() if _follow(value, whole) is NotImplemented}
            if strange and p in names and not isinstance(optimizer, LBFGS):
                raise _strange(optimizer, names[p], p, strange)


def _strange(optimizer: Optimizer, name: str, parameter: Tensor, states: Mapping[str, Any]) -> ValueError:
    found = {key: tuple(getattr(value, "shape", ())) or type(value).__name__ for key, value in states.items()}
    return ValueError(
        f"Expected the state of {name} in {type(optimizer).__name__} to be scalars or tensors of shape "
        f'{tuple(parameter.shape)}, got {found}: pass unknown="reset" to start that state anew at each cut.'
    )


def _follow(value: Any, cut: Cut) -> Any:
    """A state entry after the cut; NotImplemented if its shape is not understood."""
    if not isinstance(value, Tensor):
        holds_tensors = isinstance(value, dict | list | tuple) and len(value) > 0
        return NotImplemented if holds_tensors else value
    if value.shape == cut.old.shape:
        return cut.take(value)
    if value.numel() == 1:
        return value
    if value.ndim == 1 and value.numel() == cut.old.numel():
        return cut.take(value.reshape(cut.old.shape)).flatten()
    full = [have == want for have, want in zip(value.shape, cut.old.shape, strict=False)]
    if value.ndim == cut.old.ndim and all(f or n == 1 for f, n in zip(full, value.shape, strict=True)):
        return cut.take(value, [axis for axis in cut.keep if full[axis]])
    return NotImplemented


def _commit(optimizer: Optimizer, follow: dict[int, Cut], states: dict[int, dict[str, Any]]) -> None:
    touched = False
    for group in optimizer.param_groups:
        touched = touched or any(id(p) in follow for p in group["params"])
        moved = (follow[id(p)].new if id(p) in follow else p for p in group["params"])
        group["params"][:] = [p for p in moved if p is not None]
    if touched and isinstance(optimizer, LBFGS):
        warnings.warn("LBFGS keeps its history as flat vectors, which cannot be cut: it starts anew.", stacklevel=4)
        optimizer.state.clear()
        optimizer._numel_cache = None
        return
    for old in [p for p in optimizer.state if id(p) in follow]:
        del optimizer.state[old]
        new = follow[id(old)].new
        if new is not None and states[id(old)]:
            optimizer.state[new] = states[id(old)]
