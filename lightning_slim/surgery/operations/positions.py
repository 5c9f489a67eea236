"""What is known of every position of every parameter and buffer: which belong together, which must stay, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_slim.surgery.operations.labels import compact


@dataclass(frozen=True)
class Axis:
    """One axis of one parameter or buffer; its position `i` has the label `first + i`.

    Attributes:
        names: of the tensor: a tied one has several.
        number: of the axis.
        first: label of its first position.
        size: number of positions.
    """

    names: tuple[str, ...]
    number: int
    first: int
    size: int

    @property
    def labels(self) -> Tensor:
        """Of its positions."""
        return torch.arange(self.first, self.first + self.size)


class Positions:
    """Disjoint sets of positions (union-find, many at once), and what is noted of them.

    Args:
        model: whose parameters and buffers are labelled.

    Attributes:
        axes: of every tensor; axes of size 1 have no labels.
        made: by label, whether it is a row of a matrix, or a column of an embedding: what comes out.
        read: whether it is a column of a matrix.
        summed: whether some sum takes it in.
        mixed: whether it passes a norm over its own axis.
        trained: whether it was made or read while gradients were on.
        touched: ids of the tensors that any operation took in.
    """

    def __init__(self, model: nn.Module) -> None:
        owners = dict(model.named_modules())
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        names: dict[int, list[str]] = {}
        self.tensors: dict[int, Tensor] = {}
        for name, tensor in named:
            if name.rpartition(".")[0] in owners:
                names.setdefault(id(tensor), []).append(name)
                self.tensors[id(tensor)] = tensor
        self.axes: list[Axis] = []
        self.of_tensor: dict[int, list[Axis]] = {}
        top = 1
        for key, tensor in self.tensors.items():
            shape = () if nn.parameter.is_lazy(tensor) else tensor.shape
            own = self.of_tensor.setdefault(key, [])
            for number, size in enumerate(shape):
                if size > 1:
                    own.append(Axis(tuple(names[key]), number, top, size))
                    top += size
            self.axes += own
        self.parent = torch.arange(top)
        self.made, self.read, self.summed, self.mixed, self.trained = (
            torch.zeros(top, dtype=torch.bool) for _ in range(5)
        )
        self.touched: set[int] = set()
        self._reason = torch.zeros(top, dtype=torch.long)
        self._reasons = [""]

    def find(self, labels: Tensor) -> Tensor:
        """The set of each label, as one of its members; 0 of labels that are none."""
        labels = labels.clamp(min=0)
        found, up = labels, self.parent[labels]
        while not torch.equal(up, found):
            found, up = up, self.parent[up]
        self.parent[labels] = up  # the next time it is one step
        return up

    def join(self, a: Tensor, b: Tensor) -> None:
        """Joins the sets of positive labels, pair by pair."""
        while True:
            a, b = self.find(a), self.find(b)
            a, b = a[a != b], b[a != b]
            if not a.numel():
                return
            self.parent.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")  # one of a set's pairs

    def unite(self, a: Tensor, b: Tensor, operation: str) -> None:
        """Positions that meet live or die together; with one that must stay, they stay."""
        a, b = torch.broadcast_tensors(compact(a), compact(b))  # type: ignore[no-untyped-call]
        for x, y in ((a, b), (b, a)):
            self.block(x[(x > 0) & (y < 0)], f"it meets an input, or another axis of fixed width, in `{operation}`")
        both = (a > 0) & (b > 0)
        self.join(a[both], b[both])

    def note(self, flags: Tensor, layer: Tensor) -> None:
        """Sets a flag of all positions of a layer."""
        labels = compact(layer).flatten()
        flags[labels[labels > 0]] = True

    def block(self, labels: Tensor, reason: str) -> None:
        """Positions that must stay."""
        labels = compact(labels).flatten()
        labels = labels[labels > 0]
        if labels.numel():
            if reason not in self._reasons:
                self._reasons.append(reason)
            fresh = labels[self._reason[labels] == 0]
            self._reason[fresh] = self._reasons.index(reason)

    def reasons(self) -> dict[int, str]:
        """Set -> why it must stay, of those that must; the reason that was found first."""
        blocked = self._reason.nonzero().flatten()
        found: dict[int, int] = {}
        for root, reason in zip(self.find(blocked).tolist(), self._reason[blocked].tolist(), strict=True):
            found[root] = min(found.get(root, reason), reason)
        return {root: self._reasons[reason] for root, reason in found.items()}
