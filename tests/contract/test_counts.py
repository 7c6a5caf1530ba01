"""Invariant 2: a mask holds exactly the number of active weights that was asked, however often it changes."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gossamer as gs

from .tables import METHOD_CASES, METHODS, MethodRow, Run, TinyNet, backward, bits, start, weights

TARGETS = 8 * 4 * 9 + 16 * 32 + 4 * 16
BIASES = 8 + 16 + 4


def active(run: Run) -> int:
    return sum(int(mask.sum()) for mask in run.sparsity.masks().values())


def scramble(run: Run, generator: torch.Generator) -> None:
    """Other weights and gradients, as training would bring in time; some weights tiny, some zero."""
    for _, weight, mask in weights(run.model, run.sparsity.masks()):
        scale = torch.randint(-6, 2, weight.shape, generator=generator)
        with torch.no_grad():
            weight.copy_(torch.where(mask, torch.randn(weight.shape, generator=generator) * 10.0**scale, 0))
        weight.grad = torch.randn(weight.shape, generator=generator)


@given(
    sparsity=st.decimals(0, "0.95", places=3),
    row=st.sampled_from(METHODS),
    structure=st.sampled_from(["element", "block:4x1", "block:2x2", "block:1x4"]),
    distribution=st.sampled_from(["uniform", "er", "erk"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=150)
def test_active_weights_are_the_largest_number_of_whole_groups_within_the_budget(
    sparsity: Decimal, row: MethodRow, structure: str, distribution: str, seed: int
) -> None:
    run = start(row.make(structure, sparsity=float(sparsity), distribution=distribution, seed=seed))
    size = 1 if structure == "element" else 4
    expected = floor((1 - sparsity) * TARGETS) // size * size
    generator = torch.Generator().manual_seed(seed)
    run.train(row.settles)
    for _ in range(3):
        scramble(run, generator)
        run.sparsity.update()
        assert active(run) == expected
        assert run.sparsity.summary().totals["targets_active"] == expected
    assert run.sparsity.density() == expected / TARGETS


@given(sparsity=st.decimals("0.1", "0.9", places=3), row=st.sampled_from(METHODS))
@settings(max_examples=40)
def test_over_all_parameters_dense_ones_use_up_part_of_the_budget(sparsity: Decimal, row: MethodRow) -> None:
    run = start(row.make(sparsity=float(sparsity), over="all"))
    expected = floor((1 - sparsity) * (TARGETS + BIASES)) - BIASES
    run.train(row.settles)
    scramble(run, torch.Generator().manual_seed(0))
    run.sparsity.update()
    assert active(run) == expected
    assert run.sparsity.summary().totals["all_nonzero"] == expected + BIASES


@pytest.mark.parametrize(("method", "structure"), METHOD_CASES)
def test_many_updates_neither_lose_nor_gain_a_weight(method: MethodRow, structure: str) -> None:
    run = start(method, structure)
    generator = torch.Generator().manual_seed(0)
    run.train(method.settles)
    scramble(run, generator)
    run.sparsity.update()
    expected = active(run)
    seen = set()
    for _ in range(100):
        scramble(run, generator)
        before = run.sparsity.masks()
        (update,) = run.sparsity.update()
        after = run.sparsity.masks()
        assert active(run) == expected
        for row in update.rows:
            was, now = before[row["name"]], after[row["name"]]
            assert row["pruned"] == int((was & ~now).sum())
            assert row["grown"] == int((~was & now).sum())
            assert row["active"] == int(now.sum()) >= 1
            assert row["total"] == now.numel()
        for name, weight, mask in weights(run.model, after):
            assert not bits(weight)[~mask].any()
            if structure == "2:4":
                cells = mask.movedim(1, -1).reshape(-1, 4)
                assert (cells.sum(1) == 2).all(), f"{name}: a cell without exactly 2 of 4"
            if structure == "block:4x1":
                columns = mask.reshape(mask.shape[0] // 4, 4, -1).sum(1)
                assert ((columns == 0) | (columns == 4)).all(), f"{name}: a block is torn"
        seen.add(tuple(torch.cat([mask.flatten() for mask in after.values()]).tolist()))
    assert len(seen) == 1 if not method.grows else len(seen) > 50


@pytest.mark.parametrize("gradient", [0.0, 1.0])
@pytest.mark.parametrize(("method", "structure"), METHOD_CASES)
def test_equal_scores_do_not_make_a_count_drift(method: MethodRow, structure: str, gradient: float) -> None:
    run = start(method, structure)
    run.train(method.settles)
    expected = active(run)
    for size in (0.0, 1.0, 1.0, 0.01):
        for _, weight, mask in weights(run.model, run.sparsity.masks()):
            with torch.no_grad():
                weight.copy_(mask * size)
            weight.grad = torch.full_like(weight, gradient)
        run.sparsity.update()
        assert active(run) == expected


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in METHODS])
def test_an_explicit_distribution_gives_each_tensor_its_own_count(row: MethodRow) -> None:
    run = start(row.make(sparsity=None, distribution={"conv*": 0.5, "hidden.weight": 0.9, "*": 0.0}))
    run.train(row.settles)
    scramble(run, torch.Generator().manual_seed(0))
    run.sparsity.update()
    counts = {name: int(mask.sum()) for name, mask in run.sparsity.masks().items()}
    if row.method is gs.DSR:
        assert sum(counts.values()) == 144 + 51 + 64
    else:
        assert counts == {"conv.weight": 144, "hidden.weight": 51, "head.weight": 64}


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in METHODS])
def test_a_sparsity_of_zero_keeps_every_weight(row: MethodRow) -> None:
    run = start(row.make(sparsity=0.0)).train(5)
    assert run.sparsity.density() == 1.0
    assert all(mask.all() for mask in run.sparsity.masks().values())


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in METHODS])
def test_the_highest_possible_sparsity_leaves_one_weight_in_every_tensor(row: MethodRow) -> None:
    run = start(row.make(sparsity=0.996, distribution="uniform"))
    run.train(row.settles)
    for step in range(3):
        backward(run.model, step)
        run.sparsity.update()
        assert [int(mask.sum()) for mask in run.sparsity.masks().values()] == [1, 1, 1]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in METHODS])
def test_tensors_of_one_method_share_its_budget_and_others_stay_dense(row: MethodRow) -> None:
    run = start(row.make(targets=["hidden*", "head.weight"]))
    run.train(row.settles)
    backward(run.model, 0)
    run.sparsity.update()
    assert set(run.sparsity.masks()) == {"hidden.weight", "head.weight"}
    assert active(run) == (512 + 64) // 4
    assert run.model.conv.weight.count_nonzero() == 288


def test_several_methods_keep_each_its_own_budget() -> None:
    model = TinyNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    methods = [
        gs.DSR(0.5, every=2, threshold=0.1, targets="conv*"),
        gs.SET(0.8, every=3, targets="hidden*"),
        gs.GMP(0.9, end=6, every=2, targets="head*"),
    ]
    run = Run(model, [optimizer], gs.attach(model, methods, optimizer)).train(7)
    counts = {name: int(mask.sum()) for name, mask in run.sparsity.masks().items()}
    assert counts == {"conv.weight": 144, "hidden.weight": 102, "head.weight": 6}
    assert [row["method"] for row in run.sparsity.summary().rows] == ["dsr", "set", "gmp"]


def test_tied_weights_are_masked_and_counted_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity = gs.attach(model, gs.SET(0.75, every=1), optimizer)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
    assert list(sparsity.masks()) == ["0.weight"]
    assert sparsity.summary().totals["targets_total"] == 64
    assert sparsity.summary().totals["all_total"] == 64 + 16
    assert int(model[2].weight.count_nonzero()) <= 16


@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
@pytest.mark.parametrize("structure", ["element", "block:7x1"])
def test_gradual_pruning_is_exact_at_every_step_of_its_ramp(distribution: str, structure: str) -> None:
    model = nn.Sequential(*(nn.Linear(7, 7) for _ in range(12)))
    sparsity = gs.attach(model, gs.GMP(0.8, end=20, every=1, distribution=distribution, structure=structure))
    weights = 12 * 49
    final = Fraction(weights // 5)
    size = 1 if structure == "element" else 7
    rowwise = []
    for step in range(1, 21):
        sparsity._hooks.step = step
        sparsity.update()
        left = (1 - Fraction(step, 20)) ** 3
        asked = final // size * size + (weights - final // size * size) * left
        rowwise.append(sum(int(mask.sum()) for mask in sparsity.masks().values()))
        assert asked - size < rowwise[-1] <= asked
        assert rowwise[-1] % size == 0
    assert rowwise == sorted(rowwise, reverse=True)


def test_every_layer_keeps_a_weight_in_a_global_ranking_where_all_scores_are_equal() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
    with torch.no_grad():
        for layer in model[1:]:
            layer.weight.fill_(math.inf)
    gs.prune(model, 0.9)
    assert [int(layer.weight.count_nonzero()) >= 1 for layer in model] == [True] * 3
    assert sum(int(layer.weight.count_nonzero()) for layer in model) == 4
