"""Layers that are frozen in the course of training keep their masks, and the others train on as if alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn, optim

import gossamer as gs

from .tables import METHODS, MethodRow, assert_zeros, start


@pytest.mark.parametrize(
    ("method", "distribution"),
    [
        pytest.param(row, name, id=f"{row.id}-{name}")
        for row in METHODS
        for name in ("erk", "global")[: 1 + (not row.keeps_count)]
    ],
)
def test_layers_frozen_midway_keep_their_weights_and_masks(method: MethodRow, distribution: str) -> None:
    run = start(method.make(distribution=distribution)).train(3)
    run.model.hidden.requires_grad_(False)
    frozen = run.model.hidden.weight.detach().clone()
    masks = run.sparsity.masks()
    run.train(range(3, 12))
    run.sparsity.update() if method.id != "rigl" else None
    assert run.model.hidden.weight.equal(frozen)
    assert run.sparsity.masks()["hidden.weight"].equal(masks["hidden.weight"])
    if method.updates:
        assert any(not mask.equal(masks[name]) for name, mask in run.sparsity.masks().items())
    run.model.hidden.requires_grad_(True)
    run.train(range(12, 16))
    active = sum(int(mask.sum()) for mask in run.sparsity.masks().values())
    assert active == int(0.25 * sum(mask.numel() for mask in masks.values()))
    assert_zeros(run.model, run.sparsity.masks())


@pytest.mark.parametrize("names", [("conv", "hidden"), ("conv", "hidden", "head")], ids=["some", "all"])
@pytest.mark.parametrize(
    "method",
    [
        gs.SET(0.75, every=2, drop_score="gradient"),
        gs.RigL(0.75, every=2),
        gs.DSR(0.75, every=2, threshold=0.05),
        gs.GMP(0.75, every=2, end=30, distribution="global"),
    ],
    ids=lambda method: method.name,
)
def test_training_goes_on_after_a_stretch_with_frozen_layers(method: gs.Method, names: tuple[str, ...]) -> None:
    run = start(method).train(28)  # the ramp is almost at its end, and conv sparser than others in a global ranking
    threshold = getattr(run.sparsity.methods[0], "threshold", None)
    for name in names:
        run.model.get_submodule(name).weight.requires_grad_(False)
    before = {name: run.model.get_submodule(name).weight.detach().clone() for name in names}
    run.train(range(28, 60))
    for name in names:
        assert run.model.get_submodule(name).weight.equal(before[name])
    if threshold is not None and len(names) == 3:
        assert run.sparsity.methods[0].threshold == threshold
    again = start(method)
    again.sparsity.load_state_dict(run.sparsity.state_dict())
    run.model.requires_grad_(True)
    run.train(range(60, 64))
    assert sum(int(mask.sum()) for mask in run.sparsity.masks().values()) == 216


def test_threshold_is_held_against_the_layers_that_are_trained() -> None:
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False))
    sparsity = gs.attach(model, gs.DSR(0.5, prune_fraction=0.02, threshold=0.01, targets=["0.*", "1.*"]))
    model[0].requires_grad_(False)
    with torch.no_grad():
        for layer in model:  # 5,000 active weights each; 200 of both are below the threshold: 400 are intended
            flat = layer.weight.view(-1)
            flat[flat.nonzero().view(-1)] = torch.cat([torch.full((200,), 0.005), torch.full((4800,), 1.0)])
    sparsity.update("prune")
    sparsity.update("adjust_threshold")
    assert sparsity.methods[0].threshold == 0.01
    sparsity.update("reallocate")
    assert [int(mask.sum()) for mask in sparsity.masks().values()] == [5000, 5000]


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
@pytest.mark.parametrize("frozen", ["all", "one"])
def test_threshold_stays_where_nothing_can_be_pruned(frozen: str, tolerance: float) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 1, bias=False))
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    masks = {"0.weight": torch.rand(64, 64) < 0.1, "1.weight": torch.arange(64)[None] == 3}
    sparsity = gs.attach(model, gs.DSR(every=1, prune_fraction=0.00123, tolerance=tolerance), optimizer, masks=masks)
    model[0].requires_grad_(False)
    model[1].requires_grad_(frozen == "one")
    for step in range(5):
        x = torch.randn(4, 64, requires_grad=True)  # so that there is something to go back to where all is frozen
        model(x).square().mean().backward()
        optimizer.step()
        assert sparsity.step == step + 1
    assert sparsity.methods[0].threshold == 1e-3
    again = copy.deepcopy(sparsity.state_dict())
    sparsity.load_state_dict(again)
    assert sparsity.methods[0].threshold == 1e-3


def test_rigl_leaves_out_no_step_while_all_its_layers_are_frozen() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Linear(10, 4))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gs.attach(model, gs.RigL(0.5, every=2), optimizer)
    model[0].weight.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    for step in range(4):
        before = model[1].weight.detach().clone()
        optimizer.zero_grad()
        model(torch.randn(8, 10, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        assert not model[1].weight.equal(before)
