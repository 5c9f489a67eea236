"""Looks on while a network computes, and tells what hangs together in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lightning_slim.eager import eagerly
from lightning_slim.surgery.operations.algebra import Algebra
from lightning_slim.surgery.operations.labels import Labels, along, filled, fixed, shrink, support
from lightning_slim.surgery.operations.memo import Memo
from lightning_slim.surgery.operations.positions import Positions
from lightning_slim.surgery.operations.rules import MOVES, PRODUCTS, Operation, Rules

CLEAN_EVERY = 256  # operations: labels of tensors that are gone are dropped

View = tuple[int, tuple[int, ...], tuple[int, ...]]  # offset, shape, strides


@dataclass
class _Trail:
    """A weighted sum: the weight that makes it, and the batch norms that take it in (0: any other operation)."""

    weight: int
    takers: list[int] = field(default_factory=list)


class Watcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Labels ride along with whatever operations are carried out within.

    Labels are kept by the memory that a tensor looks at, so that what autograd wraps, `detach` and `.data` find them.

    Args:
        model: whose parameters and buffers are labelled.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.positions = Positions(model)
        self.algebra = Algebra(self.positions)
        self.memo = Memo(Rules(self.algebra))
        self.operations = 0
        self.states: set[int] = set()  # memories of the states of recurrent layers
        self.within: list[str] = []  # modules that are running, the innermost last
        self.products: list[tuple[str, int, list[Tensor]]] = []  # module, multiply-accumulates, labels of the indices
        self._trails: dict[int, _Trail] = {}  # memory -> what is known of a weighted sum that lies there
        self._normalised: dict[int, set[int]] = {}  # weight -> norms that alone take in what it makes; 0: anything else
        self._labels: dict[int, dict[View, Labels]] = {}
        self._stored = {_memory(t): t for t in self.positions.tensors.values() if not nn.parameter.is_lazy(t)}
        self._alive: dict[int, StorageWeakRef] = {}
        for key, axes in self.positions.of_tensor.items():
            tensor = self.positions.tensors[key]
            if not nn.parameter.is_lazy(tensor):
                self.put(tensor, Labels([along(axis.number, axis.labels, tensor.shape) for axis in axes]))

    # --- labels of tensors ---

    def of(self, tensor: Tensor) -> Labels:
        """A tensor's labels; one that was never seen is an input, and its positions stay."""
        known = self._labels.get(_memory(tensor), {}).get(_view(tensor))
        if known is None:
            known = Labels(fixed(tensor.shape), data=True)
            self.put(tensor, known)
        return known

    def put(self, tensor: Tensor, labels: Labels) -> None:
        """Gives a tensor labels."""
        memory = _memory(tensor)
        if memory not in self._alive:  # keeps the address from being used anew
            self._alive[memory] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self._labels.setdefault(memory, {})[_view(tensor)] = labels

    def write(self, tensor: Tensor, labels: Labels) -> None:
        """The same, in place: whatever else looks at this memory sees the new labels, too."""
        known = self._labels.setdefault(_memory(tensor), {})
        mine = _view(tensor)
        if mine in known and self.memo.number(known[mine]) == self.memo.number(labels):
            return
        for view, other in list(known.items()):
            if view != mine and tensor.numel() and 0 not in view[1]:
                known[view] = Labels(_overwritten(view, other, mine, labels), labels.data or other.data)
        self.put(tensor, labels)

    def is_state(self, tensor: Tensor) -> bool:
        """Whether a recurrent layer returned it beside its output."""
        return _memory(tensor) in self.states

    def put_state(self, tensor: Tensor, labels: Labels) -> None:
        """Labels the state of a recurrent layer."""
        self.put(tensor, labels)
        self.states.add(_memory(tensor))

    # --- operations ---

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():  # a backward pass says nothing new
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func._can_decompose():  # elsewhere autograd has taken these apart
            with self:
                return func.decompose(*args, **kwargs)
        name = func._overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        labelled = [tensor for tensor in given if _is_strided(tensor)]
        # An operation may write to a tensor, or change its shape.
        before = {id(tensor): self.of(tensor) for tensor in labelled}
        for tensor in labelled:
            self._walk_on(tensor, name, args)
            stored = self._stored.get(_memory(tensor))
            if stored is not None and (name != "clone" or isinstance(stored, nn.Parameter)):  # buffers are put aside
                self.positions.touched.add(id(stored))
        out = self.execute(func, name, args, kwargs) if len(labelled) == len(given) else func(*args, **kwargs)
        in_place = name.endswith("_") and not name.endswith("__")
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if len(labelled) < len(given) or not all(map(_is_strided, results)):
            for layer in (layer for tensor in labelled for layer in self.of(tensor).layers):
                self.positions.block(layer, f"it meets a sparse or nested tensor in `{name}`")
            return out
        plain = name.rstrip("_") if in_place else name
        writes = (in_place and plain not in MOVES) or "out" in kwargs  # `squeeze_` and the like only look anew
        made = self.memo.apply(Operation(func, plain, args, kwargs, results, lambda tensor: before[id(tensor)]))
        if plain in PRODUCTS or plain == "convolution":
            self._count(func, args, kwargs, out)
        for tensor, labels in zip(results, made, strict=True):
            (self.write if writes else self.put)(tensor, labels)
        if plain in ("convolution", "addmm", "mm") and not in_place:
            weight = next((id(self._parameter(t)) for t in args if isinstance(t, Tensor) and self._is_matrix(t)), 0)
            self._trails[_memory(results[0])] = _Trail(weight)
        self.operations += 1
        if self.operations % CLEAN_EVERY == 0:
            for memory in [memory for memory, ref in self._alive.items() if ref.expired()]:  # type: ignore[no-untyped-call]
                del self._alive[memory], self._labels[memory]
                self.states.discard(memory)
                self._end(memory)
        return out

    def _count(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Notes a product, as far as torch counts its floating-point operations (two are one multiply-accumulate)."""
        if not self.model.training and (flops := flop_registry.get(func._overloadpacket)) is not None:
            macs = flops(*args, **kwargs, out_val=out) // 2
            self.products.append((self.within[-1] if self.within else "", macs, list(self.algebra.indices)))

    # --- which batch norm follows which weight ---

    def _is_matrix(self, tensor: Tensor) -> bool:
        return tensor.dim() > 1 and id(self._parameter(tensor)) in self.positions.tensors

    def _parameter(self, tensor: Tensor) -> Tensor:
        """The parameter that a tensor is, or is the transpose of."""
        return self._stored.get(_memory(tensor), tensor) if _is_strided(tensor) else tensor

    def _walk_on(self, tensor: Tensor, name: str, args: Sequence[Any]) -> None:
        trail = self._trails.get(_memory(tensor))
        if trail is None:
            return
        norm = next((self._parameter(t) for t in args[1:5] if isinstance(t, Tensor)), None)
        follows = "batch_norm" in name and tensor is args[0] and norm is not None
        trail.takers.append(id(norm) if follows else 0)

    def _end(self, memory: int) -> None:
        trail = self._trails.pop(memory, None)
        if trail is not None:
            self._normalised.setdefault(trail.weight, set()).update(trail.takers if len(trail.takers) == 1 else [0])

    def normalised(self) -> dict[str, str]:
        """Name of a weight -> name of a tensor of the batch norm that alone takes in what it makes."""
        for memory in list(self._trails):
            self._end(memory)
        names = {
            id(self.positions.tensors[key]): axes[0].names for key, axes in self.positions.of_tensor.items() if axes
        }
        alone = {weight: next(iter(norms)) for weight, norms in self._normalised.items() if len(norms) == 1}
        return {
            name: names[norm][0]
            for weight, norm in alone.items()
            if weight in names and norm in names
            for name in names[weight]
        }

    def execute(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Carries an operation out."""
        return func(*args, **kwargs)


def _is_strided(tensor: Tensor) -> bool:
    """Sparse and nested tensors have no memory of their own shape, and carry no labels."""
    return tensor.layout == torch.strided and not tensor.is_nested


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _view(tensor: Tensor) -> View:
    return int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())


def _overwritten(view: View, other: Labels, written: View, labels: Labels) -> list[Tensor]:
    """Layers of one view of some memory after another view of it was written to."""
    offset, shape, stride = view
    reach = 1 + max(o + sum((n - 1) * s for n, s in zip(z, t, strict=True)) for o, z, t in (view, written))
    rest, layers = [shrink(layer.contiguous()) for layer in other.layers], []
    for new in labels.layers:
        flat = torch.zeros(reach, dtype=torch.long)
        for old in list(rest):  # go on with the layer that varies along the same axes
            trial = torch.zeros(reach, dtype=torch.long)
            trial.as_strided(shape, stride, offset).copy_(old)
            here = support(shrink(trial.as_strided(written[1], written[2], written[0])))
            along_same = not here and support(old) & support(new) and len(shape) == new.dim()
            if here & support(new) or along_same:
                flat, rest = trial, [layer for layer in rest if layer is not old]
                break
        flat.as_strided(written[1], written[2], written[0]).copy_(new)
        layers.append(shrink(filled(flat.as_strided(shape, stride, offset).clone())))
    return layers + rest


@contextmanager
def slowly() -> Iterator[None]:
    """No fused kernels, of which only the result would be seen."""
    with eagerly(), torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield
