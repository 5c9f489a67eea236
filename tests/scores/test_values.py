"""Scores of evidence that is small enough to work by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_slim.scores import (
    ActivationMean,
    ActivationStd,
    BatchNormScale,
    Combined,
    Evidence,
    Fisher,
    GeometricMedian,
    Granger,
    Lamp,
    Magnitude,
    MagnitudeTimesStd,
    Reading,
    Taylor,
    Wanda,
)
from lightning_slim.statistics import Moments

# Two units, two rows: means 2 and -3, standard deviations 1 and 3.
ROWS = torch.tensor([[1.0, 0.0], [3.0, -6.0]])


def reading(rows: Tensor, weight: Tensor, channels: int = 1) -> Reading:
    moments = Moments(rows.shape[1])
    moments.update(rows)
    return Reading(moments, weight, channels)


def of(*readings: Reading) -> Evidence:
    return Evidence(torch.ones(2, 1), readings)


def test_activation_mean_is_the_absolute_mean_of_what_arrives() -> None:
    once = reading(ROWS, torch.ones(2, 4))
    assert ActivationMean()(of(once)).importance.tolist() == pytest.approx([2.0, 3.0])
    again = reading(-3 * ROWS, torch.ones(2, 1))
    assert ActivationMean()(of(once, again)).importance.tolist() == pytest.approx([4.0, 6.0])


def test_activation_std_is_the_spread_of_what_arrives() -> None:
    once = reading(ROWS, torch.ones(2, 4))
    assert ActivationStd()(of(once)).importance.tolist() == pytest.approx([1.0, 3.0])
    again = reading(-3 * ROWS + 7, torch.ones(2, 1))
    assert ActivationStd()(of(once, again)).importance.tolist() == pytest.approx([2.0, 6.0])


def test_channels_of_a_head_count_together() -> None:
    """Head 0 has the channels of ROWS, head 1 twice these."""
    heads = reading(torch.cat([ROWS, 2 * ROWS], 1), torch.ones(4, 1), channels=2)
    assert ActivationMean()(of(heads)).importance.tolist() == pytest.approx([2.5, 5.0])
    expected = torch.tensor([5.0, 20.0], dtype=torch.float64).sqrt()  # of (1 + 9) / 2, four times that
    torch.testing.assert_close(ActivationStd()(of(heads)).importance, expected)


@pytest.mark.parametrize(
    "score", [ActivationMean(), ActivationStd(), MagnitudeTimesStd(), Wanda()], ids=lambda score: type(score).__name__
)
def test_the_past_of_a_unit_does_not_count(score) -> None:
    with_past = torch.stack([ROWS, 100 * torch.ones(2, 2) + ROWS], -1).flatten(1)
    weight = torch.ones(2, 4)
    expected = score(of(reading(ROWS, weight))).importance
    torch.testing.assert_close(score(of(reading(with_past, weight))).importance, expected)


def test_magnitude_times_std_is_the_spread_of_a_units_share_in_what_its_readers_compute() -> None:
    rows = torch.randn(50, 6)  # three heads of two channels, read by two layers
    first, second = torch.randn(6, 5), torch.randn(6, 2)
    given = Evidence(torch.ones(3, 1), (reading(rows, first, 2), reading(rows, second, 2)))
    alone = rows[:, :, None] * torch.cat([first, second], 1)  # row, column, target
    expected = alone.var(0, correction=0).sum(1).view(3, 2).sum(1).sqrt().double()
    torch.testing.assert_close(MagnitudeTimesStd()(given).importance, expected, rtol=1e-5, atol=0)


def test_magnitude_times_std_by_hand() -> None:
    weight = torch.tensor([[3.0, -4.0], [1.0, 0.0]])
    assert MagnitudeTimesStd()(of(reading(ROWS, weight))).importance.tolist() == pytest.approx([5.0, 3.0])
    twice = of(reading(ROWS, weight), reading(ROWS, weight))
    torch.testing.assert_close(MagnitudeTimesStd()(twice).importance, torch.tensor([5.0, 3.0]).double() * 2**0.5)


def test_wanda_sums_weights_times_the_size_of_what_they_read() -> None:
    rows = torch.tensor([[1.0, 0.0], [7.0, 2.0]])  # root mean squares 5 and sqrt 2
    weight = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    expected = torch.tensor([15.0, 3 * 2**0.5], dtype=torch.float64)
    torch.testing.assert_close(Wanda()(of(reading(rows, weight))).importance, expected)
    torch.testing.assert_close(Wanda()(of(*[reading(rows, weight)] * 2)).importance, 2 * expected)


def test_wanda_of_heads_equals_a_loop_over_single_weights() -> None:
    rows, weight = torch.randn(50, 6) + 1, torch.randn(6, 5)
    expected = [
        sum(weight[j, i].abs() * rows[:, j].square().mean().sqrt() for j in (2 * unit, 2 * unit + 1) for i in range(5))
        for unit in range(3)
    ]
    given = Evidence(torch.ones(3, 1), (reading(rows, weight, 2),))
    torch.testing.assert_close(Wanda()(given).importance, torch.stack(expected).double(), rtol=1e-5, atol=0)


def test_geometric_median_is_the_distance_to_all_others() -> None:
    made = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3.0, 0.0], [6.0, 4.0]])
    given = Evidence(torch.ones(4, 1), made=made)
    importance = GeometricMedian()(given).importance
    torch.testing.assert_close(importance, torch.tensor([12.0, 0.0, 12.0, 8.0 + 52**0.5]).double())  # 5 + 4 + 3, ...
    made = torch.randn(40, 60) + 5
    expected = [sum((a - b).norm() for b in made) for a in made]
    importance = GeometricMedian()(Evidence(torch.ones(40, 1), made=made)).importance
    torch.testing.assert_close(importance, torch.stack(expected).double(), rtol=1e-5, atol=0)


def test_lamp_is_the_share_among_all_that_are_no_smaller() -> None:
    weights = torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, 1.0]])  # squares 4, 0, 1, 9, 1
    importance = Lamp()(Evidence(weights)).importance
    torch.testing.assert_close(importance, torch.tensor([4 / 13, 0.0, 1 / 15, 1.0, 1 / 15], dtype=torch.float64))


def test_batch_norm_scale_is_the_mean_over_norms_and_magnitude_where_there_are_none() -> None:
    weights = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    given = Evidence(weights, scales=torch.tensor([[0.5, 1.5], [2.0, 4.0]]))
    assert BatchNormScale()(given).importance.tolist() == pytest.approx([1.0, 3.0])
    assert BatchNormScale()(Evidence(weights, scales=torch.zeros(2, 0))).importance.tolist() == pytest.approx(
        [5.0, 1.0]
    )


def test_fisher_is_the_recorded_information() -> None:
    given = Evidence(torch.ones(2, 1), effects={"information": torch.tensor([0.25, 0.5])})
    assert Fisher()(given).importance.tolist() == [0.25, 0.5]


def test_combined_is_the_weighted_mean_of_ranks() -> None:
    given = Evidence(
        torch.tensor([[3.0], [1.0], [0.0], [1.0], [9.0]]),  # ranks 3, 1, 0, 1, 4 of 4
        effects={"saliency": torch.tensor([0.0, 5.0, 1.0, 2.0, 7.0])},  # ranks 0, 3, 1, 2, 4 of 4
    )
    both = Combined((Magnitude(), Taylor()))(given).importance
    assert both.tolist() == [3 / 8, 4 / 8, 1 / 8, 3 / 8, 1.0]
    weighed = Combined((Magnitude(), Taylor()), (3.0, 1.0))(given).importance
    assert weighed.tolist() == [9 / 16, 6 / 16, 1 / 16, 5 / 16, 1.0]


def test_combined_asks_for_all_that_its_scores_need() -> None:
    score = Combined([Magnitude(), Granger(3), Combined((Taylor(), GeometricMedian()))])
    assert score.needs == {"moments", "saliency", "made"}
    assert score.lags == 3
    assert score.needs_gradients
    assert not Combined((Magnitude(),)).needs
    assert not Combined((Magnitude(),)).needs_gradients


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((Magnitude(),), (1.0, 2.0)), "for each of 1 scores"),
        (((Magnitude(),), (-1.0,)), "not negative"),
        (((Magnitude(),), (0.0,)), "one above 0"),
        (((Magnitude(),), (float("nan"),)), "got .nan"),
    ],
)
def test_combinations_that_say_nothing_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Combined(*arguments)
