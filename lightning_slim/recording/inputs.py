"""What single weights read: streamed input by input while the network trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence

from lightning_slim.aside import is_aside
from lightning_slim.eager import hooked
from lightning_slim.recording.recorder import is_finite
from lightning_slim.surgery.layers.conv import is_depthwise
from lightning_slim.surgery.layers.multihead import module_by_module
from lightning_slim.surgery.layers.recurrent import heard
from lightning_slim.witness import Witness

Told = Mapping[Witness, Any]  # witness -> what it gathered


class _Held(NamedTuple):
    """What a witness holds of one arrival until the step is over, and where it is going to be added."""

    witness: Witness
    inputs: Tensor
    told: dict[Witness, Any]


class InputRecorder:
    """Streams what witnesses gather of the inputs that weights are multiplied with, each input by itself.

    Inputs are the channels of a convolution (for all taps of its kernel), the tokens of an embedding, as if they were
    one-hot, and the hidden units that recurrent weights read. A fused projection of attention reads three: queries,
    keys and values.

    Args:
        model: the module that the weights belong to.
        weights: their dotted names; a tied one may have several.
        witnesses: who looks on.

    Raises:
        ValueError: what a weight reads cannot be seen.
    """

    def __init__(self, model: nn.Module, weights: Iterable[str], witnesses: Sequence[Witness]) -> None:
        self.model, self.witnesses = model, tuple(witnesses)
        # One entry for each input that a weight reads.
        self.told: dict[str, list[dict[Witness, Any]]] = {
            name: [{} for _ in range(3 if name.endswith("in_proj_weight") else 1)] for name in weights
        }
        self._held: list[_Held] = []
        for name in self.told:
            if name.rpartition(".")[2].startswith("weight_hr"):
                raise ValueError(
                    f"Expected weights whose inputs can be seen, got {name}, which reads the cells of an LSTM: leave "
                    "its layer out with `skip`, or choose a score that does not look at inputs."
                )

    @property
    def needs_labels(self) -> bool:
        """Whether `hear` must be told labels."""
        return any(witness.known == "labels" for witness in self.witnesses)

    def has_heard(self, name: str) -> bool:
        """Whether something was gathered of all that a weight reads."""
        return all(told.keys() == set(self.witnesses) for told in self.told[name])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Every forward pass of the model within is recorded, as one step.

        But for those in eval mode, or without gradients, if that is not how things are now: such are the experiments
        and trials of others.
        """
        self._held.clear()
        handles, gradients = [], torch.is_grad_enabled()
        for path in dict.fromkeys(name.rpartition(".")[0] for name in self.told):
            layer = self.model.get_submodule(path)
            watch = partial(self._watch, path, (layer.training, gradients))
            handles.append(layer.register_forward_pre_hook(watch, with_kwargs=True))
        with hooked(handles), module_by_module(self.model):
            yield

    @torch.inference_mode(False)
    @torch.no_grad()
    def hear(self, labels: Tensor | None = None) -> None:
        """What became known in the step that was recorded last; nothing need be said if no witness asks.

        Args:
            labels: of each item of the batch.

        Raises:
            ValueError: labels are missing, or are not there once for each item.
        """
        held, self._held = self._held, []
        if held and labels is None:
            raise ValueError(
                "Expected labels of the step that was recorded, got none: the score compares inputs with them. Pass "
                "them to `hear`."
            )
        for each in held:
            _add(each, labels)

    def forget(self) -> None:
        """Begins anew."""
        for told in (told for parts in self.told.values() for told in parts):
            told.clear()

    def of_entries(self, name: str, size: Callable[[Told], Float[Tensor, "inputs"]]) -> Float[Tensor, "..."]:
        """For each entry of a weight a number of the input that it reads, in a shape that broadcasts to the weight's.

        Args:
            name: of a weight that `has_heard` is true of.
            size: what was gathered of inputs -> one number each.
        """
        weight = self.model.get_parameter(name)
        numbers = torch.cat([size(told) for told in self.told[name]]).float().to(weight.device)
        if _axis(self._layer(name)) == 1:
            numbers = numbers.view(-1, weight.shape[1])
            if len(numbers) > 1:  # the rows of every group read inputs of their own
                numbers = numbers.repeat_interleave(len(weight) // len(numbers), 0)
        return numbers.view(len(numbers), -1, *[1] * (weight.ndim - 2))

    def keep(self, gone: Mapping[tuple[str, int], Int[Tensor, "gone"]], names: Iterable[str]) -> None:
        """Follows a cut, which the model has been through.

        Args:
            gone: (weight, axis) -> the positions along it that were removed.
            names: of the weights that still stand.
        """
        stand = set(names)
        self.told = {name: parts for name, parts in self.told.items() if name in stand}
        for name, parts in self.told.items():
            layer = self._layer(name)
            axis = _axis(layer)
            if (name, axis) in gone:
                before = self.model.get_parameter(name).shape[axis] + len(gone[name, axis])
                stays = torch.ones(before, dtype=torch.bool)
                stays[gone[name, axis]] = False
                groups = layer.groups if isinstance(layer, _ConvNd) and axis == 1 else 1
                for gathered in (gathered for told in parts for gathered in told.values()):
                    gathered.keep(stays.repeat(groups).nonzero().flatten())

    def state_dict(self) -> dict[str, Any]:
        """Tensors only."""
        return {
            name: [[told[w].state_dict() if w in told else None for w in self.witnesses] for told in parts]
            for name, parts in self.told.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name, parts in state.items():
            for told, values in zip(self.told[name], parts, strict=True):
                for witness, gathered in zip(self.witnesses, values, strict=True):
                    if gathered is not None:
                        told[witness] = witness.blank(gathered)
                        told[witness].load_state_dict(gathered)

    def _watch(
        self, path: str, modes: tuple[bool, bool], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A forward pre-hook: adds what the weights of a layer are going to read."""
        if is_aside() or (layer.training, torch.is_grad_enabled()) != modes:
            return
        with torch.inference_mode(False), torch.no_grad():
            for leaf, parts in _read_by(layer, args, kwargs).items():
                name = f"{path}.{leaf}" if path else leaf
                for told, inputs in zip(self.told[name], parts, strict=True) if name in self.told else ():
                    for witness in self.witnesses if inputs.numel() and is_finite(inputs) else ():
                        if isinstance(layer, nn.Embedding):
                            held = _Held(witness, witness.hold_tokens(inputs, layer.num_embeddings), told)
                        else:
                            held = _Held(witness, witness.hold(inputs), told)
                        if witness.known is None:
                            _add(held, None)
                        else:
                            self._held.append(held)

    def _layer(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])


def _add(held: _Held, known: Tensor | None) -> None:
    with torch.autocast(held.inputs.device.type, enabled=False):
        held.told[held.witness] = held.witness.add(held.told.get(held.witness), held.inputs, known)


def _axis(layer: nn.Module) -> int:
    """The axis of a layer's weights along which their inputs lie."""
    first = isinstance(layer, nn.Embedding) or (
        isinstance(layer, _ConvNd) and (layer.transposed or is_depthwise(layer))
    )
    return 0 if first else 1


def _read_by(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """What each weight of a layer reads in one call: (items, positions, inputs), or (items, positions) of tokens."""
    if isinstance(layer, nn.RNNBase):
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        read = heard(layer, given["input"], given.get("hx"))
        packed = isinstance(given["input"], PackedSequence)
        return {leaf: [x.unsqueeze(1) if packed else x] for leaf, x in read.items()}
    if isinstance(layer, nn.MultiheadAttention):
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        q, k, v = (_items_first(given[name], layer.batch_first) for name in ("query", "key", "value"))
        return {"in_proj_weight": [q, k, v], "q_proj_weight": [q], "k_proj_weight": [k], "v_proj_weight": [v]}
    inputs: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).detach()
    if isinstance(layer, nn.Embedding):
        return {"weight": [inputs.reshape(len(inputs), inputs.shape[1:].numel())]}
    if isinstance(layer, _ConvNd):
        batched = inputs if inputs.ndim == layer.weight.ndim else inputs.unsqueeze(0)
        return {"weight": [batched.flatten(2).transpose(1, 2)]}
    batched = inputs if inputs.ndim > 1 else inputs.unsqueeze(0)
    return {"weight": [batched.reshape(len(batched), batched.shape[1:-1].numel(), batched.shape[-1])]}


def _items_first(inputs: Shaped[Tensor, "..."], batch_first: bool) -> Shaped[Tensor, "items steps channels"]:
    """What attention is given, item by item."""
    inputs = inputs.detach()
    if inputs.ndim == 2:
        return inputs.unsqueeze(0)
    return inputs if batch_first else inputs.transpose(0, 1)
