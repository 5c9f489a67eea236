"""What operations do to labels: positions meet, are summed away, are contracted, or are moved about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_slim.surgery.operations.labels import Labels, compact, fixed, removable, shrink, support
from lightning_slim.surgery.operations.positions import Positions

VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
COPIES = {"clone", "_to_copy", "contiguous", "alias", "detach", "lift_fresh_copy"}


class Algebra:
    """The arithmetic of labels; what it finds out goes into `positions`.

    Attributes:
        rows: grids of labels (rows, columns): an axis that is looked at as several rows (heads, groups), of which every
            one must lose the same columns.
        indices: of the last product, the labels of its indices that have any.
        parts: the same, of an axis that is split into equal parts, every one of which must lose as many.
    """

    def __init__(self, positions: Positions) -> None:
        self.positions = positions
        self.rows: dict[tuple[int, ...], Tensor] = {}
        self.parts: dict[tuple[int, ...], Tensor] = {}
        self.indices: list[Tensor] = []

    # --- positions meet ---

    def meet(self, first: Sequence[Tensor], second: Iterable[Tensor], operation: str) -> list[Tensor]:
        """Layers of two tensors of one shape that are combined position by position."""
        result, second = list(first), list(second)
        for a in first:
            inside = [b for b in second if removable(b) and removable(a) and support(b) < support(a)]
            if len(inside) > 1:  # (heads, width) against its own two axes: the inner one is the unit, the outer stays
                for b in sorted(inside, key=lambda b: max(support(b)))[:-1]:
                    self.positions.block(b, f"it is the outer axis of a split one in `{operation}`")
                    second = [x for x in second if x is not b]
        own, other = (set[int]().union(*(support(x) for x in side if removable(x))) for side in (first, second))
        for b in second:
            keeps = True
            for i, a in enumerate(first):
                if not support(a) & support(b) or not (support(a) <= support(b) or support(b) <= support(a)):
                    continue
                if not removable(a) and not removable(b):
                    keeps &= not (support(a) == support(b) and torch.equal(compact(a), compact(b)))
                elif self._obliges(a, b, own, other):
                    self.positions.unite(a, b, operation)
                    x, y = torch.broadcast_tensors(compact(result[i]), compact(b))  # type: ignore[no-untyped-call]
                    result[i] = torch.where((x < 0) | ((x > 0) & (y >= 0)), x, y).expand(a.shape)  # what stays wins
                    keeps = False
            if keeps:
                result.append(b)
        return result

    @staticmethod
    def _obliges(a: Tensor, b: Tensor, own: set[int], other: set[int]) -> bool:
        """Whether two layers are of the same positions; fixed rows of a split axis oblige to nothing."""
        if removable(a) and removable(b):
            return True
        if removable(a):
            return not support(b) < support(a) and not support(b) & other
        return not support(a) < support(b) and not support(a) & own

    # --- positions are summed away ---

    def reduce(
        self, layers: Iterable[Tensor], axes: set[int], keepdim: bool, operation: str, mixes: bool = False
    ) -> list[Tensor]:
        """Layers of what is left when some axes are summed away.

        Args:
            layers: of the tensor.
            axes: that go.
            keepdim: whether they stay with size 1.
            operation: its name.
            mixes: whether the result depends on how many there were, as a mean does.
        """
        result = []
        for layer in layers:
            if support(layer) & axes:
                self.positions.note(self.positions.summed, layer)
                if mixes:
                    self.positions.note(self.positions.mixed, layer)
                if not support(layer) - axes:
                    continue
                small = self._left(compact(layer), axes, operation)
                layer = small.expand([1 if axis in axes else n for axis, n in enumerate(layer.shape)])
            else:
                for axis in axes:
                    layer = layer.narrow(axis, 0, 1)
            result.append(layer if keepdim else layer.reshape([n for d, n in enumerate(layer.shape) if d not in axes]))
        return [shrink(layer) for layer in result]

    def _left(self, grid: Tensor, axes: set[int], operation: str) -> Tensor:
        """What the labels of a split axis come to when some of the axes that it was split into are summed away."""
        roots, one = self.positions.find(grid), grid.amax(sorted(axes), keepdim=True)
        if bool(((roots == self.positions.find(one)) | (grid == 0)).all()):
            return one
        left = support(grid) - axes
        first = roots
        for axis in left:
            first = first.narrow(axis, 0, 1)
        if _columns(grid) in axes or bool((roots == first).all()):  # columns went; or whole rows, which are the units
            return -torch.arange(1, one.numel() + 1).reshape(one.shape)
        self.positions.unite(grid, one, operation)
        return one

    # --- positions are contracted ---

    def contract(
        self, a: Labels, b: Labels, letters: str, shapes: tuple[Sequence[int], Sequence[int]], operation: str
    ) -> Labels:
        """A product of tensors, as `torch.einsum` writes it: what meets, and is summed away.

        A tensor of parameters alone reads along the axes that are summed away, and makes along the others.
        """
        (left, right), out = letters.split("->")[0].split(","), letters.split("->")[1]
        joint = out + "".join(sorted((set(left) | set(right)) - set(out)))
        size = {**dict(zip(left, shapes[0], strict=True)), **dict(zip(right, shapes[1], strict=True))}
        gone = set(joint) - set(out)
        aligned = []
        for side, own, whole in ((a, left, a.data or b.data), (b, right, True)):
            spread = []
            for layer in side.layers:
                if not side.data:
                    reads = whole and any(own[axis] in gone for axis in support(layer))
                    self.positions.note(self.positions.read if reads else self.positions.made, layer)
                    if torch.is_grad_enabled():
                        self.positions.note(self.positions.trained, layer)
                layer = layer.permute([own.index(c) for c in joint if c in own])
                layer = layer[tuple(slice(None) if c in own else None for c in joint)]
                spread.append(layer.expand([size[c] for c in joint]))
            aligned.append(spread)
        layers = self.meet(aligned[0], aligned[1], operation)
        self.indices = [compact(layer) for layer in layers if removable(layer)]
        return Labels(self.reduce(layers, {joint.index(c) for c in gone}, False, operation), a.data or b.data)

    # --- positions are moved about ---

    def move(
        self, function: Callable[..., Any], given: Labels, args: Any, kwargs: Any, name: str
    ) -> list[list[Tensor]]:
        """Runs an operation on the layers of its first tensor: for each of its results the layers."""
        outcomes = []
        for layer in given.layers:
            done: Any
            if name in VIEWS:
                done = shrink(layer.reshape(args[1]))
                if removable(layer) and len(support(done)) > len(support(layer)):
                    self.split(done, self.rows)
            elif name in COPIES:
                done = layer
            elif name == "constant_pad_nd":
                done = self._padded(layer, args[1])
            else:
                try:
                    done = function(layer, *args[1:], **kwargs)
                except (RuntimeError, NotImplementedError):  # not of integers
                    done = tree_map(lambda t: t.long(), function(layer.double(), *args[1:], **kwargs))
            if removable(layer) and "split" in name and isinstance(args[1], int):
                axis = args[2] % layer.dim() if len(args) > 2 else 0
                if axis in support(layer) and layer.size(axis) % args[1] == 0 and args[1] > 1:
                    self.split(shrink(compact(layer).movedim(axis, -1).unflatten(-1, (-1, args[1]))), self.parts)  # type: ignore[no-untyped-call]
            results = [shrink(x) for x in (done if isinstance(done, list | tuple) else [done])]
            for result in results:
                if not support(result) and removable(result) and support(layer):
                    self.positions.block(result, f"one position is taken on its own in `{name}`")
            outcomes.append(results)
        return [list(layers) for layers in zip(*outcomes, strict=True)]

    @staticmethod
    def _padded(layer: Tensor, widths: Sequence[int]) -> Tensor:
        """Zeros beside a position are its own, along axes on which labels do not vary."""
        own = support(layer)
        sizes, pads = list(layer.shape), [0] * len(widths)
        for i in range(0, len(widths), 2):
            axis = layer.dim() - 1 - i // 2
            if axis in own:
                pads[i : i + 2] = widths[i : i + 2]
            else:
                sizes[axis] += widths[i] + widths[i + 1]
        return torch.nn.functional.pad(compact(layer).expand(sizes), pads)

    def split(self, layer: Tensor, grids: dict[tuple[int, ...], Tensor]) -> None:
        """Remembers an axis that is looked at as rows."""
        if support(layer):
            grid = compact(layer)
            rows = grid.movedim(max(support(layer)), -1).reshape(-1, grid.shape[max(support(layer))])
            if len(rows) > 1:
                grids[tuple(rows[:, 0].tolist())] = rows

    def spatial(self, layers: Iterable[Tensor], shape: Sequence[int], operation: str) -> list[Tensor]:
        """Batch and channels stay; the rest becomes new positions of fixed number, as in a pooling."""
        result = []
        for layer in layers:
            rest = set(range(2, layer.dim()))
            if support(layer) <= rest and support(layer):
                self.positions.block(layer, f"`{operation}` slides along it")
                continue
            small = compact(layer)
            if rest:
                small = small.amax(list(rest), keepdim=True)  # zeros, as of a padding, are of any position
            self.positions.unite(layer, small, operation)  # (channels * height * width) of a layer: one a channel
            result.append(small.expand([*layer.shape[:2], *shape[2:]]))
        return result + fixed(shape, range(2, len(shape)))

    def cat(self, given: Sequence[Labels], sizes: Sequence[int], axis: int, shape: Sequence[int]) -> Labels:
        """Tensors side by side along an axis."""
        pieces, across = [], list[Tensor]()
        for labels, size in zip(given, sizes, strict=True):
            mine = sorted((x for x in labels.layers if axis in support(x)), key=lambda x: not removable(x))
            for other in mine[1:]:
                self.positions.block(other, "`cat` joins two views of one axis")
            piece = compact(mine[0]) if mine else torch.zeros([1] * len(shape), dtype=torch.long)
            pieces.append((piece, size))
            around = [1 if d == axis else n for d, n in enumerate(shape)]
            rest = [x.narrow(axis, 0, 1).expand(around) for x in labels.layers if axis not in support(x)]
            across = self.meet(across, rest, "cat")
        full = [max(piece.shape[d] for piece, _ in pieces) for d in range(len(shape))]
        spread = [piece.expand([size if d == axis else n for d, n in enumerate(full)]) for piece, size in pieces]
        layer = shrink(torch.cat(spread, axis).expand(shape))
        return Labels([*(x.expand(shape) for x in across), layer], any(labels.data for labels in given))


def _columns(grid: Tensor) -> int:
    """The axis along which the columns lie of labels that were split into rows: neighbours there were neighbours."""
    corner = tuple(slice(0, 2) for _ in range(grid.dim()))

    def gap(axis: int) -> int:
        near = grid[corner].narrow(axis, 0, 1).flatten()[0], grid[corner].narrow(axis, 1, 1).flatten()[0]
        return abs(int(near[0] - near[1])) or grid.numel() + int(grid.abs().max())

    return min(support(grid), key=gap)
