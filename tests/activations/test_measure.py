"""Measured activations: counts against everything at once, and a model that is left as it was."""

from __future__ import annotations

import copy
import gc
import json
from collections import namedtuple
from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import gossamer as gs
from gossamer.activations.counts import _count, _scattered
from gossamer.zoo._vision import import_torchvision

VALUES = [0.0, -0.0, 1.0, -0.5, 0.3, -2.25, 3e-5, -1e-7, 1e4, float("nan"), float("inf"), -float("inf")]
FINITE = [value for value in VALUES if np.isfinite(value)]


def tensors(shape: tuple[int, ...], values: list[float] = VALUES) -> st.SearchStrategy[Tensor]:
    size = int(np.prod(shape))
    drawn = st.lists(st.sampled_from(values), min_size=size, max_size=size)
    return drawn.map(lambda numbers: torch.tensor(numbers, dtype=torch.float64).view(shape))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A site called twice, an in-place one, one that never runs, and a pooling and a flatten before layers."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.relu = nn.ReLU(inplace)
        self.pool = nn.AvgPool2d(2)
        self.hidden = nn.Linear(16, 16)
        self.act = nn.ReLU(inplace)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, 3)
        self.idle = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.conv(x))).flatten(1)
        x = self.act(self.hidden(x))
        return self.head(self.drop(self.act(self.hidden(x))))


def batches(count: int = 3, size: int = 5) -> list[Tensor]:
    return [random(size, 2, 6, 6, seed=i) for i in range(count)]


def row(measured: gs.ActivationMeasurements, name: str) -> dict[str, Any]:
    (found,) = [each for each in measured.sites if each["name"] == name]
    return found


def layer_row(measured: gs.ActivationMeasurements, name: str) -> dict[str, Any]:
    (found,) = [each for each in measured.layers if each["name"] == name]
    return found


# -- counts ------------------------------------------------------------------------------------------------------------


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Tensor], torch.dtype]:
    rest = draw(st.sampled_from([(3,), (2, 3), (3, 2, 2), (2, 1, 2, 2)]))
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    return [draw(tensors((size, *rest))).to(dtype) for size in sizes], dtype


@settings(max_examples=60)
@given(runs())
def test_counts_are_those_of_all_batches_at_once(run: tuple[list[Tensor], torch.dtype]) -> None:
    loader, _ = run
    found = row(gs.measure_activations(nn.Sequential(nn.Identity()), loader, sites="0"), "0")
    x = torch.cat(loader).double().numpy()
    flat, samples = x.reshape(-1), len(x)
    assert (found["calls"], found["elements"]) == (len(loader), flat.size)
    assert found["zeros"] == (flat == 0).sum()
    assert found["l0"] == (flat != 0).sum()
    assert found["non_finite"] == (~np.isfinite(flat)).sum()
    finite = flat[np.isfinite(flat)]
    assert found["l1"] == pytest.approx(np.abs(finite).sum(), rel=1e-12)
    check_histogram(found["histogram"], finite)
    if not samples:
        assert found["sparsity"] is found["samples"]["mean"] is None
        return
    assert found["sparsity"] == (flat == 0).mean()
    assert found["mean_magnitude"] == (pytest.approx(np.abs(finite).mean(), rel=1e-12) if finite.size else None)
    others = tuple(i for i in range(x.ndim) if i != 1)
    assert found["channels"] == x.shape[1]
    assert found["channel_sparsity"] == pytest.approx((x == 0).mean(others), abs=1e-15)
    assert found["dead_channels"] == np.flatnonzero((x == 0).all(others)).tolist()
    of_samples = (x == 0).reshape(samples, -1).mean(1)
    expected = {"mean": of_samples.mean(), "std": of_samples.std(), "min": of_samples.min(), "max": of_samples.max()}
    assert {key: found["samples"][key] for key in expected} == pytest.approx(expected, abs=1e-14)
    zeros, size = (x == 0).reshape(samples, -1).sum(1), flat.size // samples
    bins = [min(int(count) * 20 // size, 19) for count in zeros]
    assert found["samples"]["count"] == samples
    assert found["samples"]["histogram"] == [bins.count(i) for i in range(20)]


def check_histogram(histogram: dict[str, list[Any]], finite: np.ndarray) -> None:
    edges = histogram["edges"]
    values = finite.astype(np.float32)
    for sign, of_sign in (("positive", values[values > 0]), ("negative", -values[values < 0])):
        expected = [((low <= of_sign) & (of_sign < high)).sum() for low, high in pairwise(edges)]
        assert histogram[sign] == expected
        assert sum(histogram[sign]) == len(of_sign)
    assert all(high / low <= 1.25 for low, high in pairwise(edges))


def test_many_values_are_counted_as_few_are() -> None:
    x = random(70, 64, 16, 17).relu_()  # several parts on the CPU
    found = row(
        gs.measure_activations(nn.Sequential(nn.ReLU()), [x.contiguous(memory_format=torch.channels_last)]), "0"
    )
    assert found["zeros"] == (x == 0).sum()
    assert found["l1"] == pytest.approx(float(x.double().sum()), rel=1e-12)
    assert found["channel_sparsity"] == pytest.approx((x == 0).double().mean((0, 2, 3)).tolist(), abs=1e-15)
    assert found["samples"]["std"] == pytest.approx(
        float((x == 0).double().mean((1, 2, 3)).std(correction=0)), abs=1e-12
    )
    assert sum(found["histogram"]["positive"]) == (x > 0).sum()


@given(st.lists(st.integers(0, 7)))
def test_numbers_are_counted_alike_on_every_device(numbers: list[int]) -> None:
    index = torch.tensor(numbers, dtype=torch.int32)
    expected = [numbers.count(number) for number in range(8)]
    assert _count(index, 8).tolist() == _scattered(index, 8).tolist() == expected


def test_values_beyond_single_precision_are_finite_and_in_the_outermost_bins() -> None:
    x = torch.tensor([[1e300, -1e300, 1.0, 0.0, 1e-60, torch.inf, torch.nan]], dtype=torch.float64)
    measured = gs.measure_activations(nn.Sequential(nn.Identity()), [x, x], sites="0")
    found = row(measured, "0")
    assert (found["non_finite"], found["zeros"], found["l1"]) == (4, 2, pytest.approx(4e300))
    histogram = found["histogram"]
    assert (histogram["positive"][0], histogram["positive"][-1], sum(histogram["positive"])) == (2, 2, 6)
    assert (histogram["negative"][-1], sum(histogram["negative"])) == (2, 2)


def test_each_call_counts_and_a_site_that_never_ran_says_so() -> None:
    measured = gs.measure_activations(Net(), batches())
    assert [each["name"] for each in measured.sites] == ["relu", "act", "idle"]
    assert (row(measured, "relu")["calls"], row(measured, "act")["calls"]) == (3, 6)
    assert row(measured, "act")["elements"] == 3 * 2 * 5 * 16
    assert row(measured, "act")["samples"]["count"] == 3 * 2 * 5
    idle = row(measured, "idle")
    assert idle["sparsity"] is None
    assert idle["elements"] == idle["calls"] == 0
    assert "never called" in str(measured)


@pytest.mark.parametrize("inplace", [True, False])
def test_what_a_site_gives_is_measured_before_it_is_changed_in_place(inplace: bool) -> None:
    net = Net(inplace)
    x = batches(1)[0]
    found = row(gs.measure_activations(net, [x], sites="conv"), "conv")
    assert found["l1"] == pytest.approx(float(net.conv(x).detach().abs().double().sum()), rel=1e-6)
    assert found["zeros"] == 0


def test_layers_are_measured_by_what_enters_them() -> None:
    net = Net(inplace=True).eval()
    x = batches(1)[0]
    measured = gs.measure_activations(net, [x])
    pooled = net.pool(torch.relu(net.conv(x))).flatten(1)
    first = torch.relu(net.hidden(pooled))
    zeros = (pooled == 0).sum() + (first == 0).sum()
    assert (layer_row(measured, "hidden")["zeros"], layer_row(measured, "hidden")["saved_macs"]) == (zeros, zeros * 16)
    assert layer_row(measured, "hidden")["macs"] == 2 * 5 * 16 * 16
    assert layer_row(measured, "head")["saved_macs"] == (torch.relu(net.hidden(first)) == 0).sum() * 3


def test_totals_are_sums_over_rows() -> None:
    measured = gs.measure_activations(Net(), batches())
    totals = measured.totals
    assert totals["batches"] == 3
    assert totals["zeros"] == sum(each["zeros"] for each in measured.sites)
    assert totals["sparsity"] == totals["zeros"] / totals["elements"]
    assert totals["saved_macs"] == sum(each["saved_macs"] for each in measured.layers)
    assert totals["saved"] == totals["saved_macs"] / totals["macs"]
    assert totals["input_sparsity"] == totals["input_zeros"] / sum(each["elements"] for each in measured.layers)


def test_modules_with_products_that_are_not_counted_are_named() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.Sequential(
        nn.Embedding(5, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), encoder, nn.LSTM(8, 4)
    )
    measured = gs.measure_activations(net, [torch.zeros(2, 3, dtype=torch.int64)])
    assert measured.totals["uncounted"] == [
        {"name": "2.self_attn", "type": "MultiheadAttention"},
        {"name": "3", "type": "LSTM"},
    ]
    assert [each["name"] for each in measured.layers] == ["1", "2.linear1", "2.linear2"]
    assert "Not counted: 1 MultiheadAttention, 1 LSTM." in str(measured)
    assert "ot counted" not in str(gs.measure_activations(Net(), batches()))


# -- multiply-accumulates ----------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor, Tensor]:
    dims, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    channels, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation, padding = each(1, 3), each(1, 3), each(1, 2), each(0, 2)
    if draw(st.booleans()):
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
        added = tuple(draw(st.integers(0, max(pair) - 1)) for pair in zip(stride, dilation, strict=True))
        layer = kind(channels, outputs, kernel, stride, padding, added, groups, dilation=dilation)
    else:
        kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        same = max(stride) == 1 and draw(st.booleans())
        layer = kind(
            channels, outputs, kernel, stride, "same" if same else padding, dilation, groups, padding_mode=mode
        )
    x = draw(tensors((2, channels, *each(3, 6)), FINITE)).float()
    try:
        return layer, x, layer(x)
    except RuntimeError:  # nothing would come out, or padding repeats more than there is
        assume(False)


def products(layer: nn.Module, x: Tensor, output: Tensor) -> tuple[int, int, int]:
    """Multiply-accumulates with elements, with zeros, and with padding or cropped, one by one."""
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    size, output_size = x.shape[2:], output.shape[2:]
    if layer.padding == "same":
        before = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
        after = [d * (k - 1) - b for d, k, b in zip(dilation, kernel, before, strict=True)]
    else:
        before = after = list(layer.padding)
    macs = saved = outside = 0
    repeated = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}.get(layer.padding_mode)
    # Where each padded position comes from; -1 for zeros.
    sources = [
        np.pad(np.arange(n), (b, a), mode=repeated) if repeated else np.pad(np.arange(n), (b, a), constant_values=-1)
        for n, b, a in zip(size, before, after, strict=True)
    ]
    fan = layer.in_channels // layer.groups
    zeros = (x == 0).numpy()
    for position in product(*(range(n) for n in (size if transposed else output_size))):
        for tap in product(*(range(k) for k in kernel)):
            place = [p * s + t * d for p, s, t, d in zip(position, stride, tap, dilation, strict=True)]
            if transposed:
                place = [p - b for p, b in zip(place, before, strict=True)]
                inside = all(0 <= p < n for p, n in zip(place, output_size, strict=True))
                source = position
            else:
                source = tuple(int(of[p]) for of, p in zip(sources, place, strict=True))
                inside = min(source) >= 0
            for sample, output_channel, i in product(range(len(x)), range(layer.out_channels), range(fan)):
                channel = output_channel // (layer.out_channels // layer.groups) * fan + i
                macs += inside
                outside += not inside
                saved += inside and bool(zeros[(sample, channel, *source)])
    return macs, saved, outside


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # of torch, once in a process
@settings(max_examples=80)
@given(convolutions())
def test_products_of_convolutions_are_those_counted_one_by_one(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    layer, x, output = case
    found = layer_row(gs.measure_activations(nn.Sequential(layer), [x, x]), "0")
    macs, saved, outside = products(layer, x, output)
    assert (found["macs"], found["saved_macs"], found["padding_macs"]) == (2 * macs, 2 * saved, 2 * outside)


def test_products_of_a_transposed_convolution_are_those_of_the_size_asked_for() -> None:
    class Asked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 3, 2, stride=3, padding=1)

        def forward(self, x: Tensor, size: int) -> Tensor:
            return self.up(input=x, output_size=[size])

    net, x, sizes = Asked(), random(2, 2, 4).relu(), (9, 10, 11)
    found = layer_row(gs.measure_activations(net, [((x, size), None) for size in sizes]), "up")
    counts = zip(*(products(net.up, x, net(x, size)) for size in sizes), strict=True)
    assert [found["macs"], found["saved_macs"], found["padding_macs"]] == [sum(each) for each in counts]


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_products_of_linear_and_bilinear_layers_are_those_counted_one_by_one(shape: tuple[int, ...]) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 5)
            self.both = nn.Bilinear(4, 5, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.both(x, input2=y) + self.linear(x).sum()

    x, y = random(*shape).relu(), random(*shape[:-1], 5, seed=1).relu()
    measured = gs.measure_activations(Pair(), [((x, y), 0)])
    found = layer_row(measured, "linear")
    assert (found["macs"], found["saved_macs"]) == (x.numel() * 5, int((x == 0).sum()) * 5)
    pairs = (x.unsqueeze(-1) == 0) | (y.unsqueeze(-2) == 0)
    found = layer_row(measured, "both")
    assert (found["macs"], found["saved_macs"]) == (pairs.numel() * 2, int(pairs.sum()) * 2)
    assert found["zeros"] == (x == 0).sum() + (y == 0).sum()


def test_one_image_without_a_batch_counts_as_a_batch_of_one() -> None:
    net, x = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), random(2, 5, 5).relu()
    single = layer_row(gs.measure_activations(net, [(x, 0)]), "0")
    assert single == layer_row(gs.measure_activations(net, [(x.unsqueeze(0), 0)]), "0")


@pytest.mark.parametrize("name", ["SqueezeNet1_1", "ResNet18", "MobileNet_V2"])
def test_products_of_known_networks_are_those_published(name: str) -> None:
    models = import_torchvision().models
    published = getattr(models, f"{name}_Weights").DEFAULT.meta["_ops"]  # 10⁹, with those of padding
    net = getattr(models, name.lower())(weights=None)
    totals = gs.measure_activations(net, [random(1, 3, 224, 224)]).totals
    assert round((totals["macs"] + totals["padding_macs"]) / 1e9, 3) == published
    assert 0 < totals["saved_macs"] < totals["macs"]


# -- channels ----------------------------------------------------------------------------------------------------------


def test_channels_are_where_the_layer_before_has_them() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 1)
            self.after_conv = nn.ReLU()
            self.linear = nn.Linear(4, 6)
            self.after_linear = nn.GELU()
            self.norm = nn.BatchNorm1d(3)
            self.after_norm = nn.Tanh()
            self.shared = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            x = self.after_linear(self.linear(self.after_conv(self.conv(x))))  # (samples, 3, 6)
            return self.shared(self.after_norm(self.norm(x))).mean() + self.shared(self.linear(x[..., :4])).mean()

    measured = gs.measure_activations(Mixed(), [random(5, 2, 4)], sites=["after*", "shared", "linear"])
    channels = {each["name"]: each["channels"] for each in measured.sites}
    assert channels == {"after_conv": 3, "linear": 6, "after_linear": 6, "after_norm": 3, "shared": None}
    assert row(measured, "shared")["channel_sparsity"] is None
    assert row(measured, "shared")["dead_channels"] is None


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("position", ["after", "before"])
def test_channels_of_a_threshold_are_those_of_its_layer(position: str, per_channel: bool) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 1), nn.Linear(4, 7))
    gs.attach(net, gs.LossyThreshold(sites=["2", "3"], position=position, per_channel=per_channel))
    measured = gs.measure_activations(net, [random(5, 4)])
    channels = {each["name"]: each["channels"] for each in measured.sites}
    assert channels == dict(
        zip(("2.sparsifier", "3.sparsifier"), (3, 7) if position == "after" else (2, 4), strict=True)
    )
    assert [len(each["thresholds"]) for each in measured.sites] == (list(channels.values()) if per_channel else [1, 1])


def test_channels_of_a_threshold_for_each_of_them_are_along_its_own_dimension() -> None:
    net = nn.Sequential(gs.nn.LossyHardSparsifier(channels=4, dim=-1))
    assert row(gs.measure_activations(net, [random(2, 3, 4)]), "0")["channels"] == 4


# -- sites -------------------------------------------------------------------------------------------------------------


def names(net: nn.Module, x: Tensor, **options: Any) -> list[str]:
    return [each["name"] for each in gs.measure_activations(net, [x], **options).sites]


def test_sites_are_chosen_by_globs_types_predicates_and_exact_names() -> None:
    net, x = Net(), batches(1)[0]
    assert names(net, x, sites=["*", "!idle"]) == ["relu", "act"]
    assert names(net, x, sites=["conv", nn.Linear]) == ["conv", "hidden", "head"]
    assert names(net, x, sites=lambda name, module: name == "pool") == ["pool"]


def test_thresholds_and_masks_of_positions_are_sites_and_what_reads_them_is_one() -> None:
    mask = gs.nn.SparseActivation(6, quarters=1)
    net = nn.Sequential(
        nn.Conv2d(2, 2, 1), mask, nn.BatchNorm2d(2), gs.nn.LossyHardSparsifier(0.3), nn.Softmax(1), nn.ReLU()
    )
    net.append(gs.nn.SparseBatchNorm(2, gs.nn.SparseActivation(6, quarters=2)))
    measured = gs.measure_activations(net, batches(1))
    assert [each["name"] for each in measured.sites] == ["1", "3", "5", "6"]
    assert row(measured, "1")["sparsity"] == 0.75
    assert row(measured, "6")["sparsity"] == 0.5
    assert row(measured, "3")["thresholds"] == [pytest.approx(0.3)]


def test_a_mask_that_batch_norms_read_is_no_site_unless_it_is_called() -> None:
    class Reads(nn.Module):
        def __init__(self, calls: bool) -> None:
            super().__init__()
            self.calls = calls
            self.mask = gs.nn.SparseActivation(4, density=0.5)
            self.norm = gs.nn.SparseBatchNorm(2, self.mask)

        def forward(self, x: Tensor) -> Tensor:
            return self.mask(self.norm(x)) if self.calls else self.norm(x)

    for calls, names in ((False, ["norm"]), (True, ["mask", "norm"])):
        measured = gs.measure_activations(Reads(calls), [random(3, 2, 4, 4)])
        assert [each["name"] for each in measured.sites] == names


def test_k_winners_are_sites() -> None:
    net = nn.Sequential(nn.Linear(2, 4), gs.nn.KWinners(2, 0.25, inference_factor=1.0))
    measured = gs.measure_activations(net, [random(3, 2, 6, 2)], sites="1")  # the linear layer before has them last
    assert row(measured, "1")["sparsity"] == 0.75
    assert len(row(measured, "1")["channel_sparsity"]) == 2
    assert [each["name"] for each in gs.measure_activations(net, [random(3, 2, 6, 2)]).sites] == ["1"]


def test_threshold_on_an_activation_function_is_one_site() -> None:
    net = Net()
    gs.attach(net, gs.LossyThreshold(eps=0.2, sites=[nn.ReLU, "!idle"]))
    assert names(net, batches(1)[0]) == ["relu.sparsifier", "act.sparsifier", "idle"]
    found = row(gs.measure_activations(net, batches(1), sites="relu"), "relu")
    assert found["thresholds"] == [pytest.approx(0.2)]


def test_model_without_activation_functions_has_its_layers_measured() -> None:
    measured = gs.measure_activations(nn.Sequential(nn.Linear(3, 2)), [random(2, 3)])
    assert (measured.sites, len(measured.layers), measured.totals["sparsity"]) == ([], 1, None)
    assert "Linear" in str(measured)


# -- thresholds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"position": "before"}, {"per_channel": True}, {"hard": True}], ids=str)
def test_hard_measures_what_finalize_would_make(options: dict[str, Any]) -> None:
    net = Net()
    sparsity = gs.attach(net, gs.LossyThreshold(eps=0.4, sharpness=4.0, **options))
    hard = gs.measure_activations(net, batches(), hard=True)
    soft = gs.measure_activations(net, batches())
    names = [site.name for site in sparsity.methods[0].placed]
    for name in (f"{name}.sparsifier" for name in names):
        zeros = row(hard, name)["zeros"], row(soft, name)["zeros"]
        assert zeros[0] == zeros[1] if "hard" in options else zeros[0] > zeros[1]
    assert soft.totals["smoothed_thresholds"] == len(names)
    assert hard.totals["smoothed_thresholds"] == 0
    thresholds = row(hard, "conv.sparsifier")["thresholds"]
    sparsity.finalize()
    final = gs.measure_activations(net, batches())
    assert final.layers == hard.layers
    for each in final.sites:
        assert each | {"type": ""} == row(hard, each["name"]) | {"type": ""}
    found = row(final, "conv.sparsifier")
    assert (found["type"], found["thresholds"]) == ("LossyHardSparsifier", thresholds)


def test_masks_from_aggregates_count_in_the_layers_that_they_are_before() -> None:
    net = Net()
    masks = gs.ActivationSparsifier(net, torch.add, lambda x: x.mean(0), lambda x: (torch.arange(16) % 4 == 0).float())
    masks.register_layer(net.head)
    net(batches(1)[0])
    masks.step()
    masks.squash_mask()
    assert layer_row(gs.measure_activations(net, batches()), "head")["sparsity"] >= 0.75


# -- the model is left as it was ---------------------------------------------------------------------------------------


def state(net: nn.Module) -> Any:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [
        (module.training, sorted(module.__dict__), [list(getattr(module, each)) for each in hooks])
        for module in net.modules()
    ]


class Failing(list[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield self[0]
        raise KeyboardInterrupt


@pytest.mark.parametrize("loader", [batches(), Failing(batches())], ids=["to the end", "interrupted"])
@pytest.mark.parametrize("hard", [True, False])
def test_model_and_random_state_are_as_they_were(loader: list[Tensor], hard: bool) -> None:
    net = Net().train()
    net.pool.eval()
    sparsity = gs.attach(net, gs.LossyThreshold(eps=0.4))
    net.bn = nn.BatchNorm2d(2)
    net.register_forward_pre_hook(lambda module, args: (module.bn(args[0]) + torch.rand(1),))
    before, values, learned = state(net), copy.deepcopy(net.state_dict()), sparsity.summary().learned
    seen = torch.get_rng_state()
    try:
        # A loader draws from the random state even where it does not shuffle.
        gs.measure_activations(net, loader if isinstance(loader, Failing) else DataLoader(loader, None), hard=hard)
    except KeyboardInterrupt:
        assert isinstance(loader, Failing)
    assert torch.equal(torch.get_rng_state(), seen)
    assert state(net) == before
    assert sparsity.summary().learned == learned
    for key, value in net.state_dict().items():
        assert torch.equal(value, values[key]), key


def test_a_forward_of_a_modules_own_is_there_afterwards() -> None:
    net = nn.Sequential(gs.nn.LossySparsifier(), gs.nn.LossySparsifier())
    own = net[0].forward = lambda x: x + 1
    gs.measure_activations(net, [random(2, 3)])
    assert net[0].forward is own
    assert "forward" not in vars(net[1])


def test_modes_are_those_of_evaluation_without_gradients() -> None:
    net = Net().train()
    seen = []
    net.drop.register_forward_hook(lambda module, args, output: seen.append((module.training, output.requires_grad)))
    gs.measure_activations(net, batches(1))
    assert seen == [(False, False)]


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    net = Net()
    gs.attach(net, gs.LossyThreshold())
    held = []

    def forward(model: nn.Module, x: Tensor) -> None:
        sizes = [each.numel() for each in gc.get_objects() if issubclass(type(each), Tensor)]
        held.append(sum(size for size in sizes if type(size) is int))  # a compiler leaves tensors of symbolic size
        model(x)

    gs.measure_activations(net, batches(8), forward=forward)
    assert len(set(held[2:])) == 1


def test_nothing_is_read_from_the_device_at_every_batch() -> None:
    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    counts = []
    for loader in (batches(2), batches(9)):
        with Reads() as reads:
            gs.measure_activations(Net(), loader)
        counts.append(reads.count)
    assert counts[0] == counts[1] > 0


def test_compiled_model_is_measured_as_the_plain_one() -> None:
    net = Net().eval()
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(batches(1)[0])
    assert gs.measure_activations(compiled, batches()) == gs.measure_activations(net, batches())


# -- batches -----------------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.relu(x + y)


@pytest.mark.parametrize(
    "batch", [((1, 2), 0), [[1, 2], 0], {"x": 1, "y": 2}, ({"y": 2, "x": 1}, 0), ((1, 2), 0, "more")], ids=str
)
def test_batches_of_several_inputs(batch: Any) -> None:
    x, y = random(4, 3), random(4, 3, seed=1)

    def filled(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: filled(value) for key, value in part.items()}
        if isinstance(part, tuple | list):
            return type(part)(map(filled, part))
        return {1: x, 2: y}.get(part, part)

    found = row(gs.measure_activations(Sum(), [filled(batch)]), "relu")
    assert found["zeros"] == (x + y <= 0).sum()


def test_batches_of_one_input_with_labels_and_without_and_a_forward_of_ones_own() -> None:
    net, x = Net(), batches(1)[0]
    expected = gs.measure_activations(net, [x])
    assert gs.measure_activations(net, [(x, torch.zeros(5))]) == expected
    assert gs.measure_activations(net, [[x]]) == expected
    assert gs.measure_activations(net, [("name", x)], forward=lambda model, batch: model(batch[1])) == expected
    pair = namedtuple("pair", "name image")
    assert gs.measure_activations(net, [pair("name", x)], forward=lambda model, batch: model(batch.image)) == expected


# -- errors ------------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.LSTM(2, 3)
        self.whole = nn.Identity()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.whole(torch.ones(2, dtype=torch.int32))
        return self.linear(self.pair(x)[0])


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("pair", r"pair: gives a tuple, .*sites=\['!pair', ...\]"),
        ("whole", r"whole: gives torch.int32, and only tensors of floating point .*sites=\['!whole', ...\]"),
        ("linaer", r"'linaer' matches no module; did you mean 'linear'"),
        (nn.Conv2d, "the model calls no Conv2d"),
        ([], "sites: none in Odd"),
    ],
)
def test_sites_that_cannot_be_measured_are_refused_by_name(sites: Any, message: str) -> None:
    net = Odd()
    before = state(net)
    with pytest.raises(gs.ConfigurationError, match=message):
        gs.measure_activations(net, [random(4, 1, 2)], sites=sites)
    assert state(net) == before


class Rows(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return random(2, 6, 6, seed=index)


class Streamed(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(batches())


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (random(3, 2, 6, 6), r"got Tensor; give a DataLoader, or \[\(x,\)\] of one batch"),
        (np.zeros((3, 2, 6, 6)), "got ndarray; give a DataLoader"),
        (TensorDataset(random(3, 2, 6, 6)), r"got TensorDataset; give torch.utils.data.DataLoader\(dataset, 64\)"),
        (Rows(), "got Rows; give torch.utils.data.DataLoader"),
        ("batches", "got str"),
        ({"x": random(3, 2, 6, 6)}, "got dict"),
        (3, "got int"),
        (None, "got NoneType"),
        ([()], r"gave \(\) as a batch"),
        ([None], "gave None as a batch"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_what_gives_no_batches_is_refused(loader: Any, message: str) -> None:
    with pytest.raises(gs.ConfigurationError, match=f"loader: .*{message}"):
        gs.measure_activations(Net(), loader)


def test_batches_may_be_streamed() -> None:
    streamed, listed = (gs.measure_activations(Net(), each) for each in (Streamed(), batches()))
    assert streamed.as_dict() == listed.as_dict()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_with_a_remedy_that_helps() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    padding = torch.tensor([[False, False, True], [False, False, False]])

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch, src_key_padding_mask=padding)

    with pytest.raises(gs.ConfigurationError, match=r"layers.0.linear1: got nested .* use_nested_tensor set to False"):
        gs.measure_activations(encoder, [random(2, 3, 8)], forward=forward)
    encoder.use_nested_tensor = False
    measured = gs.measure_activations(encoder, [random(2, 3, 8)], forward=forward)
    assert layer_row(measured, "layers.0.linear1")["macs"] == 2 * 3 * 8 * 16


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(gs.ConfigurationError, match=r"idle: was not called .*sites=\['!idle', ...\]"):
        gs.measure_activations(Net(), batches(), sites=nn.ReLU)
    with pytest.raises(gs.ConfigurationError, match="loader: gave no batch"):
        gs.measure_activations(Net(), iter([]))
    with pytest.raises(gs.ConfigurationError, match=r"model: expected a torch.nn.Module, got int"):
        gs.measure_activations(3, batches())
    with pytest.raises(gs.ConfigurationError, match="hard: expected True or False"):
        gs.measure_activations(Net(), batches(), hard=1)
    with pytest.raises(gs.ConfigurationError, match="calls no activation function"):
        gs.measure_activations(nn.Sequential(nn.Flatten()), batches())
    net = nn.Sequential(gs.nn.LossySparsifier())
    with pytest.raises(gs.ConfigurationError, match=r"0: lossy threshold: got activations of dtype torch.int64"):
        gs.measure_activations(net, [torch.ones(2, 3, dtype=torch.int64)])


# -- what is told ------------------------------------------------------------------------------------------------------


def test_dict_is_plain_json_whatever_the_values() -> None:
    x = torch.tensor([[float("nan"), float("inf"), 3.4e38, 1e-42, -0.0]])
    measured = gs.measure_activations(nn.Sequential(nn.Identity()), [x, x[:0]], sites="0")
    text = json.dumps(measured.as_dict(), allow_nan=False)
    assert json.loads(text) == measured.as_dict()
    assert "not finite" in str(measured)
    assert row(measured, "0")["non_finite"] == 2
    net = nn.Sequential(nn.Identity(), gs.nn.LossyHardSparsifier()).double()
    net[1].eps.fill_(torch.nan)
    measured = gs.measure_activations(net, [torch.full((1, 2), 1e308, dtype=torch.float64)], sites=["0", "1"])
    assert row(measured, "0")["l1"] == torch.inf
    text = json.dumps(measured.as_dict(), allow_nan=False)
    assert json.loads(text) == measured.as_dict()
    assert measured.as_dict()["sites"][0]["l1"] is None
    assert measured.as_dict()["sites"][1]["thresholds"] == [None]


def test_figures_show_every_site_and_layer_and_the_thresholds() -> None:
    net = Net()
    gs.attach(net, gs.LossyThreshold({"*": 0.1}, eps=0.25, sites=["conv"]))
    gs.attach(net, gs.LossyThreshold(eps=0.5, sites=["hidden"], per_channel=True))
    with torch.no_grad():
        net.hidden.sparsifier.eps[0] = 0.75
    figures = gs.measure_activations(net, batches()).figures()
    axes = {each.get_title().partition("\n")[0]: each for each in figures["histograms"].axes}
    assert list(axes) == ["conv.sparsifier", "relu", "hidden.sparsifier", "act"]
    assert [list(line.get_xdata()) for line in axes["conv.sparsifier"].lines] == [[0.25, 0.25]]
    (span,) = [patch for patch in axes["hidden.sparsifier"].patches if type(patch).__name__ == "Rectangle"]
    assert (span.get_x(), span.get_width()) == (0.5, 0.25)
    assert [text.get_text() for text in figures["zeros"].axes[0].get_yticklabels()] == list(axes)
    assert [text.get_text() for text in figures["macs"].axes[0].get_yticklabels()] == ["conv", "hidden", "head"]
    for figure in figures.values():
        figure.canvas.draw()


def test_long_names_neither_overlap_nor_take_the_room_of_the_bars() -> None:
    measured = gs.measure_activations(Net(), batches())
    for each in measured.sites + measured.layers:
        each["name"] = f"backbone.a_stage_with_a_long_name.and_a_branch_with_a_longer_name.{each['name']}"
    figures = measured.figures()
    for figure in figures.values():
        figure.canvas.draw()
    titles = [axes.title for axes in figures["histograms"].axes]
    assert [title.get_text().partition("\n")[0] for title in titles] == [
        f"backbone.a_sta…{end}" for end in ("ranch_with_a_longer_name.relu", "branch_with_a_longer_name.act")
    ]
    boxes = [title.get_window_extent() for title in titles]
    assert boxes[0].x0 >= 0
    assert boxes[0].x1 < boxes[1].x0
    assert boxes[1].x1 <= figures["histograms"].bbox.x1
    for name in ("zeros", "macs"):
        axes = figures[name].axes[0].get_window_extent()
        assert axes.width > 0.55 * figures[name].bbox.width


def test_figures_of_nothing_are_none() -> None:
    assert gs.measure_activations(Net(), [torch.zeros(0, 2, 6, 6)]).figures() == {}
    zeros = gs.measure_activations(nn.Sequential(nn.ReLU()), [torch.zeros(2, 3)]).figures()
    assert list(zeros) == ["histograms", "zeros"]


def test_figures_without_matplotlib_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(gs.ConfigurationError, match=r"matplotlib; install it with: pip install 'gossamer\[plots\]'"):
        gs.measure_activations(Net(), batches()).figures()
