"""Invariant 6: gradients of pruned weights never change what happens to active ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

import gossamer as gs

from .tables import (
    ALONE,
    METHOD_CASES,
    METHODS,
    OPTIMIZER_CASES,
    MethodRow,
    OptimizerRow,
    Run,
    TinyNet,
    backward,
    batch,
    bits,
    everything,
    start,
    weights,
)

VALUES = st.lists(st.floats(width=32), min_size=1, max_size=6)


def put(run: Run, values: list[float]) -> None:
    """Write values into the gradients of all pruned weights."""
    for _, weight, mask in weights(run.model, run.sparsity.masks()):
        count = int((~mask).sum())
        weight.grad[~mask] = torch.tensor(values).repeat(count // len(values) + 1)[:count]


@pytest.mark.parametrize(("optimizer", "variant"), OPTIMIZER_CASES)
@given(values=VALUES, row=st.sampled_from(METHODS), structure=st.sampled_from(["element", "2:4"]))
@settings(max_examples=8)
def test_arbitrary_gradients_of_pruned_weights_change_no_active_weight(
    optimizer: OptimizerRow, variant: str, values: list[float], row: MethodRow, structure: str
) -> None:
    clean, dirty = (start(row, structure, optimizer, variant) for _ in range(2))
    for step in range(5):
        for run in (clean, dirty):
            backward(run.model, step)
        if not dirty.sparsity.methods[0].due(step + 1):  # a weight that grows now is active, and its gradient counts
            put(dirty, values)
        for run in (clean, dirty):
            for each in run.optimizers:
                each.step()
        for name, parameter in clean.model.named_parameters():
            assert bits(parameter).equal(bits(dirty.model.get_parameter(name))), f"step {step}: {name}"


class Normalized(optim.SGD):
    """Plain gradient descent along the normalized gradient of each tensor: not element-wise, and unknown to us."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad / parameter.grad.norm()


@given(values=VALUES)
@settings(max_examples=20)
def test_an_optimizer_we_do_not_know_is_taken_to_mix_its_gradients(values: list[float]) -> None:
    runs = []
    for _ in range(2):
        model = TinyNet()
        optimizer = Normalized(model.parameters(), lr=0.1)
        runs.append(Run(model, [optimizer], gs.attach(model, gs.Static(0.75), optimizer)))
    for step in range(3):
        for run in runs:
            backward(run.model, step)
        put(runs[1], values)
        for run in runs:
            run.optimizers[0].step()
    assert everything(runs[0])["model"] == everything(runs[1])["model"]


def test_growth_reads_the_gradients_before_they_are_zeroed() -> None:
    """Adafactor and Muon get zeroed gradients; RigL must still see the dense ones."""
    for name in ("adafactor", "muon+adamw"):
        run = start(gs.RigL(0.75, every=1, skip_step=False), optimizer=name)
        backward(run.model, 0)
        before = run.sparsity.masks()
        dense = {n: weight.grad.clone() for n, weight, _ in weights(run.model, before)}
        for each in run.optimizers:
            each.step()
        for n, mask in run.sparsity.masks().items():
            grown, left_out = mask & ~before[n], ~mask & ~before[n]
            if grown.any():
                assert dense[n][grown].abs().min() >= dense[n][left_out].abs().max() > 0


# -- clipping ----------------------------------------------------------------------------------------------------------


def brute_norm(run: Run, p: float) -> float:
    masks = run.sparsity.masks()
    values = []
    for name, parameter in run.model.named_parameters():
        kept = masks.get(name, torch.ones_like(parameter, dtype=torch.bool)).flatten().tolist()
        values += [abs(g) for g, alive in zip(parameter.grad.double().flatten().tolist(), kept, strict=True) if alive]
    return max(values) if p == math.inf else sum(value**p for value in values) ** (1 / p)


@given(p=st.sampled_from([1.0, 2.0, 3.0, math.inf]), limit=st.sampled_from([1e-3, 0.5, 1e3]), values=VALUES)
@settings(max_examples=40)
@pytest.mark.parametrize("optimizer", ["sgd", "muon+adamw"])
def test_clipping_counts_active_weights_only(optimizer: str, p: float, limit: float, values: list[float]) -> None:
    run = start(gs.SET(0.75), optimizer=optimizer)
    backward(run.model, 0)
    put(run, values)
    before = {name: parameter.grad.clone() for name, parameter in run.model.named_parameters()}
    expected = brute_norm(run, p)
    norm = run.sparsity.clip_grad_norm_(limit, norm_type=p)
    assert norm.dim() == 0
    assert float(norm) == pytest.approx(expected, rel=1e-5)
    factor = min(1.0, limit / (expected + 1e-6))
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name] * factor, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_clipping_equals_that_of_torch_where_pruned_gradients_are_zero() -> None:
    ours, torchs = (start(gs.Static(0.75), optimizer="sgd") for _ in range(2))
    for run in (ours, torchs):
        backward(run.model, 0)
        put(run, [0.0])
    one = ours.sparsity.clip_grad_norm_(0.1)
    other = nn.utils.clip_grad_norm_(torchs.model.parameters(), 0.1)
    assert one.equal(other)
    for a, b in zip(ours.model.parameters(), torchs.model.parameters(), strict=True):
        assert a.grad.equal(b.grad)


def test_clipping_leaves_growth_by_gradient_its_ranking() -> None:
    clipped, plain = (start(gs.RigL(0.75, every=1, skip_step=False), optimizer="sgd") for _ in range(2))
    for run in (clipped, plain):
        backward(run.model, 0)
    clipped.sparsity.clip_grad_norm_(2.0**-10)
    for run in (clipped, plain):
        run.optimizers[0].step()
    for name, mask in plain.sparsity.masks().items():
        assert mask.equal(clipped.sparsity.masks()[name])


def test_clipping_a_norm_that_is_not_finite_raises_where_asked_and_scales_nothing() -> None:
    run = start(gs.SET(0.75), optimizer="sgd")
    backward(run.model, 0)
    run.model.head.bias.grad[0] = float("inf")
    before = [parameter.grad.clone() for parameter in run.model.parameters()]
    with pytest.raises(RuntimeError, match="non-finite"):
        run.sparsity.clip_grad_norm_(1.0, error_if_nonfinite=True)
    assert all(p.grad.equal(was) for p, was in zip(run.model.parameters(), before, strict=True))
    put(run, [float("nan")])
    run.model.head.bias.grad[0] = 0.0
    assert run.sparsity.clip_grad_norm_(1.0, error_if_nonfinite=True).isfinite()


def test_clipping_works_before_follow_and_without_gradients() -> None:
    model = TinyNet()
    sparsity = gs.attach(model, gs.SET(0.75))
    assert float(sparsity.clip_grad_norm_(1.0)) == 0.0
    backward(model, 0)
    assert float(sparsity.clip_grad_norm_(1.0)) == pytest.approx(brute_norm(Run(model, [], sparsity), 2.0), rel=1e-5)


# -- closures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("optimizer", ALONE)
def test_a_step_with_a_closure_equals_backward_and_a_plain_step(optimizer: OptimizerRow, keyword: bool) -> None:
    row = next(each for each in METHODS if each.id == "rigl-step")
    plain, closed = (start(row, "element", optimizer) for _ in range(2))
    for step in range(5):
        loss = backward(plain.model, step)
        plain.optimizers[0].step()
        closure = lambda step=step: backward(closed.model, step)  # noqa: E731
        given = closed.optimizers[0].step(closure=closure) if keyword else closed.optimizers[0].step(closure)
        assert given.equal(loss)
        assert everything(closed) == everything(plain)


@pytest.mark.parametrize(("method", "structure"), METHOD_CASES)
def test_every_method_updates_from_the_gradients_of_the_closure(method: MethodRow, structure: str) -> None:
    plain, closed = (start(method, structure) for _ in range(2))
    for step in range(6):
        backward(plain.model, step)
        plain.optimizers[0].step()
        for parameter in closed.model.parameters():
            parameter.grad = torch.full_like(parameter, 7.0)  # stale: only what the closure computes may count

        def closure(step: int = step) -> torch.Tensor:
            closed.model.zero_grad()
            x, y = batch(step)
            loss = nn.functional.cross_entropy(closed.model(x), y)
            loss.backward()
            return loss

        closed.optimizers[0].step(closure)
        assert everything(closed) == everything(plain)


class Extrapolated(optim.SGD):
    """Looks ahead before it steps, and so evaluates its closure twice (the extragradient method)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> torch.Tensor:
        parameters = [p for group in self.param_groups for p in group["params"]]
        start = [p.clone() for p in parameters]
        for last in (False, True):
            with torch.enable_grad():
                loss = closure()
            for p, was in zip(parameters, start, strict=True):
                if p.grad is not None:
                    p.copy_(was - 0.1 * p.grad)
            if last:
                return loss
        raise AssertionError


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in METHODS])
def test_an_optimizer_that_evaluates_its_closure_twice_counts_one_step_and_keeps_zeros(row: MethodRow) -> None:
    model = TinyNet()
    optimizer = Extrapolated(model.parameters(), lr=0.1)
    run = Run(model, [optimizer], gs.attach(model, row.make(), optimizer))
    told: list[int] = []
    run.sparsity.on_update(lambda update: told.append(update.step))
    for step in range(5):
        optimizer.step(lambda step=step: backward(model, step))
        for _, weight, mask in weights(model, run.sparsity.masks()):
            assert not bits(weight)[~mask].any()
    assert run.sparsity.step == 5
    assert told == [step for step in row.updates if step <= 5]


@pytest.mark.parametrize("loaded", [False, True], ids=["attached late", "loaded late"])
def test_momentum_from_before_the_masks_moves_no_active_weight(loaded: bool) -> None:
    def dense() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8, bias=False))
        optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
        for _ in range(3):
            model(torch.ones(2, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    found = []
    for noise in (0.0, 5.0):
        model, optimizer = dense()
        mask = torch.eye(8)
        optimizer.state[model[0].weight]["momentum_buffer"] += noise * (1 - mask)
        state = optimizer.state_dict()
        if loaded:
            optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
        gs.attach(model, gs.Static(), optimizer, masks={"0.weight": mask})
        if loaded:
            optimizer.load_state_dict(state)
        model(torch.ones(2, 8)).square().sum().backward()
        optimizer.step()
        found.append(model[0].weight.detach().clone())
    assert found[0].equal(found[1])
