"""Masks from aggregated activations: as PyTorch's experimental class where it is right, and right where it is not."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.ao.pruning._experimental.activation_sparsifier.activation_sparsifier import (
    ActivationSparsifier as TorchActivationSparsifier,
)

import gossamer as gs
from gossamer.activations import ActivationSparsifier


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.relu(self.conv(x)).flatten(1))


def add(before: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return before + x


def mean(x: torch.Tensor) -> torch.Tensor:
    return x.mean(0)


def above(x: torch.Tensor, threshold: float) -> torch.Tensor:
    return (x.abs() > threshold).to(x.dtype)


def batch(step: int, size: int = 4) -> torch.Tensor:
    return torch.randn(size, 3, 4, 4, generator=torch.Generator().manual_seed(step))


def make(kind: type = ActivationSparsifier, **options: object) -> tuple[Net, ActivationSparsifier]:
    net = Net()
    sparsifier = kind(net, **({"aggregate_fn": add, "reduce_fn": mean, "mask_fn": above, "threshold": 0.5} | options))
    sparsifier.register_layer(net.conv)
    sparsifier.register_layer(net.linear, threshold=1.0)
    return net, sparsifier


def test_it_is_as_the_class_of_torch_where_that_is_right() -> None:
    pairs = [make(), make(TorchActivationSparsifier)]
    for step in range(3):
        for net, _ in pairs:
            net(batch(step))
    for name in ("conv", "linear"):
        ours, theirs = (sparsifier.get_mask(name) for _, sparsifier in pairs)
        assert ours.equal(theirs)  # ones, before a step
    for _, sparsifier in pairs:
        sparsifier.step()
    for name in ("conv", "linear"):
        ours, theirs = (sparsifier.get_mask(name=name) for _, sparsifier in pairs)
        assert ours.equal(theirs)
        assert 0 < ours.sum() < ours.numel()
    for _, sparsifier in pairs:
        sparsifier.squash_mask()
    ours, theirs = (net(batch(9)) for net, _ in pairs)
    assert ours.equal(theirs)
    for key in ("sparse_config", "hook_state"):
        groups = [{name: group[key] for name, group in sparsifier.data_groups.items()} for _, sparsifier in pairs]
        assert groups[0] == groups[1]


def test_masks_are_those_of_the_formula_by_hand() -> None:
    net, sparsifier = make()
    inputs = [batch(step) for step in range(3)]
    for x in inputs:
        net(x)
    sparsifier.step()
    assert sparsifier.get_mask(layer=net.conv).equal((sum(inputs).mean(0).abs() > 0.5).float())
    sparsifier.squash_mask()
    plain = Net()
    x = batch(5)
    hidden = torch.relu(plain.conv(x * sparsifier.get_mask("conv"))).flatten(1)
    torch.testing.assert_close(net(x), plain.linear(hidden * sparsifier.get_mask("linear")))


@pytest.mark.parametrize("aggregate", [torch.maximum, torch.minimum, torch.mul], ids=lambda fn: fn.__name__)
def test_aggregates_start_from_the_first_tensor(aggregate: object) -> None:
    net, sparsifier = make(aggregate_fn=aggregate)
    inputs = [batch(step) for step in range(3)]
    for x in inputs:
        net(x)
    expected = inputs[0]
    for x in inputs[1:]:
        expected = aggregate(expected, x)
    assert sparsifier.data_groups["conv"]["data"].equal(expected)
    assert not sparsifier.data_groups["linear"]["data"].requires_grad  # nothing keeps the graph


@pytest.mark.parametrize("sizes", [(4, 4, 2), (2, 4, 4), (1, 3, 2)])
def test_batches_of_other_sizes_are_aggregated_row_by_row(sizes: tuple[int, ...]) -> None:
    net, sparsifier = make()
    inputs = [batch(step, size) for step, size in enumerate(sizes)]
    for x in inputs:
        net(x)
    expected = torch.zeros(max(sizes), 3, 4, 4)
    for x in inputs:
        expected[: len(x)] += x
    torch.testing.assert_close(sparsifier.data_groups["conv"]["data"], expected)


@pytest.mark.parametrize(("features", "dim"), [([0, 2], 1), ([[0, 1], [2]], 1), ([1, 3], -1), ([0], 2)])
def test_features_have_masks_of_their_own_and_others_pass(features: list[object], dim: int) -> None:
    net = Net()
    sparsifier = ActivationSparsifier(net, add, mean, above, threshold=0.5)
    sparsifier.register_layer(net.conv, features=features, feature_dim=dim)
    x = batch(0)
    net(x)
    net(batch(1))
    sparsifier.step()
    expected = x.clone()
    for feature, mask in zip(features, sparsifier.get_mask("conv"), strict=True):
        index = torch.tensor(feature).reshape(-1)
        part = (batch(0) + batch(1)).index_select(dim, index)
        assert mask.equal((part.mean(0).abs() > 0.5).float())
        expected.index_copy_(dim, index, x.index_select(dim, index) * mask)
    sparsifier.squash_mask()
    before = x.clone()
    seen = []
    net.conv.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(x)
    assert seen[0].equal(expected)
    assert x.equal(before)  # the caller's input is not written to


class Several(nn.Module):
    def forward(self, x: torch.Tensor, scale: float, *, shift: torch.Tensor | None = None) -> torch.Tensor:
        return x * scale + (0 if shift is None else shift)


def test_other_inputs_and_keywords_pass() -> None:
    net = nn.ModuleDict({"layer": Several()})
    sparsifier = ActivationSparsifier(net, add, mean, above, threshold=0.5)
    sparsifier.register_layer(net["layer"])
    x, shift = torch.randn(4, 6), torch.randn(4, 6)
    net["layer"](x, 2.0, shift=shift)
    sparsifier.step()
    sparsifier.squash_mask()
    mask = (x.mean(0).abs() > 0.5).float()
    torch.testing.assert_close(net["layer"](x, 2.0, shift=shift), x * mask * 2 + shift)
    torch.testing.assert_close(net["layer"](x=x, scale=2.0), x * mask * 2)


def test_masks_survive_forwards_copies_and_files() -> None:
    net, sparsifier = make()
    net(batch(0))
    sparsifier.step()
    masks = {name: sparsifier.get_mask(name).clone() for name in ("conv", "linear")}
    net(batch(1))
    for name, mask in masks.items():
        assert sparsifier.get_mask(name).equal(mask)
    sparsifier.step()
    sparsifier.squash_mask()
    expected = net(batch(2))
    for net_2, _ in (copy.deepcopy((net, sparsifier)), pickle.loads(pickle.dumps((net, sparsifier)))):
        assert net_2(batch(2)).equal(expected)
        assert len(net_2.conv._forward_pre_hooks) == 1
    file = io.BytesIO()
    torch.save(sparsifier.state_dict(), file)
    file.seek(0)
    net_3, other = make()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert net_3(batch(2)).equal(expected)
    other.load_state_dict(other.state_dict())  # into itself
    assert len(net_3.conv._forward_pre_hooks) == 1
    assert net_3(batch(2)).equal(expected)


@pytest.mark.parametrize("attach", [True, False])
def test_a_state_has_hooks_as_it_was_saved_with(attach: bool) -> None:
    net, sparsifier = make()
    net(batch(0))
    sparsifier.step()
    sparsifier.squash_mask(attach_sparsify_hook=attach)
    net_2, other = make()
    other.load_state_dict(sparsifier.state_dict())
    assert len(net_2.conv._forward_pre_hooks) == attach
    assert net_2(batch(1)).equal(net(batch(1)))


def test_aggregation_goes_on_where_it_was_saved() -> None:
    net, sparsifier = make()
    net(batch(0))
    net_2, other = make()
    other.load_state_dict(sparsifier.state_dict())
    for each in (net, net_2):
        each(batch(1))
    for each in (sparsifier, other):
        each.step()
    assert other.get_mask("conv").equal(sparsifier.get_mask("conv"))


def test_layers_can_be_taken_out_and_registered_anew() -> None:
    net, sparsifier = make()
    before = Net()(batch(0))
    sparsifier.register_layer(net.conv, threshold=0.1)
    assert len(net.conv._forward_pre_hooks) == 1
    assert sparsifier.data_groups["conv"]["sparse_config"] == {"threshold": 0.1}
    assert sparsifier.defaults["sparse_config"] == {"threshold": 0.5}
    for name in ("conv", "linear"):
        sparsifier.unregister_layer(name)
    assert net(batch(0)).equal(before)
    assert not net.conv._forward_pre_hooks
    assert (sparsifier.state, sparsifier.data_groups) == ({}, {})


def nan(x: torch.Tensor, threshold: float) -> torch.Tensor:
    return x * torch.nan


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_fn": nan}, gs.NonFiniteError, "conv: mask_fn returned a mask with NaN"),
        ({"mask_fn": lambda x, threshold: x[:2]}, gs.ConfigurationError, r"conv: .* shape \(2, 4, 4\), .* inputs of"),
        ({"mask_fn": lambda x, threshold: 1}, gs.ConfigurationError, "conv: mask_fn returned int, expected a tensor"),
        ({"reduce_fn": lambda x: None}, gs.ConfigurationError, "conv: reduce_fn returned NoneType"),
    ],
)
def test_functions_that_return_what_cannot_be_used_are_named_and_change_nothing(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    net, sparsifier = make(**options)
    net(batch(0))
    masks = {name: sparsifier.get_mask(name) for name in ("conv", "linear")}
    with pytest.raises(error, match=message):
        sparsifier.step()
    assert all(sparsifier.get_mask(name) is mask for name, mask in masks.items())
    assert sparsifier.data_groups["conv"]["data"] is not None


def test_bad_input_is_named() -> None:
    net, sparsifier = make()
    with pytest.raises(gs.OrderError, match="conv: nothing was aggregated since the last step"):
        sparsifier.step()
    with pytest.raises(gs.OrderError, match="conv: has no mask yet"):
        sparsifier.get_mask("conv")
    with pytest.raises(gs.OrderError, match="conv: has no mask yet"):
        sparsifier.squash_mask()
    with pytest.raises(gs.ConfigurationError, match=r"no layer 'head' .*registered are \['conv', 'linear'\]"):
        sparsifier.get_mask("head")
    with pytest.raises(gs.ConfigurationError, match="get_mask: give the name"):
        sparsifier.get_mask()
    with pytest.raises(gs.ConfigurationError, match="this Linear is not a module of the model"):
        sparsifier.register_layer(nn.Linear(2, 2))
    with pytest.raises(gs.ConfigurationError, match="conv: mask_fn is None; give a function"):
        ActivationSparsifier(net, add, mean).register_layer(net.conv)
    with pytest.raises(gs.ConfigurationError, match="need a feature_dim"):
        sparsifier.register_layer(net.conv, features=[1])
    sparsifier.register_layer(net.conv, features=[3], feature_dim=1)
    with pytest.raises(gs.ConfigurationError, match=r"conv: feature \[3\] is out of range; inputs have 3"):
        net(batch(0))
    sparsifier.register_layer(net.conv, features=[0], feature_dim=4)
    with pytest.raises(gs.ConfigurationError, match=r"conv: feature_dim=4, but inputs have shape \(4, 3, 4, 4\)"):
        net(batch(0))
    net, sparsifier = make()
    net(batch(0))
    with pytest.raises(gs.ConfigurationError, match=r"conv: inputs have shape \(4, 3, 5, 4\), and earlier ones"):
        net.conv(torch.randn(4, 3, 5, 4))
    wrong = ActivationSparsifier(net, lambda a, b: a[0], mean, above, threshold=0.5)
    wrong.register_layer(net.linear)
    net.linear(torch.randn(2, 16))
    with pytest.raises(gs.ConfigurationError, match=r"linear: aggregate_fn returned \(16,\), expected .* \(2, 16\)"):
        net.linear(torch.randn(2, 16))
    for state in ({}, {"state": {}}, {"state": {"x": {}}, "data_groups": {"x": {"hook_state": "aggregate"}}}):
        with pytest.raises(gs.StateError):
            sparsifier.load_state_dict(state)
