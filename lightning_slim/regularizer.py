"""Find -> pull -> follow: units are pulled toward zero while a network trains; no Lightning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_slim.arguments import check_arguments
from lightning_slim.candidates import Wish, find_candidates
from lightning_slim.payload import opened, sealed
from lightning_slim.penalties import Penalty, Proximal
from lightning_slim.ranks import Decide
from lightning_slim.scores import Magnitude
from lightning_slim.skipping import Skip, check_module, check_skip
from lightning_slim.surgery import StructureChange
from lightning_slim.surgery.example import workable_calls
from lightning_slim.surgery.layers.norm import scale_spans
from lightning_slim.units import (
    Role,
    Span,
    UnitGroup,
    check_fit,
    columns,
    from_state,
    put_columns,
    renumber,
    to_state,
    weight_spans,
)
from lightning_slim.weight_norm import by_stored, editing, stored, weight

SKIPPED = "it is skipped"  # why candidates are left alone
NEAR_ZERO = 0.01  # of the mean norm that a group's units had at the start
ROLES: dict[str, Role | None] = {"all": None, "made": "out"}


class Regularizer:
    """Adds a penalty's gradients to those of a loss, or shrinks weights behind a step of an optimizer.

    An entry may belong to several units: one that it makes and one that reads it. Gradients of both are added;
    shrinkages are carried out group after group.

    Args:
        model: the module whose tensors the optimizer holds.
        penalty: what is pulled, and how.
        module: dotted name of the only part whose units are pulled; all of it if empty.
        skip: what is left alone: names of layers, patterns such as `"encoder.*"`, or module types (or their names).
        verify: whether every group is tried first, so that only units are pulled that can be removed.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> regularizer = Regularizer(net, GroupLasso())
        >>> regularizer.prepare({"": torch.randn(2, 4)})
        >>> regularizer.add_gradients(net.parameters(), strength=0.1)
        >>> net[0].weight.grad.shape
        torch.Size([8, 4])
    """

    def __init__(
        self, model: nn.Module, penalty: Penalty, *, module: str = "", skip: Skip = (), verify: bool = True
    ) -> None:
        check_arguments(Regularizer, locals())
        self.model, self.penalty, self.verify = model, penalty, verify
        self.confine(module, skip)
        self.prepared = False  # whether the groups are known
        self.groups: list[UnitGroup] = []
        self.left_alone: dict[str, str] = {}
        self.decide: Decide = lambda work: work()  # several processes: what rank 0 comes to
        self._where: dict[str, list[Span]] = {}  # group -> where the entries are that the penalty pulls
        self._start: dict[str, Tensor] = {}  # group -> norms of the units that are there now, as they were then

    # --- find ---

    def confine(self, module: str = "", skip: Skip = ()) -> None:
        """Leaves all but a part of the model alone, and what is skipped.

        Raises:
            ValueError: the model has no such layers.
        """
        check_skip(self.model, skip)
        check_module(self.model, module)
        self.wish = Wish(Magnitude(), module=module, skip=tuple(skip), verify=self.verify)

    @torch.inference_mode(False)
    def prepare(self, networks: Mapping[str, Any]) -> None:
        """Finds what is pulled.

        Args:
            networks: of each network, dotted name -> example inputs.

        Raises:
            ValueError: there is nothing to pull, though nothing is skipped.
        """
        calls = workable_calls(self.model, networks)
        found, self.left_alone, *_ = find_candidates(self.model, calls, self.wish, self.decide)
        self._pull(found)
        self.prepared = True
        if not self.groups and SKIPPED not in self.left_alone.values():
            nothing = {group.name: "it passes no normalisation with a scale" for group in found}
            reasons = "; ".join(f"{name}: {why}" for name, why in {**self.left_alone, **nothing}.items())
            raise ValueError(
                f"Expected units that {type(self.penalty).__name__} can pull, got none in {type(self.model).__name__}: "
                f"choose another penalty, such as `GroupLasso()`, or skip less. {reasons}"
            )
        self._start = self.norms()

    # --- pull ---

    @torch.no_grad()
    def add_gradients(self, parameters: Iterable[Tensor], strength: float) -> None:
        """Adds the gradients of `strength * penalty`, summed over groups, to the `grad` of these parameters.

        Frozen ones are passed over; they count in the norms of their units.
        """
        trained = {id(parameter) for parameter in parameters if parameter.requires_grad}
        for group in self.groups:
            spans, pieces = self._where[group.name], self._pieces(group)
            gradients = _split(strength * self.penalty.gradient(torch.cat(pieces, 1)), pieces)
            for span, piece in zip(spans, gradients, strict=True):
                by_weight = put_columns(torch.zeros_like(weight(self.model, span.tensor)), span, piece)
                for parameter, gradient in by_stored(self.model, span.tensor, by_weight):
                    if id(parameter) in trained:
                        _add(parameter, gradient)

    @torch.no_grad()
    def shrink(self, optimizer: Optimizer, strength: float) -> None:
        """The proximal step of `learning rate * strength * penalty` on what an optimizer has just changed.

        The learning rate is that of each parameter's own group.

        Raises:
            ValueError: the penalty has none in closed form.
        """
        penalty = as_proximal(self.penalty)
        rates = {id(p): float(g["lr"]) for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
        for group in self.groups:
            spans, pieces = self._where[group.name], self._pieces(group)
            rate_of = [rates.get(id(stored(self.model, span.tensor)[0]), 0.0) for span in spans]
            for rate in set(rate_of) - {0.0}:
                shrinkage = _split(penalty.shrinkage(torch.cat(pieces, 1), rate * strength), pieces)
                for span, factors in ((s, f) for s, f, of in zip(spans, shrinkage, rate_of, strict=True) if of == rate):
                    with editing(self.model, span.tensor) as tensor:
                        tensor.mul_(put_columns(torch.ones_like(tensor), span, factors))

    # --- look ---

    @torch.no_grad()
    def value(self) -> float:
        """The penalty at strength 1, summed over groups."""
        return sum(float(self.penalty.value(torch.cat(self._pieces(group), 1))) for group in self.groups)

    @torch.no_grad()
    def norms(self) -> dict[str, Float[Tensor, "units"]]:
        """Norms of the entries that are pulled: group -> one of each unit."""
        return {group.name: torch.cat(self._pieces(group), 1).norm(dim=1).cpu() for group in self.groups}

    def shrunk(self) -> dict[str, float]:
        """Mean norm of each group's units, relative to what the same units had at the start."""
        return {name: float(norms.mean() / self._start[name].mean()) for name, norms in self.norms().items()}

    def near_zero(self) -> dict[str, int]:
        """How many units of each group are below 1 % of the mean norm at the start."""
        norms = self.norms()
        return {name: int((norms[name] <= NEAR_ZERO * self._start[name].mean()).sum()) for name in norms}

    # --- follow, save ---

    def follow(self, change: StructureChange) -> None:
        """Lets the groups follow a cut of the model, whoever made it."""
        own = {group.name for group in self.groups}
        others = [group for group in change.groups if group.name not in own]
        self._pull(group for group in renumber([*self.groups, *others], change.plan) if group.name in own)
        kept = {name: norms[change.plan[name].cpu()] for name, norms in self._start.items() if name in change.plan}
        self._start = {group.name: {**self._start, **kept}[group.name] for group in self.groups}

    def state_dict(self) -> dict[str, Any]:
        """The groups and what their norms were, as tensors and plain data."""
        return sealed({"groups": [to_state(group) for group in self.groups], "start": dict(self._start)})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; the model must have the shapes that it had then."""
        state = opened(state, "a regularizer")
        groups = [from_state(group) for group in state["groups"]]
        check_fit(self.model, groups)
        self._pull(groups)
        self.prepared = bool(self.groups)
        self._start = {name: norms.cpu() for name, norms in state["start"].items()}

    # --- details ---

    def _pull(self, groups: Iterable[UnitGroup]) -> None:
        """From now on the penalty pulls these, as far as there is something to pull."""
        of = self.penalty.of
        spans = {
            group: scale_spans(self.model, group) if of == "scales" else [*weight_spans(self.model, group, ROLES[of])]
            for group in groups
        }
        self.groups = [group for group in spans if spans[group]]
        self._where = {group.name: spans[group] for group in self.groups}

    def _pieces(self, group: UnitGroup) -> list[Float[Tensor, "units fan"]]:
        """What is pulled of each tensor, one unit a row."""
        return [columns(weight(self.model, span.tensor), span) for span in self._where[group.name]]


def as_proximal(penalty: Penalty) -> Proximal:
    """The penalty itself; raises a ValueError if it has no proximal step in closed form."""
    if not isinstance(penalty, Proximal):
        raise ValueError(
            f"Expected a penalty with a proximal step in closed form, got {penalty}: choose `GroupLasso()`, `L1()` or "
            "`NormScaleL1()`, or `proximal=False`."
        )
    return penalty


def _split(rows: Float[Tensor, "units fan"], pieces: list[Tensor]) -> tuple[Tensor, ...]:
    """Rows as wide as all pieces beside each other, piece by piece."""
    return torch.split(rows, [piece.shape[1] for piece in pieces], 1)


def _add(parameter: Tensor, gradient: Tensor) -> None:
    """In place where there is a gradient: DistributedDataParallel may hold a view of it."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)
