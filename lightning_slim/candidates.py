"""What may go, of all that hangs together in a network; and why the rest may not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import nn

from lightning_slim.costs import Product
from lightning_slim.ranks import Decide
from lightning_slim.scores import Score
from lightning_slim.skipping import Skip, skips
from lightning_slim.surgery import Example, find_blocks
from lightning_slim.surgery.example import Calls, step_of
from lightning_slim.surgery.groups import survey_networks
from lightning_slim.surgery.sites import Survey
from lightning_slim.surgery.verify import pack_up, vet, vet_blocks
from lightning_slim.units import UnitGroup

Granularity = Literal["units", "layers", "both"]
PACK = "it must keep as many units as a layer or direction beside it that stays whole"


@dataclass(frozen=True)
class Wish:
    """What a user allows to go.

    Attributes:
        score: what says how important units are; what it cannot judge stays.
        granularity: `"units"` of layers, whole residual blocks (`"layers"`), or both.
        module: dotted name of the only part that may be cut; all of it if empty.
        skip: what stays whole: names of layers, patterns, or module types (or their names).
        verify: whether to try every group, and leave whole what differs.
    """

    score: Score
    granularity: Granularity = "units"
    module: str = ""
    skip: Skip = ()
    verify: bool = True

    def waits_for(self, model: nn.Module) -> Callable[[str], bool]:
        """Whether a layer that no call reached keeps what it may read: not if the user says that it is left alone."""
        return lambda name: not any(skips(entry, name, model.get_submodule(name)) for entry in self.skip)

    def forbids(self, model: nn.Module, name: str) -> str:
        """Why a layer or block is to stay; empty if it need not."""
        if self.module and not f"{name}.".replace("_orig_mod.", "").startswith(f"{self.module}."):
            return f"it is not in {self.module}"
        if any(skips(entry, name, model.get_submodule(name)) for entry in self.skip):
            return "it is skipped"
        return ""


class Candidates(NamedTuple):
    """What may go.

    Attributes:
        groups: the units.
        left_whole: of all else that was found, name -> why it stays whole.
        unreached: layers that no call reached.
        teachers: names of frozen networks beside what trains, which are not what is shipped.
        products: module -> the products that it was seen to carry out itself.
    """

    groups: list[UnitGroup]
    left_whole: dict[str, str]
    unreached: Sequence[str] = ()
    teachers: Sequence[str] = ()
    products: Mapping[str, Sequence[Product]] = MappingProxyType({})


def find_candidates(model: nn.Module, calls: Mapping[str, Example], wish: Wish, decide: Decide) -> Candidates:
    """Finds what can be removed and may be.

    Args:
        model: the module that will be cut.
        calls: its networks, each with one call.
        wish: what a user allows to go.
        decide: with several processes, what rank 0 comes to.
    """
    found = decide(lambda: survey_networks(model, calls, wish.waits_for(model)))
    units = _find_units(model, calls, wish, decide, found) if wish.granularity != "layers" else Candidates([], {})
    shipped = {name: call for name, call in calls.items() if name not in found.teachers}
    blocks = (
        _find_blocks(model, Calls(shipped, step_of(calls)), wish, decide)
        if wish.granularity != "units"
        else Candidates([], {})
    )
    left_whole = units.left_whole | blocks.left_whole
    return Candidates([*units.groups, *blocks.groups], left_whole, found.unreached, found.teachers, found.products)


def _find_units(
    model: nn.Module, calls: Mapping[str, Example], wish: Wish, decide: Decide, found: Survey
) -> Candidates:
    reasons = {group.name: why for group in found.groups if (why := _unwanted_units(model, group, wish))}
    groups = [group for group in found.groups if group.name not in reasons]
    broken = {group.pack for group in found.groups if group.pack and group.name in reasons}
    reasons |= dict.fromkeys((group.name for group in groups if group.pack in broken), PACK)
    groups = [group for group in groups if group.pack not in broken]
    if wish.verify:

        def tried() -> tuple[dict[str, str], dict[str, str]]:
            unfit = vet(model, groups, calls)
            return unfit, pack_up(model, groups, unfit, calls)

        unfit, packs = decide(tried)
        reasons |= {name: reason for name, reason in unfit.items() if name not in packs}
        groups = [
            replace(group, pack=packs.get(group.name, group.pack))
            for group in groups
            if group.name in packs or group.name not in unfit
        ]
    return Candidates(groups, found.left_whole | reasons)


def _find_blocks(model: nn.Module, calls: Mapping[str, Example], wish: Wish, decide: Decide) -> Candidates:
    def found_by_calls() -> dict[str, UnitGroup]:
        names = {root: f"{root}." if root else "" for root in calls}
        groups = [find_blocks(model.get_submodule(root), call, names[root]) for root, call in calls.items()]
        return {group.name: group for of_call in groups for group in of_call}

    found: dict[str, UnitGroup] = decide(found_by_calls)
    unfit: dict[str, str] = decide(lambda: vet_blocks(model, list(found.values()), calls)) if wish.verify else {}
    unfit |= {path: why for group in found.values() for path in group.blocks if (why := _unwanted(model, path, wish))}
    left = (replace(g, blocks=tuple(path for path in g.blocks if path not in unfit)) for g in found.values())
    return Candidates([group for group in left if group.blocks], unfit)


def _unwanted_units(model: nn.Module, group: UnitGroup, wish: Wish) -> str:
    """Why a group is to stay; empty if it need not."""
    forbidden = {reason for name in group.layers if (reason := wish.forbids(model, name))}
    if forbidden:
        return "it is skipped" if "it is skipped" in forbidden else f"it reaches beyond {wish.module}"
    parameters = dict(model.named_parameters(remove_duplicate=False))
    made = [parameters[s.tensor] for s in group.spans if s.role == "out" and s.tensor in parameters]
    if "made" in wish.score.needs and not made:
        return "no weights make it"
    if wish.score.needs_gradients and not any(parameter.requires_grad for parameter in made):
        return "it is frozen, so no gradient says how important it is"
    if "gates" in wish.score.needs and any(isinstance(model.get_submodule(r.layer), nn.RNNBase) for r in group.readers):
        return "a recurrent layer reads it, and no gate fits in there"
    if wish.score.needs & {"moments", "gates"} and not group.readers:
        return "no linear layer or convolution reads it, so its effect cannot be recorded"
    return ""


def _unwanted(model: nn.Module, block: str, wish: Wish) -> str:
    """Why a block is to stay; empty if it need not."""
    if forbidden := wish.forbids(model, block):
        return forbidden
    if wish.score.needs_gradients and not any(p.requires_grad for p in model.get_submodule(block).parameters()):
        return "it is frozen, so no gradient says how important it is"
    if wish.score.needs_witnesses:
        return f"a whole block arrives nowhere, and that is where {type(wish.score).__name__} looks"
    if "made" in wish.score.needs:
        return f"its weights do not correspond to those of other blocks, so {type(wish.score).__name__} cannot tell"
    return ""
