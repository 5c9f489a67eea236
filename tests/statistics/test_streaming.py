"""The laws of streaming, over every accumulator there is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import lightning_slim.statistics as package
from lightning_slim.statistics.anova import Anova
from lightning_slim.statistics.chi_square import ChiSquare
from lightning_slim.statistics.clustered import ClusteredPanel
from lightning_slim.statistics.correlation import Correlation, MultilabelAnova
from lightning_slim.statistics.dumitrescu_hurlin import DumitrescuHurlin
from lightning_slim.statistics.frequency import Frequency
from lightning_slim.statistics.information import MutualInformation
from lightning_slim.statistics.joint import JointMoments
from lightning_slim.statistics.kruskal import KruskalWallis
from lightning_slim.statistics.moments import Moments
from lightning_slim.statistics.panel import PanelGranger
from lightning_slim.statistics.panel_rows import PanelDesign
from lightning_slim.statistics.spread import Spread
from lightning_slim.statistics.streaming import Accumulator, Pivoted

UNITS, CLASSES, BATCHES, ROWS = 6, 4, 6, 20
KEPT = torch.tensor([4, 0, 3])


@dataclass(frozen=True)
class Case:
    """How an accumulator is made, with which units, and what a batch of it looks like."""

    make: Callable[[Tensor], Accumulator]
    batch: Callable[[], tuple[Tensor, ...]]
    whole: bool = True  # its result does not depend on how rows come in batches


def values() -> Tensor:
    """Rows of a dead unit, a unit beside a large mean, a tiny one, and ordinary ones."""
    rows = torch.randn(ROWS, UNITS, dtype=torch.float64)
    rows[:, 1] = 0.1
    rows[:, 3] += 1e5
    rows[:, 4] *= 1e-9
    return rows


def labels() -> Tensor:
    return torch.randint(CLASSES - 1, (ROWS,))  # the last class has no rows


def sequences() -> tuple[Tensor, ...]:
    units = torch.stack([values() for _ in range(12)], 1)
    mask = torch.arange(12) < torch.randint(4, 13, (ROWS, 1))
    return units, units[..., [0, 5]].roll(1, 1) + torch.randn(ROWS, 12, 2), mask.sum(1)


EDGES = torch.linspace(-1, 1, 4, dtype=torch.float64).repeat(UNITS, 1)
CASES = {
    Anova: Case(lambda units: Anova(CLASSES, len(units)), lambda: (values(), labels())),
    ChiSquare: Case(lambda units: ChiSquare(CLASSES, len(units)), lambda: (values().abs(), labels())),
    Correlation: Case(lambda units: Correlation(2, len(units)), lambda: (values(), torch.randn(ROWS, 2).double() + 50)),
    MultilabelAnova: Case(lambda units: MultilabelAnova(3, len(units)), lambda: (values(), torch.rand(ROWS, 3) > 0.5)),
    MutualInformation: Case(lambda units: MutualInformation(EDGES[units], CLASSES), lambda: (values(), labels())),
    Moments: Case(lambda units: Moments(len(units)), lambda: (values(),)),
    PanelGranger: Case(lambda units: PanelGranger(len(units), 2, PanelDesign(lags=2)), sequences, whole=False),
    ClusteredPanel: Case(lambda units: ClusteredPanel(len(units), 2), sequences, whole=False),
    Spread: Case(lambda units: Spread(len(units)), lambda: (values(),)),
    Frequency: Case(lambda units: Frequency(len(units)), lambda: (values().relu(),)),
    JointMoments: Case(
        lambda units: JointMoments(len(units), 2), lambda: (values(), torch.randn(ROWS, 2).double() + 9)
    ),
    DumitrescuHurlin: Case(lambda units: DumitrescuHurlin(len(units), 2), sequences, whole=False),
    KruskalWallis: Case(lambda units: KruskalWallis(EDGES[units], CLASSES), lambda: (values(), labels())),
}
ALL = torch.arange(UNITS)


def accumulators(base: type = Accumulator) -> Iterator[type]:
    """All concrete accumulators of the package."""
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    for kind in base.__subclasses__():
        yield from accumulators(kind)
        if not inspect.isabstract(kind) and kind.__module__.startswith(package.__name__):
            yield kind


def test_every_accumulator_is_under_contract() -> None:
    assert set(accumulators()) == set(CASES)


every = pytest.mark.parametrize("case", CASES.values(), ids=[kind.__name__ for kind in CASES])


def stream(case: Case, batches: list[tuple[Tensor, ...]], units: Tensor = ALL) -> Accumulator:
    accumulator = case.make(units)
    for first, *rest in batches:
        accumulator.update(first[..., units], *rest)
    return accumulator


def batches(case: Case, number: int = BATCHES) -> list[tuple[Tensor, ...]]:
    return [case.batch() for _ in range(number)]


def close(one: Accumulator, other: Accumulator) -> None:
    for mine, theirs in zip(one.result(), other.result(), strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs), rtol=1e-9, atol=1e-12)


def nan(result: tuple[Tensor | float, ...]) -> bool:
    return any(bool(torch.as_tensor(part).isnan().any()) for part in result)


def without(mine: Tensor, theirs: Tensor, units: Tensor) -> Tensor:
    """Those units, along every axis on which the other tensor has fewer."""
    for axis, (more, fewer) in enumerate(zip(mine.shape, theirs.shape, strict=True)):
        mine = mine.index_select(axis, units) if more != fewer else mine
    return mine


def joined(parts: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    return [tuple(torch.cat(column) for column in zip(*parts, strict=True))]


@every
def test_a_stream_equals_all_rows_at_once(case: Case) -> None:
    parts = batches(case)
    close(stream(case, parts), stream(case, joined(parts) if case.whole else parts[::-1]))


@every
def test_two_streams_merge_into_one(case: Case) -> None:
    parts = batches(case)
    merged, second = stream(case, parts[:2]), stream(case, parts[2:])
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    merged.merge(second)
    close(merged, stream(case, parts))
    assert all(torch.equal(before[name], tensor) for name, tensor in second.state_dict().items())


@every
def test_merging_an_empty_stream_changes_nothing_either_way(case: Case) -> None:
    parts = batches(case)
    full, empty = stream(case, parts), case.make(ALL)
    full.merge(case.make(ALL))
    empty.merge(full)
    close(full, stream(case, parts))
    close(empty, full)
    close(stream(case, []), case.make(ALL))


@every
def test_an_empty_stream_goes_on_after_merging(case: Case) -> None:
    parts = batches(case)
    empty = case.make(ALL)
    empty.merge(case.make(ALL))
    empty.merge(stream(case, parts[:1]))
    for part in parts[1:]:
        empty.update(*part)
    close(empty, stream(case, parts))


@every
def test_ranks_are_reduced_by_adding_sums(case: Case) -> None:
    parts = batches(case)
    first, second = stream(case, parts[:3]), stream(case, parts[3:])
    if isinstance(second, Pivoted) and isinstance(first, Pivoted):
        second.move_pivots(first.pivots)
    for name, tensor in first.sums.items():
        tensor += second.sums[name]  # as an all-reduce does, in place
    close(first, stream(case, parts))


@every
def test_keeping_units_equals_never_having_had_the_others(case: Case) -> None:
    parts = batches(case)
    kept = stream(case, parts[:3])
    kept.keep(KEPT)
    for first, *rest in parts[3:]:
        kept.update(first[..., KEPT], *rest)
    close(kept, stream(case, parts, KEPT))
    whole = stream(case, parts)
    whole.keep(KEPT)  # to record and then cut is to cut and then record
    close(whole, kept)


@every
def test_an_empty_batch_changes_nothing(case: Case) -> None:
    parts = batches(case, 2)
    nothing = tuple(part[:0] for part in parts[0])
    close(stream(case, [nothing, parts[0], nothing, parts[1]]), stream(case, parts))


@every
def test_a_saved_stream_goes_on_bitwise(case: Case, tmp_path) -> None:
    parts = batches(case)
    saved = stream(case, parts[:3], KEPT)
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    loaded = case.make(ALL)  # of another width: a cut comes between
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in (saved, loaded):
        for first, *rest in parts[3:]:
            one.update(first[..., KEPT], *rest)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    assert all(bool((torch.as_tensor(x) == y).all()) for x, y in zip(saved.result(), loaded.result(), strict=True))


@every
def test_a_stream_saved_before_its_first_batch_goes_on(case: Case) -> None:
    parts, loaded = batches(case), case.make(ALL)
    loaded.load_state_dict(case.make(ALL).state_dict())
    for part in parts:
        loaded.update(*part)
    close(loaded, stream(case, parts))


@every
def test_state_is_float64_and_has_an_axis(case: Case) -> None:
    state = stream(case, batches(case)).state_dict()
    assert all(tensor.dtype == torch.float64 and tensor.dim() >= 1 for tensor in state.values())


@every
def test_nothing_seen_is_defined(case: Case) -> None:
    assert not nan(case.make(ALL).result())


@every
def test_one_batch_of_one_row_is_defined(case: Case) -> None:
    accumulator = stream(case, [tuple(part[:1] for part in case.batch())])
    assert not nan(accumulator.result())


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_harms_its_own_unit_only(case: Case, bad: float) -> None:
    parts, others = batches(case), torch.tensor([0, 1, 3, 4, 5])
    expected = stream(case, parts, others)
    parts[1][0][3].view(-1, UNITS)[0, 2] = bad
    result = stream(case, parts).result()
    assert not nan(result)
    for mine, theirs in zip(map(torch.as_tensor, result), map(torch.as_tensor, expected.result()), strict=True):
        torch.testing.assert_close(without(mine, theirs, others), theirs, rtol=1e-9, atol=1e-12)


@every
def test_other_units_are_refused(case: Case) -> None:
    first, *rest = case.batch()
    with pytest.raises(ValueError, match=f"made for {UNITS} units, got {UNITS - 1}: make a new one, or `keep`"):
        case.make(ALL).update(first[..., 1:], *rest)


@every
def test_streams_of_other_units_or_kinds_do_not_merge(case: Case) -> None:
    class Other(Anova):
        pass

    with pytest.raises(ValueError, match=r"same units and classes: expected .* got"):
        case.make(ALL).merge(case.make(KEPT))
    with pytest.raises(ValueError, match=r"Only streams of one statistic merge: expected \w+, got Other"):
        case.make(ALL).merge(Other(CLASSES, UNITS))


@every
def test_float32_and_bfloat16_are_taken(case: Case) -> None:
    accumulator = case.make(ALL)
    for dtype in (torch.float32, torch.bfloat16):
        first, *rest = case.batch()
        accumulator.update(first.to(dtype), *rest)
    assert not nan(accumulator.result())


def test_streams_of_other_edges_do_not_merge() -> None:
    with pytest.raises(ValueError, match="make both with the same `edges`"):
        KruskalWallis(EDGES, CLASSES).merge(KruskalWallis(2 * EDGES, CLASSES))


def test_pivots_far_apart_merge_exactly() -> None:
    """Two streams of one unit, of which each sees another level: the pivots differ by a hundred thousand spreads."""
    x, y = torch.randn(50, 1, dtype=torch.float64), torch.randint(2, (50,))
    low, high, both = Anova(3, 1), Anova(3, 1), Anova(3, 1)
    low.update(x, y)
    high.update(x + 1e5, y + 1)
    both.update(torch.cat([x, x + 1e5]), torch.cat([y, y + 1]))
    low.merge(high)
    torch.testing.assert_close(low.result().statistic, both.result().statistic, rtol=1e-9, atol=0)
