"""One rule for each kind of operation: what it makes of the labels of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_slim.surgery.operations.algebra import Algebra
from lightning_slim.surgery.operations.labels import Labels, compact, fixed, removable, shrink, support


def names(text: str) -> set[str]:
    """Of operations, one after the other."""
    return set(text.split())


MOVES = names(
    """view _unsafe_view reshape _reshape_alias permute transpose t expand slice select split split_with_sizes unbind
    chunk squeeze unsqueeze alias detach clone _to_copy contiguous flip repeat pixel_shuffle pixel_unshuffle
    channel_shuffle constant_pad_nd diagonal im2col unfold lift_fresh_copy native_channel_shuffle reflection_pad1d
    reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d unsafe_split
    unsafe_split_with_sizes unsafe_chunk view_copy as_strided"""
)
MAKES = names(
    """zeros ones full empty arange rand randn randint randperm scalar_tensor eye linspace new_zeros new_ones new_empty
    new_full empty_strided new_empty_strided uniform normal exponential random"""
)  # the size is a number of the code, which is computed anew
LIKE = names("zeros_like ones_like empty_like full_like rand_like randn_like bernoulli native_dropout tril triu")
REDUCES = names(
    """sum mean amax amin var std var_mean std_mean norm linalg_vector_norm prod any all logsumexp max min aminmax
    nansum"""
)
MIXES = names("mean var std var_mean std_mean norm linalg_vector_norm logsumexp prod")  # it depends on the width
SOFTMAX = names("_softmax _log_softmax _safe_softmax")
ORDERS = names("cumsum cumprod logcumsumexp cummax cummin sort argsort topk kthvalue median mode roll")
TRANSFORMS = {"_fft_r2c", "_fft_c2c", "_fft_c2r"}
PICKS = names(
    """argmax argmin nll_loss_forward nll_loss2d_forward _ctc_loss multi_margin_loss _cdist_forward grid_sampler_2d
    masked_select nonzero"""
)  # the order, or the number of a position, matters
LOSSES = names("mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy soft_margin_loss")
SPATIAL = names(
    """max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d avg_pool3d
    max_pool3d_with_indices adaptive_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_bilinear2d
    _upsample_bilinear2d_aa upsample_bicubic2d upsample_linear1d upsample_trilinear3d _adaptive_avg_pool3d"""
)
WINDOWS = {"avg_pool2d", "avg_pool3d"}
PRODUCTS = {
    "mm": "ik,kj->ij",
    "bmm": "bik,bkj->bij",
    "mv": "ik,k->i",
    "dot": "k,k->",
    "addmm": "ik,kj->ij",
    "baddbmm": "bik,bkj->bij",
    "addmv": "ik,k->i",
    "addbmm": "bik,bkj->ij",
}
NORMS = names(
    """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm
    native_layer_norm native_group_norm _fused_rms_norm _native_batch_norm_legit_functional
    _batch_norm_with_update"""
)
PUTS = {"scatter", "scatter_add", "index_add", "index_put", "scatter_reduce", "index_copy"}
TAKES = {"index", "index_select", "gather", "take_along_dim"}
MORE_POINTWISE = names(
    """masked_fill fill zero rsub _prelu_kernel hardswish log_sigmoid_forward rrelu_with_noise polar real _conj
    fake_quantize_per_tensor_affine_cachemask masked_scatter special_erf"""
)


@dataclass(frozen=True)
class Operation:
    """One operation that was carried out.

    Attributes:
        function: the operator; it can be run on labels.
        name: of it, without the underscore of one that works in place.
        args: its arguments.
        kwargs: its named arguments.
        results: the tensors that it returned.
        of: a tensor's labels.
    """

    function: Callable[..., Any]
    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    results: Sequence[Tensor]
    of: Callable[[Tensor], Labels]

    @property
    def tensors(self) -> list[Tensor]:
        """All that it was given."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def shape(self) -> Sequence[int]:
        """Of its first result."""
        return self.results[0].shape if self.results else ()

    def argument(self, number: int, name: str, default: Any) -> Any:
        """An argument, wherever it was given."""
        return self.args[number] if len(self.args) > number else self.kwargs.get(name, default)


class Rules:
    """What operations make of labels; one that is not understood blocks the positions it meets.

    Args:
        algebra: carries it out.
    """

    def __init__(self, algebra: Algebra) -> None:
        self.algebra, self.positions = algebra, algebra.positions

    def apply(self, op: Operation) -> list[Labels]:
        """The labels of an operation's results; one that is used in an unknown way blocks what it meets."""
        try:
            made = self._apply(op)
        except (RuntimeError, ValueError, IndexError, TypeError):  # of labels, where the operation itself went well
            return self._unknown(op)
        shapes = [[layer.shape for layer in labels.layers] for labels in made]
        fits = len(made) == len(op.results) and all(
            shape == result.shape for of_result, result in zip(shapes, op.results, strict=True) for shape in of_result
        )
        return made if fits else self._unknown(op)

    def _apply(self, op: Operation) -> list[Labels]:
        name, tensors = op.name, op.tensors
        if name in MAKES:
            return [Labels(data="rand" in name) for _ in op.results]
        if name == "lift_fresh":
            return [Labels(fixed(result.shape)) for result in op.results]
        first = op.of(tensors[0]) if tensors else Labels()
        if name in LIKE:
            return [Labels(first.layers, first.data) for _ in op.results]
        if name == "copy":
            source = op.of(tensors[1])
            return [Labels([x.expand(op.shape) for x in source.layers], source.data)]
        if name == "as_strided":
            return [self._strided(op, first)]
        if name in MOVES:
            moved = self.algebra.move(op.function, first, op.args, op.kwargs, name) or [[] for _ in op.results]
            return [Labels(layers, first.data) for layers in moved]
        if name in ("cat", "stack"):
            return [self._join(op)]
        if name in PRODUCTS:
            return [self._product(op)]
        if name == "glu":
            return [self._glu(op, first)]
        if name == "_weight_norm_interface":
            kept = op.argument(2, "dim", 0) % len(op.shape)
            self.algebra.reduce(first.layers, set(range(len(op.shape))) - {kept}, True, name, mixes=True)
            return [self._meet_all(op), op.of(tensors[1])][: len(op.results)]
        if name == "convolution":
            return [self._convolution(op)]
        if name in NORMS:
            return self._norm(op)
        if name in SOFTMAX:
            axis = op.args[1] % max(len(op.shape), 1)
            layers = [layer for layer in first.layers if not self._scattered(layer, axis)]
            self.algebra.reduce(layers, {axis}, True, name, mixes=True)
            return [Labels(layers, first.data)]
        if name in REDUCES and len(tensors) == 1:
            return self._reduce(op, first)
        if name in SPATIAL and tensors[0].dim() == len(op.shape) > 2:
            kept, rest = self._neighbours(op, first) if name in WINDOWS else ([], first.layers)
            return [Labels(kept + self.algebra.spatial(rest, op.shape, name), first.data) for _ in op.results]
        if name in ("view_as_complex", "view_as_real"):
            return [Labels(self._complex(op, first), first.data)]
        if name in ORDERS or name in TRANSFORMS:
            return self._ordered(op, first)
        if name in LOSSES:
            met = self._together(op, torch.broadcast_shapes(*(t.shape for t in tensors)))  # type: ignore[no-untyped-call]
            axes = set(range(max(t.dim() for t in tensors))) if not op.shape else set()
            return [Labels(self.algebra.reduce(met.layers, axes, False, name, mixes=True), met.data)]
        if name in PICKS:
            for layer in first.layers:
                self.positions.block(layer, f"`{name}` picks positions by their values or order")
            return [Labels(fixed(result.shape), True) for result in op.results]
        if name in PUTS:
            return [self._put(op)]
        if name in ("_pack_padded_sequence", "_pad_packed_sequence"):
            return self._pack(op, first)
        if name in TAKES or name == "embedding":
            return [self._take(op)]
        if name == "_embedding_bag":
            return self._bags(op, first)
        if torch.Tag.pointwise in getattr(op.function, "tags", ()) or name in MORE_POINTWISE:
            met = self._meet_all(op)
            return [Labels(met.layers, met.data) for _ in op.results]
        return self._unknown(op)

    def _unknown(self, op: Operation) -> list[Labels]:
        if any(result.numel() for result in op.results):
            for layer in (x for t in op.tensors for x in op.of(t).layers if removable(x)):
                self.positions.block(layer, f"it meets `{op.name}`, which is not understood")
        return [Labels(fixed(r.shape), any(op.of(t).data for t in op.tensors)) for r in op.results]

    def _neighbours(self, op: Operation, first: Labels) -> tuple[list[Tensor], list[Tensor]]:
        """Layers of what is averaged with its neighbours, as in a local response norm, and all others."""
        kernel, stride = op.args[1], op.argument(2, "stride", ()) or op.args[1]
        kept, rest = [], []
        for layer in first.layers:
            axes = support(layer)
            axis = next(iter(axes)) if len(axes) == 1 else 0
            at = axis - layer.dim() + len(kernel)
            if (
                removable(layer)
                and at >= 0
                and stride[at] == 1
                and op.shape[axis] <= layer.shape[axis] - kernel[at] + 1
            ):
                self.positions.note(self.positions.mixed, layer)
                middle = compact(layer).narrow(axis, kernel[at] // 2, op.shape[axis])
                kept.append(middle.expand(op.shape))
            else:
                rest.append(layer)
        return kept, rest

    @staticmethod
    def _strided(op: Operation, first: Labels) -> Labels:
        """Other strides over the same memory. If the tensor itself got them, those that it had are not known."""
        x, made = op.tensors[0], op.results[0]
        if all(layer.shape == made.shape for layer in first.layers):
            return first
        if x is made:
            raise ValueError(f"Expected the shape {tuple(first.layers[0].shape)}, got {tuple(made.shape)}.")
        start, layers = x.storage_offset(), []
        for layer in first.layers:
            memory = torch.zeros(x.untyped_storage().nbytes() // x.element_size(), dtype=torch.long)
            memory.as_strided(x.shape, x.stride(), start).copy_(layer)
            layers.append(shrink(memory.as_strided(made.shape, made.stride(), made.storage_offset()).clone()))
        return Labels(layers, first.data)

    def _meet_all(self, op: Operation) -> Labels:
        """Position by position."""
        return self._together(op, op.shape)

    def _together(self, op: Operation, shape: Sequence[int]) -> Labels:
        layers: list[Tensor] = []
        for tensor in op.tensors:
            layers = self.algebra.meet(layers, [x.expand(shape) for x in op.of(tensor).layers], op.name)
        return Labels(layers, any(op.of(tensor).data for tensor in op.tensors))

    def _complex(self, op: Operation, first: Labels) -> list[Tensor]:
        """The two parts of a number live or die together."""
        layers = []
        for layer in first.layers:
            if op.name == "view_as_real":
                layers.append(layer.unsqueeze(-1).expand(op.shape))
            else:
                if layer.dim() - 1 in support(layer):
                    self.positions.unite(layer, layer[..., :1], op.name)
                layers.append(shrink(layer[..., 0]))
        return layers

    def _scattered(self, layer: Tensor, axis: int) -> bool:
        """Whether some position lies in several rows, at another place in each, as offsets of relative attention do.

        It is no unit of the rows, and must stay.
        """
        if axis not in support(layer) or len(support(layer)) == 1 or not removable(layer):
            return False
        grid = compact(layer).movedim(axis, -1).flatten(0, -2)
        rows = torch.arange(len(grid))[:, None].expand_as(grid)
        pairs = torch.stack([self.positions.find(grid), rows], -1)[grid > 0].unique(dim=0)  # type: ignore[no-untyped-call]
        scattered = len(pairs) > len(pairs[:, 0].unique())
        if scattered:
            self.positions.block(layer, "it is looked up for pairs of places")
        return scattered

    def _ordered(self, op: Operation, first: Labels) -> list[Labels]:
        """What depends on the order along some axes; those along the others are not concerned."""
        size = op.tensors[0].dim()
        given = op.argument(2 if op.name in ("topk", "kthvalue", "roll") else 1, "dim", None)
        given = op.kwargs.get("dims", given)
        if given is None or type(given) is bool:
            given = -1 if op.name in ("sort", "argsort", "topk", "kthvalue", "mode") else list(range(size))
        axes = {axis % max(size, 1) for axis in ([given] if isinstance(given, int) else given)}
        rest = []
        for layer in first.layers:
            if support(layer) & axes:
                self.positions.block(layer, f"`{op.name}` goes by the order along it")
            else:
                rest.append(layer)
        made = []
        for result in op.results:
            if result.dim() == size:
                own = [self._resized(x, axes, result.shape) for x in rest]
                own += fixed(result.shape, axes)
            else:
                own = self.algebra.reduce(rest, axes, False, op.name)
            made.append(Labels(own, first.data))
        return made

    @staticmethod
    def _resized(layer: Tensor, axes: set[int], shape: Sequence[int]) -> Tensor:
        for axis in axes:
            layer = layer.narrow(axis, 0, 1)
        return layer.expand(shape)

    def _bags(self, op: Operation, first: Labels) -> list[Labels]:
        layers = fixed(op.shape, [0])
        for layer in first.layers:
            if 0 in support(layer):
                self.positions.block(layer, f"`{op.name}` picks positions by data")
            else:
                self.positions.note(self.positions.made, layer)
                layers.append(layer[:1].expand(op.shape))
        return [Labels(layers, True), *(Labels(fixed(r.shape), True) for r in op.results[1:])]

    def _reduce(self, op: Operation, first: Labels) -> list[Labels]:
        size = op.tensors[0].dim()
        axes = axes_reduced(op.name, op.args, op.kwargs, size)
        return [
            Labels(self.algebra.reduce(first.layers, axes, r.dim() == size, op.name, op.name in MIXES), first.data)
            for r in op.results
        ]

    def _join(self, op: Operation) -> Labels:
        axis = op.argument(1, "dim", 0) % len(op.shape)
        tensors = [t for t in op.args[0] if op.name == "stack" or t.dim() == len(op.shape)]  # `cat` takes empty vectors
        given = [op.of(tensor) for tensor in tensors]
        if op.name == "stack":
            given = [Labels([x.unsqueeze(axis) for x in labels.layers], labels.data) for labels in given]
            made = self.algebra.cat(given, [1] * len(given), axis, op.shape)
            return Labels(made.layers + fixed(op.shape, [axis]), made.data)  # as many as the code says
        return self.algebra.cat(given, [tensor.shape[axis] for tensor in tensors], axis, op.shape)

    def _product(self, op: Operation) -> Labels:
        adds = "add" in op.name
        a, b = op.args[1:3] if adds else op.args[:2]
        made = self.algebra.contract(op.of(a), op.of(b), PRODUCTS[op.name], (a.shape, b.shape), op.name)
        if not adds:
            return made
        bias = op.of(op.args[0])
        layers = self.algebra.meet(made.layers, [x.expand(op.shape) for x in bias.layers], op.name)
        return Labels(layers, made.data or bias.data)

    def _glu(self, op: Operation, first: Labels) -> Labels:
        axis, width = op.argument(1, "dim", -1) % len(op.shape), 0
        width = op.shape[axis]
        pieces = (None, width, axis)
        moved = self.algebra.move(torch.split, first, pieces, {}, "split")
        layers = self.algebra.meet(moved[0], moved[1], op.name) if moved else []
        return Labels(layers, first.data)

    def _convolution(self, op: Operation) -> Labels:
        x, weight, bias, transposed, groups = *op.args[:3], op.args[6], op.args[8]
        data, own, shape = op.of(x), op.of(weight), op.shape
        sliding = set(range(2, weight.dim()))
        for layer in own.layers:
            if support(layer) and support(layer) <= sliding:
                self.positions.block(layer, "it is an axis of a kernel")
        given = [y for y in self.algebra.spatial(data.layers, x.shape, op.name) if not support(y) & sliding]
        flat = Labels([shrink(y.flatten(2)[..., 0]) for y in given], data.data)
        matrix = Labels([shrink(y.flatten(2)[..., 0]) for y in own.layers if support(y) & {0, 1}], own.data)
        samples, channels, out = x.shape[0], x.shape[1], shape[1]
        if groups == 1:
            letters = "nc,co->no" if transposed else "nc,oc->no"
            sizes = ((samples, channels), tuple(weight.shape[:2]))
            layers = self.algebra.contract(flat, matrix, letters, sizes, op.name).layers
        elif groups == channels:  # depthwise: what comes out of a channel is that channel, or several of it
            layers = self._depthwise(flat, matrix, transposed, out // channels, (samples, out))
        else:
            layers = self._grouped(flat, matrix, transposed, groups, (samples, channels, out))
        layers = [shrink(y).reshape(samples, out, *[1] * (len(shape) - 2)).expand(shape) for y in layers]
        if bias is not None:
            layers = self.algebra.meet(layers, self._along_channels(op.of(bias), shape), op.name)
        return Labels(layers + fixed(shape, range(2, len(shape))), data.data or own.data)

    def _depthwise(
        self, data: Labels, weight: Labels, transposed: bool, times: int, shape: tuple[int, int]
    ) -> list[Tensor]:
        rows = [y[:, 0] if not transposed else y[:, :1].flatten() for y in weight.layers if support(y) == {0}]
        if transposed:
            rows = [y.repeat_interleave(times) for y in rows]
        repeated = [shrink(y.repeat_interleave(times, 1)) for y in data.layers]
        self.algebra.indices = [compact(y) for y in (rows or repeated)[:1] if removable(y)]
        return self.algebra.meet(repeated, [y.reshape(1, shape[1]).expand(shape) for y in rows], "convolution")

    def _grouped(
        self, data: Labels, weight: Labels, transposed: bool, groups: int, sizes: tuple[int, int, int]
    ) -> list[Tensor]:
        samples, channels, out = sizes
        apart = [shrink(y.reshape(samples, groups, channels // groups)) for y in data.layers]
        if transposed:  # (channels, out / groups)
            letters, shape = "ngc,gco->ngo", (groups, channels // groups, out // groups)
        else:
            letters, shape = "ngc,goc->ngo", (groups, out // groups, channels // groups)
        matrix = [shrink(y.reshape(shape)) for y in weight.layers]
        for layer in (*apart, *matrix):
            if removable(layer) and len(support(layer)) > 1:
                self.algebra.split(layer, self.algebra.rows)
        given = (samples, groups, channels // groups)
        made = self.algebra.contract(
            Labels(apart, data.data), Labels(matrix, weight.data), letters, (given, shape), "convolution"
        )
        return [y.reshape(samples, out) for y in made.layers]

    @staticmethod
    def _along_channels(vector: Labels, shape: Sequence[int]) -> list[Tensor]:
        return [y.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape) for y in vector.layers]

    def _norm(self, op: Operation) -> list[Labels]:
        x, shape = op.args[0], op.args[0].shape
        data, layers = op.of(x), op.of(x).layers
        if "layer" in op.name or "rms" in op.name:
            axes = set(range(len(shape) - len(op.args[1]), len(shape)))
            self.algebra.reduce(layers, axes, True, op.name, mixes=True)
            vectors = [[y.expand(shape) for y in op.of(t).layers] for t in op.args[2:4] if isinstance(t, Tensor)]
        else:
            own = op.args[1:5] if "batch" in op.name else op.args[1:3]
            vectors = [self._along_channels(op.of(t), shape) for t in own if isinstance(t, Tensor)]
            if "group" in op.name:
                self._group_norm(layers, shape[1], op.args[6])
        for vector in vectors:
            layers = self.algebra.meet(layers, vector, op.name)
        return [Labels(layers, data.data), *(Labels(fixed(r.shape), data.data) for r in op.results[1:])]

    def _group_norm(self, layers: Sequence[Tensor], channels: int, groups: int) -> None:
        for layer in layers:
            if removable(layer) and 1 in support(layer):
                self.positions.note(self.positions.mixed, layer)
                self.positions.note(self.positions.summed, layer)
                if groups > 1:
                    row = compact(layer).movedim(1, 0).reshape(channels, -1)[:, 0]
                    self.algebra.split(shrink(row.reshape(groups, -1)), self.algebra.rows)

    def _pack(self, op: Operation, first: Labels) -> list[Labels]:
        """Sequences of several lengths end to end, and back: channels stay, steps and items are laid anew."""
        given, made = op.tensors[0].dim(), len(op.shape)
        layers = fixed(op.shape, range(2 if op.name == "_pad_packed_sequence" else 1))
        kept = given - (1 if op.name == "_pad_packed_sequence" else 2)  # axes of channels, which are the last ones
        for layer in first.layers:
            if support(layer) & set(range(given - kept)):
                self.positions.block(layer, f"it is laid anew by `{op.name}`")
            else:
                small = compact(layer).reshape([1] * (made - kept) + list(compact(layer).shape[given - kept :]))
                layers.append(small.expand(op.shape))
        return [Labels(layers, True), *(Labels(fixed(r.shape), True) for r in op.results[1:])]

    def _put(self, op: Operation) -> Labels:
        """Rows are put where an index says."""
        own, source, shape = op.of(op.tensors[0]), op.of(op.tensors[-1]), op.shape
        if op.tensors[-1].dim() != len(shape):
            return Labels(own.layers, True)
        where = op.args[1]
        axes = {where % len(shape)} if isinstance(where, int) else {d for d, i in enumerate(where) if i is not None}
        rest = []
        for layer in source.layers:
            if support(layer) & axes:
                self.positions.block(layer, f"`{op.name}` puts it where an index says")
            else:
                at = tuple(slice(0, 1) if d in axes else slice(None) for d in range(layer.dim()))
                rest.append(layer[at].expand(shape))
        return Labels(self.algebra.meet(own.layers, rest, op.name), True)

    def _take(self, op: Operation) -> Labels:
        own = op.of(op.tensors[0])
        by_data = any(op.of(t).data for t in op.tensors[1:] if not t.is_floating_point())
        layers = []
        for layer in own.layers:
            if op.name == "embedding":
                picked = 0 in support(layer)
                done = layer[0].expand(op.shape)
            else:
                picked = by_data and bool(self._axes_taken(op) & support(layer))
                done = op.function(layer, *op.args[1:], **op.kwargs)
            if removable(layer) and picked:
                self.positions.block(layer, f"`{op.name}` picks positions by data")
                continue
            layers.append(shrink(done))
            if op.name == "embedding":
                self.positions.note(self.positions.made, layer)
        bare = [d for d in range(len(op.shape)) if not any(d in support(x) for x in layers)]
        return Labels(layers + fixed(op.shape, bare), own.data or by_data)

    @staticmethod
    def _axes_taken(op: Operation) -> set[int]:
        if op.name == "index":
            return {axis for axis, index in enumerate(op.args[1]) if index is not None}
        return {op.args[1] % op.tensors[0].dim()} if isinstance(op.args[1], int) else {0}


def axes_reduced(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], size: int) -> set[int]:
    """The axes that a sum, mean or norm sums away, of a tensor of so many."""
    if name in ("norm", "linalg_vector_norm"):
        given = [args[2] if len(args) > 2 else kwargs.get("dim")]
    else:
        named = [kwargs[key] for key in ("dim", "dims", "axis") if key in kwargs]
        given = [a for a in (*args[1:], *named) if isinstance(a, int | list | tuple) and type(a) is not bool]
    chosen = given[0] if given and given[0] is not None else []
    axes = {axis % max(size, 1) for axis in ([chosen] if isinstance(chosen, int) else chosen)}
    return axes or set(range(size))
