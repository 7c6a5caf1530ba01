"""Invariant 4: masks go along with copies, wrappers, compilers and schedulers, and a wrong order is an error."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import gossamer as gs

from .tables import (
    METHOD_CASES,
    METHODS,
    ONE_OF_EACH,
    MethodRow,
    OptimizerRow,
    Run,
    TinyNet,
    assert_zeros,
    backward,
    batch,
    bits,
    everything,
    start,
    weights,
)

ROWS = [pytest.param(row, id=row.id) for row in METHODS]


def copied(run: Run) -> Run:
    return Run(*copy.deepcopy((run.model, run.optimizers, run.sparsity)))


def same_masks(one: Run, other: Run, prefix: str = "") -> bool:
    masks = other.sparsity.masks()
    return all(mask.equal(masks[prefix + name]) for name, mask in one.sparsity.masks().items())


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "structure"), METHOD_CASES)
def test_a_copy_of_model_optimizer_and_handle_goes_on_alike_and_alone(method: MethodRow, structure: str) -> None:
    whole = start(method, structure).train(9)
    run = start(method, structure).train(3)
    twin = copied(run)
    at_copy = everything(twin)
    run.train(range(3, 9))
    assert everything(twin) == at_copy, "training the original changed the copy"
    twin.train(range(3, 9))
    assert everything(run) == everything(twin) == everything(whole)
    assert_zeros(twin.model, twin.sparsity.masks())


@pytest.mark.parametrize("optimizer", ONE_OF_EACH)
def test_copies_and_pickles_go_on_alike_over_every_optimizer(optimizer: OptimizerRow) -> None:
    method = next(row for row in METHODS if row.id == "dsr")
    whole = start(method, "element", optimizer).train(7)
    run = start(method, "element", optimizer).train(3)
    twin = copied(run)
    thawed = Run(*pickle.loads(pickle.dumps((run.model, run.optimizers, run.sparsity))))
    for each in (twin, thawed):
        assert everything(each.train(range(3, 7))) == everything(whole)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_three_may_be_copied_in_any_order_or_in_a_dict(order: tuple[int, ...]) -> None:
    run = start(gs.SET(0.75, every=2)).train(3)
    three = (run.model, run.optimizers, run.sparsity)
    parts = copy.deepcopy({i: three[i] for i in order})
    twin = Run(*(parts[i] for i in range(3))).train(range(3, 6))
    assert everything(twin) == everything(run.train(range(3, 6)))


def test_a_copy_of_a_copy_and_a_copy_before_follow_work() -> None:
    model = TinyNet()
    sparsity = gs.attach(model, gs.SET(0.75, every=2))
    model, sparsity = copy.deepcopy(copy.deepcopy((model, sparsity)))
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    sparsity.follow(optimizer)
    run = Run(model, [optimizer], sparsity).train(5)
    assert_zeros(model, sparsity.masks())
    assert everything(copied(copied(run)).train(3)) == everything(run.train(3))


@pytest.mark.parametrize(("method", "structure"), METHOD_CASES)
def test_nothing_that_is_not_a_leaf_stays_on_a_module(method: MethodRow, structure: str) -> None:
    run = start(method, structure).train(4)
    backward(run.model, 4)
    for name, module in run.model.named_modules():
        held = {**module.__dict__, **module._parameters, **module._buffers}
        for key, value in held.items():
            assert not isinstance(value, torch.Tensor) or value.is_leaf, f"{name}.{key} is not a leaf"
    copy.deepcopy(run.model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_an_optimizer_copied_without_its_handle_refuses_to_step(duplicate: Any) -> None:
    run = start(gs.SET(0.75)).train(2)
    model, optimizers = duplicate((run.model, run.optimizers))
    backward(model, 0)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        gs.OrderError, match=r"a copy of one that kept masks.*copy or pickle \(model, optimizer, sparsity\)"
    ):
        optimizers[0].step()
    assert all(p.equal(was) for p, was in zip(model.parameters(), before, strict=True))


def test_a_copy_without_the_handle_works_after_the_original_was_finalized() -> None:
    run = start(gs.SET(0.75)).train(2)
    run.sparsity.finalize()
    model, (optimizer,) = copy.deepcopy((run.model, run.optimizers))
    backward(model, 0)
    optimizer.step()


# -- order -------------------------------------------------------------------------------------------------------------


def test_an_optimizer_that_was_not_followed_refuses_to_step() -> None:
    model = TinyNet()
    sparsity = gs.attach(model, gs.SET(0.75))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    backward(model, 0)
    with pytest.raises(
        gs.OrderError, match=r"conv\.weight: has a mask, but no sparsity\.follow\(optimizer\).*the order is"
    ):
        optimizer.step()
    sparsity.follow(optimizer)
    optimizer.step()
    assert_zeros(model, sparsity.masks())


def test_an_optimizer_used_before_attach_is_noticed_when_it_steps_again() -> None:
    model = TinyNet()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    backward(model, 0)
    optimizer.step()
    sparsity = gs.attach(model, gs.SET(0.75))
    with pytest.raises(gs.OrderError, match="has a mask"):
        optimizer.step()
    assert sparsity.step == 0


def test_a_second_optimizer_beside_the_followed_one_is_noticed() -> None:
    run = start(gs.SET(0.75)).train(1)
    other = optim.SGD(run.model.parameters(), lr=0.1)
    backward(run.model, 1)
    with pytest.raises(gs.OrderError, match="has a mask"):
        other.step()


def test_an_optimizer_of_other_parameters_is_left_alone() -> None:
    run = start(gs.SET(0.75)).train(1)
    other = nn.Linear(3, 3)
    optimizer = optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert run.sparsity.step == 1


def test_replaced_parameters_are_noticed() -> None:
    run = start(gs.SET(0.75)).train(2)
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.model.load_state_dict(state, assign=True)
    backward(run.model, 2)
    with pytest.raises(
        gs.OrderError,
        match=r"conv\.weight: was replaced after sparsity\.follow.*the order is",
    ):
        run.optimizers[0].step()
    optimizer = optim.SGD(run.model.parameters(), lr=0.1)
    run.sparsity.follow(optimizer)
    optimizer.step()
    assert_zeros(run.model, run.sparsity.masks())


def test_following_a_new_optimizer_lets_go_of_the_old_one() -> None:
    run = start(gs.SET(0.75, every=2)).train(2)
    old, new = run.optimizers[0], optim.SGD(run.model.parameters(), lr=0.1)
    run.sparsity.follow(new)
    backward(run.model, 2)
    with pytest.raises(gs.OrderError, match="has a mask"):
        old.step()
    new.step()
    assert not old._optimizer_step_pre_hooks
    assert not old._optimizer_step_post_hooks
    assert_zeros(run.model, run.sparsity.masks())


def test_of_several_optimizers_the_first_is_counted() -> None:
    run = start(gs.SET(0.75, every=2), optimizer="muon+adamw")
    seen: list[int] = []
    run.sparsity.on_update(lambda update: seen.append(update.step))
    run.train(7)
    assert run.sparsity.step == 7
    assert seen == [2, 4, 6]


def test_one_optimizer_of_several_may_rest() -> None:
    run = start(gs.SET(0.75, every=2), optimizer="muon+adamw")
    for step in range(6):
        backward(run.model, step)
        run.optimizers[0].step()
        if step % 2:
            run.optimizers[1].step()
        assert_zeros(run.model, run.sparsity.masks())
    assert run.sparsity.step == 6


def test_of_several_optimizers_each_leaves_out_one_step_at_an_update() -> None:
    """The second steps twice for each step of the first: an update withholds only the first of the two."""
    run = start(gs.RigL(0.75, every=3, skip_step=True), optimizer="muon+adamw")
    muon, adamw = run.optimizers
    moved = []
    for step in range(6):
        backward(run.model, step)
        muon.step()
        for _ in range(2):
            bias = run.model.head.bias.detach().clone()
            adamw.step()
            moved.append(not run.model.head.bias.equal(bias))
    assert moved == [True, True, True, True, False, True] * 2


# -- training in parts and wrappers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_accumulated_micro_batches_give_the_masks_of_the_whole_batch(row: MethodRow) -> None:
    whole, parts = (start(row, model=TinyNet().double(), optimizer="sgd-momentum") for _ in range(2))
    for step in range(8):
        backward(whole.model, step, torch.float64)
        parts.model.zero_grad()
        x, y = batch(step, torch.float64)
        for micro in range(4):
            part = slice(2 * micro, 2 * micro + 2)
            (nn.functional.cross_entropy(parts.model(x[part]), y[part]) / 4).backward()
        for run in (whole, parts):
            run.optimizers[0].step()
        assert same_masks(whole, parts)
    assert parts.sparsity.step == 8


@pytest.mark.parametrize("row", ROWS)
def test_activation_checkpointing_changes_nothing(row: MethodRow) -> None:
    class Checkpointed(TinyNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    plain, saved = start(row), start(row, model=Checkpointed())
    assert everything(saved.train(7)) == everything(plain.train(7))


@pytest.mark.parametrize("row", ROWS)
def test_autocast_keeps_weights_and_masks_exact(row: MethodRow) -> None:
    run = start(row)
    counts = {name: int(mask.sum()) for name, mask in run.sparsity.masks().items()}
    for step in range(7):
        with torch.autocast("cpu", torch.bfloat16):
            backward(run.model, step)
        run.optimizers[0].step()
        assert_zeros(run.model, run.sparsity.masks())
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    if row.keeps_count:
        assert sum(int(mask.sum()) for mask in run.sparsity.masks().values()) == sum(counts.values())


def test_masks_do_not_depend_on_autocast_where_they_are_random_or_fixed() -> None:
    """Growth at random must not draw differently because activations were rounded."""
    method = gs.SET(0.75, every=2, drop_score=lambda view: torch.arange(float(view.weight.numel())))
    plain, mixed = start(method), start(method)
    plain.train(6)
    for step in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            backward(mixed.model, step)
        mixed.optimizers[0].step()
    assert same_masks(plain, mixed)


class Counter:
    """A compiler that runs what it is given and counts how often it was asked."""

    def __init__(self) -> None:
        self.compilations = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.compilations += 1
        return graph.forward


@pytest.mark.parametrize(("method", "structure"), METHOD_CASES)
def test_a_compiled_model_is_compiled_once_and_has_the_masks_of_the_plain_one(
    method: MethodRow, structure: str
) -> None:
    torch._dynamo.reset()
    plain = start(method, structure).train(7)
    model, counter = TinyNet(), Counter()
    sparsity = gs.attach(model, method.make(structure))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = optim.AdamW(compiled.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    sparsity.follow(optimizer)
    run = Run(compiled, [optimizer], sparsity).train(7)
    assert counter.compilations == 1
    assert everything(Run(model, [optimizer], sparsity)) == everything(plain)
    run.sparsity.update()
    run.train(range(7, 8))
    run.sparsity.load_state_dict(plain.sparsity.state_dict())
    run.sparsity.freeze()
    run.train(range(8, 9))
    assert counter.compilations == 1, "a change of the masks compiled the model again"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own imports
@pytest.mark.parametrize("method", [pytest.param(row, id=row.id) for row in METHODS])
def test_a_compiled_optimizer_step_gives_the_masks_of_the_plain_one(method: MethodRow) -> None:
    torch._dynamo.reset()
    plain, run = start(method, optimizer="sgd-momentum"), start(method, optimizer="sgd-momentum")
    step = torch.compile(run.optimizers[0].step, backend="eager")
    plain.train(6)
    for number in range(6):
        backward(run.model, number)
        step()
    assert everything(run) == everything(plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
def test_inductor_keeps_the_zeros_and_recompiles_nothing() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    sparsity = gs.attach(model, gs.SET(0.75, every=2))
    compiled = torch.compile(model, fullgraph=True)
    optimizer = optim.AdamW(compiled.parameters(), lr=0.01)
    sparsity.follow(optimizer)
    first = sparsity.masks()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):
            optimizer.zero_grad()
            compiled(x).square().mean().backward()
            optimizer.step()
            assert_zeros(model, sparsity.masks())
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert any(not mask.equal(first[name]) for name, mask in sparsity.masks().items())


def test_accelerate_wraps_model_optimizer_and_scheduler() -> None:
    plain = start(gs.SET(0.75, every=2), optimizer="adamw")
    rate = optim.lr_scheduler.StepLR(plain.optimizers[0], 2, 0.5)
    model = TinyNet()
    sparsity = gs.attach(model, gs.SET(0.75, every=2))
    optimizer = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    accelerator = Accelerator(cpu=True)
    model, wrapped, stepper = accelerator.prepare(model, optimizer, scheduler)
    assert wrapped is not optimizer
    for each in (stepper, scheduler, wrapped, [wrapped]):
        sparsity.follow(each)
    for step in range(6):
        backward(plain.model, step)
        plain.optimizers[0].step()
        rate.step()
        x, y = batch(step)
        wrapped.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model(x), y))
        wrapped.step()
        stepper.step()
    assert sparsity.step == 6
    inner = Run(accelerator.unwrap_model(model), [optimizer], sparsity)
    assert everything(inner)["model"] == everything(plain)["model"]
    assert same_masks(plain, inner)


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
        lambda optimizer: optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        lambda optimizer: optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    ],
)
@pytest.mark.parametrize("row", ROWS)
def test_a_scheduler_made_after_follow_works_and_resumes(row: MethodRow, make: Any) -> None:
    def new(seed: int) -> tuple[Run, Any]:
        run = start(row, optimizer="sgd-momentum", seed=seed)
        return run, make(run.optimizers[0])

    def train(run: Run, scheduler: Any, steps: range) -> None:
        for step in steps:
            run.train(range(step, step + 1))
            scheduler.step()

    whole, whole_rate = new(0)
    train(whole, whole_rate, range(9))
    run, rate = new(0)
    train(run, rate, range(4))
    again, again_rate = new(1)
    again.model.load_state_dict(run.model.state_dict())
    again.optimizers[0].load_state_dict(run.optimizers[0].state_dict())
    again.sparsity.load_state_dict(run.sparsity.state_dict())
    again_rate.load_state_dict(rate.state_dict())
    train(again, again_rate, range(4, 9))
    assert everything(again) == everything(whole)


# -- averages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_project_writes_the_masks_into_averages_and_copies(row: MethodRow) -> None:
    run = start(row)
    average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(6):
        run.train(range(step, step + 1))
        average.update_parameters(run.model)
    dense = copy.deepcopy(average)
    before = copy.deepcopy(average.module.state_dict())
    masks = run.sparsity.masks()
    if row.grows or not row.keeps_count:
        assert any(average.module.get_parameter(n)[~mask].any() for n, mask in masks.items()), "nothing to project"
    for each in (average, dense.module, nn.ModuleDict({"module": copy.deepcopy(dense.module)})):
        run.sparsity.project(each)
        assert_zeros(each.module if hasattr(each, "module") else each, masks)
    after = average.module.state_dict()
    for name, value in before.items():
        kept = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert bits(after[name])[kept].equal(bits(value)[kept]), f"{name}: an active weight changed"


def test_project_onto_something_else_is_refused_and_changes_nothing() -> None:
    run = start(gs.SET(0.75)).train(1)
    other = nn.Sequential(nn.Linear(4, 4))
    other.add_module("conv", nn.Conv2d(4, 8, 3))
    other.add_module("hidden", nn.Linear(3, 3))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        gs.ConfigurationError, match=r"project: the copy has shape \(3, 3\) for hidden\.weight \(16, 32\)"
    ):
        run.sparsity.project(other)
    with pytest.raises(gs.ConfigurationError, match=r"project: the copy has no parameter conv\.weight"):
        run.sparsity.project(nn.Linear(2, 2))
    assert all(value.equal(before[name]) for name, value in other.state_dict().items())


# -- lives of handles --------------------------------------------------------------------------------------------------


def test_the_handle_lives_as_long_as_the_optimizer_and_no_longer() -> None:
    model = TinyNet()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gs.attach(model, gs.SET(0.75, every=1), optimizer)
    gc.collect()
    backward(model, 0)
    optimizer.step()
    assert int(model.hidden.weight.count_nonzero()) < 512 * 0.75
    del optimizer
    gc.collect()
    gs.attach(model, gs.SET(0.75))


def test_gradients_set_to_none_and_frozen_layers_do_not_disturb() -> None:
    run = start(gs.RigL(0.75, every=2), optimizer="adamw")
    run.model.hidden.weight.requires_grad_(False)
    run.train(5)
    assert_zeros(run.model, run.sparsity.masks())
    assert sum(int(mask.sum()) for mask in run.sparsity.masks().values()) == 216


def test_parameters_added_to_the_optimizer_later_are_trained_and_leave_no_trace() -> None:
    run = start(gs.SET(0.75, every=2), optimizer="sgd-momentum").train(2)
    extra = nn.Parameter(torch.ones(3))
    run.optimizers[0].add_param_group({"params": [extra]})
    run.train(range(2, 4))
    run.sparsity.finalize()
    options = {"params", *optim.SGD([nn.Parameter(torch.ones(1))]).defaults}
    assert [set(group) for group in run.optimizers[0].param_groups] == [options, options]
    assert type(run.optimizers[0].defaults) is dict


def test_the_defaults_of_a_followed_optimizer_can_make_another_one() -> None:
    run = start(gs.SET(0.75), optimizer="sgd-momentum").train(1)
    other = TinyNet()
    twin = type(run.optimizers[0])(other.parameters(), **run.optimizers[0].defaults)
    backward(other, 0)
    twin.step()
    assert twin.defaults == run.optimizers[0].defaults


def test_masks_are_right_for_every_weight_after_moves_of_memory_and_dtype() -> None:
    """`model.to(...)` after follow changes the layout and the width of the weights under the masks."""
    for move in ({"memory_format": torch.channels_last}, {"dtype": torch.float64}):
        run = start(gs.SET(0.75, every=2), optimizer="sgd").train(2)
        run.model.to(**move)
        for step in range(2, 6):
            backward(run.model, step, next(run.model.parameters()).dtype)
            run.optimizers[0].step()
            for _, weight, mask in weights(run.model, run.sparsity.masks()):
                assert not bits(weight)[~mask].any()
        assert sum(int(mask.sum()) for mask in run.sparsity.masks().values()) == 216
