"""Where a ReLU alone follows a threshold, finalize makes one operation of the two, with equal outputs."""

import copy

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.nn import FATReLU, LossyHardSparsifier
from gossamer.zoo._vision import import_torchvision


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
        )


class Residual(nn.Module):
    """The first convolution's output is used twice, the second's ReLU is called twice, the third's is a function."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.first, self.shared = nn.ReLU(), nn.ReLU()
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        y = self.one(x)
        y = self.first(y) + y
        y = self.shared(self.shared(self.two(y)) - 0.1)
        return self.last(torch.relu(self.three(y)).mean((2, 3)))


class Moody(nn.Module):
    """What takes the output depends on the mode, or on values, which no graph shows."""

    def __init__(self, by_value, mode=True):
        super().__init__()
        self.by_value, self.mode = by_value, mode
        self.one, self.relu, self.last = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x):
        y = self.one(x)
        z = self.relu(y)
        if self.by_value:
            return self.last(z) if z.sum() > 0 else self.last(y)
        return self.last(z + y if self.training == self.mode else z)


def hardened(net):
    """Outputs with hard thresholds put in by hand, where the handle has its own."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if "sparsifier" in module._modules:
            e = module.sparsifier.eps.detach().abs()
            module._forward_hooks.clear()
            shape = (-1, 1, 1) if isinstance(module, nn.Conv2d) or len(e) == 1 else (-1,)

            def hook(_, inputs, y, e=e, shape=shape):
                return y * (y.abs() > (e.view(shape) if len(e) > 1 else e))

            module.register_forward_hook(hook)
    return net


def prepare(net, **options):
    sparsity = gs.attach(net, gs.LossyThreshold(**options))
    for module in net.modules():
        if "sparsifier" in module._modules:  # thresholds of both signs that differ
            with torch.no_grad():
                module.sparsifier.eps.copy_(torch.linspace(-0.3, 0.4, len(module.sparsifier.eps)))
                module.sparsifier.eps.add_(0.05)
    return sparsity


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_relu_that_follows_becomes_one_with_the_threshold(per_channel):
    torch.manual_seed(0)
    net, keys = Plain(), list(Plain().state_dict())
    sparsity = prepare(net, eps=0.3, per_channel=per_channel)
    x = torch.randn(7, 3, 8, 8)
    expected = hardened(net)(x)
    sparsity.finalize()
    assert [type(module) for module in net] == [nn.Conv2d, FATReLU, nn.Conv2d, FATReLU, nn.Flatten, nn.Linear]
    assert net(x).equal(expected)
    assert [row["folded_into"] for row in sparsity.summary().learned] == ["1", "3"]
    assert [key for key in net.state_dict() if not key.endswith(".eps")] == keys
    assert not net[0]._modules
    assert not net[0]._forward_hooks


def test_a_relu_that_is_a_site_becomes_one_with_its_threshold():
    torch.manual_seed(0)
    net = Residual()
    sparsity = prepare(net, sites=["first", "shared"], eps=0.2)
    x = torch.randn(7, 3, 8, 8)
    expected = hardened(net)(x)
    sparsity.finalize()
    assert type(net.first) is type(net.shared) is FATReLU
    assert net(x).equal(expected)


@pytest.mark.parametrize(
    "build", [Residual, lambda: Moody(False), lambda: Moody(False, mode=False), lambda: Moody(True)]
)
def test_nothing_is_folded_that_others_see_too(build):
    torch.manual_seed(0)
    net = build()
    sparsity = prepare(net, eps=0.2)
    x = torch.randn(7, 3, 8, 8) if isinstance(net, Residual) else torch.randn(7, 4)
    hard = hardened(net)
    sparsity.finalize()
    assert not any(isinstance(module, FATReLU) for module in net.modules())
    for training in (True, False):
        assert net.train(training)(x).equal(hard.train(training)(x))
    assert {row["folded_into"] for row in sparsity.summary().learned} == {None}


def test_a_relu_that_somebody_watches_is_left():
    net = Plain()
    seen = []
    net[1].register_forward_hook(lambda *_: seen.append(1))
    prepare(net).finalize()
    net(torch.randn(1, 3, 8, 8))
    assert (type(net[1]), type(net[3]), len(seen)) == (nn.ReLU, FATReLU, 1)
    assert isinstance(net[0].sparsifier, LossyHardSparsifier)


class Inplace(nn.Module):
    """An in-place ReLU changes what others read."""

    def __init__(self, form):
        super().__init__()
        self.a, self.r, self.b, self.form = nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3), form

    def forward(self, x):
        y = self.a(x)
        if self.form == "statement":
            self.r(y)
            return self.b(y)
        if self.form == "view":
            self.r(y.view(-1))
            return self.b(y)
        z = self.r(y)
        return self.b(z + y)


class Kept(nn.Module):
    """What the first layer gives is read elsewhere: as an attribute, or only where an argument is given."""

    def __init__(self, form):
        super().__init__()
        self.a, self.r, self.b, self.form = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3), form

    def forward(self, x, skip=None):
        y = self.a(x)
        if self.form == "attribute":
            self.features = y
        z = self.r(y)
        if self.form == "argument" and skip is None:
            z = z + y
        return self.b(z)


class Listed(nn.Module):
    """Calls its modules from a list that torch does not know of, and with a keyword."""

    def __init__(self):
        super().__init__()
        self.a, self.r, self.b = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
        self.layers = [self.a, self.r, self.b]

    def forward(self, x):
        for layer in self.layers:
            x = layer(input=x)
        return x


class Counted(nn.Module):
    """Draws random numbers."""

    def __init__(self):
        super().__init__()
        self.a, self.r, self.b = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.r(self.a(x)) * torch.rand(()))


@pytest.mark.parametrize("form", ["statement", "view", "sum"])
@pytest.mark.parametrize("sites", ["a", "r"])
def test_an_in_place_relu_that_others_read_after_is_left(form, sites):
    torch.manual_seed(0)
    net = Inplace(form)
    sparsity = prepare(net, sites=[sites], eps=0.2)
    x = torch.randn(5, 6)
    expected = hardened(net)(x.clone())
    sparsity.finalize()
    assert type(net.r) is nn.ReLU
    assert net(x.clone()).equal(expected)


@pytest.mark.parametrize("form", ["attribute", "argument"])
def test_what_is_kept_or_read_in_some_calls_only_is_not_folded(form):
    torch.manual_seed(0)
    net = Kept(form)
    sparsity = prepare(net, eps=0.2)
    x = torch.randn(5, 6)
    expected = hardened(net)(x)
    sparsity.finalize()
    assert type(net.r) is nn.ReLU
    assert net(x).equal(expected)
    assert not hasattr(net, "features") or isinstance(net.features, torch.Tensor)


def test_a_relu_is_changed_for_all_who_refer_to_it():
    torch.manual_seed(0)
    net = Listed()
    sparsity = prepare(net, sites=["r"], eps=0.2)
    x = torch.randn(5, 6)
    expected = hardened(net)(x)
    sparsity.finalize()
    assert type(net.layers[1]) is type(net.r) is FATReLU
    assert net(x).equal(expected)


def test_a_relu_within_a_module_of_torch_is_left():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=nn.ReLU(), batch_first=True).eval()
    net = nn.Sequential(layer, nn.Linear(8, 3))
    sparsity = prepare(net, sites=nn.ReLU, eps=0.4)
    x = torch.randn(2, 5, 8)
    expected = hardened(net)(x)
    sparsity.finalize()
    torch.testing.assert_close(net(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)  # where torch takes a shorter way unless there are hooks


def test_a_hook_of_the_user_on_a_site_stays_where_it_was():
    for watched in (nn.ReLU(), nn.Tanh()):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), watched, nn.Linear(6, 3))
        sparsity = prepare(net, eps=0.2)
        net[0].register_forward_hook(lambda module, inputs, y: 3 * y)
        x = torch.randn(5, 6)
        y = nn.functional.linear(x, net[0].weight, net[0].bias)
        expected = net[2](net[1](3 * y * (y.abs() > net[0].sparsifier.eps.detach().abs())))
        sparsity.finalize()
        assert net(x).equal(expected)


def test_finalized_networks_can_be_traced_and_a_second_method_folds_too():
    torch.manual_seed(0)
    net = Plain()
    sparsity = gs.attach(net, [gs.LossyThreshold(sites="0", eps=0.2), gs.LossyThreshold(sites="2", eps=0.3)])
    x = torch.randn(3, 3, 8, 8)
    expected = hardened(net)(x)
    sparsity.finalize()
    assert [type(net[place]) for place in (1, 3)] == [FATReLU, FATReLU]
    assert net(x).equal(expected)
    assert torch.fx.symbolic_trace(net)(x).equal(expected)


def test_hooks_of_the_user_are_not_called_while_it_is_found_out_what_follows():
    inner = Plain()
    net = nn.Sequential(inner, nn.ReLU(), nn.Linear(5, 2))
    seen = []
    inner.register_forward_hook(lambda *_: seen.append(1))
    prepare(net).finalize()
    assert not seen
    net(torch.randn(1, 3, 8, 8))
    assert len(seen) == 1


def test_thresholds_of_features_fold_along_the_last_dimension():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    sparsity = prepare(net, per_channel=True)
    x = torch.randn(4, 5, 6)
    y = nn.functional.linear(x, net[0].weight, net[0].bias)
    expected = net[2](torch.where(y > net[0].sparsifier.eps.detach().abs(), y, 0))
    sparsity.finalize()
    assert type(net[1]) is FATReLU
    assert net(x).equal(expected)


def test_nothing_is_folded_where_that_is_not_wanted():
    net = Plain()
    prepare(net, fold=False).finalize()
    assert [type(net[place]) for place in (1, 3)] == [nn.ReLU, nn.ReLU]
    assert isinstance(net[0].sparsifier, LossyHardSparsifier)


def test_thresholds_before_modules_are_not_folded():
    net = Plain()
    prepare(net, position="before").finalize()
    assert not any(isinstance(module, FATReLU) for module in net.modules())


def test_alexnet_folds_every_site():
    net = import_torchvision().models.alexnet()
    sparsity = gs.attach(net, gs.LossyThreshold())
    sparsity.finalize()
    assert [row["folded_into"] for row in sparsity.summary().learned] == [
        *(f"features.{place}" for place in (1, 4, 7, 9, 11)),
        *(f"classifier.{place}" for place in (2, 5)),
    ]


def test_looking_for_what_follows_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), Counted())
    sparsity = gs.attach(net, gs.LossyThreshold())
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    sparsity.finalize()
    assert torch.get_rng_state().equal(random)
    assert all(net.state_dict()[key].equal(value) for key, value in before.items() if "sparsifier" not in key)
    assert net.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fatrelu_keeps_what_is_above_the_threshold_and_nan(dtype):
    x = torch.tensor([-2.0, -0.5, -0.0, 0.25, 0.5, 0.75, float("inf"), float("nan")], dtype=dtype)
    y = FATReLU(-0.5)(x)
    assert y.dtype == dtype
    assert y[:7].tolist() == [0, 0, 0, 0, 0, 0.75, float("inf")]
    assert y[7].isnan()
    assert not torch.signbit(y[:5]).any()
    with pytest.raises(gs.ConfigurationError, match=r"3 thresholds .* shape \(2, 4\)"):
        FATReLU(channels=3)(torch.randn(2, 4))


class Branches(nn.Module):
    """What lies before the ReLU is seen in passes that only some arguments, tensors or flags lead to."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.flag = kind, False
        self.first, self.relu, self.last = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
        self.body = nn.Sequential(self.first, self.relu)

    def forward(self, x, skip=None, mask=None):
        h = self.first(x)
        y = self.relu(h)
        if self.kind == "arguments":
            if mask is not None:
                y = y * mask
            elif skip is not None:
                y = y + h * skip
        seen = {"is_tensor": torch.is_tensor(h), "isinstance": isinstance(h, torch.Tensor), "flag": self.flag}
        if seen.get(self.kind):
            y = y + h
        return self.last(y)


@pytest.mark.parametrize("kind", ["arguments", "is_tensor", "isinstance", "flag"])
@pytest.mark.parametrize("in_a_row", [True, False])
def test_a_relu_is_left_where_what_lies_before_it_may_be_seen(kind, in_a_row):
    torch.manual_seed(0)
    model = Branches(kind).eval()
    if not in_a_row or kind == "flag":
        del model.body
    else:
        del model.first, model.relu
        model.__class__ = type(
            "InARow", (Branches,), {"first": property(lambda m: m.body[0]), "relu": property(lambda m: m.body[1])}
        )
    sparsity = gs.attach(model, gs.LossyThreshold(0.1, eps=0.5))
    x = torch.randn(4, 6)
    calls = [{}, {"skip": torch.ones(1)}, {"mask": torch.ones(6)}]

    def outputs():
        found = [model(x, **options) for options in calls]
        model.flag = True
        found += [model(x, **options) for options in calls]
        model.flag = False
        return found

    with torch.no_grad(), sparsity.hardened():
        before = outputs()
    sparsity.finalize()
    assert type(model.relu) is nn.ReLU
    with torch.no_grad():
        assert all(now.equal(then) for now, then in zip(outputs(), before, strict=True))


def test_a_row_that_a_forward_pass_has_once_is_folded_whatever_its_flags():
    class Flagged(nn.Module):
        def __init__(self):
            super().__init__()
            self.flag = False
            self.body, self.last = nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3)

        def forward(self, x, skip=None):
            h = self.body(x)
            if self.flag or skip is not None:
                h = h + x
            return self.last(h)

    torch.manual_seed(0)
    model = Flagged().eval()
    sparsity = gs.attach(model, gs.LossyThreshold(0.1, eps=0.5))
    x = torch.randn(4, 6)
    with torch.no_grad(), sparsity.hardened():
        before = model(x)
    sparsity.finalize()
    assert isinstance(model.body[1], FATReLU)
    with torch.no_grad():
        assert model(x).equal(before)


def test_a_forward_pass_with_many_optional_arguments_is_not_folded():
    class Many(nn.Sequential):
        def forward(self, x, a=None, b=None, c=None, d=None, e=None):
            return super().forward(x)

    model = nn.Sequential(Many(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3)))
    gs.attach(model[0], gs.LossyThreshold(0.1, eps=0.5)).finalize()
    assert type(model[0][0][1]) is nn.ReLU
