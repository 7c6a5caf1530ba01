"""The smoothed threshold and its penalties: against the formula in plain operations, in every layout and type."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gossamer as gs
from gossamer.nn import LossyHardSparsifier, LossySparsifier, hard_threshold, lossy_threshold
from gossamer.penalties import L0, L1, L2, Hoyer, Lp, Penalty, as_penalty


def formula(x: torch.Tensor, eps: torch.Tensor, a: float, dim: int = 1) -> torch.Tensor:
    """As the seed has it."""
    e = eps.abs()
    if e.numel() > 1:
        shape = [1] * x.dim()
        shape[dim] = -1
        e = e.view(shape)
    return torch.sigmoid(a * (x - e)) * x + torch.sigmoid(a * (-e - x)) * x


PENALTIES: dict[Penalty, object] = {
    L0(0.1): lambda y: (y.square() / (y.square() + 0.1)).sum(),
    L0(2.0): lambda y: (y.square() / (y.square() + 2.0)).sum(),
    L1(): lambda y: y.abs().sum(),
    L2(): lambda y: y.square().sum().sqrt(),
    Lp(1): lambda y: y.abs().sum(),
    Lp(1.5): lambda y: torch.linalg.vector_norm(y, 1.5),
    Lp(4): lambda y: torch.linalg.vector_norm(y, 4),
    Hoyer(): lambda y: y.abs().sum().square() / y.square().sum(),
}

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_values_and_gradients_are_those_of_the_formula(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    channels = data.draw(st.sampled_from([1, max(1, shape[dim])]))
    a = data.draw(st.sampled_from([0.01, 1.0, 7.0, 60.0, 1e4]))
    layout = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    if shape[dim] == 0 and channels > 1:
        return
    x = layout(torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()
    eps = (torch.rand(channels, dtype=torch.float64, generator=generator) - 0.3).requires_grad_()
    outer = torch.randn(shape, dtype=torch.float64, generator=generator)
    y, _ = lossy_threshold(x, eps, a, dim)
    expected = formula(x, eps, a, dim)
    torch.testing.assert_close(y, expected)
    for found, wanted in zip(
        torch.autograd.grad(y, (x, eps), outer), torch.autograd.grad(expected, (x, eps), outer), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("shape", [(70, 8, 33, 33), (20_000, 8), (3, 8, 70_000)], ids=str)
def test_parts_of_large_activations_fit_together(shape: tuple[int, ...], channels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    eps = torch.rand(channels, dtype=torch.float64, requires_grad=True)
    y, sums = lossy_threshold(x, eps, 4.0, terms=("absolute", "square"))
    expected = formula(x, eps, 4.0)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(sums, torch.stack([expected.abs().sum(), expected.square().sum()]))
    loss = (y * 3).sum() + sums[0] - 2 * sums[1]
    wanted = (expected * 3).sum() + expected.abs().sum() - 2 * expected.square().sum()
    for found, other in zip(torch.autograd.grad(loss, (x, eps)), torch.autograd.grad(wanted, (x, eps)), strict=True):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("channels", [1, 4])
def test_penalties_are_those_of_their_formulas_with_gradients(penalty: Penalty, channels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    eps = torch.rand(channels, dtype=torch.float64, requires_grad=True)

    def both(x: torch.Tensor, eps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, sums = lossy_threshold(x, eps, 3.0, terms=penalty.terms, b=penalty.b)
        return y, penalty.value(*sums)

    assert torch.autograd.gradcheck(both, (x, eps))
    y, value = both(x, eps)
    torch.testing.assert_close(value, PENALTIES[penalty](y.detach()))
    torch.testing.assert_close(penalty(y.detach()), PENALTIES[penalty](y.detach()))


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_penalties_of_nothing_are_zero_and_have_finite_gradients(penalty: Penalty) -> None:
    x = torch.zeros(5, requires_grad=True)
    penalty(x).backward()
    assert penalty(x) == 0
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("a", [1e-3, 1.0, 1e3, 1e8])
def test_any_sharpness_in_any_type_is_finite_and_right(dtype: torch.dtype, a: float) -> None:
    torch.manual_seed(0)
    largest = torch.finfo(dtype).max
    x = torch.cat([torch.randn(50), torch.tensor([0.0, -0.0, 0.5, -0.5, largest, -largest])]).to(dtype).requires_grad_()
    eps = torch.tensor([0.5], requires_grad=True)
    y, _ = lossy_threshold(x, eps, a)
    assert y.dtype == dtype
    torch.testing.assert_close(y, formula(x.detach().double(), eps.detach().double(), a).to(dtype))
    y[:50].sum().backward()
    assert x.grad.isfinite().all()
    assert eps.grad.isfinite().all()


def test_infinity_stays_and_nan_is_not_hidden() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], requires_grad=True)
    for hard in (False, True):
        y, _ = lossy_threshold(x, torch.tensor([0.5]), 8.0, hard=hard)
        assert y[:2].tolist() == [torch.inf, -torch.inf]
        assert y[2].isnan()
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient[:2].tolist() == [1, 1]
    assert hard_threshold(x.detach(), torch.tensor([0.5]))[2].isnan()


def test_only_the_input_is_saved_for_the_backward_pass() -> None:
    x, eps = torch.randn(1000, requires_grad=True), torch.tensor([0.5], requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lossy_threshold(x, eps, torch.tensor(2.0), terms=("square",))
    assert [tensor.data_ptr() for tensor in saved if tensor.numel() > 2] == [x.data_ptr()]


def test_output_may_be_changed_in_place_after_it_was_measured() -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    eps = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    y, sums = lossy_threshold(x, eps, 3.0, terms=("absolute",))
    measured = y.detach().abs().sum()
    (torch.relu_(y).sum() + sums[0]).backward()
    assert torch.isclose(sums[0].detach(), measured)
    other, e = x.detach().clone().requires_grad_(), eps.detach().clone().requires_grad_()
    z = formula(other, e, 3.0)
    (torch.relu(z).sum() + z.abs().sum()).backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(eps.grad, e.grad)


def test_autocast_gives_activations_of_lower_precision_and_thresholds_of_single() -> None:
    net = nn.Sequential(nn.Linear(8, 8), LossySparsifier(0.3, channels=8))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.randn(4, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert net[1].eps.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("hard", [False, True])
def test_compiled_in_one_graph_and_not_again_when_sharpness_changes(hard: bool) -> None:
    torch.manual_seed(0)
    layer = LossyHardSparsifier(0.4, a=2.0, channels=4) if hard else LossySparsifier(0.4, 2.0, channels=4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step, a in enumerate((2.0, 4.0, 8.0)):
        layer.a.fill_(a)
        x = torch.randn(3, 4, 5, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            found = torch.autograd.grad(compiled(x).square().sum(), (x, layer.eps))
        for one, two in zip(found, torch.autograd.grad(layer(x).square().sum(), (x, layer.eps)), strict=True):
            torch.testing.assert_close(one, two)


def test_hard_threshold_keeps_what_is_above_and_leaves_its_input_alone() -> None:
    x = torch.tensor([[-2.0, -0.5, -0.4, 0.0], [0.4, 0.5, 0.6, 3.0]])
    before = x.clone()
    layer = LossyHardSparsifier(-0.5)
    y = layer(x)
    assert y.tolist() == [[-2.0, 0.0, 0.0, 0.0], [0.0, 0.0, pytest.approx(0.6), 3.0]]
    assert x.equal(before)
    assert not torch.signbit(y[y == 0]).any()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.equal((y != 0).float())


def test_straight_through_has_hard_values_and_the_gradients_of_the_smoothed_threshold() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    soft = LossySparsifier(0.4, 5.0).double()
    hard = LossyHardSparsifier(0.4, 5.0).double()
    assert hard(x).equal(torch.where(x.abs() > soft.eps.abs(), x, 0))
    outer = torch.randn(40, dtype=torch.float64)
    wanted = torch.autograd.grad(soft(x), (x, soft.eps), outer)
    for found, other in zip(torch.autograd.grad(hard(x), (x, hard.eps), outer), wanted, strict=True):
        torch.testing.assert_close(found, other)


def test_a_scalar_threshold_of_the_earlier_package_loads() -> None:
    layer = LossySparsifier(a=4.0)
    layer.load_state_dict({"eps": torch.tensor(0.7)})  # its sharpness was not saved
    assert (layer.eps.tolist(), layer.a) == ([pytest.approx(0.7)], 4)
    layer.load_state_dict({"eps": torch.tensor(0.7), "a": torch.tensor(8.0)})
    assert layer.a == 8
    with pytest.raises(RuntimeError, match=r'Missing key.*"a"'):
        layer.load_state_dict({"eps": torch.tensor([0.7])})
    trained = LossyHardSparsifier(a=2.0)
    trained.load_state_dict({"eps": torch.tensor(0.7)})
    assert (trained.eps.tolist(), trained.a) == ([pytest.approx(0.7)], 2)
    layer.a = 16
    assert layer.a == 16
    hard = layer.hard()
    hard.load_state_dict({"eps": torch.tensor(0.2)})
    assert hard.eps.tolist() == [pytest.approx(0.2)]
    other = copy.deepcopy(layer)
    other.a = 2.0
    assert layer.a == 16


@pytest.mark.parametrize("kind", [LossySparsifier, LossyHardSparsifier])
def test_a_first_threshold_is_a_number_a_tensor_that_is_copied_or_nothing(kind: type[nn.Module]) -> None:
    assert kind().eps.tolist() == kind(None).eps.tolist() == kind(0.1).eps.tolist()
    given = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    layer, three = kind(given), kind(given, channels=3)
    with torch.no_grad():
        given.fill_(9)
    assert (layer.eps.tolist(), layer.eps.dtype) == ([0.3], torch.float64)
    assert three.eps.tolist() == [0.3] * 3
    assert kind(torch.tensor([0.1, 0.2])).eps.shape == (2,)
    assert "eps" in dict(kind().named_buffers() if kind is LossyHardSparsifier else kind().named_parameters())


def test_half_precision_is_summed_in_single() -> None:
    x = torch.full((100_000,), 2.0, dtype=torch.float16, requires_grad=True)
    for penalty, expected in ((L0(1.0), 80_000.0), (L1(), 200_000.0), (L2(), 400_000**0.5), (Hoyer(), 100_000.0)):
        assert float(penalty(x).detach()) == pytest.approx(expected)
        assert torch.autograd.grad(penalty(x), x)[0].isfinite().all()


def test_a_sharp_threshold_becomes_the_hard_one_it_is_made_into() -> None:
    torch.manual_seed(0)
    layer = LossySparsifier(0.5, 1e6, channels=3)
    x = torch.randn(10, 3)
    torch.testing.assert_close(layer(x), layer.hard()(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LossySparsifier(a=0), "a: the sharpness must be above 0, got 0"),
        (lambda: LossySparsifier(a=-1), r"a: expected a number in \[0"),
        (lambda: LossySparsifier("x"), "eps: expected a number"),
        (lambda: LossySparsifier(float("nan")), "eps: expected a number"),
        (lambda: LossySparsifier(torch.tensor([0.1, float("nan")])), "eps: expected finite numbers, got a tensor with"),
        (lambda: LossySparsifier(torch.tensor(1)), r"eps: expected a number, or.*\(channels,\), got \(\), torch.int64"),
        (lambda: LossyHardSparsifier(torch.ones(2), channels=3), r"of shape \(\), \(1,\) or \(3,\), got \(2,\)"),
        (lambda: LossySparsifier(torch.ones(0)), r"got \(0,\), torch.float32"),
        (lambda: LossySparsifier(torch.ones(2, 2)), r"got \(2, 2\), torch.float32"),
        (lambda: LossySparsifier(channels=0), "channels: expected an integer of at least 1"),
        (
            lambda: LossySparsifier(channels=3)(torch.randn(2, 4)),
            r"3 thresholds for channels along dimension 1.*\(2, 4\)",
        ),
        (lambda: LossySparsifier(channels=3)(torch.randn(3)), r"3 thresholds for channels along dimension 1.*\(3,\)"),
        (lambda: LossySparsifier()(torch.ones(3, dtype=torch.int64)), "dtype torch.int64; expected floating point"),
        (lambda: LossyHardSparsifier()(torch.ones(3, dtype=torch.bool)), "dtype torch.bool; expected floating point"),
        (lambda: L0(0), "b: expected a number"),
        (lambda: Lp(0.5), r"p: expected a number in \[1, inf\), got 0.5"),
        (lambda: as_penalty("l3"), "penalty: got 'l3'; allowed are 'l0', 'l1', 'l2', 'hoyer'"),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(gs.ConfigurationError, match=message):
        call()


@pytest.mark.parametrize("a", [0, -1.0, float("nan"), float("inf")])
def test_a_sharpness_that_is_not_above_zero_is_refused(a):
    for make in (
        lambda: lossy_threshold(torch.ones(2), torch.tensor([0.5]), a),
        lambda: gs.nn.LossySparsifier(a=a),
        lambda: gs.nn.LossyHardSparsifier(a=a),
    ):
        with pytest.raises(gs.ConfigurationError, match=r"^a: "):
            make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [0.5, 3.0, 6.0, 60.0])
def test_nothing_is_made_that_is_not_a_normal_number(dtype, eps):
    """A CPU computes ten to a hundred times slower with what is below the smallest normal number."""
    generator = torch.Generator().manual_seed(0)
    x = (30 * torch.rand(4000, generator=generator, dtype=dtype) - 10).requires_grad_()
    e = torch.tensor([eps], dtype=dtype, requires_grad=True)
    y, sums = lossy_threshold(x, e, 16.0, terms=("near_one",), b=0.1)
    (1e-6 * (y.sum() + sums.sum())).backward()
    for made in (y.detach(), x.grad, e.grad):
        assert not ((made != 0) & (made.abs() < torch.finfo(dtype).tiny)).any()
    torch.testing.assert_close(y, formula(x.detach(), e.detach(), 16.0), rtol=1e-5, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hard_thresholds_agree_in_half_precision_whichever_way_they_are_computed(dtype):
    x = torch.arange(0.25, 0.35, 1e-4).to(dtype)
    eps = torch.tensor([0.3003])
    expected = torch.where(x.double() > 0.3003, x, 0)
    assert lossy_threshold(x, eps, 4.0, hard=True)[0].equal(expected)
    assert gs.nn.LossyHardSparsifier(eps)(x).equal(expected)
    assert gs.nn.FATReLU(eps)(x).equal(expected)


def test_sharpness_stays_in_single_precision_in_a_half_model():
    for make in (lambda: gs.nn.LossySparsifier(0.5, 7e4), lambda: gs.nn.LossyHardSparsifier(0.5, 7e4)):
        for change in (torch.nn.Module.half, torch.nn.Module.bfloat16, lambda module: module.to(torch.float16)):
            layer = change(make())
            assert layer.a.dtype == torch.float32
            assert float(layer.a) == 7e4
            assert layer.eps.dtype in (torch.float16, torch.bfloat16)
            y = layer(torch.tensor([0.25, 0.75], dtype=layer.eps.dtype))
            assert y.tolist() == [0, 0.75]
    layer = gs.nn.LossySparsifier(0.5, 2.0)
    for wrong in (-1.0, 0, float("nan"), 1e31):
        with pytest.raises(gs.ConfigurationError, match=r"^a: "):
            layer.a = wrong
    assert float(layer.a) == 2
