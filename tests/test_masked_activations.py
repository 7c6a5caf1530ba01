"""Masks on activations, and batch norm of what they keep: against loops over positions, and torch's own modules."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import gossamer as gs
from gossamer.nn import KWinners, SparseActivation, SparseBatchNorm, SparseSyncBatchNorm, checkerboard
from gossamer.penalties import L0, L2, Hoyer, Lp, Penalty


@pytest.mark.parametrize(
    ("quarters", "expected"),
    [(1, ["1010", "0000", "1010"]), (2, ["1010", "0101", "1010"]), (3, ["1111", "0101", "1111"])],
)
def test_checkerboards_keep_so_many_quarters(quarters: int, expected: list[str]) -> None:
    mask = checkerboard((3, 4), quarters)
    assert ["".join("01"[int(kept)] for kept in row) for row in mask] == expected
    assert checkerboard((8, 8), quarters).sum() == 16 * quarters


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), density=st.floats(0.05, 1.0), seed=st.integers(0, 2**63 - 1))
def test_random_masks_keep_exactly_so_many_and_others_at_each_draw(
    height: int, width: int, density: float, seed: int
) -> None:
    wanted = floor(density * height * width + 1e-9)
    if not wanted:
        with pytest.raises(gs.ConfigurationError, match="keeps none of"):
            SparseActivation((height, width), density=density, seed=seed)
        return
    layer = SparseActivation((height, width), density=density, dynamic=True, seed=seed)
    x = torch.ones(2, 3, height, width)
    seen = set()
    for _ in range(6):
        y = layer(x)
        assert y[0, 0].sum() == wanted
        assert y.equal(y[:1, :1].expand_as(y))
        seen.add(tuple(y[0, 0].flatten().tolist()))
    if 8 < wanted < height * width - 8:
        assert len(seen) == 6


def test_every_position_is_kept_as_often_as_any_other() -> None:
    layer = SparseActivation((4, 5), density=0.3, dynamic=True)
    counts = sum(layer(torch.ones(1, 1, 4, 5)) for _ in range(4000))
    assert (counts / 4000 - 0.3).abs().max() < 0.03  # four standard deviations


def test_static_masks_stay_and_evaluation_is_masked_or_dense() -> None:
    x = torch.randn(2, 3, 4, 4)
    layer = SparseActivation(4, density=0.5)
    assert layer(x).equal(layer(x))
    assert layer.eval()(x).equal(torch.where(layer.mask, x, 0))
    dense = SparseActivation(4, density=0.5, dense_inference=True)
    assert dense.eval()(x).equal(x * 0.5)
    dynamic = SparseActivation(4, density=0.5, dynamic=True)
    before = dynamic.mask.clone()
    assert dynamic.eval()(x).equal(x * 0.5)
    assert dynamic.mask.equal(before)
    masked = SparseActivation(4, density=0.5, dynamic=True, dense_inference=False).eval()
    assert masked(x).equal(torch.where(masked.mask, x, 0))


def test_zeros_are_exact_whatever_was_there() -> None:
    x = torch.full((1, 1, 2, 2), torch.nan)
    layer = SparseActivation(2, mask=torch.tensor([[True, False], [False, False]]))
    y = layer(x)
    assert y[0, 0, 0, 0].isnan()
    assert not y.flatten()[1:].any()
    assert not torch.signbit(layer(torch.full((1, 1, 2, 2), -1.0)).flatten()[1:]).any()


def test_draws_go_on_after_saving_and_copying_and_leave_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    layer = SparseActivation((6, 6), density=0.4, dynamic=True, seed=5)
    x = torch.ones(1, 1, 6, 6)
    for _ in range(3):
        layer(x)
    other, third = SparseActivation((6, 6), density=0.7, dynamic=True, seed=8), copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    for _ in range(3):
        y = layer(x)
        assert y.equal(other(x))
        assert y.equal(third(x))
    assert torch.get_rng_state().equal(state)


def test_a_mask_that_is_loaded_may_keep_another_number_of_positions() -> None:
    layers = [SparseBatchNorm(2, SparseActivation(4, quarters=quarters)) for quarters in (1, 3)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(3, 2, 4, 4)
    assert layers[1](x).equal(layers[0](x))
    assert layers[1].activation.density == 0.25
    state = layers[0].state_dict() | {"activation.mask": torch.zeros(4, 4, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match=r"activation\.mask: keeps none of 16 positions"):
        layers[1].load_state_dict(state)
    assert layers[1](x).equal(layers[0](x))


def test_a_mask_that_is_assigned_may_keep_another_number_of_positions() -> None:
    layer = SparseBatchNorm(2, SparseActivation(4, quarters=2))
    mask = torch.zeros(4, 4)
    mask[0, :3] = 1
    layer.activation.mask = mask
    assert layer.activation.density == 3 / 16
    y = layer(torch.randn(5, 2, 4, 4))
    assert y[..., 0, :3].all()
    assert y.count_nonzero() == 5 * 2 * 3
    for wrong in (torch.zeros(4, 4), torch.ones(4, 5), torch.full((4, 4), 0.5), torch.full((4, 4), torch.nan), None):
        with pytest.raises(gs.ConfigurationError, match=r"mask: got .*expected True and False for \(4, 4\), not all F"):
            layer.activation.mask = wrong
    assert layer.activation.mask.equal(mask.bool())


def test_dense_inference_sets_nothing_to_zero() -> None:
    layer = SparseActivation(4, density=0.25, dynamic=True)
    assert (layer.sparsity, layer.eval().sparsity, layer.density) == (0.75, 0.0, 0.25)
    assert SparseActivation(4, density=0.25).eval().sparsity == 0.75


@pytest.mark.parametrize("quarters", [2, None])
def test_the_memory_format_stays(quarters: int | None) -> None:
    mask = SparseActivation(4, quarters=quarters, density=None if quarters else 1.0)
    for module in (mask, SparseBatchNorm(3, mask)):
        x = torch.randn(2, 3, 4, 4)
        y = module(x.to(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert module(x).is_contiguous()
        torch.testing.assert_close(y, module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_dynamic_masks_compile_in_one_graph_and_change() -> None:
    plain, other = (SparseActivation((5, 5), density=0.4, dynamic=True) for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for step in range(4):
        x = torch.randn(2, 3, 5, 5)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert compiled(x).equal(plain(x))


def test_a_pass_that_is_computed_again_has_the_same_positions() -> None:
    torch.manual_seed(0)
    layer = SparseActivation((4, 4), density=0.4, dynamic=True)
    plain = copy.deepcopy(layer)
    for _ in range(3):
        x = torch.randn(2, 3, 4, 4, requires_grad=True)
        checkpoint(lambda x: layer(x * 2).square(), x, use_reentrant=False).sum().backward()
        expected, x.grad = x.grad.clone(), None
        plain(x * 2).square().sum().backward()
        assert x.grad.equal(expected)
    assert layer.draws == 3


def dynamic(norm: bool) -> nn.Module:
    layer = SparseActivation(4, density=0.5, dynamic=True)
    return SparseBatchNorm(1, layer) if norm else layer


@pytest.mark.parametrize("make", [lambda: dynamic(False), lambda: dynamic(True), lambda: KWinners(1, 0.5)])
@pytest.mark.parametrize("kinds", [(False, False), (True, True), (True, None), (False, None), (False, True)])
@pytest.mark.parametrize("last", [False, True])
def test_a_pass_that_cannot_be_computed_again_as_it_was_is_refused(
    make: Callable[[], nn.Module], kinds: tuple[bool | None, bool | None], last: bool
) -> None:
    layer, losses = make(), []
    for reentrant in kinds:  # None for no checkpointing
        x = torch.randn(2, 1, 4, 4, requires_grad=True)
        # Where the layer is the last of a checkpoint, its own backward pass begins before it is computed again.
        part = (lambda x: layer(x * 2)) if last else (lambda x: layer(x * 2).square())
        y = part(x) if reentrant is None else checkpoint(part, x, use_reentrant=reentrant)
        losses.append(y.square().sum())
    with pytest.raises(gs.OrderError, match=r"called more than once in training since.*leave this layer out"):
        sum(losses).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_step_after_a_step_is_computed_again_although_losses_are_kept(reentrant: bool) -> None:
    layer, total = dynamic(False), 0.0
    layer(torch.ones(1, 1, 4, 4))  # no step, and no graph
    layer = copy.deepcopy(layer)
    for _ in range(4):
        x = torch.ones(1, 1, 4, 4, requires_grad=True)
        loss = checkpoint(lambda x: layer(x * 2).square(), x, use_reentrant=reentrant).sum()
        loss.backward()
        assert x.grad.equal(layer.mask.view_as(x) * 8.0)
        total = total + loss


def test_plain_passes_before_do_not_matter() -> None:
    layer = dynamic(False)
    for _ in range(3):
        x = torch.ones(1, 1, 4, 4, requires_grad=True)
        loss = layer(x).sum()
        loss.backward()
        with torch.no_grad():
            layer(x)
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    loss = checkpoint(lambda x: layer(x * 2).square(), x, use_reentrant=False).sum()
    loss.backward()
    assert x.grad.equal(layer.mask.view_as(x) * 8.0)


# -- norms as penalties ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [L0(0.3), L2(), Lp(3), Hoyer()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_penalty_is_the_norm_of_every_output_with_its_gradient(norm: Penalty, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = SparseActivation((3, 4), density=0.5, dynamic=True, norm=norm)
    inputs = [torch.randn(2, 3, 3, 4, dtype=dtype, requires_grad=True) for _ in range(2)]
    outputs = [torch.relu_(layer(x)) for x in inputs]  # in place: the penalty is of what the layer gave
    assert all(y.ge(0).all() for y in outputs)
    penalty = layer.penalty()
    gradients = torch.autograd.grad(penalty, inputs)
    layer_2 = SparseActivation((3, 4), density=0.5, dynamic=True)
    expected = sum(norm(layer_2(x).to(torch.promote_types(dtype, torch.float32))) for x in inputs)
    torch.testing.assert_close(penalty, expected)
    for one, two in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert one.equal(two)


def test_the_penalty_is_of_this_step_and_of_training_only() -> None:
    layer = SparseActivation(4, quarters=2, norm="l1")
    x = torch.ones(1, 2, 4, 4)
    assert layer.penalty() == 0
    layer(x)
    assert layer.penalty() == layer.penalty() == 16  # asking changes nothing
    layer.eval()(x)
    assert layer.penalty() == 16
    layer.train()
    layer(2 * x)
    with torch.no_grad():
        layer(x)
    layer(x)
    assert layer.penalty() == 48  # a pass after it was asked for begins anew
    assert layer.sparsity == 0.5
    norm = SparseBatchNorm(2, SparseActivation(4, quarters=2, norm="l2"))
    y = norm(torch.randn(5, 2, 4, 4))
    torch.testing.assert_close(norm.activation.penalty(), torch.linalg.vector_norm(y))


def test_a_step_that_leaves_the_penalty_out_keeps_nothing() -> None:
    layer = SparseActivation(4, quarters=2, norm="l1")
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    gc.disable()
    try:
        for asked in (False, True):  # without being asked for, its backward pass ends it
            hidden = x * 1
            reference = weakref.ref(hidden)
            y = layer(hidden)
            if asked:
                layer.penalty()
            else:
                y.sum().backward()
            del hidden, y
            layer(x)
            assert layer.penalty() == 8
            layer(x)
            assert reference() is None
            layer.penalty()
    finally:
        gc.enable()
    kept = layer(x).sum()
    penalty = layer.penalty()
    layer(x * 2)  # of a step that began before the first ended
    (kept + penalty).backward()
    assert layer.penalty() == 16


@pytest.mark.parametrize("sparse_norm", [False, True])
def test_the_penalty_has_its_gradient_where_activations_are_computed_again(sparse_norm: bool) -> None:
    torch.manual_seed(0)
    layer = SparseActivation(4, density=0.5, dynamic=True, norm="hoyer")
    module = SparseBatchNorm(3, layer, track_running_stats=False) if sparse_norm else layer
    plain = copy.deepcopy(module)
    for _ in range(3):
        x = torch.randn(2, 3, 4, 4, requires_grad=True)
        y = checkpoint(lambda x: module(x * 3).square(), x, use_reentrant=False)
        (y.sum() + layer.penalty()).backward()
        gradient, x.grad = x.grad, None
        (plain(x * 3).square().sum() + getattr(plain, "activation", plain).penalty()).backward()
        assert gradient.equal(x.grad)


def test_a_penalty_that_can_have_no_gradient_warns() -> None:
    layer = SparseActivation(4, quarters=2, norm="l1")
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    checkpoint(layer, x, use_reentrant=True)
    with pytest.warns(UserWarning, match=r"ran in training without gradients alone.*use_reentrant=False"):
        assert layer.penalty() == 0
    layer(x)
    assert layer.penalty() == 8


def test_a_copy_made_between_forward_and_backward_has_no_penalty_yet() -> None:
    layer = SparseActivation(4, quarters=2, norm="l1")
    layer(torch.ones(1, 1, 4, 4, requires_grad=True) * 1)
    assert copy.deepcopy(layer).penalty() == 0
    assert layer.penalty() == 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_penalty_compiles_in_one_graph() -> None:
    plain, other = (SparseActivation((5, 5), density=0.4, dynamic=True, norm="hoyer") for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for step in range(6):
        x = torch.randn(2, 3, 5, 5, requires_grad=True)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            y = compiled(x)
        plain(x)
        if step < 3:  # nobody asks
            y.sum().backward()
            plain._collected.forget()
            if step == 2:
                other.penalty()
            continue
        one, two = plain.penalty(), other.penalty()
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(torch.autograd.grad(one, x), torch.autograd.grad(two, x))


# -- batch norm ------------------------------------------------------------------------------------------------------


def by_hand(
    x: torch.Tensor, mask: torch.Tensor, norm: SparseBatchNorm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, mean and unbiased variance of each channel, from the kept positions one by one."""
    y = torch.zeros_like(x)
    means, variances = [], []
    for channel in range(x.shape[1]):
        values = [x[n, channel, i, j] for n in range(len(x)) for i, j in mask.nonzero().tolist()]
        kept = torch.stack(values)
        mean, variance = kept.mean(), kept.var(unbiased=False)
        means.append(mean)
        variances.append(kept.var())
        for n in range(len(x)):
            for i, j in mask.nonzero().tolist():
                scaled = (x[n, channel, i, j] - mean) / (variance + norm.eps).sqrt()
                y[n, channel, i, j] = scaled * norm.weight[channel] + norm.bias[channel]
    return y, torch.stack(means), torch.stack(variances)


@pytest.mark.parametrize("momentum", [None, 0.2])
def test_running_statistics_are_moving_averages_or_means_of_all_batches(momentum: float | None) -> None:
    norm = SparseBatchNorm(3, SparseActivation((4, 5), density=0.4), momentum=momentum)
    mean, variance = torch.zeros(3), torch.ones(3)
    for step in range(3):
        x = torch.randn(2, 3, 4, 5) * (step + 1) + step
        norm(x)
        _, means, variances = by_hand(x, norm.activation.mask, norm)
        weight = 1 / (step + 1) if momentum is None else momentum
        mean, variance = mean + weight * (means - mean), variance + weight * (variances - variance)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.num_batches_tracked == 3


def test_without_running_statistics_evaluation_is_of_the_batch() -> None:
    norm = SparseBatchNorm(3, SparseActivation((4, 5), density=0.4), track_running_stats=False)
    x = torch.randn(2, 3, 4, 5)
    expected, _, _ = by_hand(x, norm.activation.mask, norm)
    torch.testing.assert_close(norm.eval()(x), expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_batch_norm_is_of_the_kept_positions(dynamic: bool) -> None:
    torch.manual_seed(0)
    norm = SparseBatchNorm(3, SparseActivation((4, 5), density=0.4, dynamic=dynamic), momentum=0.3).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    before = x.clone()
    y = norm(x)
    expected, mean, variance = by_hand(x, norm.activation.mask, norm)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(norm.running_mean, 0.3 * mean)
    torch.testing.assert_close(norm.running_var, 0.7 + 0.3 * variance)
    assert x.equal(before)
    norm.eval()
    dense = nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    wanted = dense * 0.4 if dynamic else torch.where(norm.activation.mask, dense, 0)
    torch.testing.assert_close(norm(x), wanted)


def test_gradients_of_batch_norm_are_right_and_dropped_positions_have_none() -> None:
    torch.manual_seed(0)
    norm = SparseBatchNorm(2, SparseActivation(3, density=0.5)).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (x,))
    norm(x).square().sum().backward()
    assert not x.grad[:, :, ~norm.activation.mask].any()


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_a_full_mask_is_torch_batch_norm_to_the_bit(options: dict[str, object]) -> None:
    norm, plain = SparseBatchNorm(3, SparseActivation(4, density=1.0), **options), nn.BatchNorm2d(3, **options)
    for step in range(3):
        x = torch.randn(5, 3, 4, 4)
        assert norm(x).equal(plain(x))
        if step == 1:
            norm.eval()
            plain.eval()
    for name, value in plain.state_dict().items():
        assert norm.state_dict()[name].equal(value)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_the_synchronised_one_has_the_same_values_and_parameters(options: dict[str, object]) -> None:
    norm = SparseBatchNorm(3, SparseActivation(4, density=0.5), **options).double()
    norm(torch.randn(5, 3, 4, 4, dtype=torch.float64))
    norm.requires_grad_(False)
    other = norm.synchronized()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert other(x).equal(copy.deepcopy(norm)(x))  # in one process training needs no GPU
    assert norm.eval()(x).equal(other.eval()(x))
    assert [*map(id, other.parameters())] == [*map(id, norm.parameters())]
    assert other.state_dict().keys() == norm.state_dict().keys()


def test_a_model_is_converted_with_its_masks() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(SparseBatchNorm(3, SparseActivation(4, density=0.5))))
    net = SparseSyncBatchNorm.convert_sync_batchnorm(SparseSyncBatchNorm.convert_sync_batchnorm(net))
    assert [type(each) for each in (net[0], net[1][0])] == [nn.SyncBatchNorm, SparseSyncBatchNorm]
    assert isinstance(SparseSyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm1d(3)), nn.SyncBatchNorm)
    y = net.eval()(torch.randn(2, 3, 4, 4))
    assert y.ne(0).sum() == 2 * 3 * 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SparseActivation(4), "give one of mask, quarters and density"),
        (lambda: SparseActivation(4, quarters=2, density=0.5), "give one of mask, quarters and density"),
        (lambda: SparseActivation(4, quarters=4), "quarters: expected an integer of at least 1 and at most 3, got 4"),
        (lambda: SparseActivation(4, density=1.5), "density: expected a number"),
        (lambda: SparseActivation(4, density=0.0), "keeps none of 16 positions"),
        (lambda: SparseActivation(0, density=0.5), "size: expected"),
        (lambda: SparseActivation(4, mask=torch.ones(3, 4)), r"mask: got \(3, 4\), torch.float32; .* for \(4, 4\)"),
        (lambda: SparseActivation(2, mask=torch.full((2, 2), 0.5)), "expected True and False"),
        (lambda: SparseActivation(4, density=0.5, norm="l7"), "norm: got 'l7'; allowed are 'l0'"),
        (lambda: SparseActivation(4, mask=[[1, 0]]), "mask: expected a tensor of True and False, got a list"),
        (lambda: SparseActivation(2.5, density=0.5), "size: expected an integer of at least 1, got 2.5"),
        (lambda: SparseActivation((2, 2, 2), density=0.5), r"size: expected a number, or .*, got \(2, 2, 2\)"),
        (lambda: SparseActivation(4, density=0.5)(torch.ones(1, 1, 4, 4, dtype=torch.int64)), "floating.*torch.int64"),
        (lambda: SparseBatchNorm(3, None), "SparseBatchNorm: expected a SparseActivation .*, got None"),
        (lambda: SparseActivation(4, density=0.5)(torch.ones(1, 1, 4, 5)), r"4×4, got shape \(1, 1, 4, 5\)"),
        (lambda: SparseBatchNorm(1, SparseActivation(4, density=0.5))(torch.ones(1, 1, 5, 5)), "4×4, got shape"),
    ],
)
def test_bad_arguments_are_named(call: object, message: str) -> None:
    with pytest.raises(gs.ConfigurationError, match=message):
        call()


@pytest.mark.parametrize("shape", [(2, 4, 4, 4), (3, 4, 4), (3, 1, 4), (1, 3, 4, 4, 4)])
def test_activations_of_another_shape_are_refused_before_anything_is_drawn(shape: tuple[int, ...]) -> None:
    norm = SparseBatchNorm(3, SparseActivation(4, density=0.5, dynamic=True))
    with pytest.raises(gs.ConfigurationError, match=r"SparseBatchNorm: is for .* \(N, 3, height, width\), got"):
        norm(torch.ones(shape))
    assert not norm.activation.draws


def test_a_penalty_without_a_norm_is_refused() -> None:
    with pytest.raises(gs.OrderError, match="has no norm to penalise; make it with norm='l1'"):
        SparseActivation(4, quarters=2).penalty()
