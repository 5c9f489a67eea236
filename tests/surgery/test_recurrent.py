"""Hidden units of recurrent layers: every layer, direction, projection and way to read them."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_slim import Granger, Magnitude, OneShot, Pruner, Taylor, Units, find_groups, migrate, remove_units
from lightning_slim.selection import Selection
from lightning_slim.surgery import Example, resize_to, restore, survey
from lightning_slim.surgery.groups import survey_networks
from lightning_slim.surgery.layers.recurrent import heard
from lightning_slim.surgery.verify import vet
from lightning_slim.units import Plan, UnitGroup
from tests.networks import same
from tests.surgery.test_cut import zeroed
from tests.variants import variants

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class Net(nn.Module):
    """Linear, recurrent, linear, linear; the recurrent layer is read in one of four ways."""

    def __init__(self, kind: str, use: str = "sequence", **kwargs: Any) -> None:
        super().__init__()
        directions, visible = 2 if kwargs.get("bidirectional") else 1, kwargs.get("proj_size") or 10
        self.use, self.batch_first = use, kwargs.get("batch_first", False)
        self.i, self.r = nn.Linear(6, 8), getattr(nn, kind)(8, 10, **kwargs)
        self.h, self.o = nn.Linear(directions * visible, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.i(x))
        if self.use == "packed":
            packed = pack_padded_sequence(x, torch.tensor([5, 3, 2]), batch_first=self.batch_first)
            y, _ = pad_packed_sequence(self.r(packed)[0], batch_first=self.batch_first)
        else:
            y, h = self.r(x)
            h = h[0] if isinstance(h, tuple) else h
            if self.use == "last step":
                y = y[:, -1] if self.batch_first else y[-1]
            if self.use == "h_n":
                y = torch.cat([h[-2], h[-1]], 1) if self.r.bidirectional else h[-1]
        return self.o(F.relu(self.h(y)))


def sequences(batch_first: bool = False) -> Tensor:
    return torch.randn(3, 5, 6) if batch_first else torch.randn(5, 3, 6)


def different(groups: list[UnitGroup]) -> Plan:
    """Removes two units of every group, others in every layer and direction."""
    masks = {}
    for i, group in enumerate(groups):
        masks[group.name] = torch.ones(group.size, dtype=torch.bool)
        masks[group.name][[i % group.size, (i + 3) % group.size]] = False
    return Plan(masks)


USES = ("sequence", "last step", "h_n", "packed")


@pytest.mark.parametrize(("kind", "layers"), variants(["LSTM", "GRU", "RNN"], [2, 3, 1], every=3))
def test_the_cut_network_equals_the_zeroed_one_in_every_configuration(kind: str, layers: int) -> None:
    """384 configurations in all, nine of these tests together."""
    projections = (0, 6) if kind == "LSTM" else (0,)
    for both, projection, batch_first, bias, use in itertools.product(
        (False, True), projections, (False, True), (False, True), USES
    ):
        settings = {"num_layers": layers, "bidirectional": both, "batch_first": batch_first, "bias": bias}
        network = Net(kind, use, **settings, **({"proj_size": projection} if projection else {})).eval()
        x = sequences(batch_first)
        groups = find_groups(network, x)
        assert len(groups) == 2 + layers * (2 if both else 1) * (2 if projection else 1), settings
        plan = different(groups)
        reference = zeroed(network, groups, plan)
        reference.r._flat_weights = [getattr(reference.r, name) for name in reference.r._flat_weights_names]
        remove_units(network, groups, plan)
        assert (network(x) - reference(x)).abs().max() < 1e-6, (settings, use)
        assert (network.r.hidden_size, network.r.proj_size) == (8, 4 if projection else 0)
        network.train()(x).sum().backward()
        assert all(p.grad is not None for p in network.parameters())


def test_a_unit_is_a_row_of_every_gate_by_hand() -> None:
    network = Net("LSTM")
    group = next(group for group in find_groups(network, sequences()) if group.name == "r")
    places = {(span.tensor, span.axis): (span.index[3].tolist(), span.role) for span in group.spans}
    assert places == {
        ("r.weight_ih_l0", 0): ([3, 13, 23, 33], "out"),
        ("r.weight_hh_l0", 0): ([3, 13, 23, 33], "out"),
        ("r.bias_ih_l0", 0): ([3, 13, 23, 33], "out"),
        ("r.bias_hh_l0", 0): ([3, 13, 23, 33], "out"),
        ("r.weight_hh_l0", 1): ([3], "in"),
        ("h.weight", 1): ([3], "in"),
    }


def test_a_cell_behind_a_projection_is_a_row_of_every_gate_and_a_column_of_the_projection_by_hand() -> None:
    network = Net("LSTM", num_layers=2, proj_size=6, bias=False)
    group = next(group for group in find_groups(network, sequences()) if group.name == "r.cells_l1")
    places = {(span.tensor, span.axis): (span.index[3].tolist(), span.role) for span in group.spans}
    assert places == {
        ("r.weight_ih_l1", 0): ([3, 13, 23, 33], "out"),
        ("r.weight_hh_l1", 0): ([3, 13, 23, 33], "out"),
        ("r.weight_hr_l1", 1): ([3], "in"),
    }
    assert (group.pack, group.floor) == ("r.cells", 7)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_more_cells_stay_than_there_were_projections(scope: Any) -> None:
    """torch takes an LSTM whose cells are as many as its projections for one without."""
    network, x = Net("LSTM", num_layers=2, bidirectional=True, proj_size=6), sequences()
    pruner = Pruner(network, Magnitude(), Units(0.55), OneShot(0.5), selection=Selection(scope), compensate="none")
    pruner.prepare(x)
    cells = [name for name in pruner.widths if "cells" in name]
    assert len(cells) == 4
    event = pruner.step(0.5)
    assert event is not None
    assert {event.widths[name] for name in cells} == {7}
    assert network.r.hidden_size == 7 > network.r.proj_size
    assert network(x).shape == (5, 3, 3)
    resumed = Pruner(network, Magnitude(), Units(0.5))
    resumed.load_state_dict(pruner.state_dict())
    assert {group.floor for group in resumed.groups if group.name in cells} == {7}
    assert resumed.costs == pruner.costs
    with pytest.raises(ValueError, match=r"at least 7 units of 'r\.cells_l0' to stay, got 6"):
        remove_units(network, resumed.groups, {"r.cells_l0": torch.arange(7) < 6})


class LastCell(nn.Module):
    """Reads the last cells of an LSTM beside its last projections."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.o, self.p = nn.LSTM(4, 10, proj_size=6), nn.Linear(10, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, cells) = self.r(x)
        return self.o(cells[-1]) + self.p(hidden[-1])


def test_cells_that_are_read_or_as_few_as_may_be_stay() -> None:
    network, x = LastCell(), torch.randn(5, 3, 4)
    found = survey(network, x)
    unfit = vet(network, found.groups, {"": Example((x,))})
    assert "the network fails without them" in unfit["r.cells_l0"]
    found = survey(nn.LSTM(4, 7, proj_size=6), x)
    assert found.left_whole["cells"] == "it has 7 cells, and 7 must stay"


@pytest.mark.parametrize(("kind", "projection"), [("LSTM", 0), ("LSTM", 7), ("GRU", 0), ("RNN", 0)])
def test_the_trial_passes_and_leaves_the_layer_usable(kind: str, projection: int) -> None:
    settings = {"proj_size": projection} if projection else {}
    network, x = Net(kind, num_layers=2, bidirectional=True, **settings), sequences()
    before, weights = network(x), copy.deepcopy(network.state_dict())
    groups = find_groups(network, x)
    assert "forward" not in vars(network.r)
    assert vet(network, groups, {"": Example((x,))}) == {}
    assert torch.equal(before, network(x))
    assert same(weights, network.state_dict())
    cuts = remove_units(network, groups, different(groups))
    restore(network, cuts)
    assert torch.equal(before, network(x))
    assert all(
        a is getattr(network.r, n) for a, n in zip(network.r._flat_weights, network.r._flat_weights_names, strict=True)
    )


def test_a_slim_state_loads_into_a_dense_model_and_back() -> None:
    dense, slim, x = Net("LSTM", num_layers=2, proj_size=6), Net("LSTM", num_layers=2, proj_size=6), sequences()
    groups = find_groups(slim, x)
    remove_units(slim, groups, different(groups))
    shapes = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    resize_to(dense, {name: tensor.shape for name, tensor in slim.state_dict().items()})
    dense.load_state_dict(slim.state_dict())
    assert torch.equal(dense(x), slim(x))
    resize_to(dense, shapes)
    assert (dense.r.proj_size, dense.r.hidden_size, dense.r.input_size) == (6, 10, 8)
    assert dense(x).shape == (5, 3, 3)


def test_a_cut_lstm_trains_on_as_the_narrow_one_built_by_hand() -> None:
    wide, x = Net("LSTM"), sequences()
    optimizer = torch.optim.AdamW(wide.parameters(), lr=1e-2, amsgrad=True)

    def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()

    train(wide, optimizer, 5)
    kept = [0, 2, 3, 5, 6, 7, 9]
    rows = torch.tensor([gate * 10 + unit for gate in range(4) for unit in kept])
    narrow = Net("LSTM")
    narrow.r, narrow.h = nn.LSTM(8, 7), nn.Linear(7, 7)
    by_hand = {
        "r.weight_ih_l0": lambda t: t[rows],
        "r.weight_hh_l0": lambda t: t[rows][:, kept],
        "r.bias_ih_l0": lambda t: t[rows],
        "r.bias_hh_l0": lambda t: t[rows],
        "h.weight": lambda t: t[:, kept],
    }
    cut = {name: by_hand.get(name, torch.clone)(value).clone() for name, value in wide.state_dict().items()}
    narrow.load_state_dict(cut)
    oracle = torch.optim.AdamW(narrow.parameters(), lr=1e-2, amsgrad=True)
    state = copy.deepcopy(optimizer.state_dict())
    for i, (name, _) in enumerate(wide.named_parameters()):
        for key, value in state["state"][i].items():
            state["state"][i][key] = by_hand[name](value).clone() if value.ndim and name in by_hand else value
    oracle.load_state_dict(state)
    groups = find_groups(wide, x)
    mask = torch.tensor([unit in kept for unit in range(10)])
    migrate(optimizer, remove_units(wide, groups, Plan({"r": mask})))
    train(wide, optimizer, 30)
    train(narrow, oracle, 30)
    assert same(wide.state_dict(), narrow.state_dict())


def test_layers_and_directions_keep_as_many_units_but_not_the_same_ones() -> None:
    network, x = Net("GRU", num_layers=2, bidirectional=True), sequences()
    pruner = Pruner(network, Magnitude(), Units(0.5), OneShot(0.5), compensate="none")
    pruner.prepare(x)
    event = pruner.step(0.5)
    assert event is not None
    recurrent = [name for name in event.widths if name.startswith("r")]
    assert len(recurrent) == 4
    assert {event.widths[name] for name in recurrent} == {5}
    assert len({tuple(event.removed[name]) for name in recurrent}) > 1
    assert network(x).shape == (5, 3, 3)
    resumed = Pruner(network, Magnitude(), Units(0.5))
    resumed.load_state_dict(pruner.state_dict())
    assert resumed.costs.packs == dict.fromkeys(recurrent, "r")


def test_a_global_budget_keeps_packs_together() -> None:
    network, x = Net("LSTM", num_layers=2), sequences()
    with torch.no_grad():
        network.r.weight_hh_l0.mul_(10)
    settings = {"selection": Selection("global"), "compensate": "none"}
    pruner = Pruner(network, Magnitude(), Units(0.6), OneShot(0.5), **settings)  # type: ignore[arg-type]
    pruner.prepare(x)
    event = pruner.step(0.5)
    assert event is not None
    assert event.widths["r"] == event.widths["r.l0"]
    assert event.reached <= 0.6


class Residual(nn.Module):
    """Two recurrent layers, of which the second adds to the first."""

    def __init__(self, layers: int, hidden: int = 10) -> None:
        super().__init__()
        self.a, self.b = nn.GRU(4, 10, num_layers=2), nn.LSTM(10, hidden, num_layers=layers)
        self.o = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)[0]
        return self.o(h + self.b(h)[0][..., :10])


@pytest.mark.parametrize("layers", [1, 2])
def test_layers_that_make_the_same_units_are_of_one_pack(layers: int) -> None:
    network, x = Residual(layers), torch.randn(5, 3, 4)
    found = survey(network, x)
    assert {group.name: group.pack for group in found.groups} == dict.fromkeys(["a", "a.l0", "b.l0"][: layers + 1], "a")
    assert set(found.left_whole) == {"o"}
    assert vet(network, found.groups, {"": Example((x,))}) == {}


def test_layers_that_make_the_same_units_stay_whole_together() -> None:
    found = survey(Residual(2, hidden=14), torch.randn(5, 3, 4))  # four units of b's are nobody else's
    assert found.groups == []
    assert "must keep as many units" in found.left_whole["a"]
    assert "must keep as many units" in found.left_whole["b"]


def test_granger_prunes_a_single_recurrent_layer() -> None:
    network, x = Net("GRU", bidirectional=True), sequences()
    pruner = Pruner(network, Granger(), Units(0.5), OneShot(0.5))
    pruner.prepare(x)
    with pruner.recording():
        network(x)
    event = pruner.step(0.5)
    assert event is not None
    assert event.widths["r"] == event.widths["r#2"] == 5


def test_a_level_that_stays_keeps_the_others_whole() -> None:
    network, x = Net("LSTM", num_layers=2), sequences()
    for name, parameter in network.r.named_parameters():
        parameter.requires_grad_(not name.endswith("_l0"))
    pruner = Pruner(network, Taylor(), Units(0.5), OneShot(0.5), compensate="none")
    pruner.prepare(x)
    assert set(pruner.widths) == {"i", "h"}
    assert "it is frozen" in pruner.left_whole["r.l0"]
    assert "beside it that stays whole" in pruner.left_whole["r"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@torch.no_grad()
def test_what_levels_hear_is_what_the_levels_below_say(
    kind: str, bidirectional: bool, batch_first: bool, proj_size: int, packed: bool
) -> None:
    if proj_size and kind != "LSTM":
        pytest.skip("only LSTMs have projections")
    options = {"proj_size": proj_size} if proj_size else {}
    layer = getattr(nn, kind)(4, 6, 3, batch_first=batch_first, bidirectional=bidirectional, dropout=0.0, **options)
    whole = torch.randn(5, 7, 4)
    x = whole if batch_first else whole.transpose(0, 1)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, [7, 6, 4, 4, 1], batch_first=batch_first)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections")
        read = heard(layer, x)
        below = getattr(nn, kind)(4, 6, 2, batch_first=batch_first, bidirectional=bidirectional, **options)
        below.load_state_dict({name: p for name, p in layer.state_dict().items() if "_l2" not in name})
        lower = below(x)[0]
    lower = lower.data if packed else lower if batch_first else lower.transpose(0, 1)
    torch.testing.assert_close(read["weight_ih_l2"], lower)
    torch.testing.assert_close(read["weight_ih_l0"], x.data if packed else whole)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@torch.no_grad()
def test_what_recurrent_columns_hear_is_the_step_before(kind: str, packed: bool, given: bool) -> None:
    """Each sequence on its own, in steps as in the reverse direction: the state that is handed from call to call."""
    torch.manual_seed(0)
    layer = getattr(nn, kind)(4, 6, 2, batch_first=True, bidirectional=True)
    x, lengths = torch.randn(3, 5, 4), [2, 5, 4] if packed else [5, 5, 5]
    h = torch.randn(4, 3, 6) if given else torch.zeros(4, 3, 6)  # level, direction
    c = torch.randn(4, 3, 6) if given else torch.zeros(4, 3, 6)
    state = ((h, c) if kind == "LSTM" else h) if given else None
    inputs = pack_padded_sequence(x, torch.tensor(lengths), True, enforce_sorted=False) if packed else x
    read = heard(layer, inputs, state)
    for d, suffix in enumerate(["", "_reverse"]):
        one = getattr(nn, kind)(4, 6, batch_first=True)  # the lower level of one direction
        one.load_state_dict({f"{name}_l0": layer.get_parameter(f"{name}_l0{suffix}") for name in NAMES})
        heard_there = read[f"weight_hh_l0{suffix}"]
        if isinstance(inputs, nn.utils.rnn.PackedSequence):
            heard_there = pad_packed_sequence(inputs._replace(data=heard_there), batch_first=True)[0]
        for item, length in enumerate(lengths):
            steps = range(length - 1, -1, -1) if d else range(length)
            at = (h[d, item : item + 1, None], c[d, item : item + 1, None])
            for step in steps:
                torch.testing.assert_close(heard_there[item, step], at[0][0, 0])
                made = one(x[item : item + 1, step : step + 1], at if kind == "LSTM" else at[0])[1]
                at = made if kind == "LSTM" else (made, made)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_hidden_units_that_say_the_same_fold_into_one_at_every_level(kind: str, bidirectional: bool) -> None:
    """The second half of each level are copies of the first: half of the units go, and next to nothing is lost."""
    torch.manual_seed(0)
    layer = getattr(nn, kind)(4, 8, 2, batch_first=True, bidirectional=bidirectional)
    network = Plain(layer, nn.Linear(8 * (1 + bidirectional), 3)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            gates = parameter.unflatten(0, (-1, 8))  # a view
            gates[:, 4:] = gates[:, :4].clone()
    x = torch.randn(64, 9, 4).double()
    pruner = Pruner(network, Granger(0), Units(0.5), OneShot(0.5), compensate="least_squares")
    pruner.prepare(x)
    assert len(pruner.widths) == 2 * (1 + bidirectional)
    with pruner.recording():
        before = network(x).detach()
    for keep in pruner.plan(0.5).values():
        assert bool((keep[:4] ^ keep[4:]).all())  # one of each pair
    pruner.step(0.5)
    torch.testing.assert_close(network(x), before, rtol=0, atol=0.02 * float(before.abs().max()))


class Plain(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self, recurrent: nn.Module, linear: nn.Module) -> None:
        super().__init__()
        self.r, self.o = recurrent, linear

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(x)[0])


class Seq2Seq(nn.Module):
    """The encoder's last state is the decoder's first."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.d, self.o = nn.GRU(4, 8, batch_first=True), nn.GRU(5, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.o(self.d(y, self.e(x)[1])[0])


class Cells(nn.Module):
    """A loop of one's own over a cell."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.i, self.c, self.o = nn.Linear(4, 6), getattr(nn, kind)(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in F.relu(self.i(x)).unbind(1):
            state = self.c(step, state)
        return self.o(state[0] if isinstance(state, tuple) else state)


class FirstLayerOnly(nn.Module):
    """Reads the last state of the lower layer."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.o = nn.GRU(4, 8, num_layers=2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.r(x)[1][0])


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (Seq2Seq(), (torch.randn(2, 6, 4), torch.randn(2, 6, 5))),
        (Cells("LSTMCell"), (torch.randn(2, 5, 4),)),
        (Cells("GRUCell"), (torch.randn(2, 5, 4),)),
        (FirstLayerOnly(), (torch.randn(5, 2, 4),)),
    ],
)
def test_what_hangs_on_a_state_is_cut_with_it(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    network.eval()
    before = network(*inputs)
    groups = find_groups(network, inputs)
    assert vet(network, groups, {"": Example(inputs)}) == {}
    assert torch.equal(before, network(*inputs))
    plan = different(groups)
    reference = zeroed(network, groups, plan)
    for layer in (layer for layer in reference.modules() if isinstance(layer, nn.RNNBase)):
        layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
    remove_units(network, groups, plan)
    torch.testing.assert_close(network(*inputs), reference(*inputs))


def test_long_sequences_are_traced_as_one_node() -> None:
    network = Net("GRU", num_layers=2)
    assert len(find_groups(network, torch.randn(2000, 1, 6))) == 4


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_some_items_are_heard_as_among_all(kind: type[nn.RNNBase]) -> None:
    layer = kind(3, 5, 2, batch_first=True)
    x, h = torch.randn(8, 4, 3), torch.randn(2, 8, 5)
    state = (h, h + 1) if kind is nn.LSTM else h
    everything, some = heard(layer, x, state), heard(layer, x, state, enough=9)
    for name, read in some.items():
        assert read.shape[:2] == (3, 4)
        torch.testing.assert_close(read, everything[name][[0, 2, 5]])


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
def test_sequences_of_any_length_and_order_are_read_and_padded(in_order: bool, both: bool) -> None:
    """As everybody writes it: packed, padded to the longest of all, and read further."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r = nn.Linear(4, 8), nn.GRU(8, 6, 2, batch_first=True, bidirectional=both)
            self.b = nn.Linear(12 if both else 6, 3)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(self.a(x), lengths, batch_first=True, enforce_sorted=in_order)
            made, _ = pad_packed_sequence(self.r(packed)[0], batch_first=True, total_length=x.shape[1])
            return self.b(made)

    network, x = Padded(), torch.randn(2, 7, 4)
    call = Example((x, torch.tensor([5, 4] if in_order else [4, 5])), samples=2)
    found = survey_networks(network, {"": call})
    assert {group.name: group.size for group in found.groups} == {"a": 8} | dict.fromkeys(
        ("r", "r#2", "r.l0", "r.l0_reverse") if both else ("r", "r.l0"), 6
    )
    assert vet(network, found.groups, {"": call}) == {}


def test_a_state_that_the_network_returns_is_named() -> None:
    class Carries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r, self.b = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            made, state = self.r(x)
            return self.b(made[:, -1]), tuple(each.detach() for each in state)

    found = survey(Carries(), torch.randn(2, 5, 4))
    assert found.groups == []
    assert "the hidden state of a recurrent layer, which the network returns" in found.left_whole["r"]


def test_a_width_that_the_code_writes_down_is_named_with_the_remedy() -> None:
    class Begins(nn.Module):
        def __init__(self, hidden: int = 8) -> None:
            super().__init__()
            self.hidden = hidden
            self.r, self.b = nn.GRU(4, hidden, batch_first=True), nn.Linear(hidden, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.r(x, x.new_zeros(1, len(x), self.hidden))[0][:, -1])

    network, x = Begins(), torch.randn(2, 5, 4)
    groups = find_groups(network, x)
    reasons = vet(network, groups, {"": Example((x,))})
    assert "got [1, 2, 8]" in reasons["r"]
    assert "read it off the layer or the tensor: `self.lstm.hidden_size`" in reasons["r"]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_channels_of_pixels_are_read_as_one_sequence(kind: type[nn.RNNBase]) -> None:
    """A column of an image is a step: channels and rows, flattened."""

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r, self.b = nn.Conv2d(1, 8, 3, padding=1), kind(8 * 5, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.r(torch.relu(self.a(x)).permute(0, 3, 1, 2).flatten(2))[0][:, -1])

    network, x = Columns(), torch.randn(2, 1, 5, 7)
    groups = find_groups(network, x)
    assert {group.name: group.size for group in groups} == {"a": 8, "r": 6}
    assert vet(network, groups, {"": Example((x,))}) == {}
