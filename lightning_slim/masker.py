"""Score -> share out -> choose -> zero, of single weights: plain weights and masks beside them. Needs no Trainer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_slim.arguments import check_arguments
from lightning_slim.history import MaskEvent
from lightning_slim.masks import (
    LAYERS,
    Distribution,
    InputScore,
    Layer,
    Pattern,
    Regrowth,
    Uniform,
    Unstructured,
    WeightMagnitude,
    WeightScore,
    find_last,
    find_weights,
    stacked,
    transposed_groups,
    unstacked,
    weights_left_out,
)
from lightning_slim.payload import opened, sealed
from lightning_slim.ranks import Agree, alone
from lightning_slim.recording import InputRecorder
from lightning_slim.schedules import Cubic, Schedule
from lightning_slim.skipping import Skip, check_module, check_skip
from lightning_slim.surgery import StructureChange
from lightning_slim.transaction import all_or_nothing
from lightning_slim.units import blocks_gone, positions_gone


class Masker:
    """Zeroes weights of a model while it trains, and keeps them zero.

    The weights stay plain parameters under their names. Masks lie beside them: gradients are masked as they arrive,
    so that clipping sees what trains, and weights are zeroed again after each step of each optimizer.

    Args:
        model: the module whose parameters the optimizers hold.
        sparsity: the fraction of the weights that is gone in the end; None: what the pattern stands for, or 0.8.
        pattern: which weights go together.
        score: how much each weight matters.
        distribution: how the zeros are shared out among layers.
        schedule: how much of the removal is done by when.
        module: dotted name of the only part that is masked; all of it if empty.
        skip: what stays dense: names of layers, patterns such as `"encoder.*"`, or module types (or their names).
        mask_last: whether the last layers, those right before the loss, are masked too.
        regrow: once the schedule is done, what comes back in exchange for others; None: nothing.
        seed: of what comes back by chance.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> masker = Masker(net, sparsity=0.5, schedule=OneShot(at=0.5))
        >>> loss = net(torch.randn(3, 4)).sum()
        >>> masker.prepare(loss)
        >>> masker.attach([optimizer])
        >>> print(masker.update(progress=0.5, optimizers=[optimizer]))
        step 0: 16 of 32 weights are zero, 50.0% (50.0% asked)
        >>> int((net[0].weight == 0).sum()), int((net[2].weight == 0).sum())
        (16, 0)
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        pattern: Pattern | None = None,
        score: WeightScore | None = None,
        distribution: Distribution | None = None,
        schedule: Schedule | None = None,
        *,
        module: str = "",
        skip: Skip = (),
        mask_last: bool = False,
        regrow: Regrowth | None = None,
        seed: int = 0,
    ) -> None:
        check_arguments(Masker, locals())
        self.pattern = pattern or Unstructured()
        self.distribution = distribution or Uniform()
        self.sparsity = sparsity_of(self.pattern, sparsity, self.distribution)
        if regrow is not None and self.pattern.sparsity is not None:
            raise ValueError(f"Expected a pattern of any sparsity to regrow in, got {self.pattern}: choose another.")
        self.model = model
        self.score = score or WeightMagnitude()
        self.schedule = schedule or Cubic()
        self.module, self.skip, self.mask_last = module, tuple(skip), mask_last
        self.regrow, self.seed = regrow, seed
        self.masks: dict[str, Bool[Tensor, "..."]] = {}  # weight -> True where it stays; of all that may be masked
        self.last: set[str] = set()  # weights of the last layers
        self.events: list[MaskEvent] = []
        self.agree: Agree = alone  # several processes: what rank 0 says
        self._sums: dict[str, Float[Tensor, "..."]] = {}  # scores that are streamed
        self._inputs: InputRecorder | None = None  # what is read, if the score looks at that
        self._gradients: dict[str, Float[Tensor, "..."]] = {}  # the last ones, of all entries, to regrow by
        self._aliases: dict[str, str] = {}  # every name of a masked weight -> the one that it is masked under
        self._readers: dict[str, list[str]] = {}  # masked weight -> its names in layers that read with it
        self._attached = False
        self._settled: set[str] = set()  # the masks that training goes on with, whatever is found later
        self._hooked: set[str] = set()  # those whose gradients are masked: a frozen weight has none
        self._unfit: set[str] = set()  # weights that began to train later, and do not fit the pattern
        self._handles: list[RemovableHandle] = []

    @property
    def prepared(self) -> bool:
        """Whether it is known what is masked."""
        return bool(self.masks)

    @property
    def ready(self) -> bool:
        """Whether there is something to score by."""
        return self.prepared and not self.unheard

    @property
    def unheard(self) -> list[str]:
        """The masked weights that the score has heard nothing of since it began anew: no gradient, or no inputs."""
        return [name for name in self.masks if not self._heard_of(name)]

    @property
    def outgrown(self) -> bool:
        """Whether weights train by now that did not when it was found what is masked, such as unfrozen ones."""
        known = self.masks.keys() | self.last | self._unfit
        trains = find_weights(self.model, self.module, self.skip).keys()
        return self.prepared and bool((trains - known) | (trains & self._settled - self._hooked))

    @property
    def behind(self) -> bool:
        """Whether weights are masked that were not at the last update."""
        return bool(self.events) and bool(self.masks.keys() - self.events[-1].weights.keys())

    @property
    def unmasked(self) -> dict[str, int]:
        """What trains, is no bias, norm or last layer, and has no mask: name -> entries; none of what is skipped."""
        known = {id(self.model.get_parameter(name)) for name in self.masks.keys() | self.last}
        found = weights_left_out(self.model, self.module, self.skip).items()
        return {name: weight.numel() for name, weight in found if id(weight) not in known}

    @property
    def listens(self) -> bool:
        """Whether the score looks at what weights read: there is something to record."""
        return self._inputs is not None

    @property
    def needs_labels(self) -> bool:
        """Whether `hear` must be told labels."""
        return self._inputs is not None and self._inputs.needs_labels

    @property
    def in_step(self) -> bool:
        """Whether the model still has the shapes that it was masked in."""
        shapes = {name: p.shape for name, p in self.model.named_parameters()}
        return self.prepared and all(shapes.get(name) == mask.shape for name, mask in self.masks.items())

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The masked weights as they stand in the model."""
        return {name: self.model.get_parameter(name) for name in self.masks}

    @property
    def reached(self) -> float:
        """The fraction of the weights that is gone."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / total

    def prepare(self, loss: Tensor | None = None) -> None:
        """Finds what can be masked, and checks that it can; no weight is touched.

        Once the masks are attached, they stay, and those of weights that train by now join them (`outgrown`); of these,
        what does not fit the pattern stays dense, with a warning.

        Args:
            loss: a loss of the model, with its graph: it tells which layers are last. None: none is.

        Raises:
            ValueError: nothing can be masked, or a weight does not fit the pattern or the score.
        """
        check_skip(self.model, self.skip)
        check_module(self.model, self.module)
        weights = find_weights(self.model, self.module, self.skip)
        if loss is not None and not self.mask_last:
            self.last |= find_last(loss, weights) - self._settled
        weights = {name: weight for name, weight in weights.items() if name not in self.last | self._settled}
        if not weights and not self._settled:
            raise ValueError(
                f"Nothing can be masked in {type(self.model).__name__}: it has no linear, convolutional, recurrent or "
                "embedding weights but those that are skipped, frozen or right before the loss."
            )
        for name, weight in weights.items():
            wrong = self.pattern.refuses(self._stacked(name, weight).shape)
            if wrong and not self._settled:
                raise ValueError(f"{wrong} ({name}, with `skip`).")
            if wrong and name not in self._unfit:
                warnings.warn(f"{name}, which trains by now, stays dense: {wrong}.", stacklevel=2)
                self._unfit.add(name)
        settled = [name for name in self.masks if name in self._settled]
        self._mask_these([*settled, *(name for name in weights if name not in self._unfit)])

    def _mask_these(self, names: Iterable[str]) -> None:
        """Masks these weights and no others; what is known of those that were masked before stays."""
        weights = {name: self.model.get_parameter(name) for name in names}
        ones = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items() if name not in self.masks}
        self.masks = {name: ones[name] if name in ones else self.masks[name] for name in weights}
        self._name()
        heard = self._inputs.told if self._inputs is not None else {}
        self._inputs = self._listen()
        if self._inputs is not None:
            self._inputs.told |= {name: told for name, told in heard.items() if name in self._inputs.told}

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """From now on gradients are masked, and weights are zeroed after each step of these optimizers.

        With several processes, it is the weights that rank 0 found: the loss of others may pass elsewhere.
        """
        self.detach()
        names, self.last = self.agree((list(self.masks), self.last))
        if names != list(self.masks):
            self._mask_these(names)
        self._attached, self._settled, self._hooked = True, set(self.masks), set()
        optimizers = [getattr(optimizer, "_optimizer", optimizer) for optimizer in optimizers]
        for name, weight in self.weights.items():
            self.masks[name] = self.masks[name].to(weight.device)
            if name in self._sums:
                self._sums[name] = self._sums[name].to(weight.device)
            if weight.requires_grad:
                self._handles.append(weight.register_hook(self._masking(name)))  # type: ignore[no-untyped-call]
                self._hooked.add(name)
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def detach(self) -> None:
        """The weights are as free as they were; zeros stay zero until someone changes them."""
        self._attached = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def observe(self, optimizer: Optimizer) -> None:
        """Adds the scores of a step that an optimizer is going to take; gradients must be whole and unscaled."""
        if self.score.streamed:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, weight in self.weights.items():
                if weight.grad is not None and id(weight) in held:
                    score = self.score(weight.detach(), weight.grad).float()
                    score = score.nan_to_num(0.0, 0.0, 0.0)  # the step will be skipped: mixed precision overflowed
                    self._sums[name] = self._sums[name] + score if name in self._sums else score

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What weights read in forward passes within is heard, as one step, if the score looks at that."""
        with self._inputs.recording() if self._inputs is not None else nullcontext():
            yield

    def hear(self, labels: Tensor | None = None) -> None:
        """Ends a step that was recorded.

        Args:
            labels: of each item of the batch; needed if `needs_labels`.

        Raises:
            ValueError: labels are missing, or are not there once for each item.
        """
        if self._inputs is not None:
            self._inputs.hear(labels)

    @torch.inference_mode(False)
    def update(
        self,
        progress: float,
        optimizers: Iterable[Optimizer] = (),
        copies: Iterable[nn.Module] = (),
        global_step: int = 0,
    ) -> MaskEvent | None:
        """Zeroes what is due at `progress`; the optimizers forget what they knew of it.

        What is gone stays gone, and counts: the target is a fraction of all weights, however many updates lead there.

        Args:
            progress: fraction of the run that is done.
            optimizers: all that hold weights of the model.
            copies: other modules of the same structure, such as weight averages, to be zeroed alike.
            global_step: for the history.

        Returns:
            What was done; None if nothing was due.

        Raises:
            ValueError: something is due, and of some weights the score has heard nothing.
        """
        asked = self.sparsity * self.schedule(progress)
        done = bool(self.events) and self.events[-1].asked == self.sparsity and not self.behind
        exchange = self.regrow is not None and done
        if asked <= self.reached and not exchange:
            return None
        copies, optimizers = list(copies), list(optimizers)
        with all_or_nothing(self, self.model, *copies, *optimizers):
            return self._update(progress, asked, exchange, optimizers, copies, global_step)

    def _update(
        self,
        progress: float,
        asked: float,
        exchange: bool,
        optimizers: list[Optimizer],
        copies: list[nn.Module],
        global_step: int,
    ) -> MaskEvent | None:
        if unheard := self.agree(self.unheard):
            raise ValueError(
                f"Expected every masked weight to be used since the last update, got nothing to score {unheard} by: "
                "leave these layers out with `skip`, or choose a score that looks at weights only."
            )
        new: dict[str, Tensor] = self.agree(self._exchange(progress) if exchange else self._choose(asked))
        if all(torch.equal(new[name], mask) for name, mask in self.masks.items()):
            return None
        regrown = sum(int((new[name].to(mask.device) & ~mask).sum()) for name, mask in self.masks.items())
        self.masks = {name: new[name].to(weight.device) for name, weight in self.weights.items()}
        if self.score.forgets:
            self._sums = {}
            if self._inputs is not None:
                self._inputs.forget()
        # What comes back one day begins at zero.
        self._sums = {name: sums.masked_fill(~self.masks[name], 0) for name, sums in self._sums.items()}
        for model in (self.model, *copies):
            self.apply(model)
        self._forget(optimizers)
        self.events.append(self._event(progress, asked, global_step, regrown))
        return self.events[-1]

    def apply(self, model: nn.Module) -> None:
        """Zeroes what is masked in the model, or in a copy of it."""
        self._zero({name: model.get_parameter(name) for name in self.masks})

    def follow(self, change: StructureChange) -> None:
        """Cuts the masks as the model was cut. Rows and columns break patterns: of cut weights, these are chosen anew.

        Args:
            change: the cut, which the model and its optimizers have been through already.
        """
        gone, dropped = self._gone(change), blocks_gone(change.groups, change.plan)
        stand = {name for name in self.masks if not any(name.startswith(f"{path}.") for path in dropped)}
        cut = {name for name, _ in gone if name in stand}
        for held in (self.masks, self._sums, self._gradients):
            for name in held.keys() - stand:
                del held[name]
            for (name, axis), at in gone.items():
                if name in held:
                    held[name] = _without(held[name], axis, at)
        if self._inputs is not None:
            told = [alias for alias in self._inputs.told if not any(alias.startswith(f"{path}.") for path in dropped)]
            of_told = {(a, axis): at for (name, axis), at in gone.items() for a in self._readers.get(name, ())}
            self._inputs.keep(of_told, told)
        if self.pattern.aligned:
            for name in cut:
                mask = self.masks[name]
                pieces = len(self.pattern.pool(self._stacked(name, mask.float())))
                self.masks[name] = self._mask(name, round((1 - float(mask.double().mean())) * pieces))
        self._name()
        self.apply(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Masks, streamed scores and events, as plain data and tensors."""
        state = {
            "masks": dict(self.masks),
            "last": sorted(self.last),
            "sums": dict(self._sums),
            "inputs": self._inputs.state_dict() if self._inputs is not None else {},
            "gradients": dict(self._gradients),
            "events": [vars(event).copy() for event in self.events],
        }
        return sealed(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, on a model of the same shapes.

        Raises:
            ValueError: it is not as it was stored, or of a model of other shapes; nothing was loaded.
        """
        state = opened(state, "masks")
        shapes = {name: parameter.shape for name, parameter in self.model.named_parameters(remove_duplicate=False)}
        if wrong := [name for name, mask in state["masks"].items() if shapes.get(name) != mask.shape]:
            raise ValueError(f"Expected masks of this model's weights, got others: {', '.join(wrong)}.")
        self.masks, self._sums = dict(state["masks"]), dict(state["sums"])
        self.last, self._gradients = set(state["last"]), dict(state["gradients"])
        self.events = [MaskEvent(**event) for event in state["events"]]
        self._name()
        self._inputs = self._listen()
        if self._inputs is not None:
            self._inputs.load_state_dict(state["inputs"])

    # --- details ---

    def _choose(self, asked: float) -> dict[str, Tensor]:
        scores = {name: self._stacked(name, self._scores(name)) for name in self.masks}
        layers = {n: Layer(tuple(self.masks[n].shape), self.pattern.pool(stack)) for n, stack in scores.items()}
        return {name: self._mask(name, removed) for name, removed in self.distribution(layers, asked).items()}

    def _mask(self, name: str, removed: int) -> Bool[Tensor, "..."]:
        return self._chosen(name, self._scores(name), removed)

    def _chosen(self, name: str, scores: Float[Tensor, "..."], removed: int) -> Bool[Tensor, "..."]:
        """The mask of one weight, in its shape, that scores of its shape lead to."""
        stack = self.pattern.choose(self._stacked(name, scores), removed)
        return unstacked(stack, tuple(scores.shape), transposed_groups(self.model, name)).contiguous()

    def _stacked(self, name: str, tensor: Tensor) -> Tensor:
        """What has the shape of a weight, as its pattern sees it."""
        return stacked(tensor, transposed_groups(self.model, name))

    def _exchange(self, progress: float) -> dict[str, Tensor]:
        """Masks of the same density; what matters least of what stays makes room for what comes back."""
        assert self.regrow is not None
        new = {}
        generator = torch.Generator().manual_seed(self.seed + len(self.events))
        for name, mask in self.masks.items():
            pieces = len(self.pattern.pool(self._stacked(name, mask.float())))
            gone = round((1 - float(mask.double().mean())) * pieces)
            exchanged = min(round(self.regrow.share(progress) * (pieces - gone)), gone)
            survives = self._mask(name, gone + exchanged)
            back = self.regrow(self._gradients.get(name, torch.zeros_like(mask, dtype=torch.float)).float(), generator)
            back = back.to(mask.device).masked_fill(mask, -torch.inf).masked_fill(survives, torch.inf)
            new[name] = self._chosen(name, back, gone)
        return new

    @torch.no_grad()
    def _scores(self, name: str) -> Float[Tensor, "..."]:
        """Scores of one weight; what is gone comes behind all that stays. Magnitudes, where nothing was heard."""
        weight = self.model.get_parameter(name)
        if not self._heard_of(name):
            score = weight.abs()
        elif isinstance(self.score, InputScore) and self._inputs is not None:
            readers = [reader for reader in self._readers[name] if self._inputs.has_heard(reader)]
            sizes = [self._inputs.of_entries(reader, self.score.size) for reader in readers]
            score = self.score(weight, reduce(torch.hypot, sizes))
        else:
            score = self._sums[name] if self.score.streamed else self.score(weight, weight)
        return score.float().masked_fill(~self.masks[name].to(weight.device), -torch.inf)

    def _listen(self) -> InputRecorder | None:
        """A recorder of what weights read, if the score looks at that."""
        if not isinstance(self.score, InputScore):
            return None
        return InputRecorder(
            self.model, [r for readers in self._readers.values() for r in readers], self.score.witnesses
        )

    def _heard_of(self, name: str) -> bool:
        """Whether there is something to score a weight by."""
        if self._inputs is not None:
            return any(self._inputs.has_heard(reader) for reader in self._readers[name])
        return name in self._sums or not self.score.streamed

    def _masking(self, name: str) -> Callable[[Tensor], Tensor | None]:
        """A hook on a gradient. A cut hands it on to the new parameter, so that it looks its mask up."""

        def hook(gradient: Tensor) -> Tensor | None:
            if not self._attached or name not in self.masks:
                return None
            if self.regrow is not None and self.regrow.needs_gradients:
                self._gradients[name] = gradient.detach()  # not changed any more: what goes on is the masked one
            return gradient.masked_fill(~self.masks[name], 0)

        return hook

    def _gone(self, change: StructureChange) -> dict[tuple[str, int], Int[Tensor, "gone"]]:
        """(weight, axis) -> the positions that a cut removed, under whichever of the weight's names it says so."""
        gone: dict[tuple[str, int], Tensor] = {}
        for (alias, axis), at in positions_gone(change.groups, change.plan).items():
            place = self._aliases.get(alias, alias), axis
            gone[place] = torch.unique(torch.cat([gone.get(place, at), at]))
        return gone

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        held = {p for group in optimizer.param_groups for p in group["params"]}
        self._zero({name: weight for name, weight in self.weights.items() if weight in held})

    @torch.no_grad()
    def _zero(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            weight.masked_fill_(~self.masks[name].to(weight.device), 0)

    @torch.no_grad()
    def _forget(self, optimizers: Iterable[Optimizer]) -> None:
        """Clears the momentum of what is gone."""
        weights = self.weights
        for optimizer in optimizers:
            for name, weight in weights.items():
                state = optimizer.state.get(weight, {})
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        state[key] = value.masked_fill(~self.masks[name].to(value.device), 0)

    def _event(self, progress: float, asked: float, global_step: int, regrown: int) -> MaskEvent:
        zeros = {name: int((~mask).sum()) for name, mask in self.masks.items()}
        return MaskEvent(
            step=global_step,
            progress=progress,
            asked=asked,
            reached=self.reached,
            zeros=zeros,
            weights={name: mask.numel() for name, mask in self.masks.items()},
            regrown=regrown,
        )

    def _name(self) -> None:
        """Learns every name of every masked weight."""
        first = {id(weight): name for name, weight in self.weights.items()}
        named = self.model.named_parameters(remove_duplicate=False)
        self._aliases = {name: first[id(p)] for name, p in named if id(p) in first}
        self._readers = {name: [] for name in self.masks}
        for alias, name in self._aliases.items():
            if isinstance(self.model.get_submodule(alias.rpartition(".")[0]), LAYERS):
                self._readers[name].append(alias)


def sparsity_of(pattern: Pattern, sparsity: float | None, distribution: Distribution) -> float:
    """The fraction of zeros that is meant.

    Raises:
        ValueError: it is none, or not the pattern's.
    """
    fixed = pattern.sparsity
    other = sparsity is not None and fixed is not None and not math.isclose(sparsity, fixed)
    if other or (fixed is not None and not isinstance(distribution, Uniform)):
        raise ValueError(
            f"Expected a sparsity of {fixed:g} in every weight, which {pattern} stands for, got {sparsity} and "
            f"{distribution}: leave both out, or choose another pattern."
        )
    if sparsity is not None and not 0 < sparsity < 1:
        raise ValueError(f"Expected a sparsity in (0, 1), the fraction of the weights that goes, got {sparsity}.")
    return sparsity if sparsity is not None else fixed if fixed is not None else 0.8


def _without(tensor: Tensor, axis: int, gone: Tensor) -> Tensor:
    """A tensor without these positions of an axis."""
    stays = torch.ones(tensor.shape[axis], dtype=torch.bool)
    stays[gone] = False
    return tensor.index_select(axis, stays.nonzero().flatten().to(tensor.device))
