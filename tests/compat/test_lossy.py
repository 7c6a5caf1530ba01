"""Thresholds under the names of the earlier notebook: its training loop, and what went wrong there."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import gossamer as gs
from gossamer.compat import lossy
from gossamer.compat.lossy import (
    L0_penalty,
    L1_penalty,
    L2_penalty,
    SparseLoss,
    addHardSparsifierLayers,
    addSparsifierLayers,
    hardSparsify,
    normalized_L0_penalty,
    normalized_L1_penalty,
    normalized_L2_penalty,
    registerHooks,
    sparse_layer_outputs,
    sparse_layer_params,
    sparsify,
    updateSigmoidParam,
)
from gossamer.zoo._vision import import_torchvision

LAYERS = ["features.0", "features.3", "classifier.0"]  # all but the logits

PENALTIES = {  # written out, with b = 0.1
    L1_penalty: lambda x: x.abs().sum(),
    L2_penalty: lambda x: x.square().sum().sqrt(),
    L0_penalty: lambda x: (x.square() / (x.square() + 0.1)).sum(),
}
NORMALIZED = {normalized_L1_penalty: L1_penalty, normalized_L2_penalty: L2_penalty, normalized_L0_penalty: L0_penalty}


class Net(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(inplace), nn.Sequential(), nn.Conv2d(4, 3, 3), nn.ReLU(inplace)
        )
        self.classifier = nn.Sequential(nn.Linear(12, 8), nn.ReLU(inplace), nn.Linear(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 2, 6, 6, generator=generator), torch.randint(5, (6,), generator=generator)


def soft(x: torch.Tensor, eps: torch.Tensor, a: float) -> torch.Tensor:
    e = eps.abs()
    return x * torch.sigmoid(a * (x - e)) + x * torch.sigmoid(-a * (x + e))


def by_hand(
    net: Net, x: torch.Tensor, thresholds: list[torch.Tensor], a: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The network written out, and what passes its thresholds."""
    first = soft(F.conv2d(x, net.features[0].weight, net.features[0].bias), thresholds[0], a)
    second = soft(F.conv2d(first.relu(), net.features[3].weight, net.features[3].bias), thresholds[1], a)
    hidden = net.classifier[0]
    third = soft(F.linear(second.relu().flatten(1), hidden.weight, hidden.bias), thresholds[2], a)
    return F.linear(third.relu(), net.classifier[2].weight, net.classifier[2].bias), [first, second, third]


@pytest.fixture(autouse=True)
def _cleared():
    sparse_layer_outputs.clear()  # models of other tests may be there still
    sparse_layer_params.clear()


# -- the notebook's loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("inplace", [False, True])
def test_training_is_that_of_the_formulas_without_decay_of_thresholds(penalty, inplace):
    net, plain = Net(inplace), Net()
    thresholds = [nn.Parameter(torch.tensor(0.5)) for _ in LAYERS]
    sparse_layers = sparsify(net, 0.5)
    options = {"lr": 0.05, "momentum": 0.9}
    optimizer = torch.optim.SGD(net.parameters(), weight_decay=0.1, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    reference = torch.optim.SGD(
        [{"params": plain.parameters(), "weight_decay": 0.1}, {"params": thresholds}], **options
    )
    reference_scheduler = torch.optim.lr_scheduler.StepLR(reference, step_size=2, gamma=0.5)
    criterion, a = SparseLoss(), 1.0
    for step in range(6):
        if step in (2, 4):
            updateSigmoidParam(net, sparse_layers)
            a *= 2.0
        x, labels = batch(step)
        sparse_layer_outputs.clear()
        sparse_layer_params.clear()
        optimizer.zero_grad()
        loss = criterion(net(x), labels, sparse_layer_outputs, 0.3, nn.CrossEntropyLoss(), penalty)
        loss.backward()
        optimizer.step()
        scheduler.step()

        reference.zero_grad()
        out, passed = by_hand(plain, x, thresholds, a)
        expected = F.cross_entropy(out, labels) + 0.3 * sum(map(PENALTIES[penalty], passed)) / sum(
            each.numel() for each in passed
        )
        expected.backward()
        reference.step()
        reference_scheduler.step()
        torch.testing.assert_close(loss, expected)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(net.get_parameter(name), parameter)
    for found, threshold in zip(sparse_layer_params, thresholds, strict=True):
        torch.testing.assert_close(found, threshold.reshape(1))
        assert found.item() != 0.5  # it has learned


def test_an_experiment_of_the_notebook_runs_as_it_was_written():
    for penalty in (L1_penalty, L0_penalty):
        net = Net(inplace=True)
        sparse_layers = sparsify(net, 0.5)
        criterion = SparseLoss()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, weight_decay=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5)
        eps_list = []
        for epoch in range(3):
            if epoch == 1:
                updateSigmoidParam(net, sparse_layers)
            for step in range(2):
                x, labels = batch(step)
                sparse_layer_outputs.clear()
                sparse_layer_params.clear()
                optimizer.zero_grad()
                loss = criterion(net(x), labels, sparse_layer_outputs, 0.1, nn.CrossEntropyLoss(), penalty)
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                x, labels = batch(9)
                sparse_layer_outputs.clear()
                sparse_layer_params.clear()
                assert criterion(net(x), labels, sparse_layer_outputs, 0.1, nn.CrossEntropyLoss(), penalty) > 0
            scheduler.step()
            eps_list += [sparse_layer_params[j].item() for j in range(len(sparse_layer_params))]
        assert len(eps_list) == 3 * len(LAYERS)
        assert [tuple(sparse_layer_outputs[j].shape) for j in range(3)] == [(6, 4, 4, 4), (6, 3, 2, 2), (6, 8)]
        saved = {name: value.clone() for name, value in net.state_dict().items()}
        net_cpy = copy.deepcopy(net)
        hardSparsify(net_cpy, sparse_layers)
        sparse_layer_outputs.clear()
        sparse_layer_params.clear()
        with torch.no_grad():
            net_cpy(x)
        t, y = sparse_layer_params[0], sparse_layer_outputs[0]
        assert not ((y != 0) & (y.abs() <= t.abs())).any()
        assert (y == 0).any()
        assert [each.item() for each in sparse_layer_params] == eps_list[-3:]
        assert all(value.equal(saved[name]) for name, value in net.state_dict().items())
        assert updateSigmoidParam(net, sparse_layers) is None  # the original is still smooth


def test_names_are_at_the_top_level_and_are_those_of_the_modules():
    assert gs.LossySparsifier is gs.nn.LossySparsifier is lossy.LossySparsifier
    assert gs.LossyHardSparsifier is gs.nn.LossyHardSparsifier is lossy.LossyHardSparsifier
    assert gs.SparseLoss is SparseLoss
    assert addHardSparsifierLayers is hardSparsify
    assert all(hasattr(lossy, name) for name in lossy.__all__)


# -- the loss ----------------------------------------------------------------------------------------------------------

TENSORS = st.lists(st.lists(st.floats(-8, 8), min_size=1, max_size=6).map(torch.tensor), min_size=1, max_size=4)


@given(tensors=TENSORS, factor=st.floats(0, 100), penalty=st.sampled_from(list(PENALTIES)))
def test_the_loss_has_the_penalties_over_the_number_of_activations(tensors, factor, penalty):
    loss = SparseLoss()(torch.tensor(1.0), torch.tensor(3.0), tensors, factor, F.mse_loss, penalty)
    expected = sum(float(PENALTIES[penalty](each)) for each in tensors) / sum(len(each) for each in tensors)
    assert float(loss) == pytest.approx(4.0 + factor * expected, rel=1e-4, abs=1e-4)


@given(tensors=TENSORS, penalty=st.sampled_from(list(NORMALIZED)))
def test_a_normalized_penalty_is_divided_once(tensors, penalty):
    loss = SparseLoss()(torch.zeros(1), torch.zeros(1), tensors, 2.0, F.mse_loss, penalty)
    expected = sum(float(PENALTIES[NORMALIZED[penalty]](each)) / len(each) for each in tensors)
    assert float(loss) == pytest.approx(2.0 * expected, rel=1e-4, abs=1e-4)
    single = penalty(tensors[0])
    assert float(single) == pytest.approx(float(PENALTIES[NORMALIZED[penalty]](tensors[0])) / len(tensors[0]), abs=1e-4)


@pytest.mark.parametrize("penalty", [*PENALTIES, *NORMALIZED], ids=lambda each: each.__name__)
def test_penalties_have_the_gradients_of_their_formulas(penalty):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(penalty, (x,))
    assert penalty(torch.zeros(0)) == 0


def test_the_smoothing_of_l0_is_an_argument():
    x = torch.tensor([0.5, -2.0, 0.0])
    assert float(L0_penalty(x, b=0.25)) == pytest.approx(0.25 / 0.5 + 4 / 4.25)
    assert float(normalized_L0_penalty(x, b=0.25)) == pytest.approx((0.25 / 0.5 + 4 / 4.25) / 3)
    for one, two in ((L0_penalty, L0_penalty(x, 0.25) / 3), (normalized_L0_penalty, normalized_L0_penalty(x, 0.25))):
        loss = SparseLoss()(x, x, [x], 1.0, F.mse_loss, partial(one, b=0.25))
        assert float(loss) == pytest.approx(float(two))


def test_nothing_to_penalise_is_an_error_that_says_what_to_do():
    with pytest.raises(gs.ConfigurationError, match=r"list_: is empty.* with clear\(\), not by a new list"):
        SparseLoss()(torch.zeros(1), torch.zeros(1), [], 0.1, F.mse_loss, L1_penalty)
    assert SparseLoss()(torch.ones(1), torch.zeros(1), [torch.ones(0, 3)], 0.1, F.mse_loss, L1_penalty) == 1
    net = Net()
    sparsify(net, 0.5)
    net.features(batch(0)[0])  # a part of the model only
    with pytest.raises(gs.ConfigurationError, match="run the model that sparsify was given, as a whole"):
        SparseLoss()(torch.zeros(1), torch.zeros(1), sparse_layer_outputs, 0.1, F.mse_loss, L1_penalty)


def test_a_factor_below_zero_is_refused():
    with pytest.raises(gs.ConfigurationError, match=r"memRegParam: expected a number in \[0, inf\), got -1"):
        SparseLoss()(torch.zeros(1), torch.zeros(1), [torch.ones(1)], -1, F.mse_loss, L1_penalty)


# -- sites -------------------------------------------------------------------------------------------------------------


def tree(net: nn.Module, kinds: tuple[type, ...], last: nn.Module | None) -> OrderedDict:
    """Sites among the children of a module, found by walking down."""
    found = OrderedDict()
    for name, child in net.named_children():
        inner = tree(child, kinds, last)
        if (isinstance(child, kinds) and child is not last) or inner:
            found[name] = inner
    return found


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "densenet121", "mobilenet_v2", "mnasnet1_3", "squeezenet1_0"])
def test_sites_of_a_network_are_a_dict_in_its_shape_and_no_key_changes(name):
    with torch.device("meta"):
        net = getattr(import_torchvision().models, name)(weights=None)
    kinds = (nn.Conv2d, nn.Linear)
    last = [module for module in net.modules() if isinstance(module, kinds)][-1]
    before = list(net.state_dict())
    expected = tree(net, kinds, last)
    sparse_layers = sparsify(net, 0.5)
    assert sparse_layers == expected
    assert [key for key in net.state_dict() if "sparsifier" not in key] == before
    updateSigmoidParam(net, sparse_layers)
    hardSparsify(net, sparse_layers)


def test_logits_and_other_sites_may_be_chosen():
    assert sparsify(Net(), 0.5) == {"features": {"0": {}, "3": {}}, "classifier": {"0": {}}}
    assert sparsify(Net(), 0.5, logits=True)["classifier"] == {"0": {}, "2": {}}
    net = Net()
    assert sparsify(net, None, sites="features.*") == {"features": {"0": {}, "3": {}}}
    assert net.features[0].sparsifier.eps.tolist() == [pytest.approx(0.1)]


def test_a_module_within_a_site_belongs_to_it():
    class Low(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.inner = nn.Linear(4, 4)

    net = nn.Sequential(Low(), nn.Linear(4, 2))
    assert sparsify(net, 0.5) == {"0": {}}
    assert "sparsifier" not in net[0].inner._modules


def test_twice_is_an_error_that_changes_nothing():
    net = Net()
    sparsify(net, 0.5, sites="classifier.0")
    before = list(net.state_dict())
    for again in (lambda: sparsify(net, 0.5), lambda: gs.attach(net, gs.LossyThreshold())):
        with pytest.raises(gs.OrderError, match=r"classifier\.0: has a threshold already"):
            again()
        assert list(net.state_dict()) == before
    other = Net()
    gs.attach(other, gs.LossyThreshold())
    with pytest.raises(gs.OrderError, match=r"features\.0: has a threshold already"):
        sparsify(other, 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net, sites: updateSigmoidParam(nn.Linear(1, 1), sites), gs.ConfigurationError, r"features\.0: Linear"),
        (lambda net, sites: hardSparsify(Net(), sites), gs.ConfigurationError, "the sites that sparsify returned"),
        (
            lambda net, sites: registerHooks(net, {"nothing": {}}),
            gs.ConfigurationError,
            "nothing: Net has no threshold",
        ),
        (lambda net, sites: sparsify(Net(), float("nan")), gs.ConfigurationError, "eps: expected a number"),
        (lambda net, sites: sparsify(nn.ReLU(), 0.5), gs.ConfigurationError, "sites: ReLU has no modules within it"),
        (lambda net, sites: sparsify("net", 0.5), gs.ConfigurationError, "expected a torch.nn.Module, got str"),
        (lambda net, sites: sparsify(nn.DataParallel(Net()), 0.5), gs.OrderError, "is already wrapped"),
    ],
)
def test_what_cannot_work_is_named(call, error, message):
    net = Net()
    sites = sparsify(net, 0.5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(error, match=message):
        call(net, sites)
    assert all(value.equal(before[name]) for name, value in net.state_dict().items())


def test_hard_thresholds_are_for_good():
    net = Net()
    sites = sparsify(net, 0.5)
    hardSparsify(net, sites)
    for again in (hardSparsify, updateSigmoidParam):
        with pytest.raises(gs.ConfigurationError, match=r"features\.0: its threshold is hard already"):
            again(net, sites)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda x: (x, x), r"0: gives a tuple, and a threshold takes one tensor; leave it out with sites=\['!0'\]"),
        (lambda x: x.long(), r"0: lossy threshold: got activations of dtype torch.int64.*sites=\['!0'\]"),
    ],
)
def test_a_site_that_cannot_have_a_threshold_is_named(given, message):
    class Odd(nn.Identity):
        def forward(self, x):
            return given(x)

    net = nn.Sequential(Odd(), nn.Linear(2, 2))
    sparsify(net, 0.5)
    with pytest.raises(gs.ConfigurationError, match=message):
        net(torch.ones(1, 2))


# -- what is collected -------------------------------------------------------------------------------------------------


def test_lists_hold_one_pass_and_nothing_once_the_model_is_gone():
    net = Net()
    sparsify(net, 0.5)
    for step in range(4):  # never cleared
        net(batch(step)[0])
        assert len(sparse_layer_outputs) == len(sparse_layer_params) == len(LAYERS)
    torch.testing.assert_close(list(sparse_layer_outputs), by_hand(net, batch(3)[0], [torch.tensor(0.5)] * 3, 1.0)[1])
    assert repr(sparse_layer_params) == repr(list(sparse_layer_params))
    kept = weakref.ref(sparse_layer_outputs[0])
    sparse_layer_params.clear()
    assert (len(sparse_layer_outputs), len(sparse_layer_params)) == (3, 0)
    del net
    gc.collect()
    assert kept() is None
    assert len(sparse_layer_outputs) == 0


def test_an_in_place_activation_after_a_site_changes_nothing_that_was_collected():
    net = Net(inplace=True)
    sparsify(net, 0.5)
    net(batch(0)[0])
    _, passed = by_hand(net, batch(0)[0], [torch.tensor(0.5)] * 3, 1.0)
    assert any((each < 0).any() for each in passed)
    torch.testing.assert_close(list(sparse_layer_outputs), passed)


def test_a_module_that_is_called_twice_is_collected_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

        def forward(self, x):
            return self.head(self.layer(self.layer(x)))

    net = Twice()
    sparsify(net, 0.5)
    net(torch.ones(2, 3))
    first, second = sparse_layer_outputs
    torch.testing.assert_close(second, soft(F.linear(first, net.layer.weight, net.layer.bias), torch.tensor(0.5), 1.0))
    assert sparse_layer_params[0] is sparse_layer_params[1] is net.layer.sparsifier.eps


def test_parts_that_were_made_sparse_one_by_one_are_collected_together():
    net = Net()
    for part in (net.classifier, net.features):
        sparsify(part, 0.5, logits=part is net.features)
    net(batch(0)[0])
    torch.testing.assert_close(list(sparse_layer_outputs), by_hand(net, batch(0)[0], [torch.tensor(0.5)] * 3, 1.0)[1])


def test_nothing_is_collected_without_hooks_and_nothing_twice_with_two():
    net = Net()
    sites = addSparsifierLayers(net, 0.5)
    out = net(batch(0)[0])
    assert len(sparse_layer_outputs) == 0
    registerHooks(net, sites)
    registerHooks(net, sites)
    assert net(batch(0)[0]).equal(out)
    assert len(sparse_layer_outputs) == len(LAYERS)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_made_after_a_backward_pass_collects_its_own(copied):
    net = Net()
    sites = sparsify(net, 0.5)
    net(batch(0)[0]).sum().backward()
    other = copied(net)
    updateSigmoidParam(other, sites)
    sparse_layer_outputs.clear()
    other(batch(0)[0])
    torch.testing.assert_close(list(sparse_layer_outputs), by_hand(other, batch(0)[0], [torch.tensor(0.5)] * 3, 2.0)[1])
    assert net.features[0].sparsifier.a == 1


def test_a_part_that_is_computed_again_for_the_backward_pass_is_collected_once():
    def train(again):
        net = Net()
        sparsify(net, 0.5)
        x, labels = batch(0)
        if again:
            features = net.features.forward
            net.features.forward = lambda x: checkpoint(features, x, use_reentrant=False)
        sparse_layer_outputs.clear()  # of the other network, which may be there still
        out = net(x)
        loss = SparseLoss()(out, labels, sparse_layer_outputs, 1.0, F.cross_entropy, L1_penalty)
        loss.backward()
        assert len(sparse_layer_outputs) == len(LAYERS)
        return [parameter.grad for parameter in net.parameters()]

    torch.testing.assert_close(train(True), train(False))


def test_a_forward_pass_that_fails_leaves_nothing_open():
    net = Net()
    sparsify(net, 0.5)
    with pytest.raises(RuntimeError):
        net(torch.ones(6, 2, 9, 9))  # too large for the classifier
    net.features(batch(0)[0])
    assert len(sparse_layer_outputs) == 2  # those of the pass that failed
    net(batch(0)[0])
    assert len(sparse_layer_outputs) == len(LAYERS)


# -- sharpness, hard thresholds ----------------------------------------------------------------------------------------


def test_sharpness_is_bounded():
    net = Net()
    sites = sparsify(net, 0.5)
    seen = []
    for _ in range(200):
        updateSigmoidParam(net, sites)
        seen.append(float(net.features[0].sparsifier.a))
    assert seen[:4] == [2, 4, 8, 16]
    assert max(seen) == seen[-1] == 2.0**16
    net(batch(0)[0]).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    net.features[0].sparsifier.a = 2.0**17  # set by hand
    updateSigmoidParam(net, sites)
    assert net.features[0].sparsifier.a == 2.0**17


def test_only_hard_thresholds_give_exact_zeros_and_they_leave_gradients_right():
    net = Net()
    sites = sparsify(net, 0.5)
    x, _ = batch(0)
    net(x)
    assert not any((each == 0).any() for each in sparse_layer_outputs)
    hardSparsify(net, sites)
    out = net(x)
    conv = F.conv2d(x, net.features[0].weight, net.features[0].bias)
    torch.testing.assert_close(sparse_layer_outputs[0], torch.where(conv.abs() > 0.5, conv, 0.0))
    assert 0.2 < float((sparse_layer_outputs[0] == 0).float().mean()) < 0.9
    out.sum().backward()
    assert all(net.get_parameter(f"{name}.weight").grad.isfinite().all() for name in LAYERS)


# -- states of the notebook --------------------------------------------------------------------------------------------


def in_the_notebook(net: Net, names: list[str]) -> nn.Module:
    """Sites as Sequentials of the module, `0`, and a threshold, `sparse`."""
    net = copy.deepcopy(net)
    for number, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        threshold = nn.Module()
        threshold.eps = nn.Parameter(torch.tensor(0.2 + 0.1 * number))
        sequential = nn.Sequential(OrderedDict([("0", net.get_submodule(name)), ("sparse", threshold)]))
        net.get_submodule(parent)._modules[child] = sequential
    return net


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_that_the_notebook_saved_loads(hard, prefix):
    old = in_the_notebook(Net(), [*LAYERS, "classifier.2"])
    stream = io.BytesIO()
    torch.save({f"{prefix}{name}": value for name, value in old.state_dict().items()}, stream)
    stream.seek(0)
    saved = torch.load(stream)
    assert {f"{prefix}features.0.0.weight", f"{prefix}features.0.sparse.eps"} <= set(saved)
    net = Net()
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    sites = sparsify(net, 0.5, logits=True)
    updateSigmoidParam(net, sites)
    if hard:
        hardSparsify(net, sites)
    whole = nn.ModuleDict({"module": net}) if prefix else net
    names = list(saved)
    whole.load_state_dict(saved)
    assert list(saved) == names
    x, _ = batch(0)
    if hard:
        net(x)
        assert [each.item() for each in sparse_layer_params] == [pytest.approx(0.2 + 0.1 * i) for i in range(4)]
    else:
        thresholds = [torch.tensor(0.2 + 0.1 * i) for i in range(4)]
        torch.testing.assert_close(net(x), soft(by_hand(Net(), x, thresholds, 2.0)[0], thresholds[3], 2.0))
    whole.load_state_dict(whole.state_dict())  # its own loads as well


def test_a_state_of_other_sites_is_refused_by_name():
    net = Net()
    sparsify(net, 0.5)
    saved = in_the_notebook(Net(), [*LAYERS, "classifier.2"]).state_dict()
    with pytest.raises(RuntimeError, match=r"classifier\.2\.sparse\.eps"):
        net.load_state_dict(saved)


def test_a_site_with_a_child_of_that_name_loads_its_own_state():
    net = nn.Sequential(OrderedDict([("site", Net()), ("head", nn.Linear(5, 2))]))
    net.site.add_module("0", nn.Linear(2, 2))
    sparsify(net, 0.5, sites="site")
    net.load_state_dict(net.state_dict())


# -- weight decay ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "AdamW": partial(torch.optim.AdamW, lr=0.01),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("copied", [False, True])
def test_thresholds_are_trained_and_not_decayed_and_groups_stay_as_they_were(name, copied):
    def train(net, optimizer):
        for step in range(3):
            x, labels = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            optimizer.step()
        return dict(net.named_parameters())

    net, other = Net(), Net()
    for each in (net, other):
        sparsify(each, 0.5)
    if copied:
        net = copy.deepcopy(net)
    optimizer = OPTIMIZERS[name](net.parameters(), weight_decay=0.3)
    group, params = optimizer.param_groups[0], optimizer.param_groups[0]["params"]
    own = [parameter for key, parameter in other.named_parameters() if key.endswith("eps")]
    rest = [parameter for key, parameter in other.named_parameters() if not key.endswith("eps")]
    groups = [{"params": rest, "weight_decay": 0.3}, {"params": own, "weight_decay": 0.0}]
    found, wanted = train(net, optimizer), train(other, OPTIMIZERS[name](groups))
    for key, parameter in wanted.items():
        torch.testing.assert_close(found[key], parameter)
    assert [each is group for each in optimizer.param_groups] == [True]
    assert group["params"] is params
    assert [id(each) for each in params] == [id(each) for each in net.parameters()]
    optimizer.load_state_dict(optimizer.state_dict())


def test_thresholds_without_gradients_stay_where_weights_decay():
    net = Net()
    sparsify(net, 0.5)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = net.features[0].weight.detach().clone()
    for _ in range(10):
        optimizer.step()
    assert net.features[0].sparsifier.eps.tolist() == [0.5]
    torch.testing.assert_close(net.features[0].weight, before * math.pow(0.95, 10))


def test_a_step_that_fails_leaves_groups_that_the_next_one_mends():
    net = Net()
    sparsify(net, 0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5)
    params = optimizer.param_groups[0]["params"]

    def fails():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fails)
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert net.features[0].sparsifier.eps.tolist() == [0.5]
    assert optimizer.param_groups[0]["params"] is params
