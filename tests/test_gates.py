"""Hard-concrete gates, soft thresholds and iterative pruning: their formulas, and what they do over a run."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.autograd import gradcheck

import gossamer as gs
from gossamer.nn.gates import HardConcreteGates, SoftThreshold, chance

LOW, HIGH, BETA = -0.1, 1.1, 2 / 3  # γ, ζ and β of Louizos et al., 2018, section 4.1


def train(model: nn.Module, optimizer: optim.Optimizer, sparsity: gs.Sparsity, steps: range | int) -> None:
    for step in range(steps) if isinstance(steps, int) else steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        ((model(x) - x[:, :4]).square().mean() + sparsity.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


# -- hard-concrete gates -----------------------------------------------------------------------------------------------


def hard_concrete(scores: list[float]) -> HardConcreteGates:
    return HardConcreteGates([nn.Parameter(torch.tensor(scores, dtype=torch.float64))], [lambda values: values])


@given(st.floats(-6, 6), st.floats(1e-3, 1 - 1e-3))
def test_a_gate_in_training_is_the_stretched_concrete_variable_of_its_noise(score: float, u: float) -> None:
    gates = hard_concrete([score]).train()
    gates.noise_0.fill_(math.log(u) - math.log(1 - u))
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + score) / BETA))
    assert gates.gates(0).item() == pytest.approx(min(1, max(0, s * (HIGH - LOW) + LOW)), abs=1e-12)


@given(st.floats(-6, 6))
def test_a_gate_in_evaluation_has_no_noise(score: float) -> None:
    gates = hard_concrete([score]).eval()
    gates.noise_0.fill_(3.0)
    expected = min(1, max(0, 1 / (1 + math.exp(-score)) * (HIGH - LOW) + LOW))
    assert gates.gates(0).item() == pytest.approx(expected, abs=1e-12)


def test_the_expected_count_is_the_mean_number_of_gates_that_are_not_zero() -> None:
    scores = torch.linspace(-5, 5, 11, dtype=torch.float64)
    u = torch.rand(20_000, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.sigmoid((u.log() - (1 - u).log() + scores) / BETA)
    counted = (s * (HIGH - LOW) + LOW > 0).double().mean(0).sum()
    assert chance(scores).sum().item() == pytest.approx(counted.item(), abs=0.02)


def test_the_metrics_of_gates_are_their_closed_forms() -> None:
    model = net()
    sparsity = gs.attach(model, gs.HardConcrete(0.0), optim.SGD(model.parameters(), lr=0.1))
    generator = torch.Generator().manual_seed(0)
    every = []
    for scores in (p for name, p in model.named_parameters() if ".scores." in name):
        scores.data.copy_(3 * torch.randn(scores.shape, generator=generator))
        every += scores.flatten().tolist()
    metrics = sparsity.methods[0].metrics()
    chances = [1 / (1 + math.exp(-score + BETA * math.log(-LOW / HIGH))) for score in every]
    assert metrics["expected_density"] == pytest.approx(sum(chances) / len(every))
    assert metrics["hard_density"] == pytest.approx(sum(score > -math.log(11) for score in every) / len(every))


@pytest.mark.parametrize("train", [True, False])
def test_an_evaluation_under_hard_gates_is_that_of_the_finished_model(train: bool) -> None:
    model = net()
    sparsity = gs.attach(model, gs.HardConcrete(1e-3, lr=1.0), optim.SGD(model.parameters(), lr=0.1))
    model.train(train)
    model[1].eval()
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    with sparsity.hardened():
        expected = model(x)
    assert model[0].parametrizations.weight[0].training == train
    sparsity.finalize()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_noise_comes_from_the_methods_own_generator_one_draw_a_step() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    sparsity = gs.attach(model, gs.HardConcrete(0.0, seed=5), optimizer)
    generator = torch.Generator().manual_seed(5)
    for step in range(3):
        for index, shape in ((0, (8, 6)), (3, (4, 8))):
            u = torch.rand(shape, generator=generator)
            noise = model[index].parametrizations.weight[0].noise_0
            torch.testing.assert_close(noise, u.log() - (1 - u).log())
        train(model, optimizer, sparsity, range(step, step + 1))
    assert torch.get_rng_state().equal(before)


def test_one_draw_serves_all_weights_of_a_hidden_unit() -> None:
    model = nn.LSTM(4, 6, num_layers=2)
    gs.attach(model, gs.HardConcrete(structure="iss"), optim.SGD(model.parameters(), lr=0.1))
    for name in ("weight_hh_l0", "weight_ih_l1"):
        gates = model.parametrizations[name][0]
        assert gates.scores[0] is model.parametrizations["weight_ih_l0"][0].scores[0]
        assert gates.noise_0.equal(model.parametrizations["weight_ih_l0"][0].noise_0)
    dead = (model.weight_hh_l0 == 0).view(4, 6, 6)
    for unit in range(6):
        if dead[:, unit].all():
            assert (model.weight_ih_l0.view(4, 6, 4)[:, unit] == 0).all()
            assert (model.weight_ih_l1[:, unit] == 0).all()


def test_the_penalty_closes_gates_and_what_is_closed_is_an_exact_zero() -> None:
    model = net()
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    sparsity = gs.attach(model, gs.HardConcrete(0.01, drop_rate=0.3), optimizer)
    expected = sum(
        torch.sigmoid(torch.tensor(math.log(7 / 3) - BETA * math.log(-LOW / HIGH))).item() * n for n in (48, 32)
    )
    assert sparsity.penalty().item() == pytest.approx(0.01 * expected, rel=1e-5)
    train(model, optimizer, sparsity, 150)
    metrics = sparsity.methods[0].metrics()
    rows = sparsity.summary().learned
    sparsity.finalize()
    assert 0 < sparsity.density() < 0.9
    assert sparsity.density() == pytest.approx(metrics["hard_density"]) == sum(row["open"] for row in rows) / 80


# -- soft thresholds ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20), st.floats(-20, 5))
def test_a_soft_threshold_shrinks_by_the_sigmoid_of_its_score(weights: list[float], score: float) -> None:
    gates = SoftThreshold([nn.Parameter(torch.tensor([score], dtype=torch.float64))])
    found = gates(torch.tensor(weights, dtype=torch.float64)).tolist()
    threshold = 1 / (1 + math.exp(-score))
    expected = [math.copysign(max(abs(w) - threshold, 0), w) for w in weights]
    assert found == pytest.approx(expected, abs=1e-12)


def test_gradients_of_a_soft_threshold_are_those_of_finite_differences() -> None:
    gates = SoftThreshold([nn.Parameter(torch.zeros(1, dtype=torch.float64))])

    def act(weight: Tensor, score: Tensor) -> Tensor:
        return torch.func.functional_call(gates, {"scores.0": score}, (weight,)).sin()

    weight = torch.tensor([-2.0, -0.4, 0.1, 0.3, 1.7], dtype=torch.float64, requires_grad=True)
    assert gradcheck(act, (weight, torch.tensor([-0.3], dtype=torch.float64, requires_grad=True)))


def test_the_decay_of_scores_is_that_of_an_optimizer() -> None:
    model = nn.Linear(4, 3)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    sparsity = gs.attach(model, gs.STR(-8.0, 0.5), optimizer)
    reference = nn.Parameter(torch.tensor([-8.0]))
    other = optim.SGD([reference], lr=0.1, weight_decay=0.5)
    for _ in range(5):
        sparsity.penalty().backward()
        reference.grad = torch.zeros(1)
        for each in (optimizer, other):
            each.step()
            each.zero_grad()
    torch.testing.assert_close(model.parametrizations.weight[0].scores[0].detach(), reference.detach())


def test_weights_below_a_threshold_are_exact_zeros_and_may_return() -> None:
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    sparsity = gs.attach(model, gs.STR(-2.0, 0.0), optimizer)
    raw = model[0].parametrizations.weight.original
    below = raw.detach().abs() <= 1 / (1 + math.exp(2.0))
    assert 0 < below.sum() < below.numel()
    assert (model[0].weight == 0).equal(below)
    with torch.no_grad():
        raw.add_(torch.where(below, 1.0, 0.0))
    assert (model[0].weight != 0)[below].all()
    sparsity.finalize()


# -- iterative magnitude pruning ---------------------------------------------------------------------------------------


class Tickets:
    """A run of `net` under IMP, with what its weights were after every step."""

    def __init__(self, method: gs.Method, steps: int) -> None:
        self.model = net()
        self.optimizer = optim.Adam(self.model.parameters(), lr=0.05)
        self.sparsity = gs.attach(self.model, method, self.optimizer)
        self.states: list[dict[str, Tensor]] = [copy.deepcopy(self.model.state_dict())]
        self.masks: list[dict[str, Tensor]] = [self.sparsity.masks()]
        for step in range(steps):
            train(self.model, self.optimizer, self.sparsity, range(step, step + 1))
            self.states.append(copy.deepcopy(self.model.state_dict()))
            self.masks.append(self.sparsity.masks())


@pytest.mark.parametrize("rewind", [0, 2, 5])
def test_each_round_prunes_the_smallest_weights_of_all_and_rewinds_the_rest(rewind: int) -> None:
    length, rounds = 5, 3
    run = Tickets(gs.IMP(0.8, length=length, rounds=rounds, rewind=rewind), 4 * length)
    kept = run.states[rewind]
    alive = torch.ones(80, dtype=torch.bool)
    for number in range(1, rounds + 1):
        end, begin = number * length, number * length + 1
        trained = torch.cat([run.states[end][name].flatten() for name in ("0.weight", "3.weight")])
        wanted = math.floor(80 * 0.2 ** (number / rounds) + 1e-9)
        scores = trained.abs().masked_fill(~alive, -1)
        for part in (scores[:48], scores[48:]):  # every tensor keeps its largest weight
            part[part.argmax()] = torch.inf
        alive = torch.zeros(80, dtype=torch.bool).index_fill_(0, scores.argsort(descending=True)[:wanted], True)
        found = torch.cat([run.masks[begin][name].flatten() for name in ("0.weight", "3.weight")])
        assert found.equal(alive)
        for name, value in run.states[begin].items():
            mask = run.masks[begin].get(name)
            assert value.equal(kept[name] if mask is None else torch.where(mask, kept[name], 0.0)), name
    assert run.sparsity.density() == pytest.approx(0.2)


def test_a_pruned_ticket_trains_as_a_fresh_run_from_the_rewind_point_would() -> None:
    length = 6
    run = Tickets(gs.IMP(0.5, length=length, rounds=1, rewind=3), 2 * length)
    fresh = net()
    fresh.load_state_dict(run.states[3])
    optimizer = optim.Adam(fresh.parameters(), lr=0.05)
    sparsity = gs.attach(fresh, gs.Static(), optimizer, masks=run.masks[-1])
    train(fresh, optimizer, sparsity, range(length + 1, 2 * length))
    for name, value in fresh.state_dict().items():
        assert value.equal(run.states[-1][name]), name


def test_pruning_without_rewinding_goes_on_with_the_weights_as_they_are() -> None:
    run = Tickets(gs.IMP(0.5, length=4, rounds=1, rewind=None), 5)
    mask = run.masks[5]["0.weight"]
    assert run.states[5]["0.weight"].equal(torch.where(mask, run.states[4]["0.weight"], 0.0))
    assert run.optimizer.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length: expected an integer of at least 1, got 0"),
        ({"rounds": 0}, "rounds: expected an integer of at least 1, got 0"),
        ({"rewind": 9}, "rewind: got step 9, which is never reached in the first round of 8 steps"),
        ({"rewind": -1}, "rewind: expected an integer of at least 0, got -1"),
    ],
)
def test_rounds_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gs.ConfigurationError, match=f"^IMP: {message}"):
        gs.IMP(0.5, **{"length": 8} | options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gs.HardConcrete(drop_rate=0.0), r"HardConcrete: drop_rate: expected a number in \(0, 1\), got 0"),
        (lambda: gs.HardConcrete(drop_rate=1.0), r"HardConcrete: drop_rate: .*got 1.0"),
        (lambda: gs.HardConcrete(seed=-1), r"HardConcrete: seed: .*got -1"),
        (lambda: gs.HardConcrete(structure="2:4"), r"HardConcrete: structure 2:4: gates open independently"),
        (lambda: gs.STR(1.0), r"STR: initial_value: expected a number in \[-1e\+06, 0\], got 1.0"),
        (lambda: gs.STR(structure="row"), r"STR: structure: got 'row'; a threshold is for single weights"),
    ],
)
def test_what_gates_cannot_mean_is_refused(make: Any, message: str) -> None:
    with pytest.raises(gs.ConfigurationError, match=f"^{message}"):
        make()
