"""Hebbian sparsity: what is measured and when, which connections stay and grow, what they start from."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.utils.checkpoint import checkpoint

import gossamer as gs

SCOPES = ("slice", "tensor", "model")
DROPS = ("strength", "strength_or_magnitude", "weighted_magnitude")
GROWTHS = ("random", "strength", "gradient")


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 7, 7, generator=generator), torch.randint(10, (8,), generator=generator)


class Run:
    def __init__(self, seed: int = 0, **options: Any) -> None:
        self.model = net(seed)
        self.optimizer = optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        options = {"sparsity": 0.8, "every": 6, "count_every": 2} | options
        self.sparsity = gs.attach(self.model, gs.Hebbian(**options), self.optimizer)
        (self.method,) = self.sparsity.methods
        self.forward: Any = self.model

    def backward(self, step: int) -> None:
        x, y = batch(step)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.forward(x), y).backward()

    def train(self, steps: range | int) -> Run:
        for step in range(steps) if isinstance(steps, int) else steps:
            self.backward(step)
            self.optimizer.step()
        return self

    def weights(self) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name).detach().clone() for name in ("0.weight", "3.weight")}

    def everything(self) -> list[Any]:
        holders = (self.model, self.optimizer, self.sparsity)
        return pickle.loads(pickle.dumps([holder.state_dict() for holder in holders]))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


# -- what is measured --------------------------------------------------------------------------------------------------


def counts_of(run: Run, step: int) -> dict[str, tuple[Tensor, int]]:
    """Connections of the network's two layers that were active at both ends, and of how many occasions."""
    x, _ = batch(step)
    with torch.no_grad():
        y = run.model[0](x)
        z = run.model[2](run.model[1](y))
        out = run.model[3](z)
    conv = torch.zeros(4, 2, 3, 3)
    for o, i, j, k in np.ndindex(4, 2, 3, 3):
        conv[o, i, j, k] = ((y[:, o] > 0) & (x[:, i, j : j + 5 : 2, k : k + 5 : 2] > 0)).sum()
    linear = (out > 0).float().T @ (z > 0).float()
    return {"0.weight": (conv, y[:, 0].numel()), "3.weight": (linear, len(x))}


@pytest.mark.parametrize("decay", [None, 0.75])
def test_every_nth_step_is_measured_in_training_alone(decay: float | None) -> None:
    run = Run(count_every=3, every=9, decay=decay)
    expected: dict[str, Any] = {}
    for step in range(8):
        run.backward(step)
        if step % 3 == 0:
            training = run.model.eval()  # which measures nothing
            for name, (counts, of) in counts_of(run, step).items():
                was, before = expected.get(name, (None, 0))
                if decay is None:
                    expected[name] = (counts + (0 if was is None else was), before + of)
                else:
                    mean = counts / of
                    expected[name] = (mean if was is None else decay * was + (1 - decay) * mean, 1)
            training.train()
        run.optimizer.step()
        for name, found in run.method.strengths().items():
            value, of = expected[name]
            torch.testing.assert_close(found, value / of, rtol=1e-6, atol=0)
    rows = {row["name"]: row for row in run.method.learned()}
    strength, mask = run.method.strengths()["0.weight"], run.sparsity.masks()["0.weight"]
    assert rows["0.weight"]["strength_active"] == pytest.approx(float(strength[mask].mean()))
    assert rows["0.weight"]["strength_pruned"] == pytest.approx(float(strength[~mask].mean()))


def test_sums_begin_anew_after_an_update_and_averages_go_on() -> None:
    for decay in (None, 0.5):
        run = Run(count_every=1, every=4, decay=decay).train(4)
        after_update = run.method.strengths()
        assert all(each.any() for each in after_update.values())  # those by which it ranked
        run.backward(4)
        fresh = {name: counts / of for name, (counts, of) in counts_of_training(run, 4).items()}
        run.optimizer.step()
        for name, found in run.method.strengths().items():
            expected = fresh[name] if decay is None else (after_update[name] + fresh[name]) / 2
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def counts_of_training(run: Run, step: int) -> dict[str, tuple[Tensor, int]]:
    run.model.eval()
    found = counts_of(run, step)
    run.model.train()
    return found


@pytest.mark.parametrize(
    ("options", "statistic"),
    [
        ({"threshold": 0.3}, lambda x, y, layer: gs.scores.coactivation(x, y, layer, threshold=0.3)),
        (
            {"threshold": 0.6, "sigmoid": True},
            lambda x, y, m: gs.scores.coactivation(x, y, m, threshold=0.6, sigmoid=True),
        ),
        ({"deviations": 0.5}, lambda x, y, layer: gs.scores.coactivation(x, y, layer, deviations=0.5)),
        (
            {"threshold": 0.3, "activation": "relu"},
            lambda x, y, m: gs.scores.coactivation(x, y.relu(), m, threshold=0.3),
        ),
        ({"statistic": "correlation"}, gs.scores.correlation),
        ({"statistic": "absolute_correlation"}, lambda x, y, m: gs.scores.correlation(x, y, m, absolute=True)),
        (
            {"statistic": "correlation", "activation": torch.tanh},
            lambda x, y, m: gs.scores.correlation(x, y.tanh(), m),
        ),
    ],
)
def test_what_is_measured_is_the_statistic_asked_for(options: dict[str, Any], statistic: Callable[..., Tensor]) -> None:
    run = Run(**options)
    layer, (x, _) = run.model[0], batch(0)
    expected = statistic(x, layer(x).detach(), layer)
    if options.get("statistic") is None:
        expected = expected / (8 * 9)
    run.train(1)
    torch.testing.assert_close(run.method.strengths()["0.weight"], expected, rtol=1e-6, atol=1e-7)


class Twice(nn.Module):
    """One layer called twice, by keyword, and once more under activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(input=x)
        return checkpoint(self.layer, self.layer(x), use_reentrant=False)


def test_every_call_counts_once_also_under_checkpointing() -> None:
    torch.manual_seed(0)
    model = Twice()
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    sparsity = gs.attach(model, gs.Hebbian(0.5, every=4, count_every=1), optimizer)
    x = torch.randn(5, 4)
    inputs = [x]
    with torch.no_grad():
        for _ in range(3):
            inputs.append(nn.functional.linear(inputs[-1], model.layer.weight, model.layer.bias))
    expected = sum((out > 0).float().T @ (at > 0).float() for at, out in itertools.pairwise(inputs))
    model(x).sum().backward()
    optimizer.step()
    assert sparsity.methods[0].strengths()["layer.weight"].equal(expected / 15)


class Turned(nn.Linear):
    """A linear layer that takes its input as the keyword `input`, after another argument."""

    def forward(self, sign: Tensor, input: Tensor) -> Tensor:
        return super().forward(sign * input)


def test_what_is_measured_is_the_keyword_input_where_there_is_one() -> None:
    layer = Turned(4, 3)
    optimizer = optim.SGD(layer.parameters(), lr=0.0)
    sparsity = gs.attach(layer, gs.Hebbian(0.5), optimizer)
    x, sign = torch.randn(5, 4), torch.full((5, 4), -1.0)
    y = layer(sign, input=x)
    y.sum().backward()
    optimizer.step()
    (found,) = sparsity.methods[0].strengths().values()
    assert found.equal(gs.scores.coactivation(x, y, layer) / 5)


def test_an_activation_that_works_in_place_leaves_outputs_as_they_are() -> None:
    run, x = Run(activation=torch.relu_), batch(0)[0]
    expected = nn.functional.conv2d(x, run.model[0].weight, run.model[0].bias, stride=2)
    assert run.model[0](x).equal(expected)
    assert (expected < 0).any()


@pytest.mark.parametrize("statistic", ["coactivation", "correlation"])
def test_a_pass_without_samples_counts_for_nothing(statistic: str) -> None:
    run, with_empty = Run(statistic=statistic, count_every=1), Run(statistic=statistic, count_every=1)
    for step in range(3):
        run.train(range(step, step + 1))
        assert with_empty.model(torch.zeros(0, 2, 7, 7)).shape == (0, 10)
        with_empty.train(range(step, step + 1))
    assert equal(run.everything(), with_empty.everything())
    before = run.everything()
    run.optimizer.zero_grad()
    run.model(torch.zeros(0, 2, 7, 7))
    run.optimizer.step()  # whose strengths are those of the steps before
    assert equal(before[2]["methods"][0]["state"]["measured"], run.everything()[2]["methods"][0]["state"]["measured"])


def test_nothing_is_measured_after_the_last_update() -> None:
    seen: list[Tensor] = []
    run = Run(every=4, until=8, count_every=2, activation=lambda y: seen.append(y) or y).train(8)
    before, passes = run.method.strengths(), len(seen)
    run.train(range(8, 12))
    assert passes == len(seen) == 2 * 4
    assert equal(run.method.strengths(), before)
    (update,) = run.sparsity.update()  # by the strengths there are
    assert any(row["pruned"] for row in update.rows)


def test_a_compiled_model_is_measured_alike_with_a_graph_for_each_kind_of_step() -> None:
    run, compiled = Run(count_every=3, every=6), Run(count_every=3, every=6)
    counter = torch._dynamo.testing.CompileCounter()
    compiled.forward = torch.compile(compiled.model, fullgraph=True, backend=counter)
    for each in (run, compiled):
        each.train(14)
    assert equal(run.everything(), compiled.everything())
    assert counter.frame_count == 2


def test_copies_measure_for_themselves_and_a_copy_of_the_model_alone_nothing() -> None:
    run = Run().train(3)
    other = copy.copy(run)
    other.model, other.optimizer, other.sparsity = copy.deepcopy((run.model, run.optimizer, run.sparsity))
    other.forward, (other.method,) = other.model, other.sparsity.methods
    alone = copy.deepcopy(run.model)
    before = run.method.strengths()
    alone(batch(0)[0])
    run.train(range(3, 15))
    assert not equal(run.method.strengths(), before)
    assert equal(other.method.strengths(), before)
    other.train(range(3, 15))
    assert equal(run.everything(), other.everything())


@pytest.mark.parametrize("decay", [None, 0.5])
def test_a_run_resumed_at_any_step_is_the_unbroken_one_to_the_bit(decay: float | None) -> None:
    unbroken = Run(decay=decay, grow_score="strength").train(13).everything()
    for stop in (1, 2, 5, 6, 7, 12):
        first, second = Run(decay=decay, grow_score="strength").train(stop), Run(1, decay=decay, grow_score="strength")
        for holder, state in zip((second.model, second.optimizer, second.sparsity), first.everything(), strict=True):
            holder.load_state_dict(state)
        assert equal(second.train(range(stop, 13)).everything(), unbroken), stop


# -- what stays and what grows -----------------------------------------------------------------------------------------


def units_of(scope: str, masks: dict[str, Tensor]) -> list[list[tuple[str, int]]]:
    """The weights that are ranked against each other, as names and flat places."""
    places = {name: [(name, i) for i in range(mask.numel())] for name, mask in masks.items()}
    if scope == "model":
        return [[each for part in places.values() for each in part]]
    if scope == "tensor":
        return list(places.values())
    size = {"0.weight": 9, "3.weight": 36}
    return [part[i : i + size[name]] for name, part in places.items() for i in range(0, len(part), size[name])]


def lowest(unit: list[Any], value: dict[Any, float], fraction: float) -> set[Any]:
    order = sorted(unit, key=lambda place: (value[place], unit.index(place)))
    return set(order[: int(fraction * len(unit))])


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("scope", SCOPES)
def test_an_update_drops_the_lowest_and_grows_as_many(scope: str, drop: str, growth: str) -> None:
    # Strengths of this statistic do not tie, so that which connections go is not a question of order.
    run = Run(
        sparsity=0.6,
        scope=scope,
        drop_score=drop,
        grow_score=growth,
        statistic="absolute_correlation",
        drop_fraction=0.4,
        every=9,
    )
    run.train(4)
    run.backward(4)
    masks, before = run.sparsity.masks(), run.weights()
    run.sparsity.update()
    strengths = run.method.strengths()
    flat = lambda values: {(name, i): v for name, each in values.items() for i, v in enumerate(each.flatten().tolist())}  # noqa: E731
    active, strength, weight = flat(masks), flat(strengths), flat(before)
    gradient = flat({name: run.model.get_parameter(name).grad for name in masks})
    after = run.sparsity.masks()
    lives, values = flat(after), flat(run.weights())
    kept: set[Any] = set()
    for unit in units_of(scope, masks):
        here = [place for place in unit if active[place]]
        gone = lowest(here, strength, 0.4)
        if drop == "weighted_magnitude":
            gone = lowest(here, {place: strength[place] * abs(weight[place]) for place in here}, 0.4)
        if drop == "strength_or_magnitude":
            small = set()
            signs = [{False, True}] if scope == "slice" else [{False}, {True}]
            for sign in signs:
                part = [place for place in here if (weight[place] < 0) in sign]
                small |= lowest(part, {place: abs(weight[place]) for place in part}, 0.4)
            gone &= small
        stay = set(here) - gone
        kept |= stay
        now = {place for place in unit if lives[place]}
        assert stay <= now
        assert len(now) == len(here)
        if growth == "random":
            assert not gone & now
        else:
            by = strength if growth == "strength" else {place: abs(value) for place, value in gradient.items()}
            others = sorted((place for place in unit if place not in stay), key=lambda place: -by[place])
            assert now - stay == set(others[: len(gone)])
    bound = {"0.weight": math.sqrt(6 / 18), "3.weight": math.sqrt(6 / 36)}
    new = {name: [] for name in masks}
    for place, alive in lives.items():
        if not alive:
            assert values[place] == 0
        elif place in kept:
            assert values[place] == weight[place]
        else:
            assert 0 < abs(values[place]) < bound[place[0]]
            assert values[place] != weight[place]
            new[place[0]].append(abs(values[place]))
    for name, found in new.items():
        assert not found or scope != "tensor" or drop == "strength_or_magnitude" or max(found) > bound[name] / 2


def test_without_reinitialization_all_that_begins_anew_begins_at_zero() -> None:
    run = Run(grow_score="strength", reinitialize=False, every=9).train(4)
    run.sparsity.update()
    grown = {name: mask & (run.weights()[name] == 0) for name, mask in run.sparsity.masks().items()}
    assert {name: int(mask.sum()) for name, mask in grown.items()} == {
        "0.weight": int(0.3 * 14),
        "3.weight": int(0.3 * 72),
    }


@given(st.integers(0, 99), st.integers(0, 97), st.sampled_from([None, [0, 1], [0], [1], [0, 2], [3, 1]]))
@settings(max_examples=40, deadline=None)
def test_all_slices_have_as_many_active_before_and_after_updates_with_ties(
    seed: int, percent: int, dims: list[int] | None
) -> None:
    sparsity = percent / 100
    layer = nn.Conv2d(3, 4, (5, 6))
    size = math.prod(side for dim, side in enumerate((4, 3, 5, 6)) if dim not in (dims or [0, 1]))
    count = (100 - percent) * size // 100
    options = {"prune_dims": dims, "every": 2, "count_every": 1, "drop_fraction": 0.6, "seed": seed}
    make = lambda: gs.Hebbian(sparsity, scope="slice", **options)  # noqa: E731
    if count == 1:
        with pytest.raises(
            gs.ConfigurationError, match=r"weight: of 1 active weights in a slice .* never change; use sc"
        ):
            gs.attach(layer, make())
        return
    if count == 0:
        with pytest.raises(gs.ConfigurationError, match=rf"weight: slices of {size} weights cannot be sparser than"):
            gs.attach(layer, make())
        return
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    sparsity_ = gs.attach(layer, make(), optimizer)
    kept = dims or [0, 1]
    others = [dim for dim in range(4) if dim not in kept]
    for step in range(5):
        assert sparsity_.masks()["weight"].sum(others).eq(count).all()
        optimizer.zero_grad()
        # Ones tie all strengths.
        layer(torch.ones(2, 3, 6, 6)).square().sum().backward()
        with torch.no_grad():
            layer.bias.fill_(10.0 + step)
        optimizer.step()


@pytest.mark.parametrize(("size", "active", "kept"), [(25, 5, 4), (9, 2, 1), (49, 21, 18), (49, 7, 6)])
def test_fractions_that_floating_point_rounds_down_are_those_that_were_meant(size: int, active: int, kept: int) -> None:
    for scope in SCOPES:
        layer = nn.Linear(size, 4)
        optimizer = optim.SGD(layer.parameters(), lr=0.0)
        method = gs.Hebbian(
            1 - active / size, scope=scope, drop_fraction=1 - kept / active, threshold=-9.0, every=1, count_every=1
        )
        sparsity = gs.attach(layer, method, optimizer)
        assert int(sparsity.masks()["weight"].sum()) == 4 * active
        rows: list[dict[str, Any]] = []
        sparsity.on_update(lambda update, rows=rows: rows.extend(update.rows))
        layer(torch.rand(3, size)).sum().backward()
        optimizer.step()
        assert [row["pruned"] for row in rows] == [4 * (active - kept)]


@pytest.mark.parametrize("size", [3, 7, 9, 11, 36, 1000])
def test_the_bounds_that_errors_name_are_accepted(size: int) -> None:
    def bound(message: str, **options: Any) -> float:
        with pytest.raises(gs.ConfigurationError, match=message) as caught:
            gs.attach(nn.Linear(2 * size, 4), gs.Hebbian(scope="slice", **options))
        found = re.search(message, str(caught.value))
        assert found
        return float(found[1])

    sparsest = bound(r"cannot be sparser than (0\.\d+), and", sparsity=0.9999)
    least = bound(r"give at least (0\.\d+), or", sparsity=0.5, drop_fraction=0.9 / size)
    gs.attach(nn.Linear(2 * size, 4), gs.Hebbian(sparsest, scope="slice", drop_fraction=0.0))
    gs.attach(nn.Linear(2 * size, 4), gs.Hebbian(0.5, scope="slice", drop_fraction=least))


def test_the_rule_of_the_model_moves_weights_between_layers_and_leaves_none_empty() -> None:
    run = Run(scope="model", sparsity=0.97, statistic="absolute_correlation", drop_fraction=0.9)
    counts = set()
    for step in range(24):
        run.train(range(step, step + 1))
        found = [int(mask.sum()) for mask in run.sparsity.masks().values()]
        assert sum(found) == math.floor(0.03 * 432)
        assert min(found) >= 1
        counts.add(tuple(found))
    assert len(counts) > 1


@pytest.mark.parametrize("structure", ["filter", "block:2x2", "row+column", "2:4"])
def test_groups_are_ranked_by_the_strengths_of_their_connections(structure: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    budget = {} if structure == "2:4" else {"sparsity": 0.5}
    method = gs.Hebbian(**budget, structure=structure, every=3, count_every=1, statistic="absolute_correlation")
    sparsity = gs.attach(layer, method, optimizer)
    active = int(sparsity.masks()["weight"].sum())
    seen = set()
    for step in range(12):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
        seen.add(str(sparsity.masks()["weight"].tolist()))
        assert int(sparsity.masks()["weight"].sum()) == active
    assert len(seen) > 2


def test_connections_that_were_never_active_are_ranked_at_random_below_all_others() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 20)
    optimizer = optim.SGD(layer.parameters(), lr=0.0)
    sparsity = gs.attach(
        layer, gs.Hebbian(0.5, every=4, count_every=1, drop_fraction=0.9, grow_score="strength"), optimizer
    )
    x = torch.rand(64, 40)
    x[:, 5:] = -1.0  # which leaves 35 of 40 inputs never active
    with torch.no_grad():
        layer.bias.fill_(100.0)
    for _ in range(4):
        layer(x).sum().backward()
        optimizer.step()
    mask = sparsity.masks()["weight"]
    assert mask[:, :5].all()
    columns = mask[:, 5:].sum(0)
    assert columns.sum() == 400 - 100
    assert columns.max() < 18  # by index the first would be full, and the last empty
    assert columns.min() > 0


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("drop", DROPS)
@pytest.mark.parametrize("growth", GROWTHS)
def test_connections_of_equal_strength_stay_and_grow_wherever_they_are(scope: str, drop: str, growth: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(100, 20)
    nn.init.constant_(layer.bias, 100.0)
    optimizer = optim.SGD(layer.parameters(), lr=0.0)
    method = gs.Hebbian(0.8, scope=scope, drop_score=drop, grow_score=growth, every=1, count_every=1, drop_fraction=0.5)
    sparsity = gs.attach(layer, method, optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        layer(torch.rand(8, 100) + 0.1).square().sum().backward()  # so that all strengths are 1
        optimizer.step()
    assert all(each.eq(1).all() for each in sparsity.methods[0].strengths().values())
    outputs, inputs = sparsity.masks()["weight"].nonzero().double().mean(0).tolist()
    assert inputs == pytest.approx(49.5, abs=8)  # 400 of them: 5 standard deviations of their mean
    assert outputs == pytest.approx(9.5, abs=1.5)


@pytest.mark.parametrize(
    "method", [lambda: gs.Hebbian(0.8, scope="slice", seed=0), lambda: gs.Static(structure="2:4", seed=0)]
)
def test_first_masks_do_not_follow_weights_that_were_drawn_from_the_same_seed(method: Callable[[], gs.Method]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(100, 10, bias=False)
    sparsity = gs.attach(layer, method())
    assert 0.35 < (layer.weight[sparsity.masks()["weight"]] > 0).double().mean() < 0.65


def test_groups_of_connections_that_were_never_active_are_ranked_at_random() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(100, 5)
    nn.init.constant_(layer.bias, 100.0)
    optimizer = optim.SGD(layer.parameters(), lr=0.0)
    method = gs.Hebbian(
        0.6, structure="column", every=1, count_every=1, drop_fraction=0.9, grow_score="strength", reinitialize=False
    )
    sparsity = gs.attach(layer, method, optimizer)
    x = torch.rand(8, 100) + 0.1
    x[:, 10:] *= -1
    for _ in range(6):
        layer(x).sum().backward()
        optimizer.step()
    kept = sparsity.masks()["weight"][0].nonzero().flatten()
    assert kept[:10].tolist() == list(range(10))
    assert float(kept[10:].double().mean()) == pytest.approx(54.5, abs=12)  # 30 of 90


class Branches(nn.Module):
    """Two layers, of which a pass takes one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(30, 10), nn.Linear(30, 10)

    def forward(self, x: Tensor, name: str) -> Tensor:
        return self.get_submodule(name)(x)


@pytest.mark.filterwarnings("ignore:.*no forward pass went through its layer so far:UserWarning")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("decay", [None, 0.5])
def test_a_layer_that_was_not_measured_since_the_last_update_keeps_its_mask(scope: str, decay: float | None) -> None:
    model = Branches()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    sparsity = gs.attach(model, gs.Hebbian(0.5, scope=scope, every=2, count_every=1, decay=decay), optimizer)
    changed = []
    for step, name in enumerate(("first", "first", "second", "second", "first", "second")):
        before = sparsity.masks()
        optimizer.zero_grad()
        model(torch.randn(6, 30, generator=torch.Generator().manual_seed(step)), name).square().sum().backward()
        optimizer.step()
        changed.append({each.split(".")[0] for each, mask in sparsity.masks().items() if not mask.equal(before[each])})
    assert changed == [set(), {"first"}, set(), {"second"}, set(), {"first", "second"}]
    (update,) = sparsity.update()  # of both, by the strengths that there are
    assert all(row["pruned"] for row in update.rows)


def test_finalizing_leaves_no_hook_and_the_same_outputs() -> None:
    run = Run().train(7)
    x = batch(99)[0]
    before = run.model(x)
    run.sparsity.finalize()
    assert run.model(x).equal(before)
    assert not any(module._forward_hooks for module in run.model.modules())
    assert run.method.strengths()["0.weight"].any()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "layer"}, r"scope: got 'layer'; allowed are 'slice', 'tensor', 'model'"),
        ({"statistic": "hebb"}, r"statistic: got 'hebb'; allowed are 'coactivation', 'correlation', 'absolute_corr"),
        ({"drop_score": "strenght"}, r"drop_score: got 'strenght'; .*did you mean 'strength'\?"),
        ({"grow_score": "rand"}, r"grow_score: got 'rand'; .*'strength'"),
        ({"statistic": "correlation", "threshold": 0.5}, r"threshold, sigmoid and deviations say what is active, and"),
        ({"threshold": 0.5, "deviations": 1.0}, r"deviations=1.0 beside a threshold"),
        ({"sigmoid": "yes"}, r"sigmoid: expected True or False, got 'yes'"),
        ({"activation": "rule"}, r"activation: got 'rule'; allowed are 'relu', "),
        ({"decay": 1.0}, r"decay: expected a number in \[0, 1\), got 1.0"),
        ({"count_every": 0}, r"count_every: expected an integer of at least 1, got 0"),
        ({"count_every": 11}, r"count_every=11: nothing would be measured between updates that are 10 steps apart"),
        ({"reinitialize": 1}, r"reinitialize: expected True or False, got 1"),
        ({"prune_dims": [0]}, r"prune_dims=\[0\] is for scope='slice', got 'tensor'"),
        ({"scope": "slice", "prune_dims": [0, 0]}, r"prune_dims: expected a list of different numbers, got \[0, 0\]"),
        ({"scope": "slice", "prune_dims": [-1]}, r"prune_dims: expected an integer of at least 0, got -1"),
        ({"scope": "slice", "over": "all"}, r"scope='slice' has as many active weights in every slice; use over="),
        ({"scope": "slice", "distribution": "erk"}, r"distribution='erk': slices of all weights are equally sparse"),
        (
            {"scope": "slice", "distribution": {"*": 0.5}, "sparsity": None},
            r"distribution=\{'\*': 0\.5\}: .* use 'uniform', and several methods with targets",
        ),
        ({"activation": [1]}, r"activation: got \[1\]; allowed are 'relu', "),
        ({"scope": "slice", "prune_dims": [[0]]}, r"prune_dims: expected an integer of at least 0, got \[0\]"),
        ({"scope": "slice", "prune_dims": 0}, r"prune_dims: expected a list of different numbers, got 0"),
        (
            {"scope": "model", "structure": "row"},
            r"scope='model' ranks single weights; structure (row|filter) needs 'ten",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gs.ConfigurationError, match=f"^Hebbian: {message}"):
        gs.Hebbian(**{"sparsity": 0.5, "every": 10, "count_every": 2} | options)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda: nn.LSTM(3, 4), {}, r"weight_ih_l0: belongs to a LSTM, whose connections cannot be measured"),
        (lambda: nn.Conv2d(3, 4, 1), {"scope": "slice"}, r"weight: slices of shape .* along dimensions \[0, 1\]"),
        (
            lambda: nn.Conv2d(3, 4, 3),
            {"scope": "slice", "sparsity": 0.9},
            r"slices of 9 weights cannot be sparser than 0.88",
        ),
        (
            lambda: nn.Conv2d(3, 4, 3),
            {"scope": "slice", "sparsity": 0.7, "drop_fraction": 0.4},
            r"weight: of 2 active weights in a slice drop_fraction=0.4 drops none.*; give at least 0\.5, or use scope",
        ),
        (lambda: nn.Linear(3, 4), {"scope": "slice", "prune_dims": [2]}, r"weight: slices of shape \(4, 3\) along dim"),
        (lambda: nn.Linear(3, 4), {"scope": "slice", "sparsity": None}, r"no sparsity; scope='slice' needs one"),
    ],
)
def test_layers_that_it_is_not_for_are_named(
    model: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    made = model()
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(gs.ConfigurationError, match=message):
        gs.attach(made, gs.Hebbian(**{"sparsity": 0.5} | options))
    assert equal(dict(made.state_dict()), dict(before))


def test_an_update_without_a_forward_pass_is_refused_and_changes_nothing() -> None:
    run = Run()
    before = run.everything()
    with pytest.raises(gs.OrderError, match=r"^0\.weight: no forward pass in training was measured, of this or any"):
        run.sparsity.update()
    assert equal(run.everything(), before)
    run.train(2).sparsity.update()


def test_a_scheduled_update_soon_after_one_by_hand_ranks_by_the_same_strengths() -> None:
    run = Run(every=8, count_every=8).train(6)
    run.sparsity.update()
    before = run.method.strengths()
    run.train(range(6, 8))
    assert run.sparsity.step == 8
    assert equal(run.method.strengths(), before)


def test_a_layer_that_no_pass_goes_through_is_a_warning() -> None:
    model = Branches()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gs.attach(model, gs.Hebbian(0.5, every=2, count_every=1), optimizer)

    def step() -> None:
        model(torch.randn(6, 30), "first").square().sum().backward()
        optimizer.step()

    step()
    with pytest.warns(UserWarning, match=r"second\.weight: no forward pass went through its layer so far"):
        step()


@pytest.mark.parametrize("sparsity", [0.0, 0.04, 0.2])
def test_slices_that_are_nearly_full_begin_no_active_weight_anew_at_random(sparsity: float) -> None:
    run = Run(sparsity=sparsity, scope="slice", every=4, count_every=1).train(3)
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    masks = run.sparsity.masks()
    (update,) = run.sparsity.update()
    for row in update.rows:
        now, kept = run.sparsity.masks()[row["name"]], masks[row["name"]]
        both = now & kept
        assert run.model.get_parameter(row["name"])[both].equal(weights[row["name"]][both])
        assert row["pruned"] == row["grown"] == int((kept & ~now).sum())


def test_in_slices_magnitudes_are_ranked_whatever_their_sign() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 20, 5)
    optimizer = optim.SGD(conv.parameters(), lr=0.0)
    method = gs.Hebbian(0.8, scope="slice", count_every=1, drop_score="strength_or_magnitude")
    sparsity = gs.attach(conv, method, optimizer)
    conv(torch.randn(4, 16, 12, 12)).sum().backward()
    optimizer.step()
    (update,) = sparsity.update()
    # Of the five of a kernel the weakest goes where it is also the smallest: by chance once in five times.
    assert 320 / 8 < update.rows[0]["grown"] < 320 / 3


def test_over_a_model_coactivations_are_ranked_in_units_of_their_mean() -> None:
    """One layer is active everywhere, the other seldom: what is active there does not go first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20))
    nn.init.constant_(model[0].bias, 3.0)
    nn.init.constant_(model[2].bias, -0.2)
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    sparsity = gs.attach(model, gs.Hebbian(0.5, scope="model", count_every=1), optimizer)
    model(torch.rand(64, 20)).sum().backward()
    optimizer.step()
    first, second = sparsity.methods[0].strengths().values()
    assert (first == 1).all()
    often = (second > 0.5) & (second < 1)
    assert 0.5 < float(second[often].min()) < float(second[often].max()) < 1
    before = sparsity.masks()
    sparsity.update()
    after = sparsity.masks()
    assert (after["2.weight"] | ~(before["2.weight"] & often)).all()
    assert (before["0.weight"] & ~after["0.weight"]).any()


class Pair(nn.Linear):
    """A linear layer that gives more than a tensor."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), None


@pytest.mark.parametrize(
    ("kind", "input", "options", "message"),
    [
        (Pair, torch.ones(2, 4), {}, r"the layer's output is a tuple, expected a tensor; leave it out with targets="),
        (
            nn.Linear,
            torch.ones(2, 4),
            {"activation": lambda y: None},
            r"what `activation` gives is a NoneType, .*; let it return",
        ),
        (nn.Linear, torch.ones(2, 4), {"activation": torch.sum}, r"Linear of 4 inputs and 3 outputs: got an input of"),
    ],
)
def test_a_layer_that_cannot_be_measured_is_named(
    kind: type[nn.Linear], input: Tensor, options: dict[str, Any], message: str
) -> None:
    model = nn.Sequential(nn.Identity(), kind(4, 3))
    gs.attach(model, gs.Hebbian(0.5, **options), optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(gs.ConfigurationError, match=rf"^1\.weight: {message}"):
        model(input)


def test_given_masks_whose_slices_have_different_counts_are_refused() -> None:
    layer = nn.Linear(8, 3)
    mask = torch.zeros(3, 8)
    mask[:, :4] = 1
    even = gs.attach(nn.Linear(8, 3), gs.Hebbian(scope="slice"), masks={"weight": mask})
    assert even.masks()["weight"].equal(mask.bool())
    before = layer.weight.detach().clone()
    with pytest.raises(gs.ConfigurationError, match=r"of 4 active weights in a slice drop_fraction=0.2 drops none"):
        gs.attach(layer, gs.Hebbian(scope="slice", drop_fraction=0.2), masks={"weight": mask})
    mask[0, 0], mask[1, 4] = 0, 1
    with pytest.raises(gs.ConfigurationError, match=r"weight: 2 slices of the given mask have more or fewer active"):
        gs.attach(layer, gs.Hebbian(scope="slice"), masks={"weight": mask})
    assert layer.weight.equal(before)


@pytest.mark.parametrize("statistic", ["correlation", "absolute_correlation"])
def test_correlations_of_single_samples_are_refused_and_change_nothing(statistic: str) -> None:
    layer = nn.Linear(6, 4)
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    sparsity = gs.attach(layer, gs.Hebbian(0.5, every=3, count_every=1, statistic=statistic), optimizer)
    for step in range(3):
        before = layer.weight.detach().clone()
        layer(torch.randn(1, 6)).sum().backward()
        if step < 2:
            optimizer.step()
    masks = sparsity.masks()
    with pytest.raises(gs.ConfigurationError, match=r"^weight: at 3 occasions .* vary over a batch, .*several samples"):
        optimizer.step()
    assert layer.weight.equal(before)
    assert equal(sparsity.masks(), masks)


def test_a_threshold_that_nothing_reaches_is_refused_and_changes_nothing() -> None:
    run = Run(threshold=100.0).train(5)
    run.backward(5)
    before, weights = run.everything(), run.weights()
    message = r"^0\.weight: at 216 occasions no connection had its input and its output above 100, so that none can be"
    with pytest.raises(gs.ConfigurationError, match=message):
        run.optimizer.step()
    assert equal(run.weights(), weights)
    assert equal(run.everything(), before)
    relative = Run(deviations=50.0).train(4)
    with pytest.raises(gs.ConfigurationError, match=r"above mean \+ 50 deviations"):
        relative.sparsity.update()


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("measured"),
        lambda state: state.update(measured=state["measured"][:1]),
        lambda state: state["measured"][0].update(total=torch.zeros(3)),
        lambda state: state["measured"][1].update(total=torch.full((10, 36), torch.nan)),
        lambda state: state["measured"][0].pop("samples"),
        lambda state: state["measured"][0].update(samples=torch.tensor(-1.0)),
        lambda state: state["measured"][0]["total"].sub_(1000.0),
        lambda state: state.update(steps=-1),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: Callable[[dict[str, Any]], object]) -> None:
    run = Run().train(3)
    state, before = copy.deepcopy(run.sparsity.state_dict()), run.everything()
    damage(state["methods"][0]["state"])
    with pytest.raises(gs.StateError, match=r"^hebbian: .*the file is damaged"):
        run.sparsity.load_state_dict(state)
    assert equal(run.everything(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"statistic": "correlation"}, r"statistic='coactivation', attached is 'correlation'"),
        ({"threshold": 0.5}, r"threshold=0\.0, attached is 0\.5"),
        ({"sigmoid": True}, r"sigmoid=False, attached is True"),
        ({"deviations": 1}, r"deviations=None, attached is 1\.0"),
        ({"activation": "tanh"}, r"activation=None, attached is 'tanh'"),
        ({"activation": torch.nn.functional.relu}, r"activation=None, attached is 'relu'"),
        ({"activation": nn.ReLU()}, r"activation=None, attached is 'ReLU'"),
        ({"decay": 0.5}, r"decay=None, attached is 'a moving average'"),
    ],
)
def test_a_state_whose_sums_mean_something_else_is_refused(options: dict[str, Any], message: str) -> None:
    state, other = Run().train(3).sparsity.state_dict(), Run(**options)
    with pytest.raises(gs.StateError, match=rf"hebbian was saved with {message}; attach with the arguments"):
        other.sparsity.load_state_dict(state)
    again = Run(**options)
    again.sparsity.load_state_dict(other.sparsity.state_dict())


def test_a_state_whose_slices_have_different_counts_is_refused() -> None:
    state, other = Run(sparsity=1 / 3).train(7).sparsity.state_dict(), Run(sparsity=1 / 3, scope="slice")
    with pytest.raises(
        gs.StateError, match=r"0\.weight: \d slices of the saved mask have more or fewer active weights"
    ):
        other.sparsity.load_state_dict(state)
