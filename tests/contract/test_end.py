"""Invariant 7: finalize leaves a plain model; and the rest of the handle: freeze, detach, callbacks, summaries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn, optim

import gossamer as gs

from .tables import (
    METHOD_CASES,
    METHODS,
    OPTIMIZERS,
    MethodRow,
    OptimizerRow,
    Run,
    TinyNet,
    backward,
    batch,
    bits,
    everything,
    snapshot,
    start,
    weights,
)

ROWS = [pytest.param(row, id=row.id) for row in METHODS]
FINALIZED = [  # every structure with one optimizer, every optimizer with one structure
    pytest.param(row, structure, optimizer, id=f"{row.id}-{structure}-{optimizer.id}")
    for row in METHODS
    for structure in row.structures
    for optimizer in OPTIMIZERS
    if structure == "element" or optimizer.id == "adamw"
]


def hooks_of(run: Run) -> list[Any]:
    found: list[Any] = []
    for optimizer in run.optimizers:
        found += [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
    for module in run.model.modules():
        for name, value in vars(module).items():
            if "hooks" in name and value:
                found.append(name)
        found += list(getattr(module, "parametrizations", ()))
    for parameter in run.model.parameters():
        found += [name for name in ("_backward_hooks", "_post_accumulate_grad_hooks") if getattr(parameter, name, None)]
    return found


@pytest.mark.parametrize(("method", "structure", "optimizer"), FINALIZED)
def test_finalize_leaves_a_plain_model_with_the_same_outputs(
    method: MethodRow, structure: str, optimizer: OptimizerRow
) -> None:
    plain = TinyNet()
    keys = list(plain.state_dict())
    reference = [(type(o), snapshot(o.state_dict())["param_groups"], o.defaults) for o in optimizer.make(plain)]
    run = start(method, structure, optimizer)
    run.train(5)
    masks = run.sparsity.masks()
    x, _ = batch(9)
    outputs = run.model(x).detach()
    before = everything(run)
    assert run.sparsity.finalize() is run.model
    assert bits(run.model(x)).equal(bits(outputs))
    after = snapshot({"model": run.model.state_dict(), "optimizers": [o.state_dict() for o in run.optimizers]})
    assert after == {key: before[key] for key in after}
    assert list(run.model.state_dict()) == keys
    assert hooks_of(run) == []
    assert [type(module) for module in run.model.modules()] == [type(module) for module in plain.modules()]
    assert [(type(o), snapshot(o.state_dict())["param_groups"], o.defaults) for o in run.optimizers] == reference
    for _, weight, mask in weights(run.model, masks):
        assert not bits(weight)[~mask].any()
    run.train(range(5, 7))
    assert any(weight[~mask].any() for _, weight, mask in weights(run.model, masks)), "masks are still in force"


def test_finalize_writes_the_zeros_even_after_something_overwrote_them() -> None:
    run = start(gs.SET(0.75)).train(2)
    masks = run.sparsity.masks()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(float("nan"))
    run.sparsity.finalize()
    for _, weight, mask in weights(run.model, masks):
        assert not bits(weight)[~mask].any()


@pytest.mark.parametrize("end", ["finalize", "detach"])
@pytest.mark.parametrize(
    "call", ["finalize", "detach", "update", "freeze", "follow", "clip_grad_norm_", "load_state_dict"]
)
def test_after_the_end_the_handle_says_so(end: str, call: str) -> None:
    run = start(gs.SET(0.75)).train(2)
    state = run.sparsity.state_dict()
    getattr(run.sparsity, end)()
    arguments = {"follow": (run.optimizers,), "clip_grad_norm_": (1.0,), "load_state_dict": (state,)}.get(call, ())
    before = snapshot(run.model.state_dict())
    with pytest.raises(gs.OrderError, match="detached or finalized; attach the model again"):
        getattr(run.sparsity, call)(*arguments)
    assert snapshot(run.model.state_dict()) == before
    assert hooks_of(run) == []


@pytest.mark.parametrize("end", ["finalize", "detach"])
def test_after_the_end_the_model_can_be_attached_again(end: str) -> None:
    run = start(gs.SET(0.75, every=1)).train(2)
    getattr(run.sparsity, end)()
    zeros = {name: weight.detach() != 0 for name, weight, _ in weights(run.model, run.sparsity.masks())}
    again = gs.attach(run.model, gs.Static(), run.optimizers, masks="zeros")
    Run(run.model, run.optimizers, again).train(3)
    assert all(mask.equal(zeros[name]) for name, mask in again.masks().items())


@pytest.mark.parametrize("row", ROWS)
def test_detach_stops_masking_and_changes_nothing(row: MethodRow) -> None:
    run = start(row).train(5)
    masks = run.sparsity.masks()
    before = everything(run)
    run.sparsity.detach()
    after = snapshot({"model": run.model.state_dict(), "optimizers": [o.state_dict() for o in run.optimizers]})
    assert after == {key: before[key] for key in after}
    assert hooks_of(run) == []
    run.train(range(5, 7))
    assert not any(mask.all() for mask in masks.values()) or not row.keeps_count
    assert any(weight[~mask].any() for _, weight, mask in weights(run.model, masks))


@pytest.mark.parametrize(("method", "structure"), METHOD_CASES)
def test_frozen_masks_stay_and_keep_their_zeros_until_thawed(method: MethodRow, structure: str) -> None:
    run = start(method, structure).train(3)
    masks = run.sparsity.masks()
    run.sparsity.freeze()
    for step in range(3, 7):
        run.train(range(step, step + 1))
        for name, weight, mask in weights(run.model, run.sparsity.masks()):
            assert mask.equal(masks[name])
            assert not bits(weight)[~mask].any()
    run.sparsity.freeze(False)
    run.train(range(7, 8))
    changed = any(not mask.equal(masks[name]) for name, mask in run.sparsity.masks().items())
    ended = method.method is gs.GMP and structure == "2:4"  # its first update already goes from 4 to 2 of 4
    assert changed == (bool(method.updates) and not ended)
    assert run.sparsity.step == 8


@pytest.mark.parametrize(("method", "structure"), METHOD_CASES)
def test_callbacks_are_told_of_every_update_exactly(method: MethodRow, structure: str) -> None:
    run = start(method, structure)
    told: list[gs.MaskUpdate] = []
    run.sparsity.on_update(told.append)
    masks = run.sparsity.masks()
    for step in range(1, 8):
        heard = len(told)
        run.train(range(step, step + 1))
        now = run.sparsity.masks()
        for update in told[heard:]:
            assert update.step == step
            assert update.method == method.method.name
            assert all(isinstance(value, float | int) for value in update.extras.values())
            for row in update.rows:
                was, new = masks[row["name"]], now[row["name"]]
                assert row == {
                    "name": row["name"],
                    "pruned": int((was & ~new).sum()),
                    "grown": int((new & ~was).sum()),
                    "active": int(new.sum()),
                    "total": new.numel(),
                }
        masks = now
    assert [update.step for update in told] == [step for step in method.updates if step < 8]


def test_update_by_hand_is_told_too_and_does_not_count_a_step() -> None:
    run = start(gs.DSR(0.75, threshold=0.1)).train(1)
    told: list[gs.MaskUpdate] = []
    run.sparsity.on_update(told.append)
    assert run.sparsity.update() == told
    assert run.sparsity.step == 1


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in METHODS if row.updates])
def test_until_ends_the_updates(row: MethodRow) -> None:
    run = start(row.make(until=4) if row.keeps_count else row)
    told: list[int] = []
    run.sparsity.on_update(lambda update: told.append(update.step))
    run.train(12)
    assert told == (list(row.updates) if not row.keeps_count else [2] if row.method is gs.RigL else [2, 4])


def test_summary_density_and_masks_agree() -> None:
    run = start(gs.DSR(0.75, every=2, threshold=0.1)).train(5)
    summary, masks = run.sparsity.summary(), run.sparsity.masks()
    assert {row["name"]: (row["shape"], row["total"], row["active"]) for row in summary.rows} == {
        name: (list(mask.shape), mask.numel(), int(mask.sum())) for name, mask in masks.items()
    }
    active, total = 216, 864
    assert summary.totals == {
        "targets_total": total,
        "targets_active": active,
        "targets_sparsity": 0.75,
        "all_total": total + 28,
        "all_nonzero": active + 28,
        "all_sparsity": 1 - (active + 28) / (total + 28),
    }
    assert run.sparsity.density() == 0.25
    assert all(name in str(summary) for name in masks)


def test_masks_are_copies() -> None:
    run = start(gs.SET(0.75))
    for mask in run.sparsity.masks().values():
        mask.fill_(True)
    assert sum(int(mask.sum()) for mask in run.sparsity.masks().values()) == 216


def test_hard_masks_add_no_penalty_and_no_parameters() -> None:
    run = start(gs.SET(0.75))
    assert run.sparsity.param_groups() == []
    penalty = run.sparsity.penalty()
    assert float(penalty) == 0.0
    assert penalty.dim() == 0


def test_attach_leaves_the_methods_given_as_they_were() -> None:
    method = gs.DSR(0.75, every=1, threshold=0.1)
    for seed in range(2):
        start(method, seed=seed).train(3)
    assert method.threshold == 0.1
    assert method.tensors == []


def test_two_runs_with_one_seed_are_alike_and_with_another_are_not() -> None:
    one, two, other = (start(gs.SET(0.75, every=2, seed=seed)).train(5) for seed in (0, 0, 1))
    assert everything(one) == everything(two)
    assert any(not mask.equal(other.sparsity.masks()[name]) for name, mask in one.sparsity.masks().items())


def test_the_random_numbers_of_the_user_are_not_touched() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run = start(gs.SET(0.75, every=1))
    state = torch.get_rng_state()
    for step in range(3):
        backward(run.model, step)
        run.optimizers[0].step()
    gs.attach(TinyNet(), gs.DSR(0.5)).update()
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(7)
    assert torch.rand(3).equal(expected)


def test_a_model_without_optimizer_can_be_attached_updated_and_finalized() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    sparsity = gs.attach(model, gs.DSR(0.5))
    (update,) = sparsity.update()
    assert update.rows[0]["active"] == 32
    sparsity.finalize()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()


def test_a_group_that_was_empty_before_stays() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    groups = [{"params": [], "lr": 1.0}, {"params": list(model.parameters()), "lr": 0.01}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    sparsity = gs.attach(model, gs.SET(0.5), optimizer)
    optimizer.step()
    scheduler.step()
    sparsity.finalize()
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1]
    optimizer.step()
    scheduler.step()
