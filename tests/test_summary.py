"""The table of what is active: rows, both totals, and their text."""

import json

import pytest
import torch
from torch import nn

import gossamer as gs


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(8, 4)
        self.words = nn.Embedding(5, 4)


def attached():
    torch.manual_seed(0)
    model = Net()
    methods = [gs.Static(0.75, targets="stem*"), gs.Static(structure="2:4", targets="head*")]
    return model, gs.attach(model, methods)


def test_rows_count_the_zeros_of_each_tensor():
    model, sparsity = attached()
    expected = [("stem.weight", [4, 2, 3, 3], "element", 72, 18), ("head.weight", [4, 8], "2:4", 32, 16)]
    rows = sparsity.summary().rows
    for row, (name, shape, structure, total, active) in zip(rows, expected, strict=True):
        assert row == {
            "name": name,
            "shape": shape,
            "method": "static",
            "structure": structure,
            "total": total,
            "active": active,
            "sparsity": 1 - active / total,
        }
        assert model.get_parameter(name).count_nonzero() == active


def test_totals_are_over_targets_and_over_all_parameters():
    model, sparsity = attached()
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert everything == 72 + 4 + 4 + 4 + 32 + 4 + 20
    assert sparsity.summary().totals == {
        "targets_total": 104,
        "targets_active": 34,
        "targets_sparsity": 1 - 34 / 104,
        "all_total": everything,
        "all_nonzero": everything - 70,
        "all_sparsity": 1 - (everything - 70) / everything,
    }
    assert sparsity.density() == 34 / 104


def test_tied_weight_counts_once_in_both_totals():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    totals = gs.attach(model, gs.Static(0.5)).summary().totals
    assert (totals["targets_total"], totals["all_total"], totals["all_nonzero"]) == (16, 16, 8)


def test_summary_is_json():
    _, sparsity = attached()
    summary = sparsity.summary()
    assert json.loads(json.dumps(summary.as_dict())) == {"rows": summary.rows, "totals": summary.totals, "learned": []}


def test_text_has_every_tensor_and_both_totals():
    _, sparsity = attached()
    text = str(sparsity.summary())
    lines = text.splitlines()
    stem = next(line for line in lines if "stem.weight" in line)
    assert [cell.strip() for cell in stem.split("│")[1:-1]] == [
        "stem.weight",
        "4×2×3×3",
        "static",
        "72",
        "18",
        "0.7500",
    ]
    head = next(line for line in lines if "head.weight" in line)
    assert "static 2:4" in head
    whole = next(line for line in lines if "of the whole model" in line)
    assert "140" in whole
    assert f"{70 / 140:.4f}" in whole
    assert not text.endswith("\n")


def test_large_numbers_have_separators():
    text = str(gs.attach(nn.Linear(2000, 1000, bias=False), gs.Static(0.9)).summary())
    assert "2,000,000" in text
    assert "200,000" in text


def test_model_without_hard_masks_has_an_empty_summary():
    sparsity = gs.attach(nn.Linear(4, 4), [])
    assert sparsity.summary().rows == []
    assert sparsity.summary().totals == {
        "targets_total": 0,
        "targets_active": 0,
        "targets_sparsity": 0.0,
        "all_total": 20,
        "all_nonzero": 20,
        "all_sparsity": 0.0,
    }
    assert sparsity.density() == 1.0


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.98])
def test_one_shot_summary_counts_what_is_in_the_model(sparsity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    totals = gs.prune(model, sparsity).totals
    nonzero = sum(int(layer.weight.count_nonzero()) for layer in model)
    assert totals["targets_active"] == nonzero
    assert totals["all_nonzero"] == nonzero + 40
