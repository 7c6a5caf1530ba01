"""Masks that come from elsewhere: sparse models, mappings, `torch.nn.utils.prune`; and pruning in one shot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.nn.utils import prune as torch_prune

import gossamer as gs

from .tables import METHODS, STRUCTURES, Run, TinyNet, assert_zeros, backward, bits, start, weights

GIVEN = [pytest.param(row, id=row.id) for row in METHODS if row.keeps_count]
PRUNED_FURTHER = [pytest.param(row, id=row.id) for row in METHODS if not row.keeps_count]


def pruned(structure: str = "element", sparsity: float = 0.6) -> TinyNet:
    model = TinyNet()
    gs.prune(model, None if structure == "2:4" else sparsity, structure=structure)
    return model


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("row", GIVEN)
def test_a_sparse_model_is_attached_with_its_zeros_as_masks(row: Any, structure: str) -> None:
    model = pruned(structure)
    zeros = {name: parameter.detach() != 0 for name, parameter in model.named_parameters() if parameter.dim() > 1}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    run = start(row.make(structure, sparsity=None), model=model, masks="zeros")
    assert all(mask.equal(zeros[name]) for name, mask in run.sparsity.masks().items())
    assert all(bits(parameter).equal(bits(before[name])) for name, parameter in model.named_parameters())
    count = sum(int(mask.sum()) for mask in zeros.values())
    for step in range(6):
        run.train(range(step, step + 1))
        assert_zeros(model, run.sparsity.masks())
        assert sum(int(mask.sum()) for mask in run.sparsity.masks().values()) == count


def test_negative_zeros_of_a_model_are_pruned_and_become_positive() -> None:
    model = TinyNet()
    with torch.no_grad():
        model.head.weight.view(-1)[::2] = -0.0
    sparsity = gs.attach(model, gs.Static(targets="head*"), masks="zeros")
    assert not sparsity.masks()["head.weight"].view(-1)[::2].any()
    assert not bits(model.head.weight).view(-1)[::2].any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("row", GIVEN)
def test_masks_may_be_given_as_tensors_of_any_type(row: Any, dtype: torch.dtype) -> None:
    masks = {
        name: torch.rand(parameter.shape, generator=torch.Generator().manual_seed(i)) < 0.3
        for i, (name, parameter) in enumerate(TinyNet().named_parameters())
        if parameter.dim() > 1
    }
    run = start(row.make(sparsity=None), masks={name: mask.to(dtype) for name, mask in masks.items()})
    assert all(mask.equal(masks[name]) for name, mask in run.sparsity.masks().items())
    assert_zeros(run.model, run.sparsity.masks())


@pytest.mark.parametrize("given", ["zeros", "masks"])
@pytest.mark.parametrize("row", PRUNED_FURTHER)
def test_pruning_goes_on_from_the_zeros_of_a_model(row: Any, given: str) -> None:
    model = pruned(sparsity=0.3)
    zeros = {name: parameter.detach() != 0 for name, parameter in model.named_parameters() if parameter.dim() > 1}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    method = row.make(sparsity=0.9, distribution="global")
    run = start(method, model=model, masks="zeros" if given == "zeros" else zeros)
    assert all(mask.equal(zeros[name]) for name, mask in run.sparsity.masks().items())
    assert all(bits(parameter).equal(bits(before[name])) for name, parameter in model.named_parameters())
    counts = []
    for step in range(row.settles + 1):
        run.train(range(step, step + 1))
        masks = run.sparsity.masks()
        assert_zeros(model, masks)
        assert not any((mask & ~zeros[name]).any() for name, mask in masks.items())
        counts.append(sum(int(mask.sum()) for mask in masks.values()))
    assert counts[: row.updates[0] - 1] == [sum(int(mask.sum()) for mask in zeros.values())] * (row.updates[0] - 1)
    assert counts == sorted(counts, reverse=True)
    assert counts[row.settles - 1 :] == [86, 86]


@pytest.mark.parametrize("row", PRUNED_FURTHER)
def test_given_masks_below_the_end_of_pruning_are_refused(row: Any) -> None:
    model = pruned(sparsity=0.95)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(gs.ConfigurationError, match=rf"^{row.method.__name__}: conv\.weight starts with .* fewer than"):
        gs.attach(model, row.make(sparsity=0.5), masks="zeros")
    assert all(parameter.equal(before[name]) for name, parameter in model.named_parameters())


# -- one shot ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.5, 0.9, 0.99])
def test_one_shot_pruning_keeps_the_globally_largest_weights(sparsity: float) -> None:
    model = TinyNet()
    ranked = sorted(
        (
            (abs(w), name, i)
            for name, p in model.named_parameters()
            if p.dim() > 1
            for i, w in enumerate(p.flatten().tolist())
        ),
        reverse=True,
    )
    count = 864 - -int(-sparsity * 1000 * 864 // 1000)  # the ceiling of what is pruned
    best = {name: next(each for each in ranked if each[1] == name) for _, name, _ in ranked}  # one is left in each
    others = [each for each in ranked if each not in best.values()]
    kept = {(name, i) for _, name, i in [*best.values(), *others[: count - 3]]}
    summary = gs.prune(model, sparsity)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            left = {(name, i) for i, w in enumerate(parameter.flatten().tolist()) if w != 0}
            assert left == {each for each in kept if each[0] == name}
            assert not bits(parameter)[parameter == 0].any()
    assert summary.totals["targets_active"] == count
    assert not any(vars(module)["_forward_hooks"] for module in model.modules())


@pytest.mark.parametrize("distribution", ["uniform", "er", "erk", {"conv*": 0.5, "*": 0.9}])
@pytest.mark.parametrize("structure", ["element", "block:4x1"])
def test_one_shot_pruning_keeps_the_largest_groups_of_every_tensor(distribution: Any, structure: str) -> None:
    model, dense = TinyNet(), TinyNet()
    summary = gs.prune(
        model, None if isinstance(distribution, dict) else 0.75, distribution=distribution, structure=structure
    )
    assert summary.totals["targets_active"] > 0
    for row in summary.rows:
        weight, full = model.get_parameter(row["name"]), dense.get_parameter(row["name"])
        if structure == "element":
            norms = full.detach().abs().flatten(1)
            alive = (weight != 0).flatten(1)
        else:
            norms = full.detach().flatten(2 if full.dim() > 2 else 1).unflatten(0, (-1, 4)).norm(dim=1).flatten()
            alive = (weight != 0).flatten(2 if full.dim() > 2 else 1).unflatten(0, (-1, 4)).any(1).flatten()
        assert norms[alive].min() >= norms[~alive].max() if (~alive).any() else True
        assert int((weight != 0).sum()) == row["active"]


def test_one_shot_pruning_works_on_frozen_weights_and_by_other_scores() -> None:
    model = TinyNet().requires_grad_(False)
    assert gs.prune(model, 0.5).totals["targets_active"] == 432
    model = TinyNet()
    backward(model, 0)
    gradient = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    gs.prune(model, 0.5, score="gradient", distribution="uniform")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            kept = parameter != 0
            assert gradient[name][kept].abs().min() >= gradient[name][~kept].abs().max()
    model = TinyNet()
    gs.prune(model, 0.5, score=lambda view: -view.weight.abs(), distribution="uniform")
    largest = TinyNet().head.weight.detach().abs()
    assert largest[model.head.weight != 0].max() <= largest[model.head.weight == 0].min()


def test_pruning_in_one_shot_does_not_stop_an_optimizer() -> None:
    model = TinyNet()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    gs.prune(model, 0.5)
    backward(model, 0)
    optimizer.step()
    assert int(model.hidden.weight.count_nonzero()) > 300


# -- torch.nn.utils.prune ----------------------------------------------------------------------------------------------


def test_masks_of_torch_become_ours() -> None:
    model = TinyNet()
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch_prune.l1_unstructured(model.conv, "weight", 0.5)
    torch_prune.ln_structured(model.hidden, "weight", 0.25, n=2, dim=0)
    torch_prune.random_unstructured(model.head, "weight", 0.3)
    expected = {f"{name}.weight": module.weight_mask != 0 for name, module in model.named_children()}
    with torch.no_grad():
        model.conv.weight_orig[~expected["conv.weight"]] = float("nan")  # what its mask would not have hidden
    masks = gs.import_torch_masks(model)
    assert set(masks) == set(expected)
    assert all(masks[name].dtype == torch.bool and masks[name].equal(mask) for name, mask in expected.items())
    assert sorted(model.state_dict()) == sorted(TinyNet().state_dict())
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, weight, mask in weights(model, masks):
        assert weight.is_leaf
        assert isinstance(weight, nn.Parameter)
        assert not bits(weight)[~mask].any()
        assert weight[mask].equal(dense[name][mask])
    run = start(gs.SET(every=1), model=model, masks=masks).train(3)
    assert_zeros(model, run.sparsity.masks())


def test_importing_where_torch_pruned_nothing_is_an_error() -> None:
    with pytest.raises(gs.ConfigurationError, match=r"no module is pruned by torch\.nn\.utils\.prune"):
        gs.import_torch_masks(TinyNet())


def test_pruned_biases_are_imported_too_and_can_be_left_to_torch() -> None:
    model = TinyNet()
    torch_prune.random_unstructured(model.head, "bias", 0.5)
    masks = gs.import_torch_masks(model)
    assert list(masks) == ["head.bias"]
    assert int(masks["head.bias"].sum()) == 2


def test_given_masks_survive_a_copy_of_the_run() -> None:
    import copy

    run = start(gs.SET(every=2), model=pruned(), masks="zeros").train(3)
    twin = Run(*copy.deepcopy((run.model, run.optimizers, run.sparsity)))
    for each in (run, twin):
        each.train(range(3, 6))
    assert all(mask.equal(twin.sparsity.masks()[name]) for name, mask in run.sparsity.masks().items())
