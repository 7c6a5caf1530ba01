"""Continuous sparsification: the algorithm of the paper, its rounds, its ticket."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.autograd import gradcheck

import gossamer as gs
from gossamer.nn.gates import KEPT, centered_in_cells, soft_mask, suppress


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 6, generator=generator), torch.randint(4, (16,), generator=generator)


class Run:
    """Training of `net` with a method; scores start scattered, so that few steps decide about some."""

    def __init__(self, method: gs.Method, scatter: float = 0.05, lr: float = 0.1) -> None:
        self.model = net()
        self.optimizer = optim.SGD(self.model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-2)
        self.sparsity = gs.attach(self.model, method, self.optimizer)
        generator = torch.Generator().manual_seed(1)
        for scores in self.scores():
            scores.data += scatter * torch.randn(scores.shape, generator=generator)

    def scores(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if ".scores." in name]

    def temperature(self) -> float:
        (first, *others) = [float(b) for name, b in self.model.named_buffers() if name.endswith("temperature")]
        assert all(other == first for other in others)
        return first

    def train(self, steps: range | int) -> Run:
        for step in range(steps) if isinstance(steps, int) else steps:
            x, y = batch(step)
            loss = nn.functional.cross_entropy(self.model(x), y) + self.sparsity.penalty()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


# -- the formulas ------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20),
    st.floats(1, 200),
    st.sampled_from(["float32", "float64"]),
)
def test_the_soft_mask_is_a_sigmoid_and_never_makes_a_weight_denormal(
    scores: list[float], temperature: float, dtype: str
) -> None:
    s = torch.tensor(scores, dtype=getattr(torch, dtype))
    mask = soft_mask(s, temperature)
    expected = [1 / (1 + math.exp(min(-temperature * float(each), 700))) for each in s]
    torch.testing.assert_close(mask, torch.tensor(expected, dtype=mask.dtype), rtol=1e-4, atol=2e-18)
    weights = 1e-10 * mask
    assert ((weights == 0) | (weights.abs() >= torch.finfo(mask.dtype).tiny)).all()


@given(st.lists(st.floats(-10, 10, width=32).filter(lambda s: abs(s) > 1e-3), min_size=1, max_size=20))
def test_the_hard_mask_is_the_limit_of_the_soft_one(scores: list[float]) -> None:
    s = torch.tensor(scores)
    distances = [(soft_mask(s, 10.0**power) - (s > 0).float()).abs().max().item() for power in range(6)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0


@pytest.mark.parametrize("structure", ["element", "row", "block:2x2", "row+column", "2:4"])
def test_gradients_of_weights_and_scores_are_those_of_finite_differences(structure: str) -> None:
    layer = nn.Linear(8, 4).double()
    gs.attach(layer, gs.ContinuousSparsification(0.1, rounds=1, length=1, structure=structure, scaling="code"))
    gates = layer.parametrizations.weight[0]
    gates.temperature.fill_(3.0)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(s.shape, dtype=torch.float64, generator=generator).requires_grad_() for s in gates.scores]

    def act(weight: Tensor, *scores: Tensor) -> Tensor:
        named = {f"scores.{i}": each for i, each in enumerate(scores)}
        return torch.func.functional_call(gates, named, (weight,))

    weight = torch.randn(4, 8, dtype=torch.float64, generator=generator).requires_grad_()
    assert gates.scores[0].dtype == torch.float64
    assert gradcheck(lambda w, *s: act(w, *s).sin(), (weight, *scores), atol=1e-6)


@pytest.mark.parametrize("every", [1, 3])
def test_the_temperature_rises_geometrically_from_one_in_every_round(every: int) -> None:
    run = Run(gs.ContinuousSparsification(0.0, 0.0, 200.0, 2, length=12, every=every))
    found = []
    for step in range(24):
        if step == 12:  # the first step of the second round begins it, and is left out
            assert run.temperature() == 200.0
        found.append(run.temperature())
        run.train(range(step, step + 1))
    stages = 12 // every
    expected = [200 ** ((step // every) / (stages - 1)) for step in range(12)]
    assert found[:12] == pytest.approx(expected)
    assert found[12] == found[11]
    assert found[13:] == pytest.approx(expected[1:])


# -- the algorithm -----------------------------------------------------------------------------------------------------


class Reference:
    """Continuous sparsification written out for `net`, by the paper's algorithm 2 with tensors and autograd alone."""

    def __init__(self, start: Run, initial: float, penalty: float, length: int, scaling: float) -> None:
        state = {name: value.detach().clone() for name, value in net().named_parameters()}
        self.model = net()
        self.weights = {name: p for name, p in self.model.named_parameters() if p.dim() == 2}
        self.scores = {
            name: s.detach().clone().requires_grad_() for name, s in zip(self.weights, start.scores(), strict=True)
        }
        assert all(state[name].equal(p) for name, p in self.model.named_parameters())
        self.initial, self.penalty, self.length, self.scaling = initial, penalty, length, scaling
        self.velocity: dict[Any, Tensor] = {}
        self.masks: dict[str, Tensor] | None = None

    def gradients(self, step: int, temperature: float) -> dict[Any, Tensor]:
        soft = {name: torch.sigmoid(temperature * s) for name, s in self.scores.items()}
        masks = soft if self.masks is None else self.masks
        effective = {
            name: p * masks[name] * self.scaling if name in masks else p for name, p in self.model.named_parameters()
        }
        x, y = batch(step)
        loss = nn.functional.cross_entropy(torch.func.functional_call(self.model, effective, x), y)
        learned = [] if self.masks is not None else list(self.scores.values())
        if learned:
            loss = loss + self.penalty * self.scaling * sum(mask.sum() for mask in soft.values())
        leaves = [*self.model.parameters(), *learned]
        return dict(zip(leaves, torch.autograd.grad(loss, leaves), strict=True))

    def step(self, step: int, temperature: float) -> None:
        found = self.gradients(step, temperature)
        with torch.no_grad():
            for leaf, gradient in found.items():
                if not any(leaf is s for s in self.scores.values()):
                    gradient = gradient + 1e-2 * leaf
                self.velocity[leaf] = 0.9 * self.velocity[leaf] + gradient if leaf in self.velocity else gradient
                leaf -= 0.1 * self.velocity[leaf]
            for name, mask in (self.masks or {}).items():
                self.weights[name] *= mask


@pytest.mark.parametrize(("scaling", "initial"), [("paper", 0.0), ("code", 0.2), ("code", -0.01)])
def test_two_rounds_and_the_rewound_ticket_are_those_of_the_paper(scaling: str, initial: float) -> None:
    length, rewind, penalty = 6, 2, 1e-4
    run = Run(
        gs.ContinuousSparsification(initial, penalty, 50.0, 2, rewind, length=length, scaling=scaling), scatter=0.5
    )
    scale = 1.0 if scaling == "paper" else 1 / torch.sigmoid(torch.tensor(initial)).item()
    reference = Reference(run, initial, penalty, length, scale)
    kept: dict[str, Tensor] = {}
    for step in range(3 * length):
        number, into = divmod(step, length)
        if into == 0 and number > 0:
            # What the library does in the step that it leaves out; its forward changes batch-norm statistics.
            reference.model(batch(step)[0])
            with torch.no_grad():
                alive = {name: s > 0 for name, s in reference.scores.items()}
                for name, s in reference.scores.items():
                    s.copy_(torch.where(alive[name], (50.0 * s).clamp(max=initial), -torch.inf))
                    reference.velocity.pop(s, None)
                if number == 2:
                    reference.masks = {name: mask.float() for name, mask in alive.items()}
                    reference.model.load_state_dict(kept)
                    reference.velocity.clear()
                    for name, mask in reference.masks.items():
                        reference.weights[name] *= mask
            run.train(range(step, step + 1))
        else:
            reference.step(step, 50.0 ** (into / (length - 1)))
            run.train(range(step, step + 1))
        if step + 1 == rewind:
            kept = copy.deepcopy(reference.model.state_dict())
        weights = dict(run.model.named_parameters())
        for name, weight in reference.weights.items():
            owner, _, attribute = name.rpartition(".")
            here = weights[f"{owner}.parametrizations.{attribute}.original"]
            torch.testing.assert_close(here, weight, msg=f"{name} after step {step + 1}")
    assert reference.masks is not None
    masks = run.sparsity.masks()
    for name, mask in reference.masks.items():
        assert masks[name].equal(mask.bool())
        assert 0 < mask.sum() < mask.numel()


@given(
    st.lists(st.floats(-2, 2, width=32), min_size=8, max_size=8),
    st.floats(-0.5, 0.5),
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3),
    st.sampled_from(["sgd", "adam", "adagrad", "rmsprop"]),
)
@settings(max_examples=30, deadline=None)
def test_a_suppressed_weight_never_returns_whatever_its_gradients(
    scores: list[float], initial: float, gradients: list[float], kind: str
) -> None:
    layer = nn.Linear(4, 2, bias=False)
    makers: dict[str, Any] = {
        "sgd": lambda p: optim.SGD(p, lr=1.0, momentum=0.9),
        "adam": lambda p: optim.Adam(p, lr=1.0),
        "adagrad": lambda p: optim.Adagrad(p, lr=1.0),
        "rmsprop": lambda p: optim.RMSprop(p, lr=1.0, momentum=0.9),
    }
    optimizer = makers[kind](layer.parameters())
    sparsity = gs.attach(layer, gs.ContinuousSparsification(initial, 0.0, 200.0, 4, length=1), optimizer)
    (learned,) = (p for name, p in layer.named_parameters() if ".scores." in name)
    learned.data.copy_(torch.tensor(scores).view(2, 4))
    suppressed = torch.zeros(2, 4, dtype=torch.bool)
    with warnings.catch_warnings(action="ignore"):
        for gradient in gradients:
            suppressed |= learned.detach() <= 0
            sparsity.update()
            for _ in range(2):
                learned.grad = torch.full_like(learned, gradient)
                layer.parametrizations.weight.original.grad = torch.full_like(learned, gradient)
                optimizer.step()
                assert not (learned.detach() > 0)[suppressed].any()
                assert not layer.weight.detach()[suppressed].count_nonzero()
        sparsity.finalize()
    assert not layer.weight.detach()[suppressed].count_nonzero()


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20), st.floats(1, 200), st.floats(-1, 1))
def test_scores_between_rounds_are_the_least_of_the_product_and_the_first(
    scores: list[float], temperature: float, initial: float
) -> None:
    found = suppress(torch.tensor(scores), temperature, initial)
    for before, after in zip(torch.tensor(scores).tolist(), found.tolist(), strict=True):
        assert after == pytest.approx(min(temperature * before, initial) if before > 0 else -KEPT, rel=1e-5)


def test_the_ticket_of_a_model_acts_as_before_and_its_scores_are_out_of_reach() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 1e-3, 200.0, 1, length=5)).train(5)
    with run.sparsity.hardened():
        hard = run.model.eval()(batch(9)[0])
    run.sparsity.update("ticket")
    assert run.model(batch(9)[0]).equal(hard)
    run.model.train()
    before = [scores.detach().clone() for scores in run.scores()]
    run.train(range(5, 12))
    assert all(now.equal(then) for now, then in zip(run.scores(), before, strict=True))
    assert float(run.sparsity.penalty()) == 0


def test_rewinding_restores_weights_statistics_and_other_state_to_the_bit() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 1e-3, 200.0, 1, 3, length=8))
    plain = run.train(3).model.state_dict()
    kept = {name: value.clone() for name, value in plain.items() if "parametrizations.weight.0" not in name}
    assert {"1.running_mean", "1.num_batches_tracked", "0.bias"} <= kept.keys()
    run.train(range(3, 9))
    now, masks = run.model.state_dict(), run.sparsity.masks()
    for name, value in kept.items():
        mask = masks.get(name.replace("parametrizations.weight.original", "weight"))
        expected = value if mask is None else torch.where(mask, value, 0.0)
        assert now[name].equal(expected), name
    assert not any(run.optimizer.state.values())
    run.train(range(9, 12))
    for name, mask in run.sparsity.masks().items():
        weight = run.model.get_parameter(name.replace("weight", "parametrizations.weight.original"))
        assert not weight.detach()[~mask].view(torch.int32).any()
        assert weight.detach()[mask].all()


def test_without_a_rewind_point_weights_go_on_as_they_are() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 1e-3, 200.0, 1, length=6)).train(6)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if ".original" in name}
    run.train(range(6, 7))
    for name, mask in run.sparsity.masks().items():
        raw = name.replace("weight", "parametrizations.weight.original")
        assert run.model.get_parameter(raw).detach().equal(torch.where(mask, before[raw], 0.0))
    assert run.optimizer.state


def test_a_round_does_not_end_before_the_rewind_point() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 0.0, 200.0, 2, 5, length=10)).train(3)
    for phase in ("update", "ticket"):
        with pytest.raises(gs.OrderError, match=r"rewind: the rewind point has not been reached, it is after step 5"):
            run.sparsity.update(phase)
    assert run.temperature() == pytest.approx(200 ** (3 / 9))
    run.train(range(3, 6)).sparsity.update()


def test_updates_after_the_ticket_leave_it_alone() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 1e-3, 200.0, 1, 2, length=5)).train(8)
    before = copy.deepcopy(run.model.state_dict())
    assert [update.rows for update in run.sparsity.update()] == [[]]
    assert all(value.equal(before[name]) for name, value in run.model.state_dict().items())


def test_a_ticket_that_was_never_rewound_is_a_warning() -> None:
    method = gs.ContinuousSparsification(0.0, 0.0, 200.0, 1, 2, length=5)
    with pytest.raises(gs.ConfigurationError, match=r"length: 1 rounds of 5 steps are 5, which end with step 6, and"):
        gs.attach(net(), method).methods[0].check_run(5)
    run = Run(method).train(5)
    with pytest.warns(UserWarning, match=r"finalized before the ticket was rewound to step 2; train one step beyond"):
        run.sparsity.finalize()


def test_finalizing_one_copy_leaves_the_others_as_they_are() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 1e-3, 200.0, 1, length=3)).train(4)
    model, _, sparsity = copy.deepcopy((run.model, run.optimizer, run.sparsity))
    average = torch.optim.swa_utils.AveragedModel(run.model)
    x = batch(0)[0]
    expected = run.model.eval()(x)
    run.sparsity.finalize()
    for each in (model, average):
        assert each.eval()(x).equal(expected)
    sparsity.finalize()
    for each in (run.model, model, average):
        assert each(x).equal(expected)
    assert type(model[0]) is type(run.model[0]) is nn.Linear


def test_nothing_is_trained_or_updated_within_an_evaluation_under_hard_masks() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 1e-3, 200.0, 1, length=5)).train(2)
    with run.sparsity.hardened():
        for act in (run.optimizer.step, run.sparsity.update, run.sparsity.finalize, run.sparsity.hardened().__enter__):
            with pytest.raises(gs.OrderError, match=r"^sparsity\.hardened\(\) is in force"):
                act()
    run.train(range(2, 4))


@pytest.mark.parametrize("structure", ["element", "row+column"])
def test_masks_as_in_the_authors_code_are_scaled_once(structure: str) -> None:
    layer = nn.Linear(4, 3)
    weight = layer.weight.detach().clone()
    gs.attach(
        layer, gs.ContinuousSparsification(0.3, rounds=1, length=1, scaling="code", structure=structure, penalty=0.0)
    )
    for scores in layer.parametrizations.weight[0].scores:
        scores.data.fill_(0.3)
    mask = 1 / (1 + math.exp(-0.3))
    expected = weight if structure == "element" else weight * mask
    torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize("phase", ["rewind", "update"])
def test_an_update_that_is_refused_after_the_ticket_leaves_masks_in_force(phase: str) -> None:
    model = nn.Sequential(*net(), nn.Linear(4, 4))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    methods = [
        gs.ContinuousSparsification(0.0, 0.0, rounds=1, length=2, targets=["0.*", "3.*"], sparsity=None),
        gs.RigL(0.5, targets="4.*"),
    ]
    sparsity = gs.attach(model, methods, optimizer)
    for scores in (p for name, p in model.named_parameters() if ".scores." in name):
        scores.data.view(-1)[::2] = -1.0

    def step(n: int) -> None:
        x, y = batch(n)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    for n in range(4):
        step(n)
    before, masks = sparsity.density(), {name: mask.clone() for name, mask in sparsity.masks().items()}
    assert before < 1
    refusal = gs.OrderError if phase == "rewind" else gs.ConfigurationError  # none was asked for; RigL has no gradient
    with pytest.raises(refusal):
        sparsity.update(phase)
    step(4)
    assert sparsity.density() == before
    for name, mask in sparsity.masks().items():
        assert mask.equal(masks[name])
    for place in (0, 3):
        weight = model[place].parametrizations.weight.original
        assert not weight.detach()[~masks[f"{place}.weight"]].any()


def test_a_refused_update_before_training_leaves_the_start_open() -> None:
    model = net()
    methods = [gs.IMP(0.5, length=5, rounds=1, rewind=0, targets="0.*"), gs.RigL(0.5, targets="3.*")]
    sparsity = gs.attach(model, methods)
    with pytest.raises(gs.ConfigurationError, match="no weight has a gradient"):
        sparsity.update()
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    sparsity.follow(optim.SGD(model.parameters(), lr=0.1))
    assert (sparsity.methods[0].state_dict()["kept"]["0.weight"] == 0.5).all()


def test_a_layer_that_is_frozen_in_the_search_is_an_error_that_names_it() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 1e-3, rounds=1, length=5)).train(2)
    run.model[3].requires_grad_(False)
    with pytest.raises(gs.OrderError, match=r"3\.weight: its scores are frozen .*attach without this layer"):
        run.sparsity.penalty()
    run.model[3].requires_grad_(True)
    run.model[3].parametrizations.weight.original.requires_grad_(False)  # weights alone may be
    run.train(range(2, 7))
    assert run.sparsity.density() < 1
    run.model[3].requires_grad_(False)
    assert float(run.sparsity.penalty()) == 0


def test_nothing_is_saved_or_ended_within_an_evaluation_under_hard_masks() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 0.0, rounds=1, length=10)).train(3)
    state = run.sparsity.state_dict()
    with run.sparsity.hardened():
        for refused in (run.sparsity.state_dict, lambda: run.sparsity.load_state_dict(state), run.sparsity.detach):
            with pytest.raises(gs.OrderError, match=r"hardened\(\) is in force"):
                refused()
    run.train(range(3, 12))
    assert run.sparsity.density() < 1


def test_a_penalty_can_be_compiled_whole() -> None:
    run = Run(gs.ContinuousSparsification(0.1, 1e-3, rounds=1, length=10))
    compiled = torch.compile(lambda: run.sparsity.penalty(), fullgraph=True, backend="eager")
    assert compiled().equal(run.sparsity.penalty())


def train_without_penalty(run: Run, steps: int = 4) -> Run:
    for step in range(steps):
        x, y = batch(step)
        nn.functional.cross_entropy(run.model(x), y).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run


@pytest.mark.parametrize(
    "method",
    [
        gs.ContinuousSparsification(0.1, 1e-3, rounds=1, length=3),
        gs.HardConcrete(),
        gs.STR(),
        gs.LossyThreshold(0.1, sites="2"),
    ],
)
@pytest.mark.parametrize("end", ["finalize", "detach"])
def test_training_without_the_penalty_in_the_loss_is_a_warning(method: gs.Method, end: str) -> None:
    with pytest.warns(UserWarning, match=r"sparsity\.penalty\(\) was never called") as told:
        getattr(train_without_penalty(Run(method)).sparsity, end)()
    assert len([each for each in told if "never called" in str(each.message)]) == 1


def test_a_ticket_by_hand_without_the_penalty_in_the_loss_is_a_warning() -> None:
    run = train_without_penalty(Run(gs.ContinuousSparsification(0.1, 1e-3, rounds=1, length=10)))
    run.sparsity.update("checkpoint")  # nothing was learned for it
    with pytest.warns(UserWarning, match=r"sparsity\.penalty\(\) was never called"):
        run.sparsity.update("ticket")


def test_a_refused_ticket_is_not_the_end_and_warns_of_no_penalty() -> None:
    run = train_without_penalty(Run(gs.ContinuousSparsification(0.1, 1e-3, rounds=1, length=10, rewind=8)))
    with pytest.raises(gs.OrderError, match="rewind point has not been reached"):
        run.sparsity.update("ticket")
    with pytest.warns(UserWarning, match=r"sparsity\.penalty\(\) was never called"):
        train_without_penalty(run, 8)


def test_what_needs_no_penalty_is_no_warning() -> None:
    idle = [
        gs.ContinuousSparsification(0.1, 0.0, rounds=1, length=10),
        gs.ContinuousSparsification(0.1, rounds=1, length=3, structure="1:2"),
        gs.STR(penalty=0.0),
        gs.LossyThreshold(0.0, sites="2"),
        gs.LossyThreshold({"2": 0.0}, sites="2"),
    ]
    for method in idle:
        with warnings.catch_warnings(action="error"):
            warnings.filterwarnings("ignore", ".*finalized in round.*")
            train_without_penalty(Run(method)).sparsity.finalize()


def test_others_updates_do_not_ask_for_a_penalty_that_comes_later() -> None:
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    sparsity = gs.attach(model, [gs.RigL(0.5, every=2, targets="0.*"), gs.HardConcrete(targets="3.*")], optimizer)
    for step in range(6):
        x, y = batch(step)
        loss = nn.functional.cross_entropy(model(x), y)
        (loss if step < 5 else loss + sparsity.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    sparsity.finalize()


def test_tickets_can_be_taken_and_rewound_by_hand() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 1e-3, 200.0, 3, length=100)).train(2)
    with pytest.raises(gs.OrderError, match=r"rewind: the rewind point has not been reached, and none was asked for"):
        run.sparsity.update("rewind")
    run.sparsity.update("checkpoint")
    kept = run.model.get_parameter("0.parametrizations.weight.original").detach().clone()
    run.train(range(2, 6))
    run.sparsity.update()
    run.train(range(6, 9))
    run.sparsity.update("ticket")
    run.sparsity.update("rewind")
    mask = run.sparsity.masks()["0.weight"]
    assert run.model.get_parameter("0.parametrizations.weight.original").detach().equal(torch.where(mask, kept, 0.0))


def test_a_round_ended_by_hand_is_followed_by_a_whole_one() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 0.0, 200.0, 3, length=10)).train(4)
    run.sparsity.update()
    assert run.temperature() == 1
    run.train(range(4, 13))
    assert run.temperature() == pytest.approx(200.0)
    run.train(range(13, 14))
    assert run.sparsity.methods[0].metrics()["rounds_done"] == 1
    run.train(range(14, 15))
    assert run.sparsity.methods[0].metrics()["rounds_done"] == 2


def test_frozen_masks_end_no_round() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 1e-3, 200.0, 1, length=4))
    run.sparsity.freeze()
    run.train(8)
    assert run.sparsity.density() == 1
    run.sparsity.freeze(False)
    run.train(range(8, 9))
    assert run.sparsity.density() < 1


# -- a sparsity that is asked for --------------------------------------------------------------------------------------


@given(st.floats(0, 0.99), st.sampled_from(["element", "row", "block:2x2"]), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_ranked_ticket_has_the_highest_scores_and_exactly_the_number_asked(
    sparsity: float, structure: str, seed: int
) -> None:
    model = net()
    handle = gs.attach(
        model,
        gs.ContinuousSparsification(rounds=1, length=1, sparsity=sparsity, ranking=True, structure=structure),
        optim.SGD(model.parameters(), lr=0.1),
    )
    generator = torch.Generator().manual_seed(seed)
    scores = [p for name, p in model.named_parameters() if ".scores." in name]
    for each in scores:
        each.data.copy_(torch.rand(each.shape, generator=generator))
    values = torch.cat([each.detach().flatten() for each in scores])
    sizes = torch.cat([torch.full((s.numel(),), t / s.numel()) for s, t in zip(scores, (72, 48), strict=True)])
    with warnings.catch_warnings(action="ignore"):
        handle.finalize()
    budget = math.floor((1 - Fraction(str(sparsity))) * 120 + Fraction(1, 10**9))
    wanted, used = torch.zeros(len(values), dtype=torch.bool), 0
    for i in values.argsort(descending=True).tolist():
        if used + int(sizes[i]) > budget:
            continue
        wanted[i] = True
        used += int(sizes[i])
    high, wide = {"element": (1, 1), "row": (1, 0), "block:2x2": (2, 2)}[structure]
    for mask, lives in zip(handle.masks().values(), wanted.split([len(s.flatten()) for s in scores]), strict=True):
        side = wide or mask.shape[1]
        for row, column in itertools.product(*map(range, mask.shape)):
            assert mask[row, column] == lives[row // high * (mask.shape[1] // side) + column // side]
    assert sum(int(mask.sum()) for mask in handle.masks().values()) == used


def test_a_penalty_is_steered_to_the_sparsity_that_was_asked_for() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    y = torch.tensor(digits.target)
    for sparsity, rounds in ((0.9, 1), (0.6, 1), (0.95, 2)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        method = gs.ContinuousSparsification(rounds=rounds, length=400, sparsity=sparsity, ranking=False, lr=1.0)
        handle = gs.attach(model, method, optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(rounds * 400 + 1):
            index = torch.randint(len(x), (64,), generator=generator)
            (nn.functional.cross_entropy(model(x[index]), y[index]) + handle.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert abs(1 - handle.density() - sparsity) <= 0.005
        assert (model(x).argmax(1) == y).float().mean() > 0.9


@pytest.mark.parametrize(
    ("initial", "sparsity", "rounds"), [(0.1, 0.9, 1), (-0.1, 0.5, 1), (0.1, 0.9, 2), (-0.1, 0.9, 2)]
)
def test_steering_does_not_run_away_wherever_scores_begin(initial: float, sparsity: float, rounds: int) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    method = gs.ContinuousSparsification(initial, rounds=rounds, length=600, sparsity=sparsity, lr=1.0)
    handle = gs.attach(model, method, optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds * 600):
        index = torch.randint(len(x), (64,), generator=generator)
        (nn.functional.cross_entropy(model(x[index]), y[index]) + handle.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings(action="ignore"):  # pixels that are always 0 are all alike, and many
        handle.finalize()
    assert sum(int((layer.weight != 0).sum()) for layer in (model[0], model[2])) == round(7400 * (1 - sparsity))
    assert (model(x).argmax(1) == y).float().mean() > 0.93


def test_a_round_that_leaves_too_few_keeps_the_highest_scores_for_the_ticket() -> None:
    method = gs.ContinuousSparsification(0.0, rounds=2, length=3, sparsity=0.8)
    run = Run(method, scatter=0.0).train(3)
    generator = torch.Generator().manual_seed(0)
    for scores in run.scores():
        scores.data.copy_(-torch.rand(scores.shape, generator=generator))
    values = torch.cat([scores.detach().flatten() for scores in run.scores()])
    with pytest.warns(
        UserWarning, match=r"ended round 1 of 2 with 0\.00% .* 20\.00% are asked for in the end; 20\.00% stay"
    ):
        run.sparsity.update()
    highest = torch.zeros(120, dtype=torch.bool)
    highest[values.argsort(descending=True)[:24]] = True
    now = torch.cat([scores.detach().flatten() for scores in run.scores()])
    assert ((now > -KEPT / 2) == highest).all()
    assert not (now > 0).any()
    with warnings.catch_warnings(action="ignore"):
        run.sparsity.update("ticket")
    assert run.sparsity.density() == 24 / 120


def test_an_end_in_single_precision_is_no_warning() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 0.0, 100.1, 1, length=4)).train(4)
    run.sparsity.finalize()


def test_scores_that_are_no_numbers_are_an_error_that_names_their_layer() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 0.0, 200.0, 2, length=4)).train(2)
    run.scores()[1].data[0, 0] = torch.nan
    with pytest.raises(gs.NonFiniteError, match=r"^3\.weight: its scores contain NaN"):
        run.sparsity.update()


def test_an_optimizer_whose_steps_follow_the_size_of_a_parameter_is_refused() -> None:
    model = net()
    with pytest.raises(gs.ConfigurationError, match=r"optimizer: Adafactor takes its steps in proportion"):
        gs.attach(model, gs.ContinuousSparsification(length=4), optim.Adafactor(model.parameters()))
    assert "0.weight" in dict(model.named_parameters())


def test_a_ranked_ticket_goes_on_past_groups_that_do_not_fit() -> None:
    model = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 4))
    method = gs.ContinuousSparsification(rounds=1, length=1, sparsity=0.9, structure="row")
    sparsity = gs.attach(model, method)
    first, second = sparsity.param_groups()[0]["params"]
    first.data.copy_(torch.linspace(0.1, 1, 128))
    second.data.copy_(torch.tensor([2.0, 3.0, 4.0, 5.0]))
    told = r"steering ended round 1 of 1 with 100\.00% .*, where 10\.00% are asked for in the end; 9\.90% stay"
    with pytest.warns(UserWarning, match=told):
        sparsity.update("ticket")
    masks = sparsity.masks()
    assert masks["2.weight"].any(1).tolist() == [False, False, False, True]
    assert int(masks["0.weight"].any(1).sum()) == 3  # of 153 weights 128, and three rows of eight
    assert masks["0.weight"][-3:].all()


def test_cells_are_chosen_in_every_type_of_number() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        layer = nn.Linear(8, 4).to(dtype)
        sparsity = gs.attach(layer, gs.ContinuousSparsification(rounds=1, length=1, structure="2:4"))
        sparsity.update("ticket")
        assert layer(torch.ones(1, 8, dtype=dtype)).isfinite().all()
        assert ((layer.weight != 0).view(4, 2, 4).sum(2) == 2).all()


# -- N:M ---------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.sampled_from([(1, 4), (2, 4), (3, 8)]))
def test_scores_of_cells_are_centered_between_those_that_live_and_those_that_do_not(
    seed: int, cell: tuple[int, int]
) -> None:
    n, m = cell
    scores = torch.randn(5 * m, generator=torch.Generator().manual_seed(seed))
    found = centered_in_cells(scores, n, m).view(5, m)
    for before, after in zip(scores.view(5, m), found, strict=True):
        assert (after > 0).sum() == n
        assert after[before.argsort(descending=True)[:n]].min() > 0
        torch.testing.assert_close(after - after[0], before - before[0])


def test_a_ticket_of_n_of_m_has_exactly_so_many_in_every_cell() -> None:
    layer = nn.Linear(16, 8)
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    handle = gs.attach(layer, gs.ContinuousSparsification(rounds=1, length=3, structure="2:4", lr=1.0), optimizer)
    for step in range(5):
        (layer(torch.randn(4, 16, generator=torch.Generator().manual_seed(step))).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.finalize()
    assert ((layer.weight != 0).view(8, 4, 4).sum(2) == 2).all()


def test_what_is_told_of_cells_counts_those_that_will_live() -> None:
    layer = nn.Linear(8, 4)
    sparsity = gs.attach(layer, gs.ContinuousSparsification(rounds=1, length=5, structure="2:4"))
    (scores,) = sparsity.param_groups()[0]["params"]
    scores.data.copy_(5 + torch.rand(scores.shape, generator=torch.Generator().manual_seed(0)))
    (method,) = sparsity.methods
    (row,) = method.learned()
    cells = scores.detach().view(-1, 4)
    middle = cells.sort(1).values[:, 1:3].mean(1, keepdim=True)
    assert row["above_0"] == 16
    assert row["mass"] == pytest.approx(torch.sigmoid(cells - middle).sum().item(), rel=1e-5)
    assert method.metrics()["hard_density"] == 0.5
    assert method.metrics()["soft_density"] == pytest.approx(row["mass"] / 32)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, r"rounds: expected an integer of at least 1, got 0"),
        ({"length": 0}, r"length: expected an integer of at least 1, got 0"),
        ({"final_temperature": 0.5}, r"final_temperature: expected a number in \[1, 1e\+06\], got 0.5"),
        ({"final_temperature": 1}, r"final_temperature: got 1, where masks would stay as soft as they begin"),
        ({"final_temperature": float("inf")}, r"final_temperature: .*got inf"),
        ({"penalty": float("nan")}, r"penalty: .*got nan"),
        ({"initial_value": "0"}, r"initial_value: .*got '0'"),
        ({"rewind": 11}, r"rewind: got step 11, which is never reached in the first round of 10 steps; give at most"),
        ({"rewind": -1}, r"rewind: expected an integer of at least 0, got -1"),
        ({"every": 10}, r"every: got 10 with length=10: the temperature would not rise within a round; give at most 9"),
        ({"scaling": "none"}, r"scaling: got 'none'; allowed are 'paper' and 'code'"),
        ({"ranking": 1}, r"ranking: expected True or False, got 1"),
        ({"sparsity": 1.0}, r"sparsity: expected a number in \[0, 1\), got 1.0"),
        ({"sparsity": 0.5, "penalty": 0}, r"penalty: got 0, from where it cannot be steered"),
        ({"structure": "rows"}, r"structure: got 'rows'"),
    ],
)
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(gs.ConfigurationError, match=f"^ContinuousSparsification: {message}"):
        gs.ContinuousSparsification(**{"length": 10} | options)


def test_weights_that_have_learned_masks_already_are_refused() -> None:
    model = net()
    gs.attach(model, gs.ContinuousSparsification(length=10))
    for method in (gs.ContinuousSparsification(length=10), gs.SET(0.5)):
        with pytest.raises(gs.ConfigurationError, match=r"0\.weight: has learned masks of an attached method already"):
            gs.attach(model, method)


def test_n_of_m_takes_one_round() -> None:
    with pytest.raises(gs.ConfigurationError, match=r"structure 2:4 has a number of active weights of its own"):
        gs.attach(nn.Linear(8, 4), gs.ContinuousSparsification(rounds=2, length=10, structure="2:4"))


def test_a_penalty_that_removes_a_layer_is_a_warning_that_names_it() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 10.0, 200.0, 1, length=4), scatter=0.0)
    with pytest.warns(UserWarning, match="no weight is left") as found:
        run.train(5)
    told = "no weight is left, so that nothing passes this layer; lower the penalty (10) or raise initial_value (0)"
    for each, name in zip(found, ("0.weight", "3.weight"), strict=True):
        assert str(each.message).startswith(f"{name}: {told}")


def test_ending_before_the_masks_are_hard_is_a_warning() -> None:
    run = Run(gs.ContinuousSparsification(0.0, 0.0, 200.0, 2, length=10)).train(5)
    with pytest.warns(UserWarning, match=r"finalized in round 1 of 2 at temperature 18\.98, below 200"):
        run.sparsity.finalize()
