"""Every structure under every method that ranks or grows groups: exact counts of whole groups, by brute force."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from math import floor

import pytest
import torch
from torch import nn

import gossamer as gs

from .tables import METHODS, MethodRow, snapshot

LAYERS = {
    "linear": lambda: nn.Linear(7, 10),
    "conv": lambda: nn.Conv2d(6, 10, 3),
    "grouped": lambda: nn.Conv2d(6, 10, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(6, 10, 3),
    "transposed grouped": lambda: nn.ConvTranspose2d(6, 10, 3, groups=2),
}
STRUCTURES = ("row", "column", "kernel", "block:3x4:pad", "block:2x3:kernel:pad", "row+column")
CASES = [
    pytest.param(layer, structure, id=f"{layer}-{structure}")
    for layer in LAYERS
    for structure in STRUCTURES
    if not ("grouped" in layer and ("+" in structure or "pad" in structure))
]
SPARSITY = 0.6


def output_and_input(layer: nn.Module, position: tuple[int, ...]) -> tuple[int, int]:
    """The output and input channels that a weight of a layer connects."""
    groups = getattr(layer, "groups", 1)
    first, second = position[:2]
    if isinstance(layer, nn.ConvTranspose2d):
        return first // (layer.in_channels // groups) * layer.weight.shape[1] + second, first
    if isinstance(layer, nn.Conv2d):
        return first, first // (layer.out_channels // groups) * layer.weight.shape[1] + second
    return first, second


KEYS = {
    "row": lambda output, source, place: output,
    "column": lambda output, source, place: source,
    "kernel": lambda output, source, place: (output, source),
    "block:3x4:pad": lambda output, source, place: (output // 3, source // 4, place),
    "block:2x3:kernel:pad": lambda output, source, place: (output // 2, source // 3),
}


def members(layer: nn.Module, structure: str) -> dict[object, list[tuple[int, ...]]]:
    """The positions of the weights of each group, by the definition of the structure."""
    found: dict[object, list[tuple[int, ...]]] = {}
    for position in itertools.product(*map(range, layer.weight.shape)):
        found.setdefault(KEYS[structure](*output_and_input(layer, position), position[2:]), []).append(position)
    return found


def living(layer: nn.Module, structure: str, mask: torch.Tensor) -> tuple[int, int]:
    """How many groups live, and how many there are; fails where a group is torn."""
    groups = members(layer, structure).values()
    states = [{bool(mask[position]) for position in group} for group in groups]
    assert all(len(each) == 1 for each in states)
    return sum(each == {True} for each in states), len(states)


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        shape = (4, 7) if isinstance(layer, nn.Linear) else (2, 6, 5, 5)
        output = layer(torch.randn(shape, generator=generator))
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", [pytest.param(row, id=row.id) for row in METHODS])
@pytest.mark.parametrize(("kind", "structure"), CASES)
def test_whole_groups_live_and_exactly_as_many_as_asked(kind: str, structure: str, method: MethodRow) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    sparsity = gs.attach(layer, method.make(structure, sparsity=SPARSITY), optimizer)
    seen = set()
    for first in range(0, 12, 2):
        train(layer, optimizer, range(first, first + 2))
        mask = sparsity.masks()["weight"]
        seen.add(tuple(mask.flatten().tolist()))
        assert not layer.weight[~mask].any()
        if structure == "row+column":
            rows, columns = mask.any(1), mask.any(0)
            if mask.dim() > 2:
                rows, columns = mask.flatten(2).any(2).any(1), mask.flatten(2).any(2).any(0)
            crossing = (rows[:, None] & columns).reshape(mask.shape[:2] + (1,) * (mask.dim() - 2))
            assert mask.equal(crossing.expand_as(mask))
            continue
        alive, total = living(layer, structure, mask)
        if first + 2 >= method.settles:
            assert alive == floor((1 - SPARSITY) * total + 1e-9)
    assert (len(seen) > 1) == (method.id != "static")
    if structure != "row+column":
        assert alive == floor((1 - SPARSITY) * total + 1e-9)


@pytest.mark.parametrize("method", [pytest.param(row, id=row.id) for row in METHODS])
def test_a_sum_keeps_its_fraction_of_rows_and_of_columns(method: MethodRow) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20, 20)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    sparsity = gs.attach(layer, method.make("row+column", sparsity=0.4, distribution="uniform"), optimizer)
    for step in range(8):
        layer(torch.randn(4, 20, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    mask = sparsity.masks()["weight"]
    rows, columns = int(mask.any(1).sum()), int(mask.any(0).sum())
    assert rows + columns == 24
    if method.id != "dsr":  # which moves groups between rows and columns
        assert (rows, columns) == (12, 12)
    assert mask.sum() == rows * columns


def test_lowest_norms_are_pruned() -> None:
    for kind, structure in itertools.product(("conv", "transposed", "linear"), ("row", "column", "kernel")):
        for p in (1.0, 2.0):
            torch.manual_seed(0)
            layer = LAYERS[kind]()
            before = layer.weight.detach().clone()
            gs.prune(layer, 0.5, structure=structure, distribution="uniform", p=p)
            norms = {
                key: sum(abs(before[at].item()) ** p for at in places)
                for key, places in members(layer, structure).items()
            }
            alive = {key for key, places in members(layer, structure).items() if layer.weight[places[0]] != 0}
            assert alive == set(sorted(norms, key=norms.__getitem__)[len(norms) - len(alive) :])


# -- hidden units -----------------------------------------------------------------------------------------------------

RECURRENT = {
    "rnn": lambda: nn.RNN(5, 8),
    "lstm": lambda: nn.LSTM(5, 8),
    "gru": lambda: nn.GRU(5, 8),
    "lstm deep": lambda: nn.LSTM(5, 8, num_layers=2, bidirectional=True),
    "gru no bias": lambda: nn.GRU(5, 8, bias=False),
    "lstm cell": lambda: nn.LSTMCell(5, 8),
    "lstm projected": lambda: nn.LSTM(5, 8, proj_size=3),
}


class Reader(nn.Module):
    """A recurrent module and a layer that reads its output."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = RECURRENT[kind]()
        width = getattr(self.rnn, "proj_size", 0) or self.rnn.hidden_size
        self.head = nn.Linear(width * (2 if getattr(self.rnn, "bidirectional", False) else 1), 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.rnn, nn.RNNCellBase):
            return self.head(self.rnn(x)[0])
        state, outputs = None, []
        for each in x:
            state = self.rnn(each, state)
            outputs.append(state[0])
        return self.head(torch.stack(outputs))


def unit_weights(model: Reader) -> Iterator[tuple[str, dict[int, set[tuple[str, int, int]]]]]:
    """Of every layer and direction, the weights (name, row, column) of each hidden unit."""
    rnn, size = model.rnn, model.rnn.hidden_size
    deep = not isinstance(rnn, nn.RNNCellBase)
    directions = ["", "_reverse"] if deep and rnn.bidirectional else [""]
    layers = rnn.num_layers if deep else 1
    for layer, (turn, direction) in itertools.product(range(layers), enumerate(directions)):
        suffix = f"_l{layer}{direction}" if deep else ""
        units: dict[int, set[tuple[str, int, int]]] = {unit: set() for unit in range(size)}
        for kind in ("ih", "hh"):
            name = f"rnn.weight_{kind}{suffix}"
            rows, columns = model.get_parameter(name).shape
            for row, column in itertools.product(range(rows), range(columns)):
                units[row % size].add((name, row, column))
        readers = [(f"rnn.weight_hh{suffix}", 0)]
        if getattr(rnn, "proj_size", 0):
            readers = [(f"rnn.weight_hr{suffix}", 0)]
        elif layer + 1 < layers:
            readers += [(f"rnn.weight_ih_l{layer + 1}{each}", turn * size) for each in directions]
        else:
            readers += [("head.weight", turn * size)]
        for name, start in readers:
            for unit, row in itertools.product(range(size), range(model.get_parameter(name).shape[0])):
                units[unit].add((name, row, start + unit))
        yield suffix, units


def units_of(kind: str) -> gs.ISS:
    return gs.ISS() if kind == "lstm projected" else gs.ISS(consumers={"rnn": ["head.weight"]})


def targets_of(kind: str) -> list[str]:
    return ["rnn*"] if kind == "lstm projected" else ["rnn*", "head.weight"]


def data(step: int) -> torch.Tensor:
    return torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(step))


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("method", [pytest.param(row, id=row.id) for row in METHODS if not row.measures])
@pytest.mark.parametrize("kind", list(RECURRENT))
def test_hidden_units_live_as_wholes_and_exactly_as_many_as_asked(kind: str, method: MethodRow) -> None:
    model = Reader(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    options = {"threshold": 0.8} if method.id == "dsr" else {}
    made = method.make(units_of(kind), sparsity=0.5, distribution="uniform", targets=targets_of(kind), **options)
    sparsity = gs.attach(model, made, optimizer)
    seen = set()
    for step in range(10):
        model(data(step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        masks = sparsity.masks()
        seen.add(str({name: mask.tolist() for name, mask in masks.items()}))
        dead: set[tuple[str, int, int]] = set()
        counts = []
        for _, units in unit_weights(model):
            own = {unit: {at for at in each if at[0] in masks} for unit, each in units.items()}
            gone = [unit for unit, each in own.items() if not any(masks[n][row, column] for n, row, column in each)]
            counts.append(len(units) - len(gone))
            dead |= {at for unit in gone for at in own[unit]}
        for name, mask in masks.items():
            pruned = {(name, row, column) for row, column in (~mask).nonzero().tolist()}
            assert pruned == {at for at in dead if at[0] == name}
            assert not model.get_parameter(name)[~mask].any()
        if method.id == "dsr":  # which moves units from one layer to another, where they have other numbers of weights
            sizes = [len(next(iter(units.values()))) for _, units in unit_weights(model)]
            room = 4 * sum(sizes) - sum(count * size for count, size in zip(counts, sizes, strict=True))
            assert 0 <= room < min(sizes)
        elif step + 1 >= method.settles:
            assert counts == [4] * len(counts)
    without_gradient = kind == "gru no bias" and method.reads_gradients  # a dead unit without biases has none
    assert (len(seen) > 1) == (method.id != "static" and not without_gradient)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("kind", list(RECURRENT))
def test_a_unit_is_ranked_by_the_norm_of_all_its_weights_each_once(kind: str, p: float) -> None:
    model = Reader(kind)
    method = gs.Static(0.0, structure=units_of(kind), targets=targets_of(kind), p=p)
    sparsity = gs.attach(model, method)
    for groups, (_, units) in zip(sparsity.methods[0].groups, unit_weights(model), strict=True):
        scores = groups.scores(gs.scores.SCORES["magnitude"], lambda _: {}, p)
        for unit, places in units.items():
            sizes = [
                abs(model.get_parameter(n)[row, column].item()) for n, row, column in places if n in sparsity.masks()
            ]
            expected = max(sizes) if p == float("inf") else sum(size**p for size in sizes) ** (1 / p)
            assert scores[unit].item() == pytest.approx(expected, rel=1e-5)
            assert len(sizes) == groups.size


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru", "gru no bias"])
def test_pruned_units_can_be_cut_out_of_the_module(kind: str) -> None:
    model = Reader(kind)
    gs.prune(model, 0.5, structure=units_of(kind), targets=targets_of(kind), distribution="uniform")
    left = model.rnn.weight_hh_l0.reshape(-1, 8, 8).any(2).any(0).nonzero().view(-1)
    assert len(left) == 4
    thin = type(model.rnn)(5, 4, bias=model.rnn.bias)
    with torch.no_grad():
        for name, parameter in thin.named_parameters():
            rows = model.rnn.get_parameter(name).unflatten(0, (-1, 8))[:, left].flatten(0, 1)
            parameter.copy_(rows[:, left] if "weight_hh" in name else rows)
    head = nn.functional.linear(thin(data(0))[0], model.head.weight[:, left], model.head.bias)
    torch.testing.assert_close(head, model(data(0)))


@pytest.mark.parametrize("kind", ["rnn", "lstm deep", "gru no bias"])
def test_a_unit_that_grows_changes_no_output_and_gets_gradients(kind: str) -> None:
    model = Reader(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = gs.SET(0.5, drop_fraction=0.0, structure=units_of(kind), targets=targets_of(kind))
    sparsity = gs.attach(model, method, optimizer)
    (groups, *_) = sparsity.methods[0].groups
    alive = [each.alive() for each in sparsity.methods[0].groups]
    grown = int((alive[0] == 0).nonzero()[0])
    before = model(data(0))
    alive[0][grown] = -1
    with torch.no_grad():
        for change in sparsity.methods[0]._changes(alive):
            change.tensor.apply(change)
    torch.testing.assert_close(model(data(0)), before)
    assert int(groups.alive().count_nonzero()) == 5
    model(data(0)).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in ("head.weight", "rnn.weight_ih_l1"):
            assert parameter.grad[:, grown].any()


@pytest.mark.parametrize("structure", ["row", "block:3x4:pad", "row+column", "iss"])
@pytest.mark.parametrize("method", [pytest.param(row, id=row.id) for row in METHODS if not row.measures])
def test_resumed_run_is_the_unbroken_one_to_the_bit(method: MethodRow, structure: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, gs.Sparsity]:
        model = Reader("lstm")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        made = method.make(structure, sparsity=0.5, distribution="uniform", targets="rnn*")
        return model, optimizer, gs.attach(model, made, optimizer)

    def go(run: tuple[nn.Module, torch.optim.Optimizer, gs.Sparsity], steps: range) -> None:
        for step in steps:
            run[0](data(step)).square().sum().backward()
            run[1].step()
            run[1].zero_grad()

    unbroken, broken = make(), make()
    go(unbroken, range(9))
    for first in (0, 3, 6):
        go(broken, range(first, first + 3))
        state = copy.deepcopy([part.state_dict() for part in broken])
        broken = make()
        for part, saved in zip(broken, state, strict=True):
            part.load_state_dict(saved)
    assert [snapshot(part.state_dict()) for part in unbroken] == [snapshot(part.state_dict()) for part in broken]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"structure": "iss"},
            r"head\.weight: structure 'iss' is for RNN, LSTM and GRU, and head is a Linear; exclude",
        ),
        ({"structure": "iss", "targets": "rnn.weight_hh*"}, r"rnn\.weight_ih_l0: belongs to the hidden units of rnn"),
        ({"structure": gs.ISS({"net": []}), "targets": "rnn*"}, r"consumers: 'net' is no recurrent module.*'rnn'"),
        (
            {"structure": gs.ISS({"rnn": ["head.weight"]}), "targets": "rnn*"},
            r"consumers: 'head\.weight' is not among the targets, expected a target with the 8 outputs of 'rnn'",
        ),
        (
            {"structure": gs.ISS({"rnn": ["rnn.weight_ih_l0"]}), "targets": "rnn*"},
            r"consumers: 'rnn\.weight_ih_l0' has shape \(32, 5\), expected .* 8 outputs",
        ),
        ({"structure": "iss", "targets": "rnn*", "over": "all"}, r"over='all' counts weights, and structure iss"),
        ({"structure": "row+column", "over": "all"}, r"over='all' counts weights, and structure row\+column"),
        (
            {"structure": "block:2x8", "targets": "head*"},
            r"head\.weight: block:2x8 needs .*let those at the edges be smaller \('block:2x8:pad'\)",
        ),
    ],
)
def test_what_cannot_be_divided_so_is_refused_by_name(options: dict[str, object], message: str) -> None:
    model = Reader("lstm")
    before = snapshot(model.state_dict())
    with pytest.raises(gs.ConfigurationError, match=message):
        gs.attach(model, gs.SET(0.5, **options))
    assert snapshot(model.state_dict()) == before


def test_rows_and_columns_of_a_grouped_convolution_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(gs.ConfigurationError, match=r"0\.weight: row\+column needs every output to see every input"):
        gs.attach(model, gs.SET(0.5, structure="row+column"))


@pytest.mark.parametrize("consumers", [["head.weight"], {"rnn": "head.weight"}, {"rnn": [1]}, {0: ["head.weight"]}])
def test_consumers_of_another_form_are_refused(consumers: object) -> None:
    with pytest.raises(gs.ConfigurationError, match=r"structure iss: consumers=.*expected a mapping of module names"):
        gs.ISS(consumers)


# -- groups of several sizes under one budget -------------------------------------------------------------------------


@pytest.mark.parametrize("heuristic", ["paper", "within", "anti-paper"])
def test_moving_groups_between_weights_of_other_sizes_leaves_less_open_than_a_group(heuristic: str) -> None:
    """Rows of 100 weights and of 4: where none of 100 fits into what is free, those of 4 take it, pruned or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 4), nn.Linear(4, 80))
    start = {"0.*": 0.5, "1.*": 0.05}
    method = gs.DSR(structure="row", distribution=start, threshold=0.2, prune_fraction=0.1, heuristic=heuristic)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sparsity = gs.attach(model, method, optimizer)
    budget = 2 * 100 + 76 * 4
    for step in range(30):
        model(torch.randn(8, 100, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model[1].weight.mul_(0.9)  # now and then most of the small rows fall below the threshold
        (update,) = sparsity.update()
        assert budget - 4 < sum(row["active"] for row in update.rows) <= budget
        assert all(row["active"] for row in update.rows)
