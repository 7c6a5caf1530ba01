"""Invariant 5: a step skipped for non-finite gradients skips the mask update and the count of steps too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gossamer as gs

from .tables import FUSED, METHOD_CASES, METHODS, MethodRow, OptimizerRow, Run, batch, everything, start

UNMEASURED = [row for row in METHODS if not row.measures]
OVERFLOWS = st.lists(st.booleans(), min_size=1, max_size=12)


def scaled_training(run: Run, overflows: list[bool], scaler: torch.amp.GradScaler) -> None:
    """A loop as torch's documentation has it; where `overflows` says so, a gradient is infinite.

    A first good step comes before: fused SGD of torch 2.13 otherwise takes its momentum from uninitialised memory.
    """
    good = 0
    for overflow in overflows:
        run.model.zero_grad()
        x, y = batch(good)
        scaler.scale(nn.functional.cross_entropy(run.model(x), y)).backward()
        if overflow:
            run.model.head.weight.grad[0, 0] = float("inf")
        for optimizer in run.optimizers:
            scaler.step(optimizer)
        scaler.update()
        good += not overflow


def scaler() -> torch.amp.GradScaler:
    # A power of two, so that scaling rounds nothing and both runs can be compared to the bit.
    return torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)


def same_as_without(run: Run, plain: Run, overflows: list[bool]) -> None:
    updates: dict[str, list[int]] = {"scaled": [], "plain": []}
    run.sparsity.on_update(lambda update: updates["scaled"].append(update.step))
    plain.sparsity.on_update(lambda update: updates["plain"].append(update.step))
    overflows = [False, *overflows, False]  # a last good step, as a skipped one makes state where it was dropped
    scaled_training(run, overflows, scaler())
    plain.train(overflows.count(False))
    assert run.sparsity.step == plain.sparsity.step == overflows.count(False)
    assert updates["scaled"] == updates["plain"]
    assert everything(run) == everything(plain)


@pytest.mark.parametrize("optimizer", FUSED)
@given(overflows=OVERFLOWS, row=st.sampled_from(UNMEASURED))
@settings(max_examples=25)
def test_steps_skipped_inside_a_fused_optimizer_are_as_if_they_had_not_been(
    optimizer: OptimizerRow, overflows: list[bool], row: MethodRow
) -> None:
    run, plain = (start(row, "element", optimizer, "fused") for _ in range(2))
    assert run.optimizers[0]._step_supports_amp_scaling
    same_as_without(run, plain, overflows)


@given(
    overflows=OVERFLOWS, row=st.sampled_from(UNMEASURED), name=st.sampled_from(["sgd-momentum", "adamw", "adafactor"])
)
@settings(max_examples=40)
def test_steps_that_the_scaler_leaves_out_are_as_if_they_had_not_been(
    overflows: list[bool], row: MethodRow, name: str
) -> None:
    run, plain = (start(row, "element", name) for _ in range(2))
    same_as_without(run, plain, overflows)


@pytest.mark.parametrize(("method", "structure"), [case for case in METHOD_CASES if case.values[0] in UNMEASURED])
def test_every_method_skips_every_update_that_overflows(method: MethodRow, structure: str) -> None:
    overflows = [False, True, True, False, False, True, False, True, False, False]  # also where updates are due
    run, plain = (start(method, structure, "adamw", "fused") for _ in range(2))
    same_as_without(run, plain, overflows)


def test_a_flag_set_by_hand_counts_as_the_scalers() -> None:
    run = start(gs.SET(0.75, every=1), "element", "adam", "fused")
    (adam,) = run.optimizers
    run.train(1)
    before, steps = run.sparsity.masks(), run.sparsity.step
    for flag in (1.0, 1.0, 0.0):
        x, y = batch(1)
        run.model.zero_grad()
        nn.functional.cross_entropy(run.model(x), y).backward()
        adam.found_inf, adam.grad_scale = torch.tensor(flag), torch.tensor(1.0)
        adam.step()
        changed = any(not mask.equal(before[name]) for name, mask in run.sparsity.masks().items())
        assert changed == (flag == 0)
    assert run.sparsity.step == steps + 1


class Watched(torch.Tensor):
    """A flag that notices when its value is asked for, which on a device would wait for it."""

    reads = 0

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("__bool__", "item", "__int__", "__float__", "tolist", "cpu"):
            Watched.reads += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def test_the_flag_is_read_only_where_an_update_may_be_due() -> None:
    run = start(gs.SET(0.75, every=5), "element", "adamw", "fused")
    (adamw,) = run.optimizers
    reads = []
    for step in range(10):
        x, y = batch(step)
        run.model.zero_grad()
        nn.functional.cross_entropy(run.model(x), y).backward()
        Watched.reads = 0
        adamw.found_inf = torch.zeros(()).as_subclass(Watched)
        adamw.grad_scale = torch.ones(())
        adamw.step()
        reads.append(Watched.reads > 0)
    assert reads == [False] * 4 + [True] + [False] * 4 + [True]


@given(overflows=OVERFLOWS)
@settings(max_examples=30)
def test_a_frozen_stretch_with_skipped_steps_loses_no_update(overflows: list[bool]) -> None:
    run, plain = (start(gs.SET(0.75, every=2), "element", "adamw", "fused") for _ in range(2))
    scale = scaler()
    scaled_training(run, [False, True, True, False], scale)
    run.sparsity.freeze()
    plain.train(2)
    plain.sparsity.freeze()
    scaled_training(run, overflows, scale)
    plain.train(overflows.count(False))
    for each in (run, plain):
        each.sparsity.freeze(False)
    scaled_training(run, [False] * 4, scale)
    plain.train(4)
    for name, mask in plain.sparsity.masks().items():
        assert mask.equal(run.sparsity.masks()[name])
    assert run.sparsity.step == plain.sparsity.step


@given(first=st.lists(st.sampled_from(["neither", "both"]), min_size=1, max_size=8))
@settings(max_examples=20)
def test_a_round_of_two_optimizers_that_overflows_in_both_is_as_if_it_had_not_been(first: list[str]) -> None:
    for variant in ("forloop", "fused"):
        run, plain = (start(gs.SET(0.75, every=2), "element", "muon+adamw", variant) for _ in range(2))
        scale, good = scaler(), 0
        for kind in ["neither", *first]:
            run.model.zero_grad()
            x, y = batch(good)
            scale.scale(nn.functional.cross_entropy(run.model(x), y)).backward()
            if kind == "both":
                run.model.head.weight.grad[0, 0] = run.model.head.bias.grad[0] = float("inf")
            for optimizer in run.optimizers:
                scale.step(optimizer)
            scale.update()
            good += kind == "neither"
        plain.train(good)
        assert everything(run) == everything(plain)


@pytest.mark.parametrize("variant", ["forloop", "fused"])
@pytest.mark.parametrize("overflowing", [0, 1])
@pytest.mark.parametrize("skip_step", [True, False])
def test_where_one_of_two_optimizers_overflows_updates_are_still_made_before_the_first(
    variant: str, overflowing: int, skip_step: bool
) -> None:
    """A scaler skips each optimizer by itself. The rounds must not shift: gradients and weights belong together."""
    run = start(gs.RigL(0.75, every=2, skip_step=skip_step), "element", "muon+adamw", variant)
    scale = scaler()
    order: list[str] = []
    run.sparsity.on_update(lambda update: order.append("update"))
    for i, optimizer in enumerate(run.optimizers):
        optimizer.register_step_post_hook(lambda *_, i=i: order.append(f"step {i}"))
    for step in range(7):
        run.model.zero_grad()
        x, y = batch(step)
        scale.scale(nn.functional.cross_entropy(run.model(x), y)).backward()
        if step == 2:
            bad = run.model.head.weight if overflowing == 0 else run.model.head.bias
            bad.grad.view(-1)[0] = float("inf")
        order.append("|")
        for optimizer in run.optimizers:
            scale.step(optimizer)
        scale.update()
    rounds = " ".join(order).split("|")[1:]
    assert sum("update" in each for each in rounds) >= 3
    assert all("update" not in each or each.split()[0] == "update" for each in rounds), rounds
