"""Invariant 1: pruned weights are exactly +0.0 after every step; weights that grow begin with fresh optimizer state."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

import gossamer as gs

from .tables import (
    GROWING_CASES,
    METHOD_CASES,
    OPTIMIZER_CASES,
    MethodRow,
    OptimizerRow,
    Run,
    TinyNet,
    assert_zeros,
    backward,
    bits,
    start,
    weights,
)

POISON = (float("nan"), float("inf"), -float("inf"), -0.0, 3e38, -3e38)


def poison(run: Run, gradients: bool, values: bool = True) -> None:
    """Put what no pruned weight or gradient should ever hold into every one of them."""
    for _, weight, mask in weights(run.model, run.sparsity.masks()):
        pruned = ~mask
        worst = torch.tensor(POISON).repeat(int(pruned.sum()) // len(POISON) + 1)[: int(pruned.sum())]
        with torch.no_grad():
            if values:
                weight[pruned] = worst
            if gradients and weight.grad is not None:
                weight.grad[pruned] = worst.flip(0)


def grows_now(run: Run) -> bool:
    """Whether the coming step may make pruned weights active, so that their gradients count from now on."""
    return run.sparsity.methods[0].due(run.sparsity.step + 1)


@pytest.mark.parametrize(("optimizer", "variant"), OPTIMIZER_CASES)
@pytest.mark.parametrize(("method", "structure"), METHOD_CASES)
def test_pruned_weights_are_positive_zero_after_every_step_whatever_they_and_their_gradients_held(
    method: MethodRow, structure: str, optimizer: OptimizerRow, variant: str
) -> None:
    run = start(method, structure, optimizer, variant)
    for step in range(6):
        backward(run.model, step)
        poison(run, gradients=not grows_now(run))
        for each in run.optimizers:
            each.step()
        assert_zeros(run.model, run.sparsity.masks())
        assert all(weight.isfinite().all() for weight in run.model.parameters())
    assert run.sparsity.step == 6


@cache
def fresh_state(optimizer: OptimizerRow, variant: str) -> dict[str, dict[str, Any]]:
    """By brute force: what a new optimizer holds for a new parameter before its first update.

    State that only the first update makes (the momentum of SGD) is that of a zero gradient.
    """
    model = TinyNet()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizers = optimizer.make(model, variant)
    first = Run(model, optimizers, sparsity=None)  # type: ignore[arg-type]
    made: dict[str, dict[str, Any]] = {}

    def watched(initialise: Any) -> Any:
        def init_group(*args: Any, **kwargs: Any) -> Any:
            result = initialise(*args, **kwargs)
            for name, state in states(first).items():
                made.setdefault(name, {key: copy.deepcopy(value) for key, value in state.items()})
            return result

        return init_group

    for each in optimizers:
        each._init_group = watched(each._init_group)
        each.step()
    return {name: state | made.get(name, {}) for name, state in states(first).items()}


def states(run: Run) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    return {names[id(p)]: state for each in run.optimizers for p, state in each.state.items()}


@pytest.mark.parametrize(("optimizer", "variant"), OPTIMIZER_CASES)
@pytest.mark.parametrize(("method", "structure"), GROWING_CASES)
def test_grown_weights_get_fresh_state_and_no_other_state_is_touched(
    method: MethodRow, structure: str, optimizer: OptimizerRow, variant: str
) -> None:
    run = start(method, structure, optimizer, variant)
    fresh = fresh_state(optimizer, variant)
    seen: dict[str, int] = {"grown": 0, "stale": 0, "weight-shaped": 0}
    before: dict[str, Any] = {}
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    holder = {names[id(p)]: each for each in run.optimizers for group in each.param_groups for p in group["params"]}

    def check(update: gs.MaskUpdate) -> None:
        now = states(run)
        for name, weight, mask in weights(run.model, run.sparsity.masks()):
            grown = mask & ~before["masks"][name]
            seen["grown"] += int(grown.sum())
            assert not bits(weight)[grown].any(), f"{name}: a grown weight does not start at 0"
            assert now.get(name, {}).keys() == before["states"].get(name, {}).keys()
            for key, value in now.get(name, {}).items():
                if not isinstance(value, torch.Tensor):
                    assert value == before["states"][name][key]
                    continue
                was = before["states"][name][key]
                if value.shape != weight.shape:
                    assert bits(value).equal(bits(was)), f"{name}: flat state {key} was changed"
                    continue
                seen["weight-shaped"] += 1
                expected = fresh[name][key].expand_as(value)
                assert bits(value)[grown].equal(bits(expected)[grown]), f"{name}: {key} of grown weights is not fresh"
                # An optimizer that mixes weights would let the momentum of pruned ones go on moving active ones.
                others = ~grown & mask if isinstance(holder[name], torch.optim.Muon) else ~grown
                assert bits(value)[others].equal(bits(was)[others]), f"{name}: {key} of other weights was changed"
                assert not bits(value)[~mask & ~others].any(), f"{name}: {key} of pruned weights still moves others"
                seen["stale"] += int((bits(was)[grown] != bits(expected)[grown]).sum())

    run.sparsity.on_update(check)
    for step in range(6):
        backward(run.model, step)
        poison(run, gradients=not grows_now(run), values=False)
        before["masks"] = run.sparsity.masks()
        before["states"] = {
            name: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
            for name, state in states(run).items()
        }
        for each in run.optimizers:
            each.step()
    assert seen["grown"] > 0
    assert not seen["weight-shaped"] or seen["stale"], "no grown weight had state to refresh: this test shows nothing"


@pytest.mark.parametrize("optimizer", ["adam", "adam-amsgrad", "adamw", "nadam", "radam"])
def test_second_moment_mean_starts_grown_weights_at_the_mean_of_the_weights_that_stay(optimizer: str) -> None:
    run = start(gs.SET(0.75, every=2, drop_fraction=0.5), optimizer=optimizer, second_moment="mean")
    (adam,) = run.optimizers
    before: dict[str, Any] = {}
    grown_in_all = 0

    def check(update: gs.MaskUpdate) -> None:
        nonlocal grown_in_all
        for name, weight, mask in weights(run.model, run.sparsity.masks()):
            grown, stay = mask & ~before["masks"][name], mask & before["masks"][name]
            was, state = before["exp_avg_sq"][name], adam.state[weight]
            mean = torch.tensor([was[place].item() for place in stay.nonzero().unbind() for place in [tuple(place)]])
            torch.testing.assert_close(
                state["exp_avg_sq"][grown], mean.mean().expand(int(grown.sum())), rtol=1e-5, atol=0
            )
            assert state["exp_avg_sq"][~grown].equal(was[~grown])
            assert not bits(state["exp_avg"])[grown].any()
            grown_in_all += int(grown.sum())

    run.sparsity.on_update(check)
    for step in range(4):
        backward(run.model, step)
        before["masks"] = run.sparsity.masks()
        before["exp_avg_sq"] = {
            name: adam.state[p]["exp_avg_sq"].clone() for name, p in run.model.named_parameters() if p in adam.state
        }
        adam.step()
    assert grown_in_all > 0


def test_second_moment_mean_does_not_read_what_pruned_weights_accumulated() -> None:
    run = start(gs.SET(0.75, every=2, drop_fraction=0.5), optimizer="adam", second_moment="mean")
    for step in range(6):
        backward(run.model, step)
        poison(run, gradients=not grows_now(run))
        run.optimizers[0].step()
        for _, weight, mask in weights(run.model, run.sparsity.masks()):
            assert run.optimizers[0].state[weight]["exp_avg_sq"][mask].isfinite().all()


def test_rprop_starts_grown_weights_at_the_present_learning_rate() -> None:
    run = start(gs.SET(0.75, every=2, drop_fraction=0.5), optimizer="rprop")
    run.train(3)
    run.optimizers[0].param_groups[0]["lr"] = 0.003
    before = run.sparsity.masks()
    sizes: dict[str, torch.Tensor] = {}
    run.sparsity.on_update(
        lambda _: sizes.update(
            {n: run.optimizers[0].state[w]["step_size"].clone() for n, w, _ in weights(run.model, run.sparsity.masks())}
        )
    )
    run.train(range(3, 4))
    for name, mask in run.sparsity.masks().items():
        grown = mask & ~before[name]
        assert grown.any()
        assert (sizes[name][grown] == 0.003).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("method", "structure"), METHOD_CASES)
def test_weights_of_every_width_are_kept_at_zero(method: MethodRow, structure: str, dtype: torch.dtype) -> None:
    run = start(method, structure, "sgd-momentum", model=TinyNet().to(dtype))
    active = {row["name"]: row["active"] for row in run.sparsity.summary().rows}
    for step in range(4):
        backward(run.model, step, dtype)
        poison_values = torch.tensor([float("nan"), -0.0, float("inf")], dtype=dtype)
        for _, weight, mask in weights(run.model, run.sparsity.masks()):
            with torch.no_grad():
                weight[~mask] = poison_values.repeat(int((~mask).sum()) // 3 + 1)[: int((~mask).sum())]
        run.optimizers[0].step()
        assert_zeros(run.model, run.sparsity.masks())
        assert {p.dtype for p in run.model.parameters()} == {dtype}
    if method.keeps_count:
        assert sum(active.values()) == sum(int(mask.sum()) for mask in run.sparsity.masks().values())


def test_a_tensor_learning_rate_and_maximize_do_not_disturb_the_masks() -> None:
    for overrides in ({"maximize": True}, {"lr": torch.tensor(0.01)}):
        model = TinyNet()
        optimizer = torch.optim.Adam(model.parameters(), **{"foreach": False} | overrides)
        run = Run(model, [optimizer], gs.attach(model, gs.SET(0.75, every=2), optimizer))
        run.train(5)
        assert_zeros(model, run.sparsity.masks())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((3, 200_001), torch.contiguous_format),
        ((200_001, 3), torch.contiguous_format),
        ((1031, 523), torch.contiguous_format),
        ((129, 131, 6, 6), torch.channels_last),
    ],
)
def test_weights_larger_than_any_cache_are_masked_to_the_last_element(
    shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    layer = torch.nn.Linear(shape[1], shape[0]) if len(shape) == 2 else torch.nn.Conv2d(shape[1], shape[0], shape[2])
    model = torch.nn.Sequential(layer).to(dtype)
    if len(shape) == 4:
        model.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity = gs.attach(model, gs.Static(0.9), optimizer)
    mask = sparsity.masks()["0.weight"]
    assert int(mask.sum()) == int(mask.numel() - -(-9 * mask.numel() // 10))
    kept = layer.weight.detach()[mask].clone()
    layer.weight.grad = torch.zeros_like(layer.weight)
    with torch.no_grad():
        layer.weight[~mask] = float("nan")
    optimizer.step()
    assert not bits(layer.weight)[~mask].any()
    assert layer.weight[mask].equal(kept)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1)])
def test_factored_state_that_happens_to_have_the_shape_of_the_weight_is_left_alone(shape: tuple[int, int]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(*shape))
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    sparsity = gs.attach(model, gs.SET(0.5, every=10**6, drop_fraction=0.5), optimizer)
    x = torch.ones(4, shape[0])
    model(x).square().sum().backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    before = copy.deepcopy(state)
    (update,) = sparsity.update()
    assert update.rows[0]["grown"] == 2
    assert any(state[key].shape == model[0].weight.shape for key in ("row_var", "col_var"))
    assert all(value is before[key] or bits(value).equal(bits(before[key])) for key, value in state.items())
