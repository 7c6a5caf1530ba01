"""Soft-masked modules and networks under the names of the earlier package: its training script, and its defects."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gossamer as gs
from gossamer.compat import cs
from gossamer.compat.cs import MaskedNet, SoftMasked, SoftMaskedConv2d, SoftMaskedLinear

NOT_REWOUND = ("mask_weight", "init_weight", "temp", "_extra_state")


class Block(nn.Module):
    def __init__(self, mask_initial_value: float) -> None:
        super().__init__()
        self.conv = SoftMaskedConv2d(4, 4, 3, mask_initial_value=mask_initial_value, groups=2, bias=True)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, temp: Tensor, ticket: bool) -> Tensor:
        return F.relu(x + self.norm(self.conv(x, temp, ticket)), inplace=True)


class Net(MaskedNet):
    """As networks of the package are written: layers, then a list of the masked ones, then a temperature."""

    def __init__(self, mask_initial_value: float = 0.0) -> None:
        super().__init__()
        self.conv = SoftMaskedConv2d(1, 4, 3, 1, 2, mask_initial_value)
        self.block = Block(mask_initial_value)
        self.norm = nn.BatchNorm2d(4)
        self.linear = SoftMaskedLinear(64, 10, mask_initial_value=mask_initial_value)
        self.scale = nn.Parameter(torch.ones(1))
        self.mask_modules = [m for m in self.modules() if isinstance(m, SoftMaskedConv2d | SoftMaskedLinear)]
        self.temp = 1

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x, self.temp, self.ticket)), inplace=True)
        x = self.block(x, self.temp, self.ticket)
        return self.scale * self.linear(x.flatten(1), self.temp, self.ticket)


def net(seed: int = 0, mask_initial_value: float = 0.0) -> Net:
    torch.manual_seed(seed)
    return Net(mask_initial_value)


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 1, 8, 8, generator=generator), torch.randint(10, (6,), generator=generator)


def step_of(model: Net, optimizer: torch.optim.Optimizer, step: int, factor: float = 1e-3) -> None:
    x, labels = batch(step)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), labels) + factor * sum(each.mask.sum() for each in model.mask_modules)
    loss.backward()
    optimizer.step()


def train(model: Net, steps: int = 5, lr: float = 0.3) -> Net:
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for step in range(steps):
        step_of(model, optimizer, step)
    return model


def mask_by_hand(scores: Tensor, temp: float, ticket: bool, initial: float) -> Tensor:
    """One score after the other, in double precision."""
    found = []
    for score in scores.double().flatten().tolist():
        z = temp * score
        soft = 1 / (1 + math.exp(-z)) if z > -700 else 0.0
        found.append((float(score > 0) if ticket else soft) * (1 + math.exp(-initial)))
    return torch.tensor(found, dtype=torch.float64).view(scores.shape)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if n.rpartition(".")[2] not in NOT_REWOUND}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(value.equal(second[name]) for name, value in first.items())


# -- modules -----------------------------------------------------------------------------------------------------------


def test_names_are_at_the_top_level():
    assert gs.SoftMaskedConv2d is SoftMaskedConv2d
    assert gs.SoftMaskedLinear is SoftMaskedLinear
    assert gs.MaskedNet is MaskedNet
    assert all(hasattr(cs, name) for name in cs.__all__)


@given(
    scores=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=9),
    temp=st.floats(1e-3, 500),
    initial=st.floats(-1, 1),
    ticket=st.booleans(),
    as_tensor=st.booleans(),
)
def test_a_mask_is_that_of_the_formula(scores, temp, initial, ticket, as_tensor):
    layer = SoftMaskedLinear(len(scores), 1, mask_initial_value=initial, dtype=torch.float64)
    assert torch.equal(layer.mask_weight, torch.full((1, len(scores)), initial, dtype=torch.float64))
    with torch.no_grad():
        layer.mask_weight.copy_(torch.tensor([scores]))
    given_temp = torch.tensor(temp, dtype=torch.float64) if as_tensor else temp
    expected = mask_by_hand(layer.mask_weight, temp, ticket, initial)
    torch.testing.assert_close(layer.compute_mask(given_temp, ticket), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("temp", [1, 7.5, torch.tensor(40.0)])
@pytest.mark.parametrize("ticket", [False, True])
@pytest.mark.parametrize(
    ("options", "padding"),
    [
        ({}, 1),
        ({"bias": True, "groups": 2}, 1),
        ({"stride": 2, "padding": (0, 2), "dilation": 2, "mask_initial_value": -0.3}, (0, 2)),
        ({"padding": "same", "kernel_size": (3, 1), "mask_initial_value": 0.2}, "same"),
    ],
)
def test_a_convolution_is_one_with_its_weight_times_the_mask(options, padding, ticket, temp):
    torch.manual_seed(0)
    options = {"kernel_size": 3, **options}
    layer = SoftMaskedConv2d(4, 6, **options, dtype=torch.float64)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    nn.init.normal_(layer.mask_weight, std=0.5)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    mask = mask_by_hand(layer.mask_weight, float(temp), ticket, options.get("mask_initial_value", 0.0))
    expected = F.conv2d(
        x,
        layer.weight * mask,
        layer.bias,
        options.get("stride", 1),
        padding,
        options.get("dilation", 1),
        options.get("groups", 1),
    )
    torch.testing.assert_close(layer(x, temp, ticket), expected)


def test_padding_of_other_modes_is_that_of_torch():
    layer = SoftMaskedConv2d(2, 3, 3, padding_mode="circular")
    plain = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)  # the mask of a first score, over σ(s₀), is 1
    x = torch.randn(2, 2, 5, 5)
    torch.testing.assert_close(layer(x), plain(x))


def test_a_linear_module_is_one_with_its_weight_times_the_mask():
    layer = SoftMaskedLinear(5, 3, mask_initial_value=-0.1)
    nn.init.normal_(layer.mask_weight)
    x = torch.randn(2, 4, 5)
    for ticket in (False, True):
        mask = mask_by_hand(layer.mask_weight, 3.0, ticket, -0.1).float()
        torch.testing.assert_close(layer(x, 3.0, ticket), x @ (layer.weight * mask).T)  # the bias begins at 0
    nn.init.ones_(layer.bias)
    torch.testing.assert_close(layer(x, 3.0, True), x @ (layer.weight * mask).T + 1)
    assert SoftMaskedLinear(5, 3, bias=False).bias is None


def test_other_modules_are_masked_by_deriving_from_them():
    class Bilinear(cs.SoftMasked, nn.Bilinear):
        def forward(self, first, second, temp=1, ticket=False):
            return F.bilinear(first, second, self.masked_weight(temp, ticket), self.bias)

    layer = Bilinear(3, 4, 2)
    nn.init.normal_(layer.mask_weight)
    first, second = torch.randn(5, 3), torch.randn(5, 4)
    weight = layer.weight * mask_by_hand(layer.mask_weight, 2.0, False, 0.0).float()
    torch.testing.assert_close(layer(first, second, 2.0), torch.einsum("bi,oij,bj->bo", first, weight, second))


@pytest.mark.parametrize("make", [lambda: SoftMaskedConv2d(2, 2, 3), lambda: SoftMaskedLinear(4, 3)])
def test_gradients_of_weight_and_scores_are_those_of_the_output(make):
    torch.manual_seed(0)
    layer = make().double()
    nn.init.normal_(layer.mask_weight)
    x = torch.randn((2, 2, 4, 4) if isinstance(layer, nn.Conv2d) else (2, 4), dtype=torch.float64)

    def run(weight, scores):
        return torch.func.functional_call(layer, {"weight": weight, "mask_weight": scores}, (x, 2.0))

    start = [each.detach().clone().requires_grad_() for each in (layer.weight, layer.mask_weight)]
    assert torch.autograd.gradcheck(run, start)


def test_a_convolution_takes_the_order_and_makes_the_draws_of_the_package():
    torch.manual_seed(3)
    layer = SoftMaskedConv2d(3, 8, 5, 0, 2, -0.1)
    torch.manual_seed(3)
    assert torch.equal(layer.weight, nn.init.xavier_normal_(torch.empty(8, 3, 5, 5)))
    assert (layer.padding, layer.stride, layer.mask_initial_value) == ((0, 0), (2, 2), -0.1)
    assert torch.equal(layer.mask_weight, torch.full((8, 3, 5, 5), -0.1))
    assert list(layer.state_dict()) == ["weight", "init_weight", "mask_weight"]  # its keys
    assert [name for name, each in layer.named_parameters() if each.requires_grad] == ["weight", "mask_weight"]
    assert SoftMaskedConv2d(3, 8, 1).padding == (1, 1)
    assert repr(layer).endswith("stride=(2, 2), bias=False, mask_initial_value=-0.1)")


def test_masks_begin_anew_in_place():
    layer = SoftMaskedLinear(3, 2, mask_initial_value=0.2)
    optimized = layer.mask_weight
    nn.init.normal_(layer.mask_weight)
    layer.init_mask()
    assert layer.mask_weight is optimized
    assert torch.equal(optimized, torch.full((2, 3), 0.2))


def test_the_mask_that_was_used_last_can_be_looked_at_and_penalised():
    layer = SoftMaskedLinear(3, 2, mask_initial_value=-0.1)
    torch.testing.assert_close(layer.mask, torch.ones(2, 3))
    nn.init.normal_(layer.mask_weight)
    temp = torch.tensor(5.0)
    layer(torch.randn(1, 3), temp)
    layer.mask.sum().backward()
    scores, scale = layer.mask_weight.detach().double(), 1 + math.exp(0.1)
    soft = torch.sigmoid(5 * scores)
    torch.testing.assert_close(layer.mask, (soft * scale).float())
    torch.testing.assert_close(layer.mask_weight.grad, (5 * soft * (1 - soft) * scale).float())
    layer(torch.randn(1, 3), temp, True)
    torch.testing.assert_close(layer.mask, ((scores > 0) * scale).float())


def test_bf16_activations_leave_masks_in_single_precision():
    layer = net().conv
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(batch()[0], torch.tensor(2.0)).dtype == torch.bfloat16
        assert layer.mask.dtype == torch.float32


# -- suppression -------------------------------------------------------------------------------------------------------


@given(
    scores=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=9),
    temp=st.floats(1, 200),
    initial=st.floats(-0.5, 0.5),
)
def test_scores_above_0_are_those_of_the_package_and_others_give_masks_of_0(scores, temp, initial):
    layer = SoftMaskedLinear(len(scores), 1, mask_initial_value=initial)
    with torch.no_grad():
        layer.mask_weight.copy_(torch.tensor([scores]))
    layer.prune(temp)
    for before, after, mask in zip(
        scores, layer.mask_weight[0].tolist(), layer.compute_mask(1, False)[0].tolist(), strict=True
    ):
        if before > 0:
            assert after == pytest.approx(min(temp * before, initial), rel=1e-5)
        else:
            assert mask == 0


@pytest.mark.parametrize("order", ["prune first", "temperature first, as in the published script"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("initial", [0.0, 0.1, -0.1])
def test_what_is_suppressed_never_comes_back(order, optimizer, initial):
    model = net(mask_initial_value=initial)
    optimizer = optimizer(model.parameters(), lr=0.5, weight_decay=0.1)
    gone: list[Tensor] = []
    for number in range(3):
        for step in range(4):
            # In the first round masks are pulled down, from then on they are pushed up with all might.
            step_of(model, optimizer, step, factor=-10.0 if number else 0.01)
            model.temp *= 3
            for before, module in zip(gone, model.mask_modules, strict=False):
                assert not (before & (module.mask_weight > 0)).any()
                assert not (module.compute_mask(model.temp, False)[before] != 0).any()
        gone = [module.mask_weight <= 0 for module in model.mask_modules]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing may be left of a layer
            if order == "prune first":
                model.prune()
                model.temp = 1
            else:
                model.temp = 1
                model.prune()
    assert any(each.any() for each in gone)


def test_a_network_prunes_with_its_temperature():
    model = net(mask_initial_value=0.5)
    for module in model.mask_modules:
        nn.init.constant_(module.mask_weight, 0.01)
    model.temp = 20
    model.prune()
    for module in model.mask_modules:
        torch.testing.assert_close(module.mask_weight.detach(), torch.full_like(module.mask_weight, 0.2))


def test_a_layer_of_which_nothing_is_left_is_named():
    model = train(net())
    with torch.no_grad():
        model.block.conv.mask_weight.fill_(-0.5)
    with pytest.warns(UserWarning, match=r"^block\.conv: no score is above 0, .* raise mask_initial_value \(0\)"):
        model.prune()


# -- rewinding ---------------------------------------------------------------------------------------------------------


def test_a_network_goes_back_to_the_bit_and_keeps_its_masks():
    model = train(net(), 2)
    kept = values(model)
    model.checkpoint()
    train(model)
    masks = [module.mask_weight.clone() for module in model.mask_modules]
    model.temp, model.ticket = 9, True
    changed = values(model)
    assert [name for name in kept if changed[name].equal(kept[name])] == []
    model.rewind_weights()
    assert same(values(model), kept)
    assert {"block.conv.bias", "norm.running_var", "norm.num_batches_tracked", "scale"} < kept.keys()
    assert all(module.mask_weight.equal(mask) for module, mask in zip(model.mask_modules, masks, strict=True))
    assert (float(model.temp), model.ticket) == (9, True)
    train(model)
    model.rewind_weights()  # as often as wanted
    assert same(values(model), kept)


def test_a_module_goes_back_alone():
    layer = SoftMaskedLinear(3, 2)
    layer.checkpoint()
    kept = layer.weight.detach().clone()
    nn.init.normal_(layer.weight)
    layer.rewind_weights()
    assert torch.equal(layer.weight, kept)
    assert torch.equal(layer.init_weight, kept)


# -- copies, states, compilers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temp", [2.0, torch.tensor(2.0, requires_grad=True) * 1])
def test_a_module_can_be_copied_after_forward_and_backward(temp):
    layer = SoftMaskedLinear(3, 2)
    layer(torch.randn(4, 3), temp).sum().backward()
    assert torch.equal(copy.deepcopy(layer).mask, layer.mask)


def test_a_copy_of_a_network_goes_on_alike_and_alone():
    model = train(net())
    model.checkpoint()
    model(batch()[0]).sum().backward()
    assert all(each.is_leaf for module in model.modules() for each in vars(module).values() if isinstance(each, Tensor))
    twin = copy.deepcopy(model)
    assert same(values(train(twin)), values(train(model)))
    before = values(model)
    twin.temp *= 50
    masks = [each.mask.clone() for each in model.mask_modules]
    twin(batch()[0])
    twin.rewind_weights()
    assert same(values(model), before)
    assert all(each.mask.equal(mask) for each, mask in zip(model.mask_modules, masks, strict=True))
    assert not any(each.mask.equal(mask) for each, mask in zip(twin.mask_modules, masks, strict=True))


def test_temperature_ticket_and_rewind_point_are_saved(tmp_path):
    model = train(net())
    model.checkpoint()
    kept = values(model)
    train(model)
    model.temp, model.ticket = 31.5, True
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = net(1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x, _ = batch()
    assert (float(other.temp), other.ticket) == (31.5, True)
    assert same(values(other), values(model))
    assert torch.equal(other.eval()(x), model.eval()(x))
    other.rewind_weights()
    assert same(values(other), kept)


def test_a_state_of_the_package_is_loaded_and_one_without_a_rewind_point_has_none():
    model = train(net())
    old = {name: value for name, value in model.state_dict().items() if name not in ("temp", "_extra_state")}
    other = net(1)
    other.temp, other.ticket = 3, True
    other.load_state_dict(old)
    assert same(values(other), values(model))
    assert (float(other.temp), other.ticket) == (3, True)
    wrapped = nn.ModuleDict({"inner": net(2)})
    wrapped.load_state_dict({f"inner.{name}": value for name, value in old.items()})
    assert same(values(wrapped["inner"]), values(model))
    other.checkpoint()
    other.load_state_dict(model.state_dict())
    with pytest.raises(gs.OrderError, match="there is no rewind point"):
        other.rewind_weights()


def test_a_network_without_memory_takes_a_state_as_it_is():
    model = train(net())
    model.temp = 4
    with torch.device("meta"):
        other = Net()
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other.eval()(batch()[0]), model.eval()(batch()[0]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own imports
def test_a_change_of_temperature_does_not_compile_anew():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, plain = net(), net()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(4):
        x, _ = batch(step)
        for each, run in ((model, compiled), (plain, plain)):
            (run(x).square().sum() + sum(m.mask.sum() for m in each.mask_modules)).backward()
            each.temp = 7 if step == 2 else each.temp * 1.5
    assert len(compilations) == 1
    for name, parameter in plain.named_parameters():
        assert (parameter.grad is None) == name.endswith("init_weight")
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    layer = SoftMaskedLinear(3, 2)
    run = torch.compile(layer, backend=backend, fullgraph=True)
    for temp in (1.0, 2.0, 3.0):
        run(torch.ones(1, 3), torch.tensor(temp))
    assert len(compilations) == 2
    torch.testing.assert_close(run(torch.ones(1, 3), 2.5), layer(torch.ones(1, 3), 2.5))


def test_a_ticket_is_exported():
    model = train(net())
    model.ticket = True
    x, _ = batch()
    exported = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    copy.deepcopy(model)


# -- networks ----------------------------------------------------------------------------------------------------------


def test_masked_modules_are_all_unless_a_list_is_assigned():
    class Plain(MaskedNet):
        def __init__(self):
            super().__init__()
            self.first = SoftMaskedLinear(3, 3)
            self.second = nn.Sequential(SoftMaskedConv2d(3, 3, 3), nn.ReLU())

    model = Plain()
    assert model.mask_modules == [model.first, model.second[0]]
    model.mask_modules = [model.first]
    twin = copy.deepcopy(model)
    assert twin.mask_modules == [twin.first]


def test_the_temperature_takes_numbers_and_is_shown_as_one():
    model = net()
    buffer = model.temp
    model.temp = 3
    model.temp *= 1.5
    assert model.temp is buffer
    assert f"{model.temp:.1f}" == "4.5"
    model.temp = torch.tensor(2.0)
    assert dict(model.named_buffers())["temp"] == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        *(
            (
                call,
                gs.ConfigurationError,
                rf"temp: expected a finite number above 0, or such a tensor of shape \(\), got {got}; it begins at 1",
            )
            for call, got in [
                (lambda model: model.conv(batch()[0], 0), "0"),
                (lambda model: model.conv(batch()[0], True), "True"),
                (lambda model: model.linear.compute_mask(math.inf, False), "inf"),
                (lambda model: model.linear.prune(torch.tensor(math.nan)), r"tensor\(nan\)"),
                (lambda model: setattr(model, "temp", -1), "-1"),
                (lambda model: setattr(model, "temp", torch.ones(2)), r"tensor\(\[1., 1.\]\)"),
                (lambda model: setattr(model, "temp", "1"), "'1'"),
            ]
        ),
        (lambda model: setattr(model, "ticket", 1), gs.ConfigurationError, "ticket: expected True or False, got 1"),
        (
            lambda model: SoftMaskedConv2d(1, 1, 3, mask_initial_value=math.nan),
            gs.ConfigurationError,
            r"mask_initial_value: expected a number in \[-50, 50\], got nan",
        ),
        (lambda model: SoftMaskedLinear(1, 1, True, "0"), gs.ConfigurationError, r"mask_initial_value: .*, got '0'"),
        (lambda model: SoftMaskedConv2d(1, 1, 3, group=2), TypeError, "group"),
        (
            lambda model: model.rewind_weights(),
            gs.OrderError,
            r"there is no rewind point; call checkpoint\(\) at the rewind epoch",
        ),
        (
            lambda model: model.linear.rewind_weights(),
            gs.OrderError,
            r"SoftMaskedLinear\(.*has no weight to go back to.* call checkpoint\(\) at the rewind point first",
        ),
        (
            lambda model: setattr(model, "mask_modules", [model.norm]),
            gs.ConfigurationError,
            "mask_modules: got BatchNorm2d.*expected soft-masked modules of this network",
        ),
        (
            lambda model: setattr(model, "mask_modules", [SoftMaskedLinear(1, 1)]),
            gs.ConfigurationError,
            "mask_modules: got SoftMaskedLinear",
        ),
        (
            lambda model: model.set_extra_state({"ticket": "yes"}),
            gs.StateError,
            "the saved ticket is 'yes' and the rewind point None.*the file is damaged",
        ),
        (lambda model: model.set_extra_state({"ticket": True, "kept": [1]}), gs.StateError, r"point \[1\]"),
        (lambda model: model.set_extra_state(None), gs.StateError, "ticket is None"),
    ],
)
def test_what_cannot_work_is_named_and_changes_nothing(call, error, message):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    with pytest.raises(error, match=message):
        call(model)
    after = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    assert same(before, after)
    assert model.get_extra_state() == {"ticket": False, "kept": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model, "norm", nn.BatchNorm2d(5)), r"norm\.weight: has shape \(5,\), .* point \(4,\)"),
        (lambda model: setattr(model, "more", nn.Linear(1, 1)), r"more\.weight: has shape \(1, 1\), .* point nothing"),
        (lambda model: delattr(model, "scale"), r"scale: has shape nothing there, at the rewind point \(1,\); rewind"),
    ],
)
def test_another_network_is_not_rewound(change, message):
    model = train(net())
    model.checkpoint()
    train(model)
    change(model)
    before = values(model)
    with pytest.raises(gs.StateError, match=message):
        model.rewind_weights()
    assert same(values(model), before)


# -- the published script ----------------------------------------------------------------------------------------------


class Small(MaskedNet):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = SoftMaskedConv2d(1, 12, 3)
        self.norm1 = nn.BatchNorm2d(12)
        self.conv2 = SoftMaskedConv2d(12, 24, 3, 1, 2)
        self.norm2 = nn.BatchNorm2d(24)
        self.classifier = nn.Linear(24, 10)
        self.mask_modules = [m for m in self.modules() if type(m) is SoftMaskedConv2d]
        self.temp = 1

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x, self.temp, self.ticket)), inplace=True)
        x = F.relu(self.norm2(self.conv2(x, self.temp, self.ticket)), inplace=True)
        return self.classifier(x.mean((2, 3)))


def test_the_published_loop_finds_a_ticket_of_handwritten_digits_and_trains_it():
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    order = torch.randperm(len(labels))
    test, rest = order[:397], order[397:]
    epochs, rounds, rewind_epoch = 8, 2, 2
    model = Small()
    factor = 200 ** (1 / (epochs - 1))
    weights = [p for n, p in model.named_parameters() if p.requires_grad and "mask" not in n]
    scores = [p for n, p in model.named_parameters() if p.requires_grad and "mask" in n]
    optimizers = [
        torch.optim.SGD(weights, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
        torch.optim.SGD(scores, 0.1, momentum=0.9, nesterov=True),
    ]
    kept: dict[str, Tensor] = {}
    gone: list[Tensor] = []
    left: list[float] = []

    def one_round(number):
        for epoch in range(epochs):
            model.train()
            if epoch > 0:
                model.temp *= factor
            if number == 0 and epoch == rewind_epoch:
                model.checkpoint()
                kept.update(values(model))
            for part in rest[torch.randperm(len(rest))].split(64):
                for optimizer in optimizers:
                    optimizer.zero_grad()
                output = model(images[part])
                masks = [m.mask for m in model.mask_modules]
                loss = F.cross_entropy(output, labels[part]) + 2e-4 * sum(mask.sum() for mask in masks)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
            for before, module in zip(gone, model.mask_modules, strict=False):
                assert not (before & (module.mask != 0)).any()
        left.append(sum(float((m.mask_weight > 0).sum()) for m in model.mask_modules) / (12 * 9 + 24 * 12 * 9))

    def accuracy():
        model.eval()
        with torch.no_grad():
            return float((model(images[test]).argmax(1) == labels[test]).float().mean())

    model.ticket = False
    for number in range(rounds):
        one_round(number)
        assert float(model.temp) == pytest.approx(200, rel=1e-5)
        if number != rounds - 1:
            gone = [m.mask_weight <= 0 for m in model.mask_modules]
            model.prune()
        model.temp = 1

    optimizers = [torch.optim.SGD(weights, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)]
    found = [m.mask_weight.clone() for m in model.mask_modules]
    assert not same(values(model), kept)
    model.ticket = True
    model.rewind_weights()
    assert same(values(model), kept)
    rewound = accuracy()
    one_round(rounds)
    assert all(m.mask_weight.equal(mask) for m, mask in zip(model.mask_modules, found, strict=True))
    assert 0.03 < left[1] <= left[0] < 0.4
    assert left[2] == left[1]
    assert rewound < 0.85 < accuracy()


def test_a_layer_of_ones_own_is_written_as_the_package_says() -> None:
    class Own(SoftMasked, nn.Linear):
        def forward(self, x: Tensor, temp: float = 1, ticket: bool = False) -> Tensor:
            self.mask = self.compute_mask(temp, ticket)
            return nn.functional.linear(x, self.weight * self.mask, self.bias)

    class Net(MaskedNet):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Own(3, 2)
            self.mask_modules = [self.layer]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, self.temp, self.ticket)

    model = Net()
    model.temp = 3.0
    model.layer.mask_weight.data.copy_(torch.tensor([[0.5, -0.5, 0.1], [1.0, 2.0, -3.0]]))
    x = torch.ones(1, 3)
    soft = 2 / (1 + torch.exp(-3 * model.layer.mask_weight))
    torch.testing.assert_close(model(x), nn.functional.linear(x, model.layer.weight * soft, model.layer.bias))
    torch.testing.assert_close(model.layer.mask, soft)
    copy.deepcopy(model)
    with pytest.raises(gs.ConfigurationError, match=r"own ones derive from gossamer\.compat\.cs\.SoftMasked"):
        model.mask_modules = [nn.Linear(3, 2)]
