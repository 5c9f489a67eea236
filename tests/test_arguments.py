"""Whatever a user makes says at once what is wrong with an argument: expected, got, what to write instead."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule
from torch import nn

import lightning_slim
from lightning_slim import (
    L1,
    Budget,
    Cubic,
    Distribution,
    Granger,
    GrangerPrune,
    GroupLasso,
    InputScreening,
    Latency,
    MACs,
    Magnitude,
    Masker,
    Pattern,
    Penalty,
    Prune,
    Pruner,
    Regrowth,
    Regularizer,
    Schedule,
    Score,
    Sensitivity,
    Significant,
    SparsityRegularization,
    WeightPrune,
    WeightScore,
    explore,
    sensitivity,
)
from lightning_slim.guards import Guard
from lightning_slim.input_screener import InputScreener
from lightning_slim.selection import Selection

KINDS = (Callback, Budget, Schedule, Score, Penalty, Pattern, WeightScore, Distribution, Regrowth)
PUBLIC = [getattr(lightning_slim, name) for name in lightning_slim.__all__]
MADE = [each for each in PUBLIC if isinstance(each, type) and issubclass(each, KINDS) and not inspect.isabstract(each)]
CALLED = [*MADE, Selection, Guard, Pruner, Masker, Regularizer, InputScreener, explore, sensitivity]
NEEDED = {
    "score": Magnitude(), "penalty": L1(), "strength": 0.1, "monitor": "acc", "model": LightningModule(), "mode": "max",
    "method": "auto", "alpha": 0.05, "lags": 1, "overlap": 1.0, "min_inputs": 1, "protect": [], "names": [],
    "compensate": "none", "budget": MACs(0.5),
}  # fmt: skip


class Other:
    """Nothing that any argument may be."""

    def __repr__(self) -> str:
        return "<something else>"


def arguments() -> Iterator[tuple[Callable[..., Any], str]]:
    for call in CALLED:
        for p in inspect.signature(call).parameters.values():
            if p.kind is not p.VAR_KEYWORD and p.annotation != "Any":
                yield call, p.name


def plainly(call: Callable[..., Any], given: dict[str, Any]) -> None:
    """As users call it: without the checks of shapes that tests put around some constructors."""
    if isinstance(call, type):
        inspect.unwrap(call.__init__)(call.__new__(call), **given)  # type: ignore[misc]
    else:
        call(**given)


@pytest.mark.parametrize("wrong", [Other(), Other, {Other(): 1}], ids=["object", "class", "dictionary"])
@pytest.mark.parametrize(("call", "name"), arguments(), ids=lambda each: getattr(each, "__name__", each))
def test_a_wrong_kind_is_told_when_the_object_is_made(call: Callable[..., Any], name: str, wrong: Any) -> None:
    needed = [p.name for p in inspect.signature(call).parameters.values() if p.default is p.empty]
    given = {other: NEEDED[other] for other in needed if other in NEEDED} | {name: wrong}
    with pytest.raises((TypeError, ValueError), match=rf"^Expected `{name}`.*, got .*"):
        plainly(call, given)


def test_all_that_is_public_is_looked_at() -> None:
    assert {Prune, GrangerPrune, WeightPrune, InputScreening, SparsityRegularization, Sensitivity} < set(MADE)
    assert {kind for kind in KINDS if not any(issubclass(made, kind) for made in MADE)} == set()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MACs("50%"), "`fraction` to be a number or None, got '50%' in MACs: write 0.5."),
        (lambda: GrangerPrune(0.5), "`budget` to be a Budget, got 0.5 in GrangerPrune: write one such as MACs(0.5)."),
        (lambda: GrangerPrune(MACs), "`budget` to be a Budget, got the class MACs in GrangerPrune: write `MACs()`"),
        (
            lambda: GrangerPrune(schedule="cubic"),
            "`schedule` to be a Schedule, got 'cubic' in GrangerPrune: write `C",
        ),
        (lambda: Prune("magnitude"), "`score` to be a Score, got 'magnitude' in Prune: write `Magnitude()`."),
        (lambda: Prune(Magnitude), "`score` to be a Score, got the class Magnitude in Prune: write `Magnitude()`, an"),
        (lambda: Prune(MACs(0.2)), "`score` to be a Score, got MACs(0.2) in Prune: write `budget=MACs(0.2)`."),
        (lambda: Prune(Magnitude(), compensate="fold"), '"none", "mean", "least_squares" or "exact", got \'fold\''),
        (lambda: Prune(Magnitude(), compensate="least squares"), 'write "least_squares".'),
        (lambda: Prune(Magnitude(), skip="head"), "got 'head' in Prune: write ['head']."),
        (lambda: Prune(Magnitude(), Significant()), "a score with p-values"),
        (lambda: GrangerPrune(protect_significant=2.0), "`protect_significant` between 0 and 1, got 2.0"),
        (lambda: GrangerPrune(score=Magnitude()), "write `Prune(score=...)`"),
        (lambda: SparsityRegularization(GroupLasso, 0.1), "got the class GroupLasso"),
        (lambda: MACs(0.5, absolute=1e6), "got both in MACs(0.5, absolute=1000000.0): write MACs(0.5), or MACs(abs"),
        (lambda: Pruner(nn.Sequential(nn.Linear(2, 2)), Granger(), module="body"), "`module=` to be the dotted name"),
        (lambda: Regularizer(nn.Sequential(nn.Linear(2, 2)), L1(), module="body"), "got 'body': its parts are 0."),
    ],
)
def test_the_message_says_what_to_write(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"Expected.*{re.escape(message)}"):
        make()


def test_layers_to_skip_may_be_a_set_and_numbers_may_be_of_numpy() -> None:
    assert Prune(Magnitude(), skip={"head"}).skip == {"head"}
    assert Prune(Magnitude(), skip=frozenset({nn.Linear}), round_to=np.int64(8)).selection.round_to == 8
    assert MACs(np.float32(0.5)).fraction == 0.5


def test_what_a_budget_prints_is_the_call_that_makes_it() -> None:
    budgets = [MACs(0.001), Latency(absolute=2.5), MACs(), Significant()]
    assert [repr(budget) for budget in budgets] == [
        "MACs(0.001)",
        "Latency(absolute=2.5)",
        "MACs(0.5)",
        "Significant(alpha=0.05)",
    ]


def test_a_users_own_child_may_have_fields_of_any_kind() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Wavy(Cubic):
        waves: NotImported = 3

    assert Wavy(start=0.2).waves == 3
    with pytest.raises(TypeError, match="Expected `start`"):
        Wavy(start=None)
