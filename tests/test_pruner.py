"""Record, score, select, cut and migrate, without a Trainer."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from lightning_slim import (
    BatchNormScale,
    BivariateGranger,
    Fisher,
    Granger,
    Lamp,
    Linear,
    MACs,
    Magnitude,
    NoEffectWarning,
    OneShot,
    Pruner,
    Random,
    Score,
    Screening,
    Taylor,
    Units,
    migrate,
)
from lightning_slim.profile import count_macs
from lightning_slim.selection import Selection
from lightning_slim.surgery import remove_units
from tests.networks import Mixed, images, same, same_optimizer_state
from tests.surgery.test_cut import Net
from tests.surgery.test_optimizer import Strange
from tests.variants import variants


def prepared(network: nn.Module, x: torch.Tensor, score: Score | None = None, **kwargs) -> Pruner:
    kwargs = {"budget": Units(0.5), "schedule": OneShot(0.5), "compensate": "none", **kwargs}
    pruner = Pruner(network, score or Magnitude(), **kwargs)
    pruner.prepare(x)
    return pruner


def test_the_history_tells_removed_units_in_original_numbering() -> None:
    network, x = Mixed(), images(0)[0]
    pruner = prepared(network, x, schedule=Linear(0.0, 1.0))
    original = network.c1.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for progress in (0.5, 1.0):
        pruner.step(progress, [optimizer])
    gone = [unit for event in pruner.history.events for unit in event.removed.get("c1", [])]
    stays = [unit for unit in range(8) if unit not in gone]
    assert len(gone) == len(set(gone)) == 4
    assert torch.equal(network.c1.weight, original[stays])


def test_budgets_never_compound() -> None:
    network, x = Mixed(), images(0)[0]
    pruner = prepared(network, x, budget=MACs(0.5), schedule=Linear(0.0, 1.0))
    dense = sum(count_macs(network, (x,)).values())
    events = [pruner.step(progress / 10) for progress in range(1, 11)]
    assert [event.asked for event in events if event] == pytest.approx(
        [0.95 - 0.05 * i for i, event in enumerate(events) if event]
    )
    assert sum(count_macs(network, (x,)).values()) == 16 * pruner.history.events[-1].macs
    assert 0.46 < 16 * pruner.history.events[-1].macs / dense <= 0.5
    assert pruner.step(1.0) is None  # nothing is due any more


def test_a_plan_is_looked_at_without_cutting() -> None:
    network, x = Mixed(), images(0)[0]
    pruner = prepared(network, x)
    before = copy.deepcopy(network.state_dict())
    plan = pruner.plan(0.5)
    assert re.search(r"c1: keeps 4 of 8 units", str(plan))
    assert same(before, network.state_dict())
    event = pruner.step(0.5)
    assert event is not None
    assert {name: int(keep.sum()) for name, keep in plan.items()} == event.widths


def test_nothing_goes_before_the_schedule_starts() -> None:
    pruner = prepared(Mixed(), images(0)[0])
    assert pruner.step(0.4) is None
    assert not pruner.plan(0.4)


@pytest.mark.parametrize(
    ("skip", "groups"),
    [
        (["c1"], {"c2", "up", "fc1"}),
        (["up", "fc*"], {"c1"}),
        ([nn.Linear], {"c1", "c2"}),
        (["ConvTranspose2d"], {"c1", "fc1"}),
        (["torch.nn.modules.batchnorm.BatchNorm2d"], {"c2", "fc1"}),
    ],
)
def test_skip_takes_names_patterns_and_types(skip: list, groups: set[str]) -> None:
    pruner = prepared(Mixed(), images(0)[0], skip=skip)
    assert set(pruner.widths) == groups
    assert "it is skipped" in pruner.left_whole.values()


def test_a_submodule_is_skipped_by_its_name() -> None:
    network = Net(
        lambda s, x: s.head(F.relu(s.body(x))),
        body=nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8)),
        head=nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 2)),
    )
    assert set(prepared(network, torch.randn(2, 4), skip=["body"]).widths) == {"head.0"}


EVERY = [kind() for kind in Score.__subclasses__() if kind is not BivariateGranger]
EVERY += [BivariateGranger(axis="training_step"), Granger(0, "labels"), Granger(0, "losses"), Taylor("weights")]
EVERY += [Granger(0, form="leave_one_out"), Screening("kruskal_wallis", "nothing"), Screening(times="scale")]


@pytest.mark.parametrize(("score", "compensate"), variants(EVERY, ["none", "least_squares"], every=2), ids=str)
def test_every_score_prunes_with_and_without_compensation(score: Score, compensate: str) -> None:
    network, (x, y) = Mixed(), images(0)
    pruner = prepared(network, x, score, compensate=compensate)
    optimizer = torch.optim.AdamW(network.parameters())
    steps = 0
    while steps < 2 or not pruner.recorder.ready:
        optimizer.zero_grad()
        if pruner.recorder.experiments:
            pruner.recorder.experiment(lambda: F.cross_entropy(network(x), y, reduction="none"))
        with pruner.recording():
            losses = F.cross_entropy(network(x), y, reduction="none")
            losses.mean().backward()
        pruner.recorder.hear(labels=y, losses=losses)
        pruner.recorder.observe_gradients()
        optimizer.step()
        if score.flow is not None:
            for gradients in score.flow(network, [lambda: F.cross_entropy(network(x), y)], pruner.calls, lambda g: g):
                for parameter, gradient in gradients.items():
                    parameter.grad = gradient
                pruner.recorder.observe_flow()
        steps += 1
        assert steps < 50
    event = pruner.step(0.5, [optimizer])
    assert event is not None
    assert event.widths == {"c1": 4, "c2": 3, "up": 8, "fc1": 10}
    F.cross_entropy(network(x), y).backward()
    optimizer.step()
    assert network(x).isfinite().all()


def test_absolute_scores_compare_across_layers_as_they_are() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 2))
    with torch.no_grad():
        network[2].weight[:, :3] *= 4  # three units of the first group are much larger than the others
    pruner = prepared(network, torch.randn(2, 4), Lamp(), selection=Selection("global"))
    event = pruner.step(0.5)
    assert event is not None

    def widths(importance: dict[str, torch.Tensor]) -> dict[str, int]:
        """Of the more important half."""
        least = torch.cat(list(importance.values())).sort(descending=True).values[11]
        return {name: int((values >= least).sum()) for name, values in importance.items()}

    importance = {name: torch.tensor(values, dtype=torch.float64) for name, values in event.importance.items()}
    relative = {name: values / values.mean() for name, values in importance.items()}
    assert event.widths == widths(importance) != widths(relative)


def test_scales_of_norms_count_and_layers_without_go_by_magnitude() -> None:
    network = Net(
        lambda s, x: s.c(F.relu(s.b(F.relu(s.norm(s.a(x)))))),
        a=nn.Linear(4, 8),
        norm=nn.BatchNorm1d(8),
        b=nn.Linear(8, 6),
        c=nn.Linear(6, 2),
    )
    with torch.no_grad():
        network.norm.weight.copy_(torch.tensor([-1.0, 0.1, 0.9, 0.2, 0.0, 0.5, -0.3, 0.6]))
    by_magnitude = prepared(copy.deepcopy(network), torch.randn(3, 4)).step(0.5)
    event = prepared(network, torch.randn(3, 4), BatchNormScale()).step(0.5)
    assert event is not None
    assert by_magnitude is not None
    assert event.removed["a"] == [1, 3, 4, 6]
    assert event.removed["b"] == by_magnitude.removed["b"]


def test_a_network_without_norms_is_refused_by_the_scales_of_norms() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"pass a normalisation with a scale, got none in Sequential.*Magnitude"):
        prepared(network, torch.randn(2, 4), BatchNormScale())


def digits_after(score: Score, compensate: str) -> tuple[float, float]:
    """Test loss of a small digits network before and after 85 % of its units went, without fine-tuning."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    pruner = prepared(network, x, score, budget=Units(0.15), compensate=compensate)
    for step in range(300):
        batch = slice(step % 20 * 60, step % 20 * 60 + 60)
        optimizer.zero_grad()
        with pruner.recording():
            F.cross_entropy(network(x[batch]), y[batch]).backward()
        optimizer.step()
    before = F.cross_entropy(network(x[1200:]), y[1200:]).item()
    pruner.step(0.5, [optimizer])
    return before, F.cross_entropy(network(x[1200:]), y[1200:]).item()


def test_granger_with_the_fold_keeps_a_digits_network_alive() -> None:
    dense, granger = digits_after(Granger(), "least_squares")
    _, dropped = digits_after(Granger(), "none")
    _, random = digits_after(Random(), "least_squares")
    assert granger - dense < 0.15
    assert dropped - dense > 1.0
    assert granger < random


def test_a_failing_optimizer_leaves_model_and_optimizers_as_they_were() -> None:
    network, (x, y) = Mixed(), images(0)
    adam, strange = torch.optim.Adam(network.parameters()), Strange(network.parameters(), lr=0.1)
    pruner = prepared(network, x, Granger(), compensate="least_squares")
    with pruner.recording():
        F.cross_entropy(network(x), y).backward()
    adam.step()
    strange.step()
    weights, state = copy.deepcopy(network.state_dict()), copy.deepcopy(adam.state_dict())
    held = [id(p) for p in network.parameters()]
    with pytest.raises(ValueError, match="sketch"):
        pruner.step(0.5, [adam, strange])
    assert same(weights, network.state_dict())
    assert held == [id(p) for p in network.parameters()]
    assert same_optimizer_state(state, adam.state_dict())
    assert network.c1.out_channels == 8
    assert not pruner.history.events
    strange.state.clear()
    assert pruner.step(0.5, [adam, strange]) is not None


def test_copies_are_cut_alike_and_a_broken_one_leaves_everything_as_it_was() -> None:
    network, x = Mixed(), images(0)[0]
    pruner = prepared(network, x, compensate="least_squares")
    with pruner.recording():
        network(x)
    copied = copy.deepcopy(network)
    weights = copy.deepcopy(network.state_dict())
    with pytest.raises(KeyError):
        pruner.step(0.5, copies=[copied, nn.Linear(2, 2)])
    assert same(weights, network.state_dict())
    assert same(weights, copied.state_dict())
    assert pruner.step(0.5, copies=[copied]) is not None
    assert same(network.state_dict(), copied.state_dict())
    assert network.c1.out_channels == copied.c1.out_channels == 4


def test_a_resumed_pruner_goes_on_as_if_nothing_had_happened(tmp_path) -> None:
    def run(pruner: Pruner, steps: range, optimizer: torch.optim.Optimizer) -> None:
        for step in steps:
            x, y = images(step)
            optimizer.zero_grad()
            with pruner.recording():
                F.cross_entropy(pruner.model(x), y).backward()
            pruner.recorder.observe_gradients()
            optimizer.step()
            pruner.step(step / 10, [optimizer])

    for score in (Granger(), Taylor(), Fisher(), Random()):
        torch.manual_seed(0)
        network = Mixed()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
        pruner = prepared(network, images(0)[0], score, schedule=Linear(0.0, 1.0), compensate="least_squares")
        run(pruner, range(5), optimizer)
        torch.save(pruner.state_dict(), tmp_path / "pruner.pt")
        twin = copy.deepcopy(network)
        resumed = Pruner(twin, score, Units(0.5), Linear(0.0, 1.0))
        resumed.load_state_dict(torch.load(tmp_path / "pruner.pt", weights_only=True))
        run(pruner, range(5, 11), optimizer)
        run(resumed, range(5, 11), torch.optim.SGD(twin.parameters(), lr=0.05))
        assert same(network.state_dict(), twin.state_dict())
        assert resumed.history.to_json() == pruner.history.to_json()
        assert pruner.widths == {"c1": 4, "c2": 3, "up": 8, "fc1": 10}


def test_a_network_with_nothing_to_prune_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Nothing can be removed from Linear.*output"):
        prepared(nn.Linear(3, 2), torch.randn(2, 3))


def test_a_budget_that_cannot_be_reached_says_the_closest() -> None:
    network, x = Mixed(), images(0)[0]
    with pytest.raises(ValueError, match=r"got MACs\(0\.01\).*Ask for at least MACs\((0\.\d+)\)") as error:
        prepared(network, x, budget=MACs(0.01))
    closest = float(re.search(r"at least MACs\((0\.\d+)\)", str(error.value)).group(1))  # type: ignore[union-attr]
    event = prepared(network, x, budget=MACs(closest)).step(0.5)
    assert event is not None
    assert closest - 0.002 < event.reached <= closest


def test_an_unknown_layer_in_skip_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ValueError, match="got 'c9': its layers are c1, b1"):
        Pruner(Mixed(), Magnitude(), skip=["c9"])


def test_nan_evidence_is_refused_before_the_cut() -> None:
    network, x = Mixed(), images(0)[0]
    pruner = prepared(network, x)
    with torch.no_grad():
        network.c1.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity from Magnitude for c1"):
        pruner.step(0.5)
    assert network.c1.out_channels == 8


def test_activations_that_are_not_finite_are_refused_before_the_cut() -> None:
    network, x = Mixed(), images(0)[0]
    pruner = prepared(network, x, Granger())
    with pruner.recording():
        network(x * torch.inf)
    with pytest.raises(ValueError, match="Expected finite activations, got NaN or infinity from c1: the run has div"):
        pruner.step(0.5)
    assert network.c1.out_channels == 8


def test_where_rounding_leaves_nothing_to_remove_there_is_a_warning() -> None:
    network = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))
    pruner = prepared(network, torch.randn(2, 4), selection=Selection(round_to=8), budget=Units(0.9))
    assert pruner.step(0.5).widths == {"0": 8}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pruner.step(0.6) is None


def test_several_networks_of_one_model() -> None:
    model = nn.ModuleDict(
        {
            "generator": nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5)),
            "critic": nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1)),
        }
    )
    pruner = Pruner(model, Magnitude(), Units(0.5), OneShot(0.5), compensate="none")
    pruner.prepare(networks={"generator": torch.randn(2, 3), "critic": torch.randn(2, 5)})
    assert pruner.step(0.5).widths == {"generator.0": 4, "critic.0": 3}  # type: ignore[union-attr]
    assert model["critic"](model["generator"](torch.randn(2, 3))).shape == (2, 1)


def test_what_is_also_called_on_its_own_is_found_there_only() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 6))
            self.head = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.encoder(x))

    model = Both()
    pruner = Pruner(model, Magnitude(), Units(0.5), OneShot(0.5), compensate="none")
    pruner.prepare(networks={"": torch.randn(2, 4), "encoder": torch.randn(2, 4)})
    assert set(pruner.widths) == {"encoder.0", "head.0"}  # encoder.2 is an output of the encoder
    pruner.step(0.5)
    assert model.encoder(torch.randn(2, 4)).shape == (2, 6)


def test_warnings_are_exported() -> None:
    assert issubclass(NoEffectWarning, UserWarning)
    assert callable(migrate)
    assert callable(remove_units)


@pytest.mark.parametrize(("lags", "warned"), [(6, False), (7, True)])
def test_lags_that_are_longer_than_the_series_are_told_once(lags: int, warned: bool) -> None:
    network = nn.Sequential(nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 2, 3, padding=1))
    x = torch.randn(4, 2, 7)
    pruner = Pruner(network, Granger(lags=lags), Units(0.25))
    pruner.prepare(x)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for asked in (0.6, 0.3):
            with pruner.recorder.recording():
                network(x)
            assert pruner.step(0.5, asked=asked) is not None
    messages = [str(each.message) for each in seen if "longer series" in str(each.message)]
    assert len(messages) == warned
    assert all("series of more than 7 time steps for lags=7, got none" in message for message in messages)
