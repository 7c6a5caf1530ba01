"""Every kind of layer whose weights are targets, under every method; and every memory layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import gossamer as gs

from .tables import METHODS, STRUCTURES, MethodRow, Run, TinyNet, assert_zeros, bits, everything, start, weights


class Attention(nn.Module):
    """Self-attention, or attention over inputs of other widths, which keeps three projections apart."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
        self.widths = (widths.get("kdim", 8), widths.get("vdim", 8))

    def forward(self, x: Tensor) -> Tensor:
        key, value = (x[..., :width] for width in self.widths)
        return self.attention(x[..., :8], key, value, need_weights=False)[0]


class Cells(nn.Module):
    """Recurrent cells called in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.gru, self.lstm = nn.RNNCell(8, 8), nn.GRUCell(8, 8), nn.LSTMCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(x.shape[0], 8)
        for step in x.unbind(1):
            hidden = self.gru(step, self.plain(step, hidden))
            hidden, cell = self.lstm(step, (hidden, cell))
        return hidden


class TiedToEmbedding(nn.Module):
    """A language model that reads and writes with one table, which stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.out = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(self.table(x))))


class Twice(nn.Module):
    """One layer under two names, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@dataclass(frozen=True, eq=False)
class LayerRow:
    """A model, the shape of its input and the names of its targets; `structures` are those that divide its weights."""

    id: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    structures: tuple[str, ...] = STRUCTURES
    integers: bool = False

    def input(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        if self.integers:
            return torch.randint(12, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)


def _layers(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}_l{layer}{way}" for layer in (0, 1) for way in ("", "_reverse") for name in names)


ONE = ("weight",)
LAYERS = [
    LayerRow("linear", lambda: nn.Linear(8, 8), (4, 8), ONE),
    LayerRow("linear-no-bias", lambda: nn.Linear(8, 8, bias=False), (4, 8), ONE),
    LayerRow("norms-stay-dense", lambda: nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)), (4, 8), ("0.weight",)),
    LayerRow("conv1d", lambda: nn.Conv1d(4, 8, 3), (2, 4, 6), ONE),
    LayerRow("conv2d", lambda: nn.Conv2d(4, 8, 3), (2, 4, 5, 5), ONE),
    LayerRow("conv2d-1x1", lambda: nn.Conv2d(8, 8, 1), (2, 8, 3, 3), ONE),
    LayerRow("conv2d-grouped", lambda: nn.Conv2d(8, 8, 3, groups=2), (2, 8, 5, 5), ONE),
    LayerRow("conv2d-depthwise", lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 5, 5), ONE, ("element", "block:4x1")),
    LayerRow("conv3d", lambda: nn.Conv3d(4, 4, 2), (2, 4, 3, 3, 3), ONE),
    LayerRow("transposed1d", lambda: nn.ConvTranspose1d(4, 8, 3), (2, 4, 5), ONE),
    LayerRow("transposed2d", lambda: nn.ConvTranspose2d(8, 4, 3, stride=2), (2, 8, 4, 4), ONE),
    LayerRow("transposed3d", lambda: nn.ConvTranspose3d(4, 4, 2), (2, 4, 2, 2, 2), ONE),
    LayerRow("rnn", lambda: nn.RNN(8, 8, batch_first=True), (2, 3, 8), ("weight_ih_l0", "weight_hh_l0")),
    LayerRow("gru", lambda: nn.GRU(8, 8, batch_first=True), (2, 3, 8), ("weight_ih_l0", "weight_hh_l0")),
    LayerRow(
        "lstm",
        lambda: nn.LSTM(8, 8, num_layers=2, bidirectional=True, proj_size=4, batch_first=True),
        (2, 3, 8),
        _layers("weight_ih", "weight_hh", "weight_hr"),
    ),
    LayerRow(
        "cells", Cells, (2, 3, 8), tuple(f"{c}.weight_{w}" for c in ("plain", "gru", "lstm") for w in ("ih", "hh"))
    ),
    LayerRow("attention", Attention, (2, 3, 8), ("attention.in_proj_weight", "attention.out_proj.weight")),
    LayerRow(
        "attention-of-other-widths",
        lambda: Attention(kdim=4, vdim=12),
        (2, 3, 12),
        tuple(f"attention.{name}" for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")),
    ),
    LayerRow(
        "encoder",
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0),
        (2, 3, 8),
        ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"),
    ),
    LayerRow("tied", Twice, (4, 8), ("first.weight",)),
    LayerRow("tied-to-embedding", TiedToEmbedding, (4, 3), ("body.weight",), integers=True),
]

MEASURED = ("linear", "linear-no-bias", "norms-stay-dense", "conv", "transposed", "tied")
CASES = [
    pytest.param(layer, method, id=f"{layer.id}-{method.id}")
    for layer in LAYERS
    for method in METHODS
    if layer.id.startswith(MEASURED) or not method.measures
]
STRUCTURED = [
    pytest.param(layer, structure, id=f"{layer.id}-{structure}")
    for layer in LAYERS
    for structure in layer.structures
    if structure != "element"
]


def build(layer: LayerRow, method: Any) -> Run:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = layer.make()
    optimizer = optim.AdamW(model.parameters(), lr=0.02)
    return Run(model, [optimizer], gs.attach(model, method, optimizer))


def train(layer: LayerRow, run: Run, steps: range) -> None:
    for step in steps:
        run.optimizers[0].zero_grad()
        output = run.model(layer.input(step))
        (output[0] if isinstance(output, tuple) else output).square().mean().backward()
        run.optimizers[0].step()


@pytest.mark.parametrize(("layer", "method"), CASES)
def test_every_layer_is_found_and_keeps_its_zeros_and_counts(layer: LayerRow, method: MethodRow) -> None:
    run = build(layer, method.make())
    masks = run.sparsity.masks()
    assert set(masks) == set(layer.targets)
    total = sum(mask.numel() for mask in masks.values())
    for steps in (range(3), range(3, 8)):
        train(layer, run, steps)
        masks = run.sparsity.masks()
        for name, weight, mask in weights(run.model, masks):
            assert not bits(weight)[~mask].any(), name
    assert sum(int(mask.sum()) for mask in masks.values()) == total // 4
    keys = list(run.model.state_dict())
    assert keys == list(layer.make().state_dict())


@pytest.mark.parametrize(
    "method", [pytest.param(row, id=row.id) for row in METHODS if row.id in ("rigl", "dsr", "gmp")]
)
@pytest.mark.parametrize(("layer", "structure"), STRUCTURED)
def test_groups_run_along_outputs_and_inputs_of_every_layer(layer: LayerRow, structure: str, method: MethodRow) -> None:
    """2:4 along the inputs, blocks of four along the outputs, whichever dimension they are."""
    run = build(layer, method.make(structure))
    train(layer, run, range(8))
    for name, weight, mask in weights(run.model, run.sparsity.masks()):
        assert not bits(weight)[~mask].any(), name
        inputs = 0 if "transposed" in layer.id else 1
        if structure == "2:4":
            cells = mask.movedim(inputs, -1).reshape(-1, 4).sum(1)
            assert (cells == 2).all(), name
        else:
            blocks = mask.movedim(1 - inputs, -1).reshape(-1, 4).sum(1)
            assert ((blocks == 0) | (blocks == 4)).all(), name


def test_a_layer_used_twice_is_pruned_by_its_summed_gradient() -> None:
    layer = next(row for row in LAYERS if row.id == "tied")
    run = build(layer, gs.RigL(0.75, every=1, skip_step=False))
    run.model(layer.input(0)).square().mean().backward()
    before, gradient = run.sparsity.masks()["first.weight"], run.model.first.weight.grad.clone()
    run.optimizers[0].step()
    after = run.sparsity.masks()["first.weight"]
    grown, left = after & ~before, ~after & ~before
    assert gradient[grown].abs().min() >= gradient[left].abs().max()


def test_the_fast_path_of_attention_sees_the_zeros() -> None:
    layer = next(row for row in LAYERS if row.id == "encoder")
    run = build(layer, gs.SET(0.75, every=2))
    train(layer, run, range(5))
    dense = copy.deepcopy(run.sparsity.finalize())
    x = layer.input(9)
    expected = dense.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(dense.eval()(x), expected, rtol=1e-4, atol=1e-5)


# -- memory layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before attach", "before follow", "after follow"])
@pytest.mark.parametrize("method", [pytest.param(row, id=row.id) for row in METHODS])
def test_channels_last_gives_the_masks_of_the_plain_layout(method: MethodRow, when: str) -> None:
    """In float64 and with a random first mask, so that only a mix-up of positions could make a difference."""
    plain = start(method, model=TinyNet().double(), optimizer="sgd-momentum")
    model = TinyNet().double()
    if when == "before attach":
        model.to(memory_format=torch.channels_last)
    sparsity = gs.attach(model, method.make())
    if when == "before follow":
        model.to(memory_format=torch.channels_last)
    optimizer = optim.SGD(model.parameters(), **plain.optimizers[0].defaults)
    sparsity.follow(optimizer)
    if when == "after follow":
        model.to(memory_format=torch.channels_last)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, 4, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (8,), generator=generator)
        for run_model, run_optimizer in ((plain.model, plain.optimizers[0]), (model, optimizer)):
            run_optimizer.zero_grad()
            nn.functional.cross_entropy(run_model(x), y).backward()
            run_optimizer.step()
        for name, mask in plain.sparsity.masks().items():
            assert mask.equal(sparsity.masks()[name]), f"step {step}: {name}"
        assert_zeros(model, sparsity.masks())


def test_a_channels_last_run_resumes_into_a_plain_one_to_the_bit() -> None:
    run = start(gs.SET(0.75, every=2), model=TinyNet().to(memory_format=torch.channels_last)).train(3)
    again = start(gs.SET(0.75, every=2), model=TinyNet(1).to(memory_format=torch.channels_last))
    again.model.load_state_dict(run.model.state_dict())
    again.optimizers[0].load_state_dict(copy.deepcopy(run.optimizers[0].state_dict()))
    again.sparsity.load_state_dict(run.sparsity.state_dict())
    assert everything(again.train(range(3, 7))) == everything(run.train(range(3, 7)))
    plain = start(gs.SET(0.75, every=2), seed=2)
    plain.sparsity.load_state_dict(run.sparsity.state_dict())
    assert all(mask.equal(plain.sparsity.masks()[name]) for name, mask in run.sparsity.masks().items())


def test_weights_with_gaps_in_memory_are_masked_where_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    whole = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    model[0].weight = nn.Parameter(whole[:, ::2])
    assert not model[0].weight.is_contiguous()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsity = gs.attach(model, gs.RigL(0.75, every=2), optimizer)
    between = whole[:, 1::2].clone()
    for step in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        assert_zeros(model, sparsity.masks())
    assert int(sparsity.masks()["0.weight"].sum()) == 16
    assert model[0].weight.data_ptr() == whole.data_ptr()
    assert whole[:, 1::2].equal(between)
