"""Rounds and rewinding: what a rewind writes and what it leaves, when rounds end, and what of them is saved."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn, optim

import gossamer as gs

from .tables import (
    METHODS,
    ONE_OF_EACH,
    OptimizerRow,
    Run,
    TinyNet,
    assert_zeros,
    backward,
    bits,
    everything,
    snapshot,
    start,
)

IMP = next(row for row in METHODS if row.method is gs.IMP)
ROUNDS = {
    "imp": lambda **options: gs.IMP(0.75, **{"length": 3, "rounds": 2, "rewind": 1} | options),
    "continuous": lambda **options: gs.ContinuousSparsification(
        penalty=0.0, **{"length": 3, "rounds": 2, "rewind": 1} | options
    ),
}


class Normed(TinyNet):
    """TinyNet with a batch norm, whose statistics are rewound too."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


def told(run: Run) -> list[int]:
    steps: list[int] = []
    run.sparsity.on_update(lambda update: steps.append(update.step))
    return steps


def same(model: nn.Module, state: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Of every parameter and buffer, whether it is what it was then, under masks."""
    return {
        name: bits(value).equal(bits(torch.where(masks[name], state[name], 0.0) if name in masks else state[name]))
        for name, value in model.state_dict().items()
    }


# -- what a rewind writes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ONE_OF_EACH)
def test_after_a_rewind_every_optimizer_goes_on_as_a_new_one_from_the_rewind_point(optimizer: OptimizerRow) -> None:
    run = start(IMP, "element", optimizer, model=Normed()).train(1)
    point = copy.deepcopy(run.model.state_dict())
    run.train(range(1, 7))
    masks = run.sparsity.masks()
    assert all(same(run.model, point, masks).values())
    assert run.sparsity.density() == 0.25
    run.train(range(7, 11))
    fresh = Normed(seed=1)
    fresh.load_state_dict(point)
    other = Run(fresh, optimizers := optimizer.make(fresh), gs.attach(fresh, gs.Static(), optimizers, masks=masks))
    other.train(range(7, 11))
    assert all(same(run.model, fresh.state_dict(), masks).values())


def test_parameters_that_are_frozen_stay_as_they_are_and_buffers_are_rewound() -> None:
    run = start(IMP, model=Normed()).train(1)
    point = copy.deepcopy(run.model.state_dict())
    run.train(range(1, 3))
    for frozen in (run.model.hidden, run.model.norm, run.model.head.bias):
        frozen.requires_grad_(False)
    run.train(range(3, 6))
    before = copy.deepcopy(run.model.state_dict())
    run.train(range(6, 7))
    masks = run.sparsity.masks()
    kept = {"hidden.weight", "hidden.bias", "norm.weight", "norm.bias", "head.bias"}
    assert masks["hidden.weight"].all()
    assert {name for name, unchanged in same(run.model, before, {}).items() if unchanged} >= kept
    rewound = same(run.model, point, masks)
    assert {name for name, is_rewound in rewound.items() if not is_rewound} == kept
    states = {name for name, p in run.model.named_parameters() if run.optimizers[0].state.get(p)}
    assert states == kept, "the optimizer's state of what was rewound is dropped, and no other"


@pytest.mark.parametrize("variant", ["forloop", "foreach", "fused"])
def test_momentum_that_is_dropped_stands_beside_momentum_that_stays(variant: str) -> None:
    run = start(IMP, "element", "sgd-momentum", variant).train(3)
    run.model.hidden.requires_grad_(False)
    run.train(range(3, 4))
    momentum = run.optimizers[0].state[run.model.hidden.weight]["momentum_buffer"].clone()
    assert momentum.any()
    run.model.hidden.requires_grad_(True)
    before = run.model.hidden.weight.detach().clone()
    backward(run.model, 4)
    gradient = run.model.hidden.weight.grad + 0.01 * before
    run.optimizers[0].step()
    torch.testing.assert_close(run.model.hidden.weight.detach(), before - 0.05 * (0.9 * momentum + 0.9 * gradient))


def test_what_was_frozen_at_the_rewind_point_and_is_trained_since_is_rewound() -> None:
    run = start(IMP)
    first = run.model.hidden.bias.detach().clone()
    run.model.hidden.bias.requires_grad_(False)
    run.train(1)
    run.model.hidden.bias.requires_grad_(True)
    run.train(range(1, 3))
    assert not run.model.hidden.bias.equal(first)
    run.train(range(3, 4))
    assert run.model.hidden.bias.equal(first)


def test_layers_trained_again_after_the_rounds_are_pruned_and_rewound_in_a_further_round() -> None:
    run = start(IMP).train(1)
    point = copy.deepcopy(run.model.state_dict())
    steps = told(run)
    run.model.hidden.requires_grad_(False)
    run.train(range(1, 8))
    assert run.sparsity.density() > 0.25
    for step in range(8, 12):  # a round ends at step 10, with nothing to prune: no step is left out, nothing rewound
        was = run.model.conv.bias.detach().clone()
        run.train(range(step, step + 1))
        assert not run.model.conv.bias.equal(was)
        assert not run.model.conv.bias.equal(point["conv.bias"])
    run.model.hidden.requires_grad_(True)
    run.train(range(12, 13))
    assert steps == [4, 7, 10, 13]
    assert run.sparsity.density() == 0.25
    masks = run.sparsity.masks()
    assert all(same(run.model, point, masks).values())
    run.train(range(13, 20))
    assert steps == [4, 7, 10, 13], "rounds go on though nothing is left to prune"
    before = everything(run)
    (update,) = run.sparsity.update()
    assert [(row["pruned"], row["grown"]) for row in update.rows] == [(0, 0)] * 3
    assert everything(run)["model"] == before["model"], "an update by hand rewound a ticket that has no more to prune"
    assert_zeros(run.model, masks)


def test_a_rewind_leaves_the_sharpness_of_thresholds_to_its_schedule() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    methods = [ROUNDS["imp"](), gs.LossyThreshold(sites="1", sharpness=1.0, double_at=[2, 3], fold=False)]
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    sparsity = gs.attach(model, methods, optimizer)
    threshold = model[1].sparsifier
    found, sharpness = [], []
    for step in range(8):
        optimizer.zero_grad()
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        (model(x).square().mean() + sparsity.penalty()).backward()
        optimizer.step()
        found.append(threshold.eps.item())
        sharpness.append(threshold.a.item())
    assert sharpness == [1, 2, 4, 4, 4, 4, 4, 4]
    assert found[3] == found[6] == found[0] != found[2]


@pytest.mark.parametrize("rewind", [None, 3])
def test_the_rewind_point_can_be_set_and_gone_back_to_by_hand(rewind: int | None) -> None:
    run = start(ROUNDS["imp"](rewind=rewind))
    run.train(1)
    before = everything(run)
    with pytest.raises(gs.OrderError, match=r"rewind point has not been reached, .*sparsity\.update\('checkpoint'\)"):
        run.sparsity.update("rewind")
    assert everything(run) == before
    run.sparsity.update("checkpoint")
    point = copy.deepcopy(run.model.state_dict())
    run.train(range(1, 2))
    assert not all(same(run.model, point, {}).values())
    run.sparsity.update("rewind")
    assert all(same(run.model, point, {}).values())
    assert not any(run.optimizers[0].state.values())


def test_a_round_ended_by_hand_before_the_rewind_point_is_refused_and_changes_nothing() -> None:
    run = start(ROUNDS["imp"](rewind=2)).train(1)
    before = everything(run)
    with pytest.raises(gs.OrderError, match=r"it is after step 2; train up to it"):
        run.sparsity.update()
    assert everything(run) == before


# -- when rounds end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUNDS)
def test_a_round_that_ends_late_is_followed_by_a_whole_one(name: str) -> None:
    run = start(ROUNDS[name]())
    steps = told(run)
    run.train(2)
    run.sparsity.freeze()
    run.train(range(2, 8))
    assert not steps
    run.sparsity.freeze(False)
    run.train(range(8, 13))
    assert steps == [9, 12]


def test_the_temperature_of_a_round_counts_from_where_it_began() -> None:
    run = start(ROUNDS["continuous"](length=4, rounds=3, rewind=None, final_temperature=8.0))
    (method,) = run.sparsity.methods
    run.sparsity.freeze()
    run.train(6)
    assert method.metrics()["temperature"] == 8
    run.sparsity.freeze(False)
    found = []
    for step in range(6, 12):
        run.train(range(step, step + 1))
        found.append(method.metrics()["temperature"])
    assert found == pytest.approx([2, 4, 8, 8, 2, 4])


@pytest.mark.parametrize("name", ROUNDS)
def test_rounds_of_another_length_after_a_resume_are_counted_from_where_the_present_one_began(name: str) -> None:
    state = start(ROUNDS[name](length=8)).train(11)
    run = start(ROUNDS[name](length=5))
    run.model.load_state_dict(state.model.state_dict())
    run.sparsity.load_state_dict(state.sparsity.state_dict())
    steps = told(run)
    run.train(range(11, 22))
    assert steps == [14]


def test_a_round_that_is_ended_by_hand_is_followed_by_one_of_the_usual_length() -> None:
    run = start(ROUNDS["imp"](length=5)).train(2)
    run.sparsity.update()
    steps = told(run)
    run.train(range(2, 12))
    assert steps == [8]
    assert run.sparsity.density() == 0.25


def test_a_run_without_the_step_at_which_the_last_round_is_pruned_is_refused() -> None:
    for name in ("imp", "continuous"):
        (method,) = gs.attach(TinyNet(), ROUNDS[name]()).methods
        method.check_run(7)
        with pytest.raises(
            gs.ConfigurationError, match=r"2 rounds of 3 steps are 6, which end with step 7, and the run has 6;"
        ):
            method.check_run(6)
    (method,) = gs.attach(TinyNet(), gs.ContinuousSparsification(rounds=2, length=3)).methods
    method.check_run(6)  # `finalize` takes the ticket, and nothing is rewound
    with pytest.raises(gs.ConfigurationError, match=r"2 rounds of 3 steps are 6, and the run has 5"):
        method.check_run(5)


# -- what is saved -----------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A user's wrapper, which may have parameters of its own with the names of some below it."""

    def __init__(self, module: nn.Module, own: bool = False) -> None:
        super().__init__()
        self.module = module
        if own:
            self.hidden = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


@pytest.mark.parametrize("to", ["plain", "wrapped"])
def test_a_rewind_point_saved_below_a_wrapper_is_that_of_the_plain_model_and_back(to: str) -> None:
    plain = start(IMP).train(3)
    first = plain if to == "wrapped" else start(IMP, model=Wrapped(TinyNet())).train(3)
    again = start(IMP, model=Wrapped(TinyNet(1)) if to == "wrapped" else TinyNet(1))
    inner = again.model.module if to == "wrapped" else again.model
    inner.load_state_dict((first.model.module if to == "plain" else first.model).state_dict())
    again.optimizers[0].load_state_dict(first.optimizers[0].state_dict())
    again.sparsity.load_state_dict(first.sparsity.state_dict())
    again.train(range(3, 9))
    plain.train(range(3, 9))
    assert all(same(inner, plain.model.state_dict(), {}).values())


def test_parameters_that_a_wrapper_names_as_one_below_it_are_not_mixed_up() -> None:
    run = start(IMP.make(targets="module.*"), model=Wrapped(TinyNet(), own=True)).train(1)
    with torch.no_grad():
        run.model.hidden.weight.fill_(5.0)
    run.sparsity.update("checkpoint")
    point = copy.deepcopy(run.model.state_dict())
    again = start(IMP.make(targets="module.*"), model=Wrapped(TinyNet(1), own=True))
    again.sparsity.load_state_dict(copy.deepcopy(run.sparsity.state_dict()))
    again.sparsity.update("rewind")
    assert all(same(again.model, point, {}).values())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda kept, name: kept.pop(name), "it was None"),
        (lambda kept, name: kept.update({name: kept[name][:-1]}), r"it was torch.float32 \("),
        (lambda kept, name: kept.update({name: "text"}), "it was 'text'"),
        (lambda kept, name: kept.update({name: kept[name].to("meta")}), r"it was torch.float32 \("),
        (lambda kept, name: kept.update({name: kept[name].int()}), r"it was torch.int32 \("),
    ],
    ids=["missing", "cut", "no tensor", "without values", "whole numbers"],
)
@pytest.mark.parametrize("part", ["conv.weight", "head.bias", "norm.running_mean"])
@pytest.mark.parametrize("name", ROUNDS)
def test_a_rewind_point_that_does_not_fit_the_model_is_refused_when_it_is_loaded(
    name: str, part: str, damage: Any, message: str
) -> None:
    run = start(ROUNDS[name](), model=Normed()).train(2)
    state = copy.deepcopy(run.sparsity.state_dict())
    damage(state["methods"][0]["state"]["kept"], part)
    before = everything(run)
    with pytest.raises(gs.StateError, match=rf"^{part}: is torch.float32 \(.*\), and at the rewind point {message}"):
        run.sparsity.load_state_dict(state)
    assert everything(run) == before


@pytest.mark.parametrize("name", ROUNDS)
def test_a_state_without_a_rewind_point_that_was_reached_is_refused(name: str) -> None:
    run = start(ROUNDS[name](), model=Normed()).train(2)
    state = run.sparsity.state_dict()
    for damage in (lambda saved: saved.pop("kept"), lambda saved: saved.update(kept=None)):
        broken = copy.deepcopy(state)
        damage(broken["methods"][0]["state"])
        before = everything(run)
        with pytest.raises(gs.StateError, match=r"the rewind point after step 1 is not in the saved state, .* step 2"):
            run.sparsity.load_state_dict(broken)
        assert everything(run) == before


class Cached(Normed):
    """With a cache that grows with what it is called with, as that of rotary embeddings does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cache = torch.zeros(len(self.cache) + 1)
        return super().forward(x)


@pytest.mark.parametrize("name", ROUNDS)
def test_what_no_state_of_the_model_has_is_not_rewound(name: str) -> None:
    run = start(ROUNDS[name](), model=Cached()).train(7)
    assert len(run.model.cache) == 8


@pytest.mark.parametrize("name", ROUNDS)
def test_weights_that_were_loaded_before_the_optimizer_was_followed_are_the_start(name: str) -> None:
    pretrained = Normed(seed=3).state_dict()
    model = Normed()
    sparsity = gs.attach(model, ROUNDS[name](rewind=0))
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            plain = key.replace("parametrizations.weight.original", "weight")
            if plain in pretrained:
                tensor.copy_(pretrained[plain])
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    sparsity.follow(optimizer)
    kept = sparsity.methods[0].state_dict()["kept"]
    assert {key: bits(value).tolist() for key, value in kept.items()} == {
        key: bits(value).tolist() for key, value in pretrained.items()
    }
    # What was loaded from a state of the run is right, whatever the model is by then.
    state = sparsity.state_dict()
    other = gs.attach(second := Normed(), ROUNDS[name](rewind=0))
    other.load_state_dict(state)
    other.follow(optim.SGD(second.parameters(), lr=0.1))
    assert snapshot(other.methods[0].state_dict()["kept"]) == snapshot(kept)


def test_a_rewind_of_a_model_that_has_changed_since_is_refused_and_changes_nothing() -> None:
    run = start(IMP, model=Normed()).train(3)
    run.model.norm.running_mean = torch.zeros(9)
    before = run.sparsity.masks()
    with pytest.raises(
        gs.StateError, match=r"^norm\.running_mean: is torch\.float32 \(9,\), and at the rewind point it was"
    ):
        run.sparsity.update()
    assert all(mask.equal(before[name]) for name, mask in run.sparsity.masks().items())
    assert run.sparsity.methods[0].state_dict()["rounds"] == [0, 0, 3]
