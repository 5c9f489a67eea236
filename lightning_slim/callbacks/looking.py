"""What a training step computes, to be looked at and to be tried out on other widths."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_slim.callbacks.replay import loss_of, unseen, validation_of
from lightning_slim.capture import capture_calls, capture_results
from lightning_slim.surgery import Example
from lightning_slim.surgery.example import SAMPLES, Calls, few_of, untouched, whole

MOST = 8  # calls of one network that are kept: a few branches, not a history

Taken = Callable[[], Any]


class ReplayedStep:
    """A training step, and a validation step if there was one, taken again without a trace.

    Attributes:
        takes: what takes them, each.
    """

    def __init__(self, module: LightningModule, takes: tuple[Taken, ...]) -> None:
        self.module, self.takes = module, takes

    def __call__(self) -> list[Tensor]:
        """What its networks return, and the loss."""
        made: list[Tensor] = []
        for take in self.takes:
            with capture_results(self.module) as results, unseen(self.module), torch.enable_grad():
                loss = take()
            made += [leaf.detach() for leaf in tree_leaves((results, loss)) if isinstance(leaf, Tensor)]
        return made

    def calls(self) -> Mapping[str, Example]:
        """What it calls the networks with."""
        with capture_calls(self.module) as calls:
            self()
        return calls

    def runs(self) -> bool:
        """Whether it can be taken again, as it can in training."""
        with untouched(self.module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self()
            except MemoryError:
                raise
            except Exception:  # whatever a user's step raises when it is taken alone, or on fewer samples
                return False
        return True


def looked_at(
    module: LightningModule, calls: Mapping[str, Example], batch: Any, batch_idx: int, known: Calls | None = None
) -> Calls:
    """The networks that a training step called, with the step itself where they are called with each other's results.

    Args:
        module: that is trained.
        calls: what was seen of the step.
        batch: that it was given.
        batch_idx: its number.
        known: of batches that were looked at before.
    """
    known = known or Calls()
    networks = {name: _beside(known.get(name), call) for name, call in calls.items()}
    together = {**known, **networks}
    takes = known.step.takes if isinstance(known.step, ReplayedStep) else ()
    alone = len(together) < 2 and not _reaches_beyond(module, together)
    if not module.automatic_optimization or alone or len(takes) >= MOST:
        return Calls(together, known.step)
    step = _smallest(module, batch, batch_idx, takes)
    return Calls(together, step or known.step)


def validated(module: LightningModule, calls: Mapping[str, Example], batch: Any, known: Calls) -> Calls:
    """The same, of a validation step."""
    together = {**known, **{name: _beside(known.get(name), call) for name, call in calls.items()}}
    if not isinstance(known.step, ReplayedStep):
        return Calls(together, known.step)
    step = ReplayedStep(module, (*known.step.takes, lambda: validation_of(module, _copied(batch))))
    return Calls(together, step if step.runs() else known.step)


def _reaches_beyond(module: LightningModule, calls: Mapping[str, Example]) -> bool:
    """Whether a module has weights that are in no network, and that the step may use itself."""
    inside = tuple(f"{name}." if name else "" for name in calls)
    return any(p.requires_grad and not name.startswith(inside) for name, p in module.named_parameters())


def _beside(known: Example | None, call: Example) -> Example:
    if known is None or len(known.each) >= MOST:
        return known or call
    return known._replace(also=(*known.also, call))


def _smallest(module: LightningModule, batch: Any, batch_idx: int, takes: tuple[Taken, ...]) -> ReplayedStep | None:
    """A step on few samples of a batch, or on all of them; None if it cannot be taken again at all."""
    batch = tree_map(whole, batch)
    sizes = [leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    for given in ([few_of(batch, sizes[0])] if sizes and sizes[0] > SAMPLES else []) + [batch]:
        step = ReplayedStep(module, (*takes, _Training(module, given, batch_idx)))
        if step.runs():
            return step
    return None


class _Training:
    def __init__(self, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.module, self.batch, self.batch_idx = module, batch, batch_idx

    def __call__(self) -> Any:
        return loss_of(self.module, _copied(self.batch), self.batch_idx)


def _copied(batch: Any) -> Any:
    return tree_map(whole, batch)
