"""What every score promises, for every subclass there is."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import get_args

import pytest
import torch
from torch import Tensor

from lightning_slim.recording import Effect
from lightning_slim.scores import Evidence, GeometricMedian, Granger, Magnitude, Random, Reading, Score, Taylor
from lightning_slim.statistics import JointMoments, Moments
from lightning_slim.witness import Gathered, Witness

SCORES = Score.__subclasses__()
UNITS = 8
# With an error that says so.
REFUSED = [(kind, "blocks") for kind in SCORES if kind is GeometricMedian or kind().needs_witnesses]
KINDS = ["channels", "heads", "blocks"]  # what the units are
SCORED = [(kind, units) for kind in SCORES for units in KINDS if (kind, units) not in REFUSED]


def evidence(score: Score, dead: bool = False, kind: str = "channels") -> Evidence:
    """Random evidence of eight units; if `dead`, unit 3 is always zero. Heads are read by a second layer, too."""
    generator = torch.Generator().manual_seed(1)
    width = 2 if kind == "heads" else 1
    x = torch.randn(200, UNITS, width, generator=generator)
    x = torch.einsum("rvc,vu->ruc", x, torch.randn(UNITS, UNITS, generator=generator))
    weights = torch.randn(UNITS, 5 * width, generator=generator)
    effects = dict(zip(get_args(Effect), torch.rand(5, UNITS, generator=generator), strict=True))
    gone = (torch.rand(300, UNITS, generator=generator) < 0.1).double()
    made = None if kind == "blocks" else torch.randn(UNITS, 7, generator=generator)
    scales = torch.rand(UNITS, 0 if kind == "blocks" else 2, generator=generator)
    if dead:
        x[:, 3], weights[3], scales[3], gone[:, 3] = 0, 0, 0, 0
        effects = {name: effect.index_fill(0, torch.tensor(3), 0) for name, effect in effects.items()}
        if made is not None:
            made[3] = 0
    if kind == "heads":
        weight = weights.view(UNITS * width, 5)
        readings = (
            Reading(streamed(x.flatten(1)), weight, width, told(score, x.flatten(1))),
            Reading(streamed(x[:, :, 0]), weights, told=told(score, x[:, :, 0])),
        )
    else:
        lags = 0 if kind == "blocks" else score.lags
        past = torch.stack([x[:, :, 0].roll(lag, 0) for lag in range(lags + 1)], -1).flatten(1)
        if kind == "blocks":
            readings = (Reading(streamed(past), torch.ones(UNITS, 1)),)
        else:
            readings = (Reading(streamed(past), weights, told=told(score, x[:, :, 0])),)
    gates = JointMoments(UNITS, 1)
    gates.update(gone, gone.sum(1, keepdim=True) + 0.1 * torch.randn(300, 1, generator=generator))
    draws = torch.Generator().manual_seed(2)
    return Evidence(weights, readings, effects, made, scales, generator=draws, gates=gates)


def told(score: Score, x: Tensor) -> dict[Witness, Gathered]:
    """What the score's witnesses gather of twenty items of ten steps each: the first half is positive, and so on."""
    items = x.relu().view(20, 10, -1)
    known = {
        "labels": (torch.arange(20) >= 10).long(),
        "outputs": items[:, :, :2].roll(1, 1) + items.sum(2, keepdim=True),
        "losses": items.sum((1, 2)),
        None: None,
    }
    gathered = {}
    for witness in score.witnesses:
        held = witness.hold(items)
        gathered[witness] = witness.add(None, held, known[witness.known])
        for shift in range(1, 60):
            if not witness.enough(gathered[witness]):
                held = witness.hold(items.roll(shift, 0)[:10])
                gathered[witness] = witness.add(gathered[witness], held, items.roll(shift, 0)[:10].sum((1, 2)))
    return gathered


def streamed(rows: Tensor) -> Moments:
    moments = Moments(rows.shape[1])
    moments.update(rows)
    return moments


def permuted(given: Evidence, order: Tensor) -> Evidence:
    """The same evidence with its units in another order."""

    def of(reading: Reading) -> Reading:
        moments = copy.deepcopy(reading.moments)
        width = len(moments.total) // UNITS
        moments.keep((order[:, None] * width + torch.arange(width)).flatten())
        weight = reading.weight.view(UNITS, reading.channels, -1)[order].flatten(0, 1)
        seen = copy.deepcopy(reading.told)
        for gathered in seen.values():
            gathered.keep((order[:, None] * reading.channels + torch.arange(reading.channels)).flatten())
        return Reading(moments, weight, reading.channels, seen)

    tensors = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    moved = {name: value[order] for name, value in tensors.items() if isinstance(value, Tensor)}
    moved["effects"] = {name: effect[order] for name, effect in given.effects.items()}
    moved["gates"] = copy.deepcopy(given.gates)
    moved["gates"].keep(order)
    return dataclasses.replace(given, readings=tuple(map(of, given.readings)), **moved)


@pytest.mark.parametrize(("kind", "units"), SCORED)
def test_importance_is_finite_not_negative_and_one_a_unit(kind: type[Score], units: str) -> None:
    for dead in (False, True):
        importance = kind()(evidence(kind(), dead, units)).importance
        assert importance.shape == (UNITS,)
        assert importance.isfinite().all()
        assert (importance >= 0).all()


@pytest.mark.parametrize(("kind", "units"), [(kind, units) for kind, units in SCORED if kind is not Random])
def test_a_dead_unit_has_importance_zero(kind: type[Score], units: str) -> None:
    importance = kind()(evidence(kind(), True, units)).importance
    assert importance[3] == 0
    assert (importance > 0).sum() == UNITS - 1


@pytest.mark.parametrize(("kind", "units"), [(kind, units) for kind, units in SCORED if kind is not Random])
def test_units_are_scored_the_same_in_any_order(kind: type[Score], units: str) -> None:
    given, order = evidence(kind(), kind=units), torch.randperm(UNITS)
    torch.testing.assert_close(kind()(permuted(given, order)).importance, kind()(given).importance[order])


@pytest.mark.parametrize(("kind", "units"), SCORED)
def test_the_same_evidence_gives_the_same_scores(kind: type[Score], units: str) -> None:
    assert torch.equal(*(kind()(evidence(kind(), kind=units)).importance for _ in range(2)))


@pytest.mark.parametrize(("kind", "units"), REFUSED)
def test_units_of_the_wrong_kind_are_refused(kind: type[Score], units: str) -> None:
    with pytest.raises(ValueError, match=r"Expected .*, got .*: choose"):
        kind()(evidence(kind(), kind=units))


@pytest.mark.parametrize("kind", [kind for kind in SCORES if "moments" in kind().needs and kind is not Granger])
def test_without_a_record_what_is_missing_is_said(kind: type[Score]) -> None:
    with pytest.raises(ValueError, match="got none: run the network within"):
        kind()(Evidence(torch.ones(2, 1)))


@pytest.mark.parametrize("kind", SCORES)
def test_it_is_frozen_and_survives_a_pickle(kind: type[Score]) -> None:
    assert pickle.loads(pickle.dumps(kind())) == kind()
    assert dataclasses.is_dataclass(kind)
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError, AttributeError)):
        kind().something = 1  # type: ignore[attr-defined]


def test_magnitude_by_hand() -> None:
    given = Evidence(torch.tensor([[3.0, -4.0], [1.0, 0.0]]))
    assert Magnitude()(given).importance.tolist() == pytest.approx([5.0, 1.0])
    assert Magnitude(p=1.0)(given).importance.tolist() == pytest.approx([7.0, 1.0])


def test_taylor_is_the_recorded_saliency() -> None:
    given = Evidence(torch.ones(2, 1), effects={"saliency": torch.tensor([0.25, 0.5])})
    assert Taylor()(given).importance.tolist() == [0.25, 0.5]


def test_granger_importance_is_the_share_unexplained_when_chosen() -> None:
    x = torch.randn(4000, 3, dtype=torch.float64)
    moments = Moments(3)
    moments.update(x / x.std(0))
    weight = torch.tensor([[2.0], [1.0], [0.0]])
    importance = Granger(lags=0)(Evidence(weight, (Reading(moments, weight),))).importance
    torch.testing.assert_close(importance, torch.tensor([1.0, 0.2, 0.0], dtype=torch.float64), atol=0.05, rtol=0)


@pytest.mark.parametrize(("make", "message"), [(lambda: Granger(lags=-1), "lags"), (lambda: Magnitude(p=0.0), "norm")])
def test_bad_arguments_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
