"""Layers under the names of Numenta's notebook: its counts and its rule written out, and what went wrong there."""

from __future__ import annotations

import copy
import io
import math
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gossamer as gs
from counting import METHODS
from gossamer.compat import dst
from gossamer.compat.hebbian import DSConv2d, DSLinear
from gossamer.errors import ConfigurationError, OrderError, StateError

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}


def conv(**options: object) -> DSConv2d:
    torch.manual_seed(0)
    return DSConv2d(3, 4, 5, **options)


def counted(layer: DSConv2d | DSLinear, seed: int = 0) -> DSConv2d | DSLinear:
    """The layer after a pass that was counted."""
    torch.manual_seed(seed)
    shape = (8, layer.in_features) if isinstance(layer, DSLinear) else (4, layer.in_channels, 9, 9)
    layer(torch.randn(shape))
    return layer


def ranks(strengths: Tensor, dims: list[int]) -> np.ndarray:
    """The place of each connection in its slice, one by one: the strongest first, then the lowest index."""
    values = strengths.numpy()
    found = np.empty(values.shape, dtype=int)
    for index in product(*[range(side) if dim in dims else [slice(None)] for dim, side in enumerate(values.shape)]):
        flat = values[index].flatten().tolist()
        order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
        place = np.empty(len(flat), dtype=int)
        place[order] = range(len(flat))
        found[index] = place.reshape(values[index].shape)
    return found


def with_strengths(layer: DSConv2d | DSLinear, strengths: Tensor) -> DSConv2d | DSLinear:
    layer.learning_iterations = 0  # so that the pass is counted
    counted(layer).connections_tensor.copy_(strengths)
    return layer


def snapshot(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


# -- counting ----------------------------------------------------------------------------------------------------------


@given(
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    sides=st.tuples(st.integers(3, 5), st.integers(3, 6)),
    seed=st.integers(0, 1000),
)
def test_coactivation_equals_the_three_methods_of_the_notebook(inputs, outputs, kernel, stride, padding, sides, seed):
    torch.manual_seed(seed)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding)
    x = torch.randn(2, inputs, *sides)
    y = layer(x).detach()
    count = gs.scores.coactivation(x, y, layer, threshold=0.5, sigmoid=True)
    assert all(count.equal(method(layer, x, y)) for method in METHODS)


@pytest.mark.parametrize(
    "options",
    [{}, {"groups": 3}, {"dilation": 2}, {"padding": 2, "padding_mode": "reflect"}, {"bias": False, "stride": 2}],
    ids=str,
)
def test_a_convolution_is_pytorchs_and_counts_its_connections(options):
    layer = DSConv2d(3, 6, 3, **options)
    plain = nn.Conv2d(3, 6, 3, **options)
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    x = torch.randn(2, 3, 9, 8)
    y = layer(x)
    assert y.equal(plain(x))
    count = torch.zeros(layer.weight.shape)
    inputs = x if layer.padding_mode == "zeros" else nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    wide = layer.out_channels // layer.groups
    for o, c, j, h in product(*map(range, count.shape)):
        channel = o // wide * (3 // layer.groups) + c
        for n, m in product(*map(range, y.shape[2:])):
            row, column = n * layer.stride[0] + j * layer.dilation[0], m * layer.stride[1] + h * layer.dilation[1]
            count[o, c, j, h] += ((inputs[:, channel, row, column] > 0) & (y[:, o, n, m] > 0)).sum()
    assert layer.connections_tensor.equal(count)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
def test_a_linear_layer_is_pytorchs_and_counts_its_connections(shape):
    layer = DSLinear(5, 4)
    x = torch.randn(shape)
    y = layer(x)
    assert y.equal(nn.functional.linear(x, layer.weight, layer.bias))
    active = [each.flatten(0, -2) > 0 for each in (x, y)]
    count = torch.stack([torch.stack([(active[1][:, o] & active[0][:, i]).sum() for i in range(5)]) for o in range(4)])
    assert layer.connections_tensor.equal(count.float())


def test_what_is_active_follows_the_threshold_on_the_sigmoid():
    layer = DSLinear(1, 1)
    layer.activity_threshold = 0.75
    layer.update_connections_tensor(
        torch.tensor([[1.0], [2.0], [2.0], [3.0]]), torch.tensor([[2.0], [1.0], [2.0], [3.0]])
    )
    assert layer.connections_tensor.tolist() == [[2.0]]  # σ(1) = 0.731, σ(2) = 0.881


def test_every_twentieth_pass_in_training_is_counted_and_takes_the_place_of_the_last():
    layer, passes, counted = conv(), 0, []
    for number in range(90):
        layer.train(number % 2 == 0)  # which the notebook's helper layers did not survive
        held = layer.connections_tensor.clone()
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(number))
        y = layer(x)
        if not layer.connections_tensor.equal(held):
            counted.append(passes)
            assert layer.connections_tensor.equal(METHODS[0](layer, x, y))
        passes += layer.training
    assert counted == [0, 20, 40]
    assert layer.learning_iterations == passes == 45


def test_evaluation_is_not_counted():
    layer = conv().eval()
    counted(layer)
    assert layer.learning_iterations == 0
    assert not layer.connections_tensor.any()


def test_hooks_run_and_what_they_put_in_is_counted():
    layer, seen = conv(), []
    layer.register_forward_pre_hook(lambda module, args: (-args[0],))
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(2, 3, 6, 6)
    y = layer(x)
    assert seen[0] is y
    assert layer.connections_tensor.equal(METHODS[0](layer, -x, y))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_pass_that_is_computed_again_is_counted_once(reentrant):
    layer = conv()
    for _ in range(21):
        x = torch.randn(2, 3, 6, 6, requires_grad=True)
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert layer.learning_iterations == 21
    assert layer.connections_tensor.equal(METHODS[0](layer, x, layer.eval()(x)))


def test_counts_are_exact_in_half_precision():
    layer = DSLinear(2, 2).bfloat16()
    with torch.no_grad():
        layer.weight.fill_(1)
    layer(torch.ones(1001, 2, dtype=torch.bfloat16))
    assert layer.connections_tensor.equal(torch.full((2, 2), 1001.0))


def test_a_layer_holds_two_numbers_more_for_each_weight_and_no_helper_layer():
    layer = conv()
    assert {name: (tuple(each.shape), each.dtype) for name, each in layer.named_buffers()} == {
        "connections_tensor": ((4, 3, 5, 5), torch.float32),
        "mask": ((4, 3, 5, 5), torch.int8),
        "seed": ((), torch.int64),
    }
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert list(layer.children()) == []


# -- progress ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "dims", "k1", "k2"),
    [
        (DSConv2d(3, 4, 5), [0, 1], 2, 3),
        (DSConv2d(4, 4, 3, groups=2), [0, 1], 1, 1),
        (DSConv2d(1, 2, 2), [0, 1], 1, 1),
        (DSLinear(100, 3), [0], 10, 15),
    ],
)
def test_defaults_are_those_of_the_notebook(layer, dims, k1, k2):
    assert (layer.prune_dims, layer.k1, layer.k2, layer.activity_threshold) == (dims, k1, k2, 0.5)
    assert (layer.learning_iterations, layer.connections_tensor.any()) == (0, False)


@given(seed=st.integers(0, 1000), dims=st.sampled_from([[0, 1], [0], [1], [3, 0], [], [0, 1, 2]]), data=st.data())
def test_where_no_strengths_are_equal_it_is_the_rule_of_the_notebook(seed, dims, data):
    layer = conv(seed=seed)
    size = layer.weight.numel() // math.prod(layer.weight.shape[dim] for dim in dims)
    layer.prune_dims, layer.k1 = dims, data.draw(st.integers(1, size))
    layer.k2 = data.draw(st.integers(layer.k1, size))
    strengths = torch.randperm(300, generator=torch.Generator().manual_seed(seed)).view(4, 3, 5, 5).float()
    before = with_strengths(layer, strengths).weight.detach().clone()
    layer.progress_connections()
    after, values = layer.weight.detach(), strengths.numpy()
    for index in product(*[range(side) if dim in dims else [slice(None)] for dim, side in enumerate(after.shape)]):
        s = values[index].flatten()
        v1, v2 = (np.partition(s, -k)[-k] for k in (layer.k1, layer.k2))
        old, new = (each.numpy()[index].flatten() for each in (before, after))
        assert (new[s >= v1] == old[s >= v1]).all()
        assert (new[(s < v1) & (s >= v2)] != old[(s < v1) & (s >= v2)]).all()
        assert (new[s < v2] == 0).all()
    assert not layer.connections_tensor.any()


@given(seed=st.integers(0, 1000), levels=st.integers(1, 4), linear=st.booleans())
def test_of_equal_strengths_the_lowest_index_is_the_strongest_and_as_many_live_in_each_slice(seed, levels, linear):
    layer = DSLinear(30, 4) if linear else conv()
    layer.k1, layer.k2 = 3, 5
    generator = torch.Generator().manual_seed(seed)
    strengths = torch.randint(levels, layer.weight.shape, generator=generator).float()
    strengths[0, 0] = 1
    before = with_strengths(layer, strengths).weight.detach().clone()
    layer.progress_connections()
    rank = torch.from_numpy(ranks(strengths, layer.prune_dims))
    assert layer.weight[rank < 3].equal(before[rank < 3])
    assert (layer.weight == 0).equal(rank >= 5)
    assert layer.mask.equal(-(rank < 5).to(torch.int8))
    assert not torch.signbit(layer.weight[rank >= 5]).any()


def test_what_is_drawn_anew_takes_effect_within_the_bounds_of_the_layers_own_fan():
    layer = DSConv2d(8, 40, 5, groups=2)
    layer.k1, layer.k2 = 1, 24
    strengths = torch.arange(25.0).view(5, 5).expand(layer.weight.shape)
    with_strengths(layer, strengths).progress_connections()
    drawn = layer.weight.detach()[(strengths < 24) & (strengths > 0)]
    bound = math.sqrt(6 / (4 * 25))
    assert drawn.abs().max() <= bound
    assert drawn.min() < -0.99 * bound
    assert drawn.max() > 0.99 * bound
    assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert drawn.unique().numel() > 0.99 * drawn.numel()


def test_draws_follow_from_the_seed_alone_and_differ_from_time_to_time():
    def draws(layer: DSLinear) -> list[Tensor]:
        found = []
        for _ in range(2):
            with_strengths(layer, torch.ones(4, 30)).progress_connections()
            found.append(layer.weight[:, 3:4].clone())
        return found

    layers = [DSLinear(30, 4, seed=seed) for seed in (5, 5, 6)]
    first, second, third = map(draws, layers)
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])
    assert not first[0].equal(first[1])
    assert not first[0].equal(third[0])


def test_layers_without_a_seed_draw_differently_and_as_pytorchs_generator_says():
    seeds = []
    for _ in range(2):
        torch.manual_seed(3)
        seeds.append([int(DSLinear(3, 3).seed) for _ in range(2)])
    assert seeds[0] == seeds[1]
    assert seeds[0][0] != seeds[0][1]


def test_a_pruned_connection_that_becomes_strong_lives_again_and_begins_at_zero():
    layer = conv()
    first = torch.arange(25.0).view(5, 5).expand(4, 3, 5, 5)
    with_strengths(layer, first).progress_connections()
    with_strengths(layer, 24 - first).progress_connections()
    assert (layer.weight[:, :, 0, :2] == 0).all()
    assert (layer.mask[:, :, 0, :3] == -1).all()
    optimizer = OPTIMIZERS["sgd"](layer.parameters())
    layer(torch.randn(2, 3, 9, 9)).square().sum().backward()
    optimizer.step()
    assert (layer.weight != 0).sum() == 3 * 12
    assert (layer.weight[:, :, 0, :3] != 0).all()


def test_pruning_at_random_takes_fifteen_percent_and_leaves_the_rest_as_it_was():
    layer = DSLinear(200, 200, seed=1)
    before = layer.weight.detach().clone()
    layer.prune_randomly()
    pruned = layer.weight == 0
    assert pruned.float().mean() == pytest.approx(0.15, abs=0.01)
    assert layer.weight[~pruned].equal(before[~pruned])
    layer.prune_randomly()
    assert (layer.weight == 0)[pruned].all()
    assert (layer.mask == 0).equal(layer.weight == 0)
    assert (layer.weight == 0).float().mean() == pytest.approx(1 - 0.85**2, abs=0.01)
    layer.prune_randomly(1)
    assert not layer.weight.any()


# -- zeros stay --------------------------------------------------------------------------------------------------------


def steps(layer: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        layer(torch.randn(2, 3, 9, 9)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("prune", ["progress_connections", "prune_randomly"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zeros_are_exact_after_every_step_with_momentum_and_decay(name, prune, dtype):
    layer = conv().to(dtype)
    optimizer = OPTIMIZERS[name](layer.parameters())
    for _ in range(3):  # so that there is momentum
        optimizer.zero_grad()
        layer(torch.randn(2, 3, 9, 9, dtype=dtype)).square().mean().backward()
        optimizer.step()
    getattr(layer, prune)()
    pruned = layer.weight == 0
    assert pruned.any()
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, 3, 9, 9, dtype=dtype)).square().mean().backward()
        optimizer.step()
        assert (layer.weight == 0).equal(pruned)
        assert not torch.signbit(layer.weight[pruned]).any()
        assert (layer.state_dict()["weight"] == 0).equal(pruned)


def test_what_was_nan_is_zero_where_it_is_pruned():
    layer = counted(conv())
    with torch.no_grad():
        layer.weight.fill_(torch.nan)
    layer.progress_connections()
    assert (layer.weight == 0).sum() == 22 * 12


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "load": lambda layer: (new := DSConv2d(3, 4, 5), new.load_state_dict(layer.state_dict()))[0],
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_keep_their_zeros_count_on_and_draw_the_same(way):
    layer = counted(conv())
    layer.progress_connections()
    layer.learning_iterations = 40
    counted(layer)
    other = COPIES[way](layer)
    assert same(snapshot(layer), snapshot(other))
    for each in (layer, other):
        torch.manual_seed(1)
        optimizer = OPTIMIZERS["sgd"](each.parameters())
        steps(each, optimizer)
        assert (each.weight == 0).equal(each.mask == 0)
        assert each.learning_iterations == 44
        each.progress_connections()
    assert same(snapshot(layer), snapshot(other))


def test_layers_of_other_optimizers_and_other_parameters_are_left_alone():
    first, second = conv(), conv()
    second.prune_randomly(0.5)
    with torch.no_grad():
        second.weight.fill_(1)  # by hand, which a step of its own optimizer puts right
    bias = first.bias.detach().clone()
    steps(first, torch.optim.SGD(first.parameters(), lr=0.1))
    assert (second.weight == 1).all()
    assert (first.bias != bias).all()
    steps(second, torch.optim.SGD(second.parameters(), lr=0.1))
    assert (second.weight == 0).equal(second.mask == 0)


def test_buffers_move_with_the_layer():
    layer = conv().to("meta")
    assert {each.device.type for each in layer.buffers()} == {"meta"}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # PyTorch's, which hides it from users
def test_a_compiled_model_counts_and_keeps_its_zeros():
    net = nn.Sequential(conv(), nn.ReLU(), DSConv2d(4, 2, 3))
    compiled = torch.compile(net, backend="eager")
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    for _ in range(21):
        x = torch.randn(2, 3, 9, 9)
        expected = METHODS[0](net[0], x, net[0].eval()(x))
        net.train()
        optimizer.zero_grad()
        (compiled(x) - 1).square().mean().backward()
        optimizer.step()
    assert net[0].learning_iterations == net[2].learning_iterations == 21
    assert net[0].connections_tensor.equal(expected)
    for layer in (net[0], net[2]):
        layer.progress_connections()
    steps(compiled, optimizer)
    assert all((layer.weight == 0).equal(layer.mask == 0) for layer in (net[0], net[2]))
    whole = torch.compile(net.eval(), backend="eager", fullgraph=True)
    assert whole(x).equal(net(x))


# -- states and bad input ----------------------------------------------------------------------------------------------


def test_a_state_goes_through_a_file_that_holds_tensors_alone():
    layer = counted(conv())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = DSConv2d(3, 4, 5)
    other.load_state_dict(torch.load(file, weights_only=True))
    layer.progress_connections()
    other.progress_connections()
    assert same(snapshot(layer), snapshot(other))


@pytest.mark.parametrize("extra", [{}, {"stacked_conv.weight": torch.zeros(300, 1, 5, 5)}], ids=["dense", "notebook"])
def test_a_state_without_masks_is_loaded_and_prunes_nothing(extra):
    dense = nn.Conv2d(3, 4, 5)
    layer = counted(conv())
    layer.progress_connections()
    layer.load_state_dict(dense.state_dict() | extra)
    assert layer.weight.equal(dense.weight)
    assert (layer.mask == -1).all()
    assert (layer.learning_iterations, layer.connections_tensor.any()) == (0, False)


@pytest.mark.parametrize("extra", [torch.zeros(3, dtype=torch.int64), torch.tensor([-1, 0]), {"passes": 3}])
def test_a_damaged_state_is_refused(extra):
    layer = conv()
    with pytest.raises(StateError, match="number of forward passes"):
        layer.load_state_dict(layer.state_dict() | {"_extra_state": extra})


def refused(layer: DSConv2d | DSLinear, error: type[Exception], match: str) -> None:
    before = snapshot(layer)
    with pytest.raises(error, match=match):
        layer.progress_connections()
    assert same(before, snapshot(layer))


def test_progress_before_anything_was_counted_is_refused_and_so_is_a_second_one():
    layer = conv()
    refused(layer, OrderError, r"DSConv2d\(3, 4, .*no forward pass was counted.*there were 0")
    counted(layer).progress_connections()
    counted(layer)  # the second pass, which is not
    refused(layer, OrderError, r"DSConv2d\(3, 4, .*there were 2")


def test_progress_where_nothing_was_active_is_refused():
    layer = conv()
    layer.activity_threshold = 0.9999
    refused(counted(layer), ConfigurationError, r"DSConv2d\(3, 4, .*activity_threshold=0.9999")


def test_a_threshold_that_is_no_number_is_refused_by_its_name():
    layer = conv()
    layer.activity_threshold = "a"
    with pytest.raises(
        ConfigurationError, match=r"^DSConv2d\(3, 4, .*: activity_threshold: expected a number in .*'a'"
    ):
        counted(layer)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"k1": 4, "k2": 3}, r"DSLinear\(in_features=30.*k1=4 and k2=3 of slices of 30"),
        ({"k2": 31}, r"DSLinear\(in_features=30.*k1=3 and k2=31 of slices of 30"),
        ({"k1": 0}, r"DSLinear.*k1: expected an integer of at least 1, got 0"),
        ({"k2": 2.5}, r"DSLinear.*k2: expected an integer of at least 1, got 2.5"),
        ({"prune_dims": [0, 1]}, r"k2=4 of slices of 1 connections along prune_dims=\[0, 1\]"),
        ({"prune_dims": [2]}, r"DSLinear.*prune_dims=\[2\]; expected .* 0 to 1"),
        ({"prune_dims": [0, 0]}, r"prune_dims=\[0, 0\]"),
        ({"prune_dims": 0}, "prune_dims=0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(values, match):
    layer = counted(DSLinear(30, 4))
    for name, value in values.items():
        setattr(layer, name, value)
    refused(layer, ConfigurationError, match)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, "most"])
def test_a_fraction_that_cannot_be_is_refused(fraction):
    layer = conv()
    before = snapshot(layer)
    with pytest.raises(ConfigurationError, match="fraction"):
        layer.prune_randomly(fraction)
    assert same(before, snapshot(layer))


@pytest.mark.parametrize("seed", [-1, 1.5])
def test_a_seed_that_cannot_be_is_refused(seed):
    with pytest.raises(ConfigurationError, match="seed"):
        DSLinear(3, 3, seed=seed)


def test_the_layers_are_pytorchs_own_and_not_at_the_top_level():
    assert issubclass(DSConv2d, nn.Conv2d)
    assert issubclass(DSLinear, nn.Linear)
    assert not {"DSConv2d", "DSLinear"} & set(dir(gs))
    assert dst.DSConv2d is not DSConv2d
