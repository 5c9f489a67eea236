"""The first batches of a run, tried out before anything is trained on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from lightning_slim.callbacks.looking import looked_at
from lightning_slim.callbacks.replay import loss_of, refuse_manual, unseen
from lightning_slim.callbacks.step_watch import StepWatch
from lightning_slim.capture import capture_calls
from lightning_slim.eager import eagerly
from lightning_slim.flows import Flow, Gradients, LossGradient, whole_gradients
from lightning_slim.recording import Recorder
from lightning_slim.scores import Score
from lightning_slim.surgery import Example
from lightning_slim.surgery.example import Calls, workable_calls
from lightning_slim.weight_norm import settle


class Probe:
    """Losses and gradients of the first batches; no weight, random number, statistic or log tells that they were taken.

    Args:
        trainer: of the run.
        module: what it trains.
        batches: how many to take.

    Raises:
        MisconfigurationException: a module that steps its optimizers itself.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, batches: int) -> None:
        refuse_manual(module, 'Prune it while it trains (`when="during"`).')
        self.trainer, self.module = trainer, module
        self.average: Callable[[Tensor], Tensor] = partial(trainer.strategy.reduce, reduce_op="mean")
        with unseen(module):
            self.batches = list(_first_batches(trainer, module, batches))

    def calls(self) -> Calls:
        """The networks that the training step calls, each with one call."""
        with capture_calls(self.module) as calls:
            self.loss(0)
        seen = looked_at(self.module, calls, self.batches[0], 0)
        return workable_calls(self.module, seen)

    def loss(self, number: int) -> Tensor:
        """The loss of a batch, with its graph; the same each time.

        Raises:
            MisconfigurationException: the training step returned none.
        """
        with unseen(self.module), eagerly(), self._precision():
            loss = loss_of(self.module, self.batches[number], number)
        if not isinstance(loss, Tensor):
            raise MisconfigurationException(f"Expected a loss of the training step, got {loss}: return one.")
        return loss

    def gradients(self, flow: Flow | None, calls: dict[str, Example]) -> Iterator[None]:
        """Lets every parameter hold its gradient, or what stands in for it, once for each of several observations.

        Args:
            flow: what stands in for the gradient of the loss, if anything does.
            calls: of the networks.
        """
        losses = [partial(self.loss, number) for number in range(len(self.batches))]
        with unseen(self.module), eagerly():
            for gradients in (flow or LossGradient())(self.module, losses, calls, self.average):
                with self._held(gradients):
                    yield
        settle(self.module)  # weights that were computed of others' absolute values

    def record(self, recorder: Recorder, watch: StepWatch, score: Score, calls: dict[str, Example]) -> None:
        """Lets a recorder look on as it does while the network trains.

        Args:
            recorder: of the network.
            watch: tells it of the steps.
            score: that the evidence is for.
            calls: of the networks.

        Raises:
            MisconfigurationException: the batches are not enough.
        """
        for number, batch in enumerate(self.batches if recorder.attends else []):
            watch.begin(recorder, self.trainer, self.module, batch, number)
            loss = self.loss(number)
            watch.end(self.trainer, {"loss": loss.detach() / self.trainer.accumulate_grad_batches}, batch)
            if score.needs_gradients:
                with self._held(whole_gradients(loss, self.module, self.average)):
                    recorder.observe_gradients()
        if score.flow is not None:
            for _ in self.gradients(score.flow, calls):
                recorder.observe_flow()
        if not recorder.ready:
            raise MisconfigurationException(
                f"Expected {len(self.batches)} batches to tell something of every unit, got too little: raise "
                "`probe_batches`."
            )

    def _precision(self) -> AbstractContextManager[Any]:
        """That of the run; but gradients in float16 would vanish, for nothing scales them here: then the weights'."""
        plugin = self.trainer.precision_plugin
        return plugin.train_step_context() if getattr(plugin, "scaler", None) is None else nullcontext()

    @contextmanager
    def _held(self, gradients: Gradients) -> Iterator[None]:
        before = [(parameter, parameter.grad) for parameter in self.module.parameters()]
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        try:
            yield
        finally:
            for parameter, grad in before:
                parameter.grad = grad


def _first_batches(trainer: Trainer, module: LightningModule, count: int) -> Iterator[Any]:
    """Batches of a pass over the training data that is not the run's own, as the training step would be given them."""
    loaders = tree_map(_apart, trainer.train_dataloader)
    holders = [h for loader in tree_leaves(loaders) for h in (loader, getattr(loader, "sampler", None))]
    generators = [getattr(holder, "generator", None) for holder in holders]
    states = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
    combined = CombinedLoader(loaders, trainer.fit_loop._combined_loader._mode)  # type: ignore[union-attr]
    for batch, _, _ in islice(combined, int(min(count, trainer.num_training_batches))):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    for generator, state in states:
        generator.set_state(state)


def _apart(loader: Any) -> Any:
    """The same loader with workers of its own: a second pass would take persistent ones away from the run."""
    if not isinstance(loader, DataLoader):
        return loader
    other = copy.copy(loader)
    other._iterator = None
    return other
