"""Masks from aggregated activations: as PyTorch's experimental class where it is right, and right where it is not."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.pruning._experimental.activation_sparsifier.activation_sparsifier import (
    ActivationSparsifier as TorchActivationSparsifier,
)
from torch.utils.checkpoint import checkpoint

import gossamer as gs
from gossamer.activations import ActivationSparsifier, functions
from gossamer.checkpoint import load_tree, save_tree


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


# -- defects of the class of torch -----------------------------------------------------------------------------------

Kind = type[ActivationSparsifier]
DEFECTS: dict[str, Callable[[Kind], None]] = {}


def defect(scenario: Callable[[Kind], None]) -> Callable[[Kind], None]:
    DEFECTS[scenario.__name__] = scenario
    return scenario


@defect
def aggregates_keep_no_graph(kind: Kind) -> None:
    net, sparsifier = make(kind)
    net(batch(0))
    assert not sparsifier.data_groups["linear"]["data"].requires_grad


@defect
def a_smaller_last_batch_is_aggregated(kind: Kind) -> None:
    net, sparsifier = make(kind)
    net(batch(0, 4))
    net(batch(1, 2))
    expected = batch(0, 4)
    expected[:2] += batch(1, 2)
    assert sparsifier.data_groups["conv"]["data"].equal(expected)


@defect
def a_step_before_any_forward_pass_is_refused(kind: Kind) -> None:
    _, sparsifier = make(kind)
    with pytest.raises(gs.OrderError, match="conv: nothing was aggregated"):
        sparsifier.step()


@defect
def features_may_be_lists(kind: Kind) -> None:
    net, sparsifier = make(kind)
    sparsifier.unregister_layer("conv")
    sparsifier.register_layer(net.conv, features=[[0, 2], [1]], feature_dim=1)
    net(batch(0))
    sparsifier.step()
    assert [tuple(mask.shape) for mask in sparsifier.get_mask("conv")] == [(2, 4, 4), (1, 4, 4)]


@defect
def inputs_with_features_are_not_written_to(kind: Kind) -> None:
    net, sparsifier = make(kind)
    sparsifier.unregister_layer("conv")
    sparsifier.register_layer(net.conv, features=[0], feature_dim=1)
    net(batch(0))
    sparsifier.step()
    sparsifier.squash_mask()
    x = batch(1)
    net(x)
    assert x.equal(batch(1))


@defect
def other_inputs_of_a_layer_pass(kind: Kind) -> None:
    net = nn.ModuleDict({"layer": Several()})
    sparsifier = kind(net, add, mean, above, threshold=0.5)
    sparsifier.register_layer(net["layer"])
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    net["layer"](x, 2.0)
    sparsifier.step()
    sparsifier.squash_mask()
    assert net["layer"](x, 2.0).equal(x * (x.mean(0).abs() > 0.5) * 2)


@defect
def aggregation_starts_with_the_first_batch(kind: Kind) -> None:
    net, sparsifier = make(kind, aggregate_fn=torch.minimum)
    for step in range(2):
        net(batch(step).abs())
    assert sparsifier.data_groups["conv"]["data"].equal(torch.minimum(batch(0).abs(), batch(1).abs()))


@defect
def the_next_forward_pass_leaves_masks(kind: Kind) -> None:
    net, sparsifier = make(kind)
    net(batch(0))
    sparsifier.step()
    net(batch(1))
    assert sparsifier.get_mask("conv").equal((batch(0).mean(0).abs() > 0.5).float())


@defect
def what_was_squashed_without_masks_is_loaded_without(kind: Kind) -> None:
    net, sparsifier = make(kind)
    net(batch(0))
    sparsifier.step()
    sparsifier.squash_mask(attach_sparsify_hook=False)
    net_2, other = make(kind)
    for name in ("conv", "linear"):
        other.unregister_layer(name)
    other.load_state_dict(sparsifier.state_dict())
    assert not net_2.conv._forward_pre_hooks


@defect
def a_state_loaded_where_it_came_from_leaves_one_hook(kind: Kind) -> None:
    net, sparsifier = make(kind)
    net(batch(0))
    sparsifier.load_state_dict(sparsifier.state_dict())
    assert len(net.conv._forward_pre_hooks) == 1


@defect
def it_can_be_pickled(kind: Kind) -> None:
    net, sparsifier = make(kind)
    net(batch(0))
    sparsifier.step()
    sparsifier.squash_mask()
    net_2, _ = pickle.loads(pickle.dumps((net, sparsifier)))
    assert net_2(batch(1)).equal(net(batch(1)))


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_of_the_class_of_torch_is_none_here(name: str) -> None:
    DEFECTS[name](ActivationSparsifier)
    try:
        DEFECTS[name](TorchActivationSparsifier)
    except Exception:
        return
    pytest.fail("the class of torch passes too, so that this shows nothing")


# -- what it does ----------------------------------------------------------------------------------------------------


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


def test_masks_need_no_functions_to_be_loaded(tmp_path: Path) -> None:
    net = Net()
    sparsifier = ActivationSparsifier(net, add, mean, above, threshold=0.5)
    sparsifier.register_layer(net.conv, features=torch.tensor([[0, 2], [1, 1]])[:1], feature_dim=1)
    sparsifier.register_layer(net.linear)
    net(batch(0))
    sparsifier.step()
    sparsifier.squash_mask()
    save_tree(tmp_path / "masks.safetensors", sparsifier.state_dict())
    net_2 = Net()
    other = ActivationSparsifier(net_2)
    other.load_state_dict(load_tree(tmp_path / "masks.safetensors"))
    assert net_2(batch(1)).equal(net(batch(1)))
    assert not net_2(batch(1)).equal(Net()(batch(1)))
    assert other.data_groups["conv"]["features"] == [[0, 2]]


def test_a_state_of_the_class_of_torch_is_loaded() -> None:
    net, theirs = make(TorchActivationSparsifier)
    theirs.unregister_layer("conv")
    theirs.register_layer(net.conv, features=[0, 2], feature_dim=1)
    net(batch(0))
    theirs.step()
    theirs.squash_mask()
    net_2 = Net()
    ActivationSparsifier(net_2).load_state_dict(theirs.state_dict())
    x = batch(1)
    assert net_2(x).equal(net(batch(1)))
    assert not net_2(x).equal(Net()(x))


@pytest.mark.parametrize("registered", [False, True])
def test_a_watched_state_of_the_class_of_torch_goes_on_with_its_functions(registered: bool) -> None:
    net, theirs = make(TorchActivationSparsifier)
    theirs.unregister_layer("conv")
    theirs.register_layer(net.conv, features=(0, 2), feature_dim=1, threshold=0.3)
    net(batch(0))
    net_2 = Net()
    ours = ActivationSparsifier(net_2)
    if registered:
        ours.register_layer(net_2.conv, add, mean, above, (0, 2), 1, threshold=0.3)
    ours.load_state_dict(theirs.state_dict())
    for each, sparsifier in ((net, theirs), (net_2, ours)):
        each(batch(1))
        sparsifier.step()
    assert ours.get_mask("linear").equal(theirs.get_mask("linear"))
    for mask, expected in zip(ours.get_mask("conv"), theirs.get_mask("conv"), strict=True):
        assert mask.equal(expected)


def test_masks_that_are_not_known_yet_are_a_value_error_as_in_the_class_of_torch() -> None:
    for kind in (ActivationSparsifier, TorchActivationSparsifier):
        _, sparsifier = make(kind)
        with pytest.raises(ValueError, match=r"conv: has no mask yet|shape unknown"):
            sparsifier.get_mask("conv")


@pytest.mark.parametrize("features", [(0, 2), np.array([0, 2]), [np.int64(0), np.int32(2)], torch.tensor([0, 2])])
def test_features_may_be_any_integers(features: object) -> None:
    net = Net()
    sparsifier = ActivationSparsifier(net, add, mean, above, threshold=0.5)
    sparsifier.register_layer(net.conv, features=features, feature_dim=np.int64(1))
    net(batch(0))
    sparsifier.step()
    assert [mask.shape for mask in sparsifier.get_mask("conv")] == [(1, 4, 4)] * 2
    assert (sparsifier.data_groups["conv"]["features"], sparsifier.data_groups["conv"]["feature_dim"]) == ([0, 2], 1)


@pytest.mark.parametrize(
    ("saved", "here", "said"),
    [
        ("mean", "max", r"aggregate of Mean\(.*decay=1.0\), and aggregate_fn is Max"),
        ("max", "mean", r"aggregate of Max\(.*\), and aggregate_fn is Mean"),
        ("mean", "running_mean", r"aggregate of Mean\(.*decay=1.0\), and aggregate_fn is Mean\(.*decay=0.9\)"),
        (add, "quantile", r"aggregate of add, and aggregate_fn is Quantile"),
        (add, torch.maximum, r"aggregate of add, and aggregate_fn is .*maximum"),
    ],
)
def test_what_one_aggregate_kept_is_not_loaded_into_another(saved: object, here: object, said: str) -> None:
    net, sparsifier = make(aggregate_fn=saved)
    net(batch(0))
    net_2, other = make(aggregate_fn=here)
    state = pickle.loads(pickle.dumps(sparsifier.state_dict()))
    refuses(net_2, other, gs.StateError, f"conv: the state has an {said}", lambda: other.load_state_dict(state))


def test_layers_of_one_side_are_left_as_they_are_unless_strict() -> None:
    net, sparsifier = make()
    net(batch(0))
    state = sparsifier.state_dict()
    for part in state.values():
        part["head"] = part.pop("linear")
    _, other = make()
    other.load_state_dict(state, strict=False)
    assert other.data_groups["conv"]["data"].equal(batch(0))
    assert list(other.data_groups) == ["linear", "conv"]
    assert "data" not in other.data_groups["linear"]


def test_a_mask_is_not_the_tensor_that_the_function_returned() -> None:
    given = torch.ones(3, 4, 4)
    net = Net()
    sparsifier = ActivationSparsifier(net, add, mean, lambda x: given)
    sparsifier.register_layer(net.conv)
    net(batch(0))
    sparsifier.step()
    given.zero_()
    assert sparsifier.get_mask("conv").equal(torch.ones(3, 4, 4))


def test_a_copy_of_the_model_alone_is_masked() -> None:
    net, sparsifier = make()
    net(batch(0))
    sparsifier.step()
    sparsifier.squash_mask()
    copied = copy.deepcopy(net)
    sparsifier.unregister_layer("conv")
    sparsifier.unregister_layer("linear")
    assert net(batch(1)).equal(Net()(batch(1)))
    assert not copied(batch(1)).equal(Net()(batch(1)))


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
    with pytest.warns(UserWarning, match="conv: is registered already, and begins anew"):
        sparsifier.register_layer(net.conv, threshold=0.1)
    assert len(net.conv._forward_pre_hooks) == 1
    assert sparsifier.data_groups["conv"]["sparse_config"] == {"threshold": 0.1}
    assert sparsifier.defaults["sparse_config"] == {"threshold": 0.5}
    for name in ("conv", "linear"):
        sparsifier.unregister_layer(name)
    assert net(batch(0)).equal(before)
    assert not net.conv._forward_pre_hooks
    assert (sparsifier.state, sparsifier.data_groups) == ({}, {})


def test_masked_values_are_zero_whatever_was_there() -> None:
    seen = []
    net = nn.Sequential(nn.Identity())
    sparsifier = ActivationSparsifier(net, add, mean, above, threshold=0.5)
    sparsifier.register_layer(net[0])
    net(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    sparsifier.step()
    sparsifier.squash_mask()
    net[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.tensor([[-1.0, torch.nan, -torch.inf, -3.0]], requires_grad=True)
    net(x).nan_to_num().sum().backward()
    assert seen[0].tolist() == [[-1, 0, 0, 0]]
    assert torch.signbit(seen[0]).tolist() == [[True, False, False, False]]
    assert x.grad.tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_activations_stays(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Identity())
    sparsifier = ActivationSparsifier(net, "mean", "batch_mean", "top_fraction", fraction=0.5).register_layers("0")
    x = torch.tensor([[1.0, 4.0], [3.0, 1.0]]).to(dtype)
    net(x)
    sparsifier.step()
    sparsifier.squash_mask()
    assert net(x).equal(torch.tensor([[0.0, 4.0], [0.0, 1.0]]).to(dtype))


class Checkpointed(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_a_layer_counts_once_where_activations_are_computed_again() -> None:
    net = Checkpointed()
    sparsifier = ActivationSparsifier(net, add, mean, above, threshold=0.5)
    sparsifier.register_layer(net.conv)
    net(batch(0)).sum().backward()
    assert sparsifier.data_groups["conv"]["data"].equal(batch(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_in_one_graph_it_aggregates_and_masks() -> None:
    results = []
    for compiled in (False, True):
        net = Net()
        forward = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
        sparsifier = ActivationSparsifier(net, "mean", "batch_mean", "top_fraction", fraction=0.5)
        sparsifier.register_layers("conv", features=[0, [1, 2]], feature_dim=1)
        sparsifier.register_layers("linear")
        for step in range(3):
            forward(batch(step))
        sparsifier.step()
        sparsifier.squash_mask()
        results.append((forward(batch(9)), *sparsifier.get_mask("conv"), sparsifier.get_mask("linear")))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)
    assert not results[0][0].equal(Net()(batch(9)))


# -- ready-made functions ----------------------------------------------------------------------------------------------


def test_the_common_use_is_one_line() -> None:
    net = Net()
    sparsifier = gs.ActivationSparsifier(net, "mean", "batch_mean", "top_fraction", fraction=0.25).register_layers()
    inputs = [batch(step, size) for step, size in enumerate((4, 4, 3))]
    for x in inputs:
        net(x)
    hidden = [torch.relu(Net().conv(x)).flatten(1) for x in inputs]
    sparsifier.step()
    for name, each in (("conv", inputs), ("linear", hidden)):
        sizes = torch.cat(each).mean(0).abs()
        mask = sparsifier.get_mask(name)
        assert mask.sum() == sizes.numel() // 4
        assert sizes[mask[0]].min() > sizes[~mask[0]].max()


def test_a_mask_by_channel_lets_whole_channels_pass() -> None:
    net = Net()
    sparsifier = ActivationSparsifier(net, "max", "channel_mean", "top_fraction", fraction=0.7)
    sparsifier.register_layers("conv")
    x = torch.zeros(2, 3, 4, 4)
    x[:, 0], x[0, 1, 1, 1], x[:, 2] = 1, 5, -2
    net(x)
    sparsifier.step()
    assert sparsifier.get_mask("conv").tolist() == [[[[True]], [[False]], [[True]]]]


def test_functions_may_be_set_up_and_mixed_with_others() -> None:
    net = Net()
    sparsifier = ActivationSparsifier(net, functions.Mean(0.5, absolute=True), mean, "magnitude")
    sparsifier.register_layer(net.conv, threshold=0.7)
    for step in range(3):
        net(batch(step))
    sparsifier.step()
    expected = sum(weight * batch(step).abs().mean(0) for step, weight in enumerate((1 / 7, 2 / 7, 4 / 7)))
    assert sparsifier.get_mask("conv").equal(expected > 0.7)


def test_layers_are_registered_all_or_none() -> None:
    net = Net()
    sparsifier = ActivationSparsifier(net, "mean", "batch_mean")
    with pytest.raises(gs.ConfigurationError, match=r"conv: mask_fn with {}: missing a required argument: 'fraction'"):
        sparsifier.register_layers(mask_fn="top_fraction")
    with pytest.raises(gs.ConfigurationError, match="sites: 'lin' matches no"):
        sparsifier.register_layers(["conv", "lin"], mask_fn="top_fraction", fraction=0.5)
    assert (sparsifier.state, sparsifier.data_groups) == ({}, {})
    assert not net.conv._forward_pre_hooks
    sparsifier.register_layers(nn.Linear, mask_fn="top_fraction", fraction=0.5)
    assert list(sparsifier.data_groups) == ["linear"]
    assert sparsifier.data_groups["linear"]["sparse_config"] == {"fraction": 0.5}


@pytest.mark.parametrize(
    "aggregate", ["max", "mean", "quantile", torch.maximum, lambda one, other: other], ids=lambda each: str(each)[:9]
)
def test_what_is_kept_shares_nothing_with_what_enters_the_layer(aggregate: object) -> None:
    net = nn.Sequential(nn.ReLU(inplace=True))
    sparsifier = ActivationSparsifier(net, aggregate, mean, above, threshold=0.5).register_layers("0", mask_fn=above)
    for step in range(2):
        x = batch(step).sub_(1)
        net(x)
        before = sparsifier.data_groups["0"]["data"].clone()
        x.zero_()
        assert sparsifier.data_groups["0"]["data"].equal(before)
    assert (before < 0).any()  # and not rectified


def test_functions_that_write_into_what_they_get_change_nothing_else() -> None:
    net, _ = make(aggregate_fn=lambda one, other: other.add_(one))
    x = batch(1)
    net(batch(0))
    net(x)
    assert x.equal(batch(1))


# -- bad input ---------------------------------------------------------------------------------------------------------


def same(one: object, two: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.nan_to_num().equal(two.nan_to_num())
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return isinstance(two, list) and len(one) == len(two) and all(map(same, one, two))
    return one == two


def refuses(
    net: nn.Module, sparsifier: ActivationSparsifier, error: type[Exception], message: str, action: Callable[[], object]
) -> None:
    """The action raises this, and afterwards state and hooks are as they were."""
    state = copy.deepcopy(sparsifier.state_dict())
    hooks = [len(module._forward_pre_hooks) for module in net.modules()]
    with pytest.raises(error, match=message):
        action()
    assert same(sparsifier.state_dict(), state)
    assert [len(module._forward_pre_hooks) for module in net.modules()] == hooks


def nan(x: torch.Tensor, threshold: float) -> torch.Tensor:
    return x * torch.nan


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_fn": nan}, gs.NonFiniteError, "conv: mask_fn returned NaN"),
        ({"mask_fn": lambda x, threshold: x[:2]}, gs.ConfigurationError, r"conv: .* shape \(2, 4, 4\), .* inputs of"),
        ({"mask_fn": lambda x, threshold: 1}, gs.ConfigurationError, "conv: mask_fn returned int, expected a tensor"),
        ({"reduce_fn": lambda x: None}, gs.ConfigurationError, "conv: reduce_fn returned NoneType"),
        ({"reduce_fn": lambda x: x * torch.nan}, gs.NonFiniteError, "conv: reduce_fn returned NaN"),
        (
            {"mask_fn": lambda x, threshold: functions.top_fraction(x, 0.001)},
            gs.ConfigurationError,
            r"conv: fraction=0.001 of 48 lets none pass; give at least 0\.02083",
        ),
        (
            {"mask_fn": lambda x, threshold: functions.top_fraction(x, 0.5, dim=3)},
            gs.ConfigurationError,
            r"conv: dim=3: what was reduced has shape \(3, 4, 4\)",
        ),
    ],
)
def test_functions_that_return_what_cannot_be_used_are_named_and_change_nothing(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    net, sparsifier = make(**options)
    net(batch(0))
    refuses(net, sparsifier, error, message, sparsifier.step)


def in_place_and_broken(one: torch.Tensor, other: torch.Tensor | float = 0.0, threshold: float = 0.5) -> torch.Tensor:
    one.add_(1)
    if isinstance(other, torch.Tensor):
        other.add_(1)
    raise KeyError("broken")


@pytest.mark.parametrize("key", ["aggregate_fn", "reduce_fn", "mask_fn"])
def test_functions_that_raise_are_named_with_their_layer_and_change_nothing(key: str) -> None:
    net, sparsifier = make(**({"reduce_fn": lambda x: x.div_(10).mean(0)} | {key: in_place_and_broken}))
    net.conv(batch(0))
    net.linear(torch.ones(2, 16))
    x = batch(1)
    action = (lambda: net(x)) if key == "aggregate_fn" else sparsifier.step
    refuses(net, sparsifier, gs.ConfigurationError, f"conv: {key} raised KeyError: 'broken'", action)
    assert x.equal(batch(1))


def test_quantiles_of_nan_are_refused_as_other_aggregates_are() -> None:
    for aggregate in ("mean", "max", "quantile"):
        net, sparsifier = make(aggregate_fn=aggregate)
        x = batch(0)
        x[0, 0, 0, 0] = torch.nan
        net.conv(x)
        net.linear(torch.ones(2, 16))
        refuses(net, sparsifier, gs.NonFiniteError, "conv: reduce_fn returned NaN", sparsifier.step)


@pytest.mark.parametrize(
    ("data", "configs", "message"),
    [
        (None, {}, "conv: data: expected a tensor, got None"),
        (3, {}, "conv: data: expected a tensor, got int"),
        ([torch.ones(1), torch.ones(1)], {}, "conv: data: expected a tensor, got Tensor, Tensor"),
        (torch.ones(2, 3, 4, 4), None, "conv: configs: expected a dict of functions, .* got None"),
        (torch.ones(2, 3, 4, 4), {"sparse_config": None}, "conv: configs: .* got {'sparse_config': None}"),
        (torch.ones(2, 3, 4, 4), {"mask_fn": 3}, "conv: mask_fn raised TypeError: 'int' object is not callable"),
    ],
)
def test_masks_are_made_of_the_right_data_alone(data: object, configs: object, message: str) -> None:
    net, sparsifier = make()
    refuses(net, sparsifier, gs.ConfigurationError, message, lambda: sparsifier.update_mask("conv", data, configs))


def test_masks_of_features_are_made_of_one_aggregate_for_each() -> None:
    net = Net()
    sparsifier = ActivationSparsifier(net, add, mean, above, threshold=0.5)
    sparsifier.register_layer(net.conv, features=[0, 1], feature_dim=1)
    parts = [torch.full((1, 1, 4, 4), value) for value in (0.0, 1.0)]
    message = "conv: data: expected a list of 2 tensors, one for each feature, got Tensor"
    refuses(net, sparsifier, gs.ConfigurationError, message, lambda: sparsifier.update_mask("conv", parts[1:], {}))
    sparsifier.update_mask("conv", parts, {"sparse_config": {"threshold": -1.0}})  # the others are the layer's
    assert [mask.mean() for mask in sparsifier.get_mask("conv")] == [1, 1]
    sparsifier.update_mask("conv", parts, {})
    assert [mask.mean() for mask in sparsifier.get_mask("conv")] == [0, 1]


@pytest.mark.parametrize(
    ("message", "action"),
    [
        ("conv: nothing was aggregated since the last step", lambda net, it: it.step()),
        ("conv: has no mask yet", lambda net, it: it.get_mask("conv")),
        ("conv: has no mask yet", lambda net, it: it.squash_mask()),
        (r"no layer 'head' .*registered are \['conv', 'linear'\]", lambda net, it: it.get_mask("head")),
        ("no layer 'head' is registered", lambda net, it: it.update_mask("head", torch.ones(1), {})),
        ("no layer 'head' is registered", lambda net, it: it.unregister_layer("head")),
        ("get_mask: give the name", lambda net, it: it.get_mask()),
        ("this Linear is not a module of the model", lambda net, it: it.register_layer(nn.Linear(2, 2))),
        (
            "conv: mask_fn is None; give a function or one of 'magnitude'",
            lambda net, it: ActivationSparsifier(net, add, mean).register_layer(net.conv),
        ),
        (
            "linear: aggregate_fn is 'maen'; .*'quantile', .*did you mean 'mean'",
            lambda net, it: it.register_layer(net.linear, aggregate_fn="maen"),
        ),
        (
            r"conv: mask_fn with \{'threshold': 0.5, 'fraction': 7\}: got an unexpected keyword argument",
            lambda net, it: it.register_layer(net.conv, mask_fn="magnitude", fraction=7),
        ),
        *(
            (
                rf"threshold: expected a number in \[0, inf\), got {value!r}",
                lambda net, it, value=value: it.register_layer(net.conv, mask_fn="magnitude", threshold=value),
            )
            for value in ("0.5", None, float("nan"), -1.0)
        ),
        (
            r"conv: mask_fn with {'fraction': 7}: fraction: expected a number in \[0, 1\], got 7",
            lambda net, it: ActivationSparsifier(
                net, "mean", "batch_mean", "top_fraction", fraction=7
            ).register_layers(),
        ),
        *(
            (
                r"conv: features=\[.*; give integers, or lists of them",
                lambda net, it, features=features: it.register_layer(net.conv, features=features, feature_dim=1),
            )
            for features in ([], [[]], [[[0, 1]]], ["a"])
        ),
        (
            r"features=\[1\] need a feature_dim, an integer; got 1.5",
            lambda net, it: it.register_layer(net.conv, features=[1], feature_dim=1.5),
        ),
        ("conv: reduce_fn is 3; give a function", lambda net, it: it.register_layer(net.conv, reduce_fn=3)),
        (r"features=\[1\] need a feature_dim", lambda net, it: it.register_layer(net.conv, features=[1])),
        (
            r"conv: features=\[1\.5\]; give integers",
            lambda net, it: it.register_layer(net.conv, features=[1.5], feature_dim=1),
        ),
        ("conv: features=3; give integers", lambda net, it: it.register_layer(net.conv, features=3, feature_dim=1)),
        (
            r"mask_fn with \{'threshold': 0.5, 'q': 3\}: got an unexpected keyword argument 'q'",
            lambda net, it: it.register_layer(net.conv, q=3),
        ),
        ("conv: got activations of .* dtype torch.int64", lambda net, it: net.conv(torch.ones(1, 3, 4, 4).long())),
        (r"linear: got activations of shape \(\)", lambda net, it: net.linear(torch.tensor(1.0))),
        ("linear: was called without a tensor", lambda net, it: net.linear(3)),
    ],
)
def test_bad_input_is_named_and_changes_nothing(message: str, action: Callable[..., object]) -> None:
    net, sparsifier = make()
    refuses(net, sparsifier, gs.GossamerError, message, lambda: action(net, sparsifier))


@pytest.mark.parametrize(
    ("message", "options", "x"),
    [
        (r"conv: feature \[3\] is out of range; inputs have 3", {"features": [0, 3], "feature_dim": 1}, batch(1)),
        (r"conv: feature \[-1\] is out of range", {"features": [[0], [-1]], "feature_dim": 1}, batch(1)),
        (r"conv: feature_dim=4, but .* \(4, 3, 4, 4\)", {"features": [0], "feature_dim": 4}, batch(1)),
        (r"conv: inputs have shape \(4, 3, 5, 4\), and earlier ones \(…, 3, 4, 4\)", {}, torch.ones(4, 3, 5, 4)),
        (r"conv: aggregate_fn returned \(3, 4, 4\), .* \(4, 3, 4, 4\)", {"aggregate_fn": lambda a, b: a[0]}, batch(1)),
        ("conv: aggregate_fn returned int", {"aggregate_fn": lambda a, b: 1}, batch(1)),
    ],
)
def test_inputs_that_cannot_be_aggregated_are_named_and_change_nothing(
    message: str, options: dict[str, object], x: torch.Tensor
) -> None:
    net, sparsifier = make()
    sparsifier.unregister_layer("conv")
    sparsifier.register_layer(net.conv, **options)
    if "features" not in options:
        net(batch(0))
    refuses(net, sparsifier, gs.ConfigurationError, message, lambda: net.conv(x))


def test_an_empty_batch_adds_nothing() -> None:
    net, sparsifier = make(aggregate_fn="mean")
    net(batch(0)[:0])
    with pytest.raises(gs.OrderError, match="conv: nothing was aggregated"):
        sparsifier.step()
    net(batch(0))
    net(batch(0)[:0])
    sparsifier.step()
    assert sparsifier.get_mask("conv").equal((batch(0).mean(0).abs() > 0.5).float())


def test_inputs_of_another_shape_than_the_mask_are_named() -> None:
    net, sparsifier = make(reduce_fn=lambda x: x)  # with a batch dimension
    net(batch(0))
    sparsifier.step()
    sparsifier.squash_mask()
    net(batch(1))
    with pytest.raises(gs.ConfigurationError, match=r"conv: its mask has shape \(4, 3, 4, 4\), .* \(2, 3, 4, 4\)"):
        net(batch(1, 2))


def damaged(change: Callable[[dict[str, object]], object]) -> dict[str, object]:
    net, sparsifier = make()
    net(batch(0))
    sparsifier.step()
    state = sparsifier.state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("expected 'state' and 'data_groups' of the same layers", lambda state: state.clear()),
        ("expected 'state' and 'data_groups' of the same layers", lambda state: state["state"].pop("conv")),
        ("linear: the saved state is damaged", lambda state: state["state"].update(linear={"mask": 3})),
        ("linear: the saved state is damaged", lambda state: state["state"].update(linear={})),
        ("linear: the saved state is damaged", lambda state: state["data_groups"].update(linear={})),
        ("linear: the saved state is damaged", lambda state: state["data_groups"]["linear"].update(hook_state="x")),
        (
            "linear: the saved state is damaged",
            lambda state: (
                state["data_groups"]["linear"].update(features=[1], feature_dim=1, hook_state="sparsify")
                or state["state"].update(linear={"mask": None})
            ),
        ),
        (
            "linear: the saved state is damaged",
            lambda state: state["state"]["linear"].update(mask=torch.full((16,), torch.nan)),
        ),
        (
            "linear: the saved aggregate is damaged",
            lambda state: state["data_groups"]["linear"].update(data=torch.tensor(1.0)),
        ),
        (
            r"linear: the state has features=\[1\], feature_dim=1, and the layer is registered with None, None",
            lambda state: state["data_groups"]["linear"].update(features=[1], feature_dim=1),
        ),
        (
            "head: the state is of this layer, and the model has none",
            lambda state: [part.update(head=part["linear"]) for part in state.values()],
        ),
        ("linear: is registered, and the state has no such", lambda state: [p.pop("linear") for p in state.values()]),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    message: str, change: Callable[[dict[str, object]], object]
) -> None:
    net, sparsifier = make()
    net(batch(3))
    refuses(net, sparsifier, gs.StateError, message, lambda: sparsifier.load_state_dict(damaged(change)))


@pytest.mark.parametrize(("aggregate", "rows"), [("mean", 2), ("max", 1)])
def test_aggregates_of_another_length_are_damaged(aggregate: str, rows: int) -> None:
    net, sparsifier = make(aggregate_fn=aggregate)
    net(batch(0))
    state = copy.deepcopy(sparsifier.state_dict())
    assert len(state["data_groups"]["conv"]["data"]) == rows
    state["data_groups"]["conv"]["data"] = torch.ones(3, 3, 4, 4)
    action = lambda: sparsifier.load_state_dict(state)  # noqa: E731
    refuses(net, sparsifier, gs.StateError, "conv: the saved aggregate is damaged", action)


def test_a_watched_layer_is_not_loaded_without_functions() -> None:
    net = Net()
    sparsifier = ActivationSparsifier(net)
    message = "conv: aggregate_fn is None; give a function"
    refuses(
        net, sparsifier, gs.ConfigurationError, message, lambda: sparsifier.load_state_dict(damaged(lambda state: None))
    )
