"""Weights computed from a bank by hashing: the hash by brute force, gradients, and masks that act in the forward."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gossamer as gs
from gossamer.nn import HashedWeight, hash_weight

METHODS = {
    "dsr": lambda: gs.DSR(0.75, every=2, threshold=0.05),
    "set": lambda: gs.SET(0.75, every=2),
    "gmp": lambda: gs.GMP(0.75, begin=0, end=6, every=2),
    "static": lambda: gs.Static(0.75),
    "dsr rows": lambda: gs.DSR(0.75, every=2, threshold=0.2, structure="row"),
    "set 2:4": lambda: gs.SET(every=2, structure="2:4"),
}


def mix(x: int) -> int:
    """The finalizer of splitmix64, in integers of any length."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def place_and_sign(i: int, size: int, seed: int) -> tuple[int, int]:
    hashed = mix(((i + 1) * 0x9E3779B97F4A7C15 + mix(seed)) % 2**64) % 2**63 % (2 * size)
    return hashed % size, 1 if hashed < size else -1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3)
        self.hidden = nn.Linear(32, 16)
        self.head = nn.Linear(16, 4)
        hash_weight(self.conv, "weight", 40, seed=1)
        hash_weight(self.hidden, "weight", 100, seed=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(torch.tanh(self.conv(x)).flatten(1))))


def hashed(layer: nn.Module) -> nn.Module:
    hash_weight(layer, "weight", 8)
    return layer


def shifted() -> nn.Module:
    class Shift(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + 1

    layer = hashed(nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(layer, "weight", Shift())
    return layer


def shared_bank() -> nn.Module:
    first, second = hashed(nn.Linear(4, 4)), hashed(nn.Linear(4, 4))
    second.parametrizations.weight.original = first.parametrizations.weight.original
    return nn.Sequential(first, second)


class Run:
    def __init__(self, method: gs.Method, net: nn.Module | None = None) -> None:
        self.net = net or Net()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        self.sparsity = gs.attach(self.net, method, self.optimizer)

    def train(self, steps: range) -> Run:
        for step in steps:
            x = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(step))
            self.net(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


def snapshot(run: Run) -> list[torch.Tensor]:
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    return [*run.net.state_dict().values(), *run.sparsity.masks().values(), *moments]


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    size=st.integers(1, 60),
    seed=st.integers(0, 2**63 - 1),
)
def test_weight_is_the_signed_number_that_its_position_hashes_to(shape: list[int], size: int, seed: int) -> None:
    hashed = HashedWeight(shape, size, seed)
    bank = torch.randn(size, dtype=torch.float64)
    weight = hashed(bank)
    assert list(weight.shape) == shape
    for i, value in enumerate(weight.flatten()):
        place, sign = place_and_sign(i, size, seed)
        assert value == sign * bank[place]


def test_positions_spread_over_the_bank_and_signs_are_even() -> None:
    hashed = HashedWeight((400, 500), 1000, seed=7)
    counts = torch.bincount(hashed.index % 1000, minlength=1000).double()
    assert abs(counts.std() / 200**0.5 - 1) < 0.1  # as of 200,000 independent draws: Poisson of mean 200
    assert abs((hashed.index < 1000).double().mean() - 0.5) < 0.005
    other = HashedWeight((400, 500), 1000, seed=8)
    assert abs((hashed.index % 1000 == other.index % 1000).double().mean() - 1e-3) < 3e-4


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_is_that_of_the_formula_and_reaches_the_bank(masked: bool) -> None:
    torch.manual_seed(0)
    hashed = HashedWeight((5, 7), 6, seed=3)
    bank = torch.randn(6, dtype=torch.float64, requires_grad=True)
    if masked:
        hashed.mask = -(torch.rand(5, 7) < 0.5).to(torch.int8)
    assert torch.autograd.gradcheck(hashed, (bank,))
    assert torch.autograd.gradgradcheck(lambda x: hashed(x).square(), (bank,))
    gradient = torch.randn(5, 7, dtype=torch.float64)
    hashed(bank).backward(gradient)
    expected = torch.zeros(6, dtype=torch.float64)
    for i, value in enumerate(gradient.flatten()):
        place, sign = place_and_sign(i, 6, 3)
        if hashed.mask is None or hashed.mask.flatten()[i]:
            expected[place] += sign * value
    torch.testing.assert_close(bank.grad, expected)


def test_a_fitted_bank_is_the_least_squares_fit_and_a_fresh_one_keeps_the_variance() -> None:
    torch.manual_seed(0)
    trained = nn.Linear(60, 50)
    weight = trained.weight.detach().clone()
    system = torch.zeros(3000, 300)
    for i in range(3000):
        place, sign = place_and_sign(i, 300, 5)
        system[i, place] = sign
    bank = hash_weight(trained, "weight", 300, seed=5, fit=True)
    torch.testing.assert_close(bank.detach(), torch.linalg.lstsq(system, weight.flatten()[:, None]).solution[:, 0])
    torch.manual_seed(0)
    fresh = nn.Linear(60, 50)
    hash_weight(fresh, "weight", 300, seed=5)
    assert abs(fresh.weight.std() / weight.std() - 1) < 0.1


@pytest.mark.parametrize("name", METHODS)
def test_pruned_weights_are_zero_in_the_forward_and_counts_are_exact(name: str) -> None:
    run = Run(METHODS[name]())
    for step in range(12):
        run.train(range(step, step + 1))
        masks = run.sparsity.masks()
        for layer in ("conv", "hidden", "head"):
            weight = getattr(run.net, layer).weight.detach()
            assert not weight[~masks[f"{layer}.weight"]].any()
            assert not torch.signbit(weight[~masks[f"{layer}.weight"]]).any()
            assert weight[masks[f"{layer}.weight"]].count_nonzero()
    total = sum(mask.numel() for mask in masks.values())
    active = sum(int(mask.sum()) for mask in masks.values())
    assert total == 8 * 36 + 16 * 32 + 4 * 16
    if name == "set 2:4":
        assert active == total // 2
    elif name == "dsr rows":
        assert total // 4 - 16 < active <= total // 4  # rows of 16, 32 and 36 weights
    else:
        assert active == total // 4
    assert run.sparsity.summary().totals["targets_active"] == active
    banks = [run.net.conv.parametrizations.weight.original, run.net.hidden.parametrizations.weight.original]
    assert [tuple(bank.shape) for bank in banks] == [(40,), (100,)]


@pytest.mark.parametrize("name", METHODS)
def test_stopped_and_resumed_run_is_the_unbroken_one(name: str) -> None:
    unbroken = Run(METHODS[name]()).train(range(9))
    broken = Run(METHODS[name]())
    for begin in range(0, 9, 3):
        broken.train(range(begin, begin + 3))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (broken.net, broken.optimizer, broken.sparsity)], file)
        file.seek(0)
        broken = Run(METHODS[name]())
        parts = (broken.net, broken.optimizer, broken.sparsity)
        for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
    assert all(a.equal(b) for a, b in zip(snapshot(unbroken), snapshot(broken), strict=True))


def test_copies_go_on_alone_and_projected_copies_have_the_masks() -> None:
    run = Run(METHODS["set"]()).train(range(3))
    other = copy.deepcopy(run)
    average = torch.optim.swa_utils.AveragedModel(run.net)
    run.train(range(3, 8))
    frozen = snapshot(run)
    run.sparsity.project(average)
    for layer in ("conv", "hidden", "head"):
        mask = run.sparsity.masks()[f"{layer}.weight"]
        assert not getattr(average.module, layer).weight[~mask].any()
    other.train(range(3, 12))
    assert all(a.equal(b) for a, b in zip(snapshot(run), frozen, strict=True))
    run.train(range(8, 12))
    assert all(a.equal(b) for a, b in zip(snapshot(run), snapshot(other), strict=True))


def test_finalized_model_is_plain_with_the_same_outputs_and_trains_on() -> None:
    run = Run(METHODS["dsr"]()).train(range(8))
    x = torch.randn(3, 4, 4, 4)
    before, masks = run.net(x), run.sparsity.masks()
    assert run.sparsity.finalize() is run.net
    assert run.net(x).equal(before)
    plain = {name: tuple(value.shape) for name, value in run.net.state_dict().items()}
    assert plain["conv.weight"] == (8, 4, 3, 3)
    assert not any("parametrizations" in name for name in plain)
    for name, mask in masks.items():
        assert not run.net.get_parameter(name)[~mask].any()
    run.train(range(8, 10))  # every weight is trained by itself now
    assert not run.net(x).equal(before)


def test_one_shot_pruning_keeps_the_largest_weights_and_writes_them_out() -> None:
    net = Net()
    weight = net.hidden.weight.detach().clone()
    gs.prune(net, 0.5, distribution="uniform")
    assert isinstance(net.hidden.weight, nn.Parameter)
    kept = net.hidden.weight != 0
    assert net.hidden.weight[kept].equal(weight[kept])
    assert kept.sum() == 256
    assert weight[kept].abs().min() >= weight[~kept].abs().max()


def test_masks_given_and_masks_from_zeros_are_taken() -> None:
    first = gs.attach(Net(), gs.Static(0.5))
    masks = first.masks()
    net = Net()
    second = gs.attach(net, gs.Static(), masks=masks)
    assert not net.hidden.weight[~masks["hidden.weight"]].any()
    second.detach()
    third = gs.attach(net, gs.Static(), masks="zeros")
    assert all(mask.equal(masks[name]) for name, mask in third.masks().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_model_sees_new_masks_without_compiling_again() -> None:
    run = Run(METHODS["set"]())
    compiled = torch.compile(run.net, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 4, 4)
    for step in range(6):
        run.train(range(step, step + 1))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            torch.testing.assert_close(compiled(x), run.net(x))


def test_gradients_are_clipped_by_the_norm_over_the_banks() -> None:
    run = Run(METHODS["static"]())
    run.net(torch.randn(6, 4, 4, 4)).square().mean().backward()
    kept = run.sparsity.masks()["head.weight"]
    squares = [p.grad.square().sum() for p in run.net.parameters() if p is not run.net.head.weight]
    expected = torch.stack([*squares, run.net.head.weight.grad[kept].square().sum()]).sum().sqrt()
    torch.testing.assert_close(run.sparsity.clip_grad_norm_(1e9), expected)


def test_an_optimizer_that_mixes_weights_trains_banks() -> None:
    run = Run(METHODS["set"]())
    run.optimizer = torch.optim.Adafactor(run.net.parameters(), lr=0.01)
    run.sparsity.follow(run.optimizer)
    run.train(range(6))
    assert not run.net.hidden.weight[~run.sparsity.masks()["hidden.weight"]].any()


def test_saved_with_another_seed_is_refused() -> None:
    saved = nn.Linear(8, 8)
    hash_weight(saved, "weight", 16, seed=1)
    other = nn.Linear(8, 8)
    hash_weight(other, "weight", 16, seed=2)
    with pytest.raises(gs.StateError, match=r"saved with the seed, size and shape \[1, 16, 8, 8\]"):
        other.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hash_weight(nn.Linear(4, 4), "weights", 2), "Linear has no parameter 'weights'; it has weight, bias"),
        (lambda: hash_weight(nn.Linear(4, 4), "weight", 0), "size: expected"),
        (lambda: hash_weight(nn.Linear(4, 4), "weight", 17), "size: expected"),
        (lambda: hash_weight(nn.Linear(4, 4), "weight", 4, seed=-1), "seed: expected"),
        (lambda: hash_weight(nn.LSTM(4, 4), "weight_hh_l0", 4), "take LSTMCell"),
        (lambda: hash_weight(nn.LazyLinear(4), "weight", 4), "has no values yet"),
        (lambda: hash_weight(nn.Linear(4, 4, device="meta"), "weight", 4), "has no values yet"),
        (lambda: hash_weight(nn.Linear(4, 4), ["weight"], 4), "Linear has no parameter"),
        (lambda: hash_weight(nn.Linear(4, 4), "weight", 4, fit=1), "fit: expected True or False"),
        (
            lambda: hash_weight(hashed(nn.Linear(4, 4)), "weight", 4),
            "is computed by HashedWeight already",
        ),
        (
            lambda: gs.attach(nn.Sequential(shifted()), gs.Static(0.5)),
            r"0\.weight: is computed from numbers",
        ),
        (lambda: gs.attach(shared_bank(), gs.Static(0.5)), r"0\.weight: is computed from numbers that other weights"),
        (lambda: hash_weight(torch.zeros(2), "weight", 4), "expected a torch.nn.Module, got Tensor"),
        (lambda: gs.attach(Net(), gs.RigL(0.5)), r"conv\.weight: is computed from other numbers.*'gradient'"),
        (lambda: gs.attach(Net(), gs.GMP(0.5, end=9, score="movement")), r"conv\.weight: is computed"),
        (lambda: gs.attach(Net(), gs.Static(0.5, rescale=True)), r"conv\.weight: is computed.*rescale=False"),
    ],
)
def test_what_cannot_be_hashed_is_refused_by_name(call: object, message: str) -> None:
    with pytest.raises(gs.ConfigurationError, match=message):
        call()


@pytest.mark.parametrize("options", [{}, {"use_buffers": True}], ids=["parameters", "buffers"])
@pytest.mark.parametrize("early", [True, False], ids=["made before", "made after"])
def test_an_average_of_a_model_reads_its_bank_by_the_same_hashes(options: dict[str, bool], early: bool) -> None:
    net = Net()
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9999)
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=ema, **options) if early else None
    sparsity = gs.attach(net, gs.Static(0.5))
    average = average or torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=ema, **options)
    for _ in range(20):
        average.update_parameters(net)
    sparsity.project(average)
    x = torch.randn(3, 4, 4, 4)
    torch.testing.assert_close(average(x), net(x))
    Net().load_state_dict(average.module.state_dict())


def test_a_tie_to_another_module_ends_and_that_one_keeps_its_weight() -> None:
    embedding, decoder = nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
    decoder.weight = embedding.weight
    before = embedding.weight.detach().clone()
    hash_weight(decoder, "weight", 30)
    assert embedding.weight.equal(before)
    assert tuple(decoder.weight.shape) == (20, 6)
    gs.attach(nn.Sequential(embedding, decoder), gs.Static(0.5))


def test_predicates_see_the_weight_that_is_computed() -> None:
    seen = {}
    gs.attach(Net(), gs.Static(0.5, targets=lambda name, module, weight: seen.setdefault(name, weight.dim()) > 1))
    assert seen["hidden.weight"] == 2
    assert seen["conv.weight"] == 4


def test_a_finalized_weight_has_no_gradient_of_another_shape() -> None:
    run = Run(METHODS["static"]())
    run.net(torch.randn(3, 4, 4, 4)).sum().backward()
    run.sparsity.finalize()
    run.optimizer.zero_grad(set_to_none=False)
    run.train(range(2))


def test_modules_made_without_memory_have_their_hashes_afterwards() -> None:
    layer = nn.Linear(4, 4)
    hash_weight(layer, "weight", 8, seed=3)
    index = layer.parametrizations.weight[0].index.clone()
    layer.to("meta")
    layer.to_empty(device="cpu")
    assert layer.parametrizations.weight[0].index.equal(index)


def test_a_masked_module_goes_to_memory_that_it_did_not_have() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsity = gs.attach(net, gs.Static(0.5))
    masks = sparsity.masks()
    net.to("meta").to_empty(device="cpu")
    net.requires_grad_(True)
    sparsity.follow(torch.optim.SGD(net.parameters(), lr=0.1))
    assert not net.hidden.weight[~masks["hidden.weight"]].any()
    del optimizer


def test_a_mask_without_a_handle_is_not_lost_where_memory_is_given_anew() -> None:
    net = Net()
    sparsity = gs.attach(net, gs.Static(0.5))
    masks = sparsity.masks()
    state = copy.deepcopy(net.state_dict())
    sparsity.detach()
    net.to("meta").to_empty(device="cpu")
    net.load_state_dict(state)
    assert not net.hidden.weight[~masks["hidden.weight"]].any()


def test_a_copy_made_without_memory_is_read_by_the_same_hashes_once_it_has_weights() -> None:
    net = Net()
    gs.attach(net, gs.Static(0.5))
    other = copy.deepcopy(net).to("meta")
    assert other(torch.randn(2, 4, 4, 4, device="meta")).shape == (2, 4)
    other.load_state_dict(net.state_dict(), assign=True)
    x = torch.randn(2, 4, 4, 4)
    assert other(x).equal(net(x))
