"""The search for what an accuracy allows: hand-worked courses."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_slim import AccuracyBudget, MACs, Magnitude, Pruner, Significant
from lightning_slim.accuracy import AccuracySearch, Trial


def search(*values: float, **kwargs: Any) -> AccuracySearch:
    """One that has heard some values."""
    found = AccuracySearch(AccuracyBudget("acc", **kwargs))
    for value in values:
        found.observe(value)
    return found


def decide(course: AccuracySearch, value: float, epoch: float) -> str:
    course.observe(value)
    verdict = course.verdict(epoch)
    if verdict != "wait":
        course.end(verdict, epoch)
    return verdict


def test_steps_are_shares_of_what_is_left() -> None:
    course = search(0.9, step=0.5)
    course.begin(course.target, 0)
    assert decide(course, 0.895, 1) == "keep"
    assert (course.left, course.target) == (0.5, 0.25)


def test_a_step_that_fails_is_halved_until_it_is_too_small() -> None:
    course = search(0.9, step=0.4, min_step=0.1, patience=1)
    targets = []
    for epoch in range(3):
        targets.append(course.target)
        course.begin(course.target, epoch)
        assert decide(course, 0.8, epoch + 1) == "roll back"
    assert targets == pytest.approx([0.6, 0.8, 0.9])
    assert course.over
    assert course.left == 1.0
    assert [trial.kept for trial in course.trials] == [False] * 3


def test_what_failed_is_not_tried_again() -> None:
    """Where widths are rounded, half of a step may come to the same; after a step that is kept, it is another state."""
    course = search(0.9, step=0.4, patience=1)
    course.begin(0.5, 0)
    assert decide(course, 0.8, 1) == "roll back"
    course.begin(0.5, 1)
    assert course.repeats
    assert course.verdict(1) == "roll back"
    course.end("roll back", 1)
    assert (len(course.trials), course.target) == (1, 0.9)
    course.begin(0.9, 1)
    assert decide(course, 0.9, 2) == "keep"
    course.begin(0.5, 2)
    assert not course.repeats


def test_after_stop_there_is_no_other_step() -> None:
    course = search(0.9, on_failure="stop", patience=1)
    course.begin(0.8, 0)
    assert decide(course, 0.0, 1) == "roll back"
    assert course.over


def test_there_is_time_to_recover() -> None:
    course = search(0.9, patience=3)
    course.begin(0.8, 2.5)
    assert [decide(course, value, epoch) for value, epoch in ((0.1, 3.5), (0.8, 4.5), (0.889, 5.4))] == ["wait"] * 3
    assert decide(course, 0.889, 5.5) == "roll back"
    assert str(course.trials[0]) == "80.0% left, 0.889 against 0.9: rolled back"


def test_the_best_is_that_of_good_states() -> None:
    """A step that is kept may raise it; what is worse, or was rolled back, changes nothing."""
    course = search(0.9, 0.85)
    assert course.reference == 0.9
    course.begin(0.8, 0)
    assert decide(course, 0.95, 1) == "keep"
    assert course.trials == [Trial(1, 0.8, 0.95, 0.9, True)]
    assert course.reference == 0.95
    course.begin(0.7, 1)
    assert decide(course, 0.93, 2) == "wait"


def test_a_loss_is_good_when_it_is_small() -> None:
    course = search(0.5, 0.4, mode="min", max_drop=0.1, patience=1)
    course.begin(0.8, 0)
    assert decide(course, 0.5, 1) == "keep"
    course.begin(0.7, 1)
    assert decide(course, 0.51, 2) == "roll back"


def test_a_reference_that_is_given_counts() -> None:
    course = search(0.9, reference=0.97, patience=1)
    course.begin(0.8, 0)
    assert decide(course, 0.955, 1) == "roll back"


def test_nan_is_never_good() -> None:
    course = search(0.9, patience=1)
    course.begin(0.8, 0)
    assert decide(course, math.nan, 1) == "roll back"


def test_at_the_end_what_was_not_measured_is_rolled_back() -> None:
    course = search(0.9)
    course.begin(0.8, 0)
    assert course.verdict(0.5) == "wait"
    assert course.verdict(0.5, last=True) == "roll back"


def test_a_search_goes_on_where_it_was() -> None:
    course, other = search(0.9, step=0.4), search(step=0.4)
    course.begin(0.6, 0)
    decide(course, 0.91, 1)
    course.begin(0.4, 1)
    other.load_state_dict(course.state_dict())
    assert vars(other) == vars(course)
    assert pickle.loads(pickle.dumps(course.budget)) == course.budget


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "up"}, 'Expected `mode` to be "min" or "max"'),
        ({"on_failure": "cry"}, 'Expected `on_failure` to be "halve" or "stop"'),
        ({"max_drop": -0.1}, "Expected a finite `max_drop` of at least 0, in the unit of 'acc', got -0.1"),
        ({"step": 1.0}, "Expected 0 < `min_step` <= `step` < 1"),
        ({"step": 0.1, "min_step": 0.2}, "Expected 0 < `min_step` <= `step` < 1"),
        ({"patience": 0}, "Expected `patience` of at least 1 epoch, got 0"),
        ({"of": Significant()}, "Expected a budget that counts in `of`"),
    ],
)
def test_bad_budgets(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AccuracyBudget("acc", **kwargs)


def test_a_pruner_alone_hears_no_metric() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="which only the callback `Prune` hears"):
        Pruner(net, Magnitude(), AccuracyBudget("acc"))


def test_a_pruner_leaves_what_is_asked_for_whatever_its_schedule_says() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    pruner = Pruner(net, Magnitude(), MACs(0.05), compensate="none", open_ended=True)
    pruner.prepare(torch.randn(2, 4))
    event = pruner.step(0.0, asked=0.75)
    assert event is not None
    assert (event.asked, event.reached, event.widths) == (0.75, 0.75, {"0": 6})
    assert pruner.step(0.0, asked=0.75) is None
