"""Learned thresholds behind `attach`: where they go, what they learn from, what is left of them."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gossamer as gs
from gossamer.penalties import L0, L1, Hoyer, Penalty
from gossamer.sites import select_sites
from gossamer.zoo._vision import import_torchvision

SITES = {  # all convolutions and linear layers but the one that makes the logits
    "alexnet": (7, "features.0", "classifier.4"),
    "resnet18": (20, "conv1", "layer4.1.conv2"),
    "resnet34": (36, "conv1", "layer4.2.conv2"),
    "densenet121": (120, "features.conv0", "features.denseblock4.denselayer16.conv2"),
    "mobilenet_v2": (52, "features.0.0", "features.18.0"),
    "mnasnet1_3": (52, "layers.0", "layers.14"),
    "squeezenet1_0": (25, "features.0", "features.12.expand3x3"),
}


class Net(nn.Module):
    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3)
        self.hidden = nn.Linear(16, 12)
        self.again = nn.Linear(12, 12)
        self.relu = nn.ReLU(inplace)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.conv(x)).flatten(1)
        x = self.relu(self.hidden(x))
        return self.head(self.relu(self.again(self.relu(self.again(x)))))


class Run:
    def __init__(self, *methods: gs.Method, net: nn.Module | None = None, optimizer: type = torch.optim.SGD) -> None:
        self.net = net or Net()
        self.optimizer = optimizer(self.net.parameters(), lr=0.05)
        self.sparsity = gs.attach(self.net, list(methods), self.optimizer)

    def train(self, steps: range, forward: nn.Module | None = None) -> Run:
        for step in steps:
            loss = (self.net if forward is None else forward)(batch(step)).square().mean() + self.sparsity.penalty()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


def batch(step: int) -> torch.Tensor:
    return torch.randn(6, 2, 4, 4, generator=torch.Generator().manual_seed(step))


def soft(x: torch.Tensor, eps: torch.Tensor, a: float) -> torch.Tensor:
    e = eps.abs()
    return torch.sigmoid(a * (x - e)) * x + torch.sigmoid(a * (-e - x)) * x


@pytest.mark.parametrize("name", SITES)
def test_sites_of_known_networks_are_all_but_the_logits_and_no_key_changes(name: str) -> None:
    torchvision = import_torchvision()
    with torch.device("meta"):
        net = getattr(torchvision.models, name)(weights=None)
    count, first, last = SITES[name]
    sites = [site.name for site in select_sites(net)]
    assert (len(sites), sites[0], sites[-1]) == (count, first, last)
    before = list(net.state_dict())
    gs.attach(net, gs.LossyThreshold(per_channel=True))
    added = [key for key in net.state_dict() if key not in before]
    assert [key for key in net.state_dict() if key in before] == before
    assert added == [f"{site}.sparsifier.{each}" for site in sites for each in ("eps", "a")]


@pytest.mark.parametrize("position", ["after", "before"])
def test_outputs_are_those_of_the_formula_at_every_call(position: str) -> None:
    net = Net()
    plain = copy.deepcopy(net)
    gs.attach(net, gs.LossyThreshold(eps=0.2, sharpness=5.0, position=position))
    e = torch.tensor(0.2)

    def site(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return soft(layer(x), e, 5.0) if position == "after" else layer(soft(x, e, 5.0))

    x = batch(0)
    y = torch.relu(site(plain.conv, x)).flatten(1)
    y = torch.relu(site(plain.hidden, y))
    y = plain.head(torch.relu(site(plain.again, torch.relu(site(plain.again, y)))))
    torch.testing.assert_close(net(x), y)


@pytest.mark.parametrize("norm", [L0(0.2), L1(), Hoyer()], ids=str)
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_penalty_is_that_of_every_call_whatever_follows_the_site(
    norm: Penalty, normalized: bool, inplace: bool
) -> None:
    net = Net(inplace)
    run = Run(gs.LossyThreshold({"conv": 0.5, "*": 2.0}, eps=0.2, norm=norm, normalized=normalized), net=net)
    x = batch(0)
    net(x)
    penalty = run.sparsity.penalty()
    penalty.backward()
    layers = {name: copy.deepcopy(getattr(net, name)) for name in ("conv", "hidden", "again")}
    eps = {name: layer.sparsifier.eps.detach().clone().requires_grad_() for name, layer in layers.items()}
    weights = {name: layer.weight.detach().clone().requires_grad_() for name, layer in layers.items()}
    first = soft(nn.functional.conv2d(x, weights["conv"], layers["conv"].bias), eps["conv"], 1.0)
    second = torch.relu(first).flatten(1)
    second = soft(nn.functional.linear(second, weights["hidden"], layers["hidden"].bias), eps["hidden"], 1.0)
    third = nn.functional.linear(torch.relu(second), weights["again"], layers["again"].bias)
    third = soft(third, eps["again"], 1.0)
    fourth = nn.functional.linear(torch.relu(third), weights["again"], layers["again"].bias)
    fourth = soft(fourth, eps["again"], 1.0)
    calls = [(0.5, first), (2.0, second), (2.0, third), (2.0, fourth)]
    expected = sum(strength * norm(y) for strength, y in calls)
    if normalized:
        expected = expected / sum(y.numel() for _, y in calls)
    torch.testing.assert_close(penalty, expected)
    expected.backward()
    for name in layers:
        torch.testing.assert_close(getattr(net, name).weight.grad, weights[name].grad)
        torch.testing.assert_close(getattr(net, name).sparsifier.eps.grad, eps[name].grad)


def test_penalty_is_of_this_step_and_of_training_only() -> None:
    run = Run(gs.LossyThreshold(1.0))
    run.net(batch(0))
    once = run.sparsity.penalty()
    run.net(batch(0))
    assert run.sparsity.penalty() == once  # a pass after it was asked for begins anew
    assert run.sparsity.penalty() == once  # asking changes nothing
    run.net.eval()
    run.net(batch(0))
    run.net.train()
    with torch.no_grad():
        run.net(batch(0))
    run.net(batch(0))  # not asked for: the step forgets it
    run.optimizer.step()
    assert run.sparsity.penalty() == 0
    run.train(range(1))
    assert run.sparsity.penalty() == 0
    run.net(batch(0))
    assert run.sparsity.penalty() != once


def test_parts_of_a_step_give_the_penalties_of_each_whether_asked_for_at_once_or_one_by_one() -> None:
    gradients = []
    for at_once in (True, False):
        run = Run(gs.LossyThreshold(1.0, normalized=False))
        for step in (1, 2):
            run.net(batch(step))
            if not at_once:
                run.sparsity.penalty()  # print(penalty)
                run.sparsity.penalty().backward()
        if at_once:
            run.sparsity.penalty().backward()
        gradients.append(run.net.conv.sparsifier.eps.grad)
    torch.testing.assert_close(*gradients)


def test_sites_that_run_without_gradients_alone_are_named() -> None:
    class Reentrant(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=True)

    run = Run(gs.LossyThreshold(0.5), net=Reentrant())
    run.net(batch(0).requires_grad_())
    with pytest.warns(UserWarning, match=r"conv \(and 2 others\): ran in training .* use_reentrant=False"):
        assert run.sparsity.penalty() == 0


def test_thresholds_are_trained_without_weight_decay_and_grow_sharper() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, weight_decay=10.0)
    method = gs.LossyThreshold(0.0, eps=1e-3, double_at=[2, 4, 6], max_sharpness=4.0, lr=0.0)
    sparsity = gs.attach(net, method, optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [10.0, 0.0]
    seen = []
    for step in range(8):
        (net(batch(step)).square().mean() + sparsity.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(net.conv.sparsifier.a))
    assert seen == [1, 2, 2, 4, 4, 4, 4, 4]
    assert net.conv.sparsifier.eps.tolist() == [pytest.approx(1e-3)]


def test_sharpness_may_grow_in_a_geometric_progression() -> None:
    run = Run(gs.LossyThreshold(sharpness=1.0, final_sharpness=16.0, until=4))
    seen = []
    for step in range(6):
        run.train(range(step, step + 1))
        seen.append(float(run.net.conv.sparsifier.a))
    assert seen == [pytest.approx(value) for value in (2, 4, 8, 16, 16, 16)]


def test_a_larger_penalty_leaves_fewer_activations() -> None:
    zeros = {}
    for strength in (0.0, 5.0):
        run = Run(gs.LossyThreshold(strength, eps=0.1, norm="l1", sharpness=8.0)).train(range(60))
        run.net.eval()
        run.sparsity.finalize()
        seen = []
        handle = run.net.hidden.register_forward_hook(lambda m, i, y, seen=seen: seen.append((y == 0).float().mean()))
        run.net(batch(99))
        handle.remove()
        zeros[strength] = float(seen[0])
    assert zeros[5.0] > zeros[0.0] + 0.1


@pytest.mark.parametrize("per_channel", [False, True])
def test_finalized_sites_are_hard_and_plain(per_channel: bool) -> None:
    run = Run(gs.LossyThreshold(0.5, eps=0.3, per_channel=per_channel)).train(range(5))
    threshold = run.net.conv.sparsifier.eps.detach().abs().clone()
    run.net.eval()
    x = batch(0)
    run.net(x)
    rows = run.sparsity.summary().learned
    run.sparsity.finalize()
    assert run.sparsity.summary().learned == [row | {"folded_into": None} for row in rows]
    assert [row["site"] for row in rows] == ["conv", "hidden", "again"]
    assert all(0 < row["moved"] < 1.5 for row in rows)
    assert len(run.optimizer.param_groups) == 1
    assert not any("sparsifier" in name for name, _ in run.net.named_parameters())
    y = nn.functional.conv2d(x, run.net.conv.weight, run.net.conv.bias)
    e = threshold.view(-1, 1, 1)
    assert run.net.conv(x).equal(torch.where(y.abs() > e, y, 0))
    other = Net()
    gs.attach(other, gs.LossyThreshold(per_channel=per_channel)).finalize()
    other.load_state_dict(run.net.state_dict())
    assert other.eval()(x).equal(run.net(x))


def test_movement_is_that_over_all_evaluation_passes_since_training_and_takes_one_number() -> None:
    net = Net()
    sparsity = gs.attach(net, gs.LossyThreshold(eps=0.3, sharpness=2.0, sites="conv"))
    net.eval()
    net(batch(7))
    net.train()
    net(batch(8))
    net.eval()
    for step in range(5):
        net(batch(step))
    assert net.conv.sparsifier._moved.numel() == 2
    y = nn.functional.conv2d(torch.cat([batch(step) for step in range(5)]), net.conv.weight, net.conv.bias)
    y = y.detach()
    smooth = soft(y, torch.tensor(0.3), 2.0)
    expected = (torch.where(y.abs() > 0.3, y, 0) - smooth).norm() / smooth.norm()
    assert sparsity.summary().learned[0]["moved"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("made", ["before", "after"])
def test_an_optimizer_that_nobody_follows_is_refused(made: str) -> None:
    net = Net()
    early = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = gs.attach(net, gs.LossyThreshold())
    optimizer = early if made == "before" else torch.optim.SGD(net.parameters(), lr=0.1)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    other.step()  # of another model
    (net(batch(0)).square().mean() + handle.penalty()).backward()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(gs.OrderError, match=r"conv.weight: is of a model that learns parameters .* sparsity\.follow"):
        optimizer.step()
    assert all(net.state_dict()[key].equal(value) for key, value in before.items())
    handle.follow(optimizer)
    optimizer.step()
    handle.finalize()
    torch.optim.SGD(net.parameters(), lr=0.1).step()


def test_an_optimizer_is_followed_of_itself_where_that_was_asked_for() -> None:
    net = Net()
    handle = gs.attach(net, gs.LossyThreshold(eps=0.1, double_at=[1]), "auto")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.5)
    for step in range(2):
        (net(batch(step)).square().mean() + handle.penalty()).backward()
        optimizer.step()
    assert float(net.conv.sparsifier.a) == 2
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def everything(net: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


@pytest.mark.parametrize("second", ["after", "before"])
def test_two_methods_on_one_site_are_refused(second: str) -> None:
    net = Net()
    before = everything(net)
    methods = [gs.LossyThreshold(sites="conv"), gs.LossyThreshold(sites="con*", position=second)]
    with pytest.raises(gs.ConfigurationError, match=r"conv: is a site of both .*; give them `sites` that do not"):
        gs.attach(net, methods)
    assert everything(net).keys() == before.keys()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: torch.optim.Muon([net.hidden.weight], lr=0.1), "Muon is for matrices"),
        (lambda net: scheduled(net), "a scheduler was made before learned parameters"),
    ],
)
def test_an_optimizer_that_cannot_take_thresholds_is_refused_before_anything_is_changed(
    make: object, message: str
) -> None:
    net = Net()
    before = everything(net)
    optimizer = make(net)
    with pytest.raises(gs.GossamerError, match=message):
        gs.attach(net, [gs.DSR(0.8, targets="hidden.weight"), gs.LossyThreshold()], optimizer)
    after = everything(net)
    assert before.keys() == after.keys()
    assert all(after[key].equal(value) for key, value in before.items())


def scheduled(net: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


def test_another_optimizer_may_not_train_thresholds() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    gs.attach(net, gs.LossyThreshold(), optimizer)
    other = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=1.0)
    net(batch(0)).sum().backward()
    with pytest.raises(gs.OrderError, match=r"conv.sparsifier.eps: is learned beside the model, .* another optimizer"):
        other.step()
    assert net.conv.sparsifier.eps.tolist() == pytest.approx([0.1])
    with pytest.raises(gs.OrderError, match="optimizer: has no parameter of the model"):
        gs.attach(Net(), gs.LossyThreshold(), torch.optim.SGD(net.parameters(), lr=0.1))


def test_following_again_keeps_groups_state_and_schedulers() -> None:
    net = Net()
    handle = gs.attach(net, gs.LossyThreshold())
    eps = [each for name, each in net.named_parameters() if name.endswith("eps")]
    others = [each for name, each in net.named_parameters() if not name.endswith("eps")]
    groups = [{"params": others}, {"params": eps, "lr": 0.5, "weight_decay": 0.0}]
    optimizer = torch.optim.Adam(groups, lr=0.1, weight_decay=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    handle.follow(optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    (net(batch(0)).sum() + handle.penalty()).backward()
    optimizer.step()
    state = optimizer.state[eps[0]]["exp_avg"].clone()
    handle.follow(optimizer)
    assert optimizer.state[eps[0]]["exp_avg"].equal(state)
    handle.detach()
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(others)]


def test_thresholds_before_modules_take_inputs_by_keyword() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    gs.attach(net, gs.LossyThreshold(sites="0", position="before", eps=0.3))
    x = torch.randn(3, 4)
    assert net[0](input=x).equal(net[0](x))


def test_what_cannot_take_a_threshold_is_refused_with_a_remedy() -> None:
    net = Net()
    gs.attach(net, gs.LossyThreshold(fold=False)).finalize()
    with pytest.raises(gs.OrderError, match="conv: has the hard threshold of a run that was finalized; load its"):
        gs.attach(net, gs.LossyThreshold())
    net = Net()
    net.hidden.sparsifier = 3
    with pytest.raises(gs.ConfigurationError, match="hidden: has an attribute 'sparsifier'"):
        gs.attach(net, gs.LossyThreshold())
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(gs.ConfigurationError, match="0: its channels are not known yet"):
        gs.attach(lazy, gs.LossyThreshold(position="before", per_channel=True))


def test_a_step_forgets_what_nobody_asked_for() -> None:
    run = Run(gs.LossyThreshold(1.0))
    run.net(batch(0)).sum().backward()
    run.optimizer.step()
    assert run.sparsity.penalty() == 0


def test_channels_of_norms_have_thresholds_of_their_own() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.ReLU())
    sparsity = gs.attach(net, gs.LossyThreshold(sites=[nn.BatchNorm2d, nn.GroupNorm], per_channel=True))
    with torch.no_grad():
        for place in (1, 3):
            net[place].sparsifier.eps.copy_(torch.tensor([0.0, 0.3, 0.6, 9.0]))
    x = torch.randn(5, 3, 6, 6)
    e = torch.tensor([0.0, 0.3, 0.6, 9.0]).view(-1, 1, 1)
    y = nn.functional.batch_norm(net[0](x), None, None, training=True)
    y = torch.where(y > e, y, 0)
    y = nn.functional.group_norm(y, 2)
    sparsity.finalize()
    torch.testing.assert_close(net(x), torch.where(y > e, y, 0))


def test_thresholds_have_the_type_of_the_weights_around_them() -> None:
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 3), nn.Linear(3, 2)).bfloat16()
    net[1].double()
    gs.attach(net, gs.LossyThreshold())
    assert (net[0].sparsifier.eps.dtype, net[1].sparsifier.eps.dtype) == (torch.float64, torch.float64)
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).to("meta")
    gs.attach(net, gs.LossyThreshold(sites="1"))
    assert net[1].sparsifier.eps.is_meta


@pytest.mark.parametrize("end", ["finalize", "detach"])
def test_there_is_no_penalty_after_the_end(end: str) -> None:
    run = Run(gs.LossyThreshold(0.5)).train(range(2))
    run.net(batch(2))
    getattr(run.sparsity, end)()
    run.net(batch(3))
    assert run.sparsity.penalty() == 0


@pytest.mark.parametrize("position", ["after", "before"])
def test_detached_networks_are_as_they_were(position: str) -> None:
    net = Net()
    before, keys = net(batch(0)), list(net.state_dict())
    gs.attach(net, gs.LossyThreshold(eps=0.5, position=position)).detach()
    assert not net.conv._forward_pre_hooks
    assert net(batch(0)).equal(before)
    assert list(net.state_dict()) == keys
    assert not net.conv._forward_hooks


@pytest.mark.parametrize("weights", [None, lambda: gs.DSR(0.7, every=2, threshold=0.05), lambda: gs.RigL(0.7, every=2)])
def test_stopped_and_resumed_run_is_the_unbroken_one(weights: object) -> None:
    def make() -> Run:
        methods = [gs.LossyThreshold(0.5, eps=0.2, double_at=[2, 5])]
        return Run(*methods, *([] if weights is None else [weights()]), optimizer=torch.optim.Adam)

    unbroken = make().train(range(9))
    broken = make()
    for begin in range(0, 9, 3):
        broken.train(range(begin, begin + 3))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (broken.net, broken.optimizer, broken.sparsity)], file)
        file.seek(0)
        broken = make()
        parts = (broken.net, broken.optimizer, broken.sparsity)
        for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
    for (name, one), two in zip(unbroken.net.state_dict().items(), broken.net.state_dict().values(), strict=True):
        assert one.equal(two), name


def test_copies_made_between_forward_and_backward_go_on_alone() -> None:
    run = Run(gs.LossyThreshold(0.5), gs.SET(0.5, every=2)).train(range(2))
    loss = run.net(batch(2)).square().mean()
    other = copy.deepcopy(run)
    (loss + run.sparsity.penalty()).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    other.train(range(2, 3))
    for one, two in zip(run.net.state_dict().values(), other.net.state_dict().values(), strict=True):
        assert one.equal(two)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_in_one_graph_with_the_same_penalty() -> None:
    plain, other = (Run(gs.LossyThreshold(0.5, eps=0.2, double_at=[2])) for _ in range(2))
    compiled = torch.compile(other.net, fullgraph=True, backend="aot_eager")
    for step in range(4):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            compiled(batch(9)).sum().backward()  # a part whose penalty nobody asks for, of a step that is left out
            other.optimizer.zero_grad()
            other.sparsity.penalty()
            other.train(range(step, step + 1), forward=compiled)
        plain.train(range(step, step + 1))
    for one, two in zip(plain.net.state_dict().values(), other.net.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two)


def test_a_site_counts_once_where_activations_are_computed_again() -> None:
    class Checkpointed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    plain, other = Run(gs.LossyThreshold(0.5)), Run(gs.LossyThreshold(0.5), net=Checkpointed())
    for run in (plain, other):
        run.train(range(4))
    for one, two in zip(plain.net.state_dict().values(), other.net.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two)


class Branches(Net):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 3)
        self.rnn = nn.LSTM(3, 3)
        self.tail = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(super().forward(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gs.LossyThreshold(-1), "strength: expected a number"),
        (lambda: gs.LossyThreshold({"conv": -1}), r"strength\['conv'\]: expected a number"),
        (lambda: gs.LossyThreshold({"conv": 1}), r"strength: no glob of \['conv'\] gives hidden a factor"),
        (lambda: gs.LossyThreshold(norm="l7"), "norm: got 'l7'; allowed are 'l0'"),
        (lambda: gs.LossyThreshold(position="at"), "position: got 'at'; allowed are 'after' and 'before'"),
        (lambda: gs.LossyThreshold(sharpness=0), "sharpness: expected a number above 0"),
        (lambda: gs.LossyThreshold(until=3), "give final_sharpness with until"),
        (lambda: gs.LossyThreshold(double_at=[1], final_sharpness=2.0, until=4), "give final_sharpness with until"),
        (lambda: gs.LossyThreshold(sites="con"), "sites: 'con' matches no module.*did you mean 'conv'"),
        (lambda: gs.LossyThreshold(sites=nn.GELU), "sites: the model calls no GELU"),
        (lambda: gs.LossyThreshold(sites=lambda name, module: False), "sites: the predicate .* holds for no module"),
        (lambda: gs.LossyThreshold(eps=1e39), r"eps: expected a number in .* got 1e\+39"),
        (lambda: gs.LossyThreshold(sharpness=float("inf")), "sharpness: expected a number in .* got inf"),
        (lambda: gs.LossyThreshold(sharpness=None), "sharpness: expected a number in .* got None"),
        (lambda: gs.LossyThreshold(max_sharpness=None), "max_sharpness: expected a number in .* got None"),
        (lambda: gs.LossyThreshold(lr=float("inf")), "lr: expected a number in .* got inf"),
        (lambda: gs.LossyThreshold(double_at=3), "double_at: expected a list of numbers of steps, got 3"),
        (lambda: gs.LossyThreshold({1: 2.0}), "strength: expected globs over names of sites, got 1"),
        (lambda: gs.LossyThreshold({"con": 1.0, "*": 2.0}), "strength: 'con' matches no site; the first is conv"),
        (lambda: gs.LossyThreshold(sites=3), "sites: expected globs, module types or predicates, got 3"),
        (lambda: gs.LossyThreshold(sites=["relu"], per_channel=True), "relu: is a ReLU, whose channels are not known"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(make: object, message: str) -> None:
    net = Net()
    keys = list(net.state_dict())
    with pytest.raises(gs.ConfigurationError, match=message):
        gs.attach(net, make())
    assert list(net.state_dict()) == keys


def test_attaching_twice_is_an_error() -> None:
    net = Net()
    gs.attach(net, gs.LossyThreshold())
    with pytest.raises(gs.OrderError, match="conv: has a threshold already"):
        gs.attach(net, gs.LossyThreshold())


def test_sites_that_cannot_work_are_named_when_they_are_called() -> None:
    for sites in (None, "idle"):
        run = Run(gs.LossyThreshold(0.5, sites=sites), net=Branches()).train(range(10))
        before = everything(run.net)
        with pytest.raises(gs.ConfigurationError, match="idle: has not run in a forward pass for training"):
            run.train(range(1))
        assert all(run.net.state_dict()[key].equal(value) for key, value in before.items())
    run = Run(gs.LossyThreshold(0.5), net=Branches()).train(range(10))
    with pytest.raises(gs.ConfigurationError, match="idle: has not run in a forward pass for training"):
        run.train(range(1))
    net = nn.Sequential(nn.LSTM(3, 3), nn.Identity())
    gs.attach(net, gs.LossyThreshold(sites=["0"]))
    with pytest.raises(gs.ConfigurationError, match="0: gives a tuple, and a threshold takes one tensor"):
        net(torch.randn(2, 1, 3))
    net = nn.Sequential(nn.Identity(), nn.Identity())
    gs.attach(net, gs.LossyThreshold())
    with pytest.raises(gs.ConfigurationError, match=r"0: lossy threshold: got activations of dtype torch\.int64"):
        net(torch.ones(2, 2, dtype=torch.int64))
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    with pytest.raises(gs.ConfigurationError, match="0: a Sequential would call the threshold"):
        gs.attach(net, gs.LossyThreshold(sites=["0"]))


# -- what compiled models and copies see -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what the compiler imports
@pytest.mark.parametrize("norm", ["l0", "l1", "l2", "hoyer"])
def test_a_compiled_model_may_change_what_passed_a_threshold_in_place(norm: str) -> None:
    def run(compiled: bool) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
        for seed, parameter in enumerate(net.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
        sparsity = gs.attach(net, gs.LossyThreshold(0.3, sites="0", eps=0.4, norm=norm))
        forward = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(9))
        loss = forward(x).square().mean() + sparsity.penalty()
        loss.backward()
        return loss, [parameter.grad for parameter in net.parameters()]

    (there, expected), (here, found) = run(False), run(True)
    torch.testing.assert_close(here, there)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@torch._dynamo.config.patch(skip_nnmodule_hook_guards=True)
def test_hooks_are_seen_by_compiled_models_of_a_class_that_was_compiled_without_them() -> None:
    torch.compiler.reset()
    dense, net = (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).eval() for _ in range(2))
    x = torch.randn(5, 4)
    for each in (dense, net):
        torch.compile(each, backend="eager")(x)
    gs.attach(net, gs.LossyThreshold(eps=5.0)).finalize()
    assert torch.compile(net, backend="eager")(x).equal(net(x))
    assert torch.compile(dense, backend="eager")(x).equal(dense(x))
    assert not net(x).equal(dense(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what the compiler imports
def test_a_model_that_was_compiled_in_place_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    net[0].compile()
    with pytest.raises(gs.OrderError, match=r"^0: is already compiled, by its method `compile`; the order is: attach"):
        gs.attach(net, gs.LossyThreshold())


def test_thresholds_of_a_model_in_evaluation_mode_are_in_it_too() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).eval()
    sparsity = gs.attach(net, gs.LossyThreshold(eps=0.5))
    net(torch.randn(3, 4))
    assert sparsity.penalty().item() == 0
    assert sparsity.summary().learned[0]["moved"] > 0


def test_copies_of_the_model_alone_collect_nothing_and_those_of_all_three_do() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsity = gs.attach(net, gs.LossyThreshold(eps=0.1), optimizer)
    alone, (model, _, handle) = copy.deepcopy(net), copy.deepcopy((net, optimizer, sparsity))
    x = torch.randn(3, 4)
    for _ in range(3):
        alone(x).sum().backward()
    assert alone[0].sparsifier.collected.values() == []
    for each in (net, model):
        each(x)
    assert handle.penalty().item() == sparsity.penalty().item() > 0


def test_an_empty_batch_has_no_penalty() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    sparsity = gs.attach(net, gs.LossyThreshold())
    net(torch.zeros(0, 4))
    assert sparsity.penalty().item() == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_with_the_site_and_the_remedy() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    sparsity = gs.attach(encoder, gs.LossyThreshold(0.1))
    x, padding = torch.randn(2, 4, 16), torch.zeros(2, 4, dtype=torch.bool)
    padding[1, 3] = True
    encoder(x, src_key_padding_mask=padding)
    encoder.eval()
    with (
        torch.no_grad(),
        pytest.raises(gs.ConfigurationError, match=r"^layers\.0\.linear1: .*nested .*use_nested_tensor"),
    ):
        encoder(x, src_key_padding_mask=padding)
    encoder.use_nested_tensor = False
    with torch.no_grad():
        encoder(x, src_key_padding_mask=padding)
    sparsity.finalize()
    encoder.use_nested_tensor = True
    with torch.no_grad(), pytest.raises(gs.ConfigurationError, match=r"nested tensors.*use_nested_tensor set to False"):
        encoder(x, src_key_padding_mask=padding)


def test_the_sharpness_begins_no_higher_than_it_may_become() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    sparsity = gs.attach(model, gs.LossyThreshold(0.1, sharpness=100.0, max_sharpness=10.0))
    assert [row["sharpness"] for row in sparsity.methods[0].learned()] == [10.0]
