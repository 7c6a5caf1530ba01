"""Invariant 9: bad input is an error that names the place, the value and the remedy, and changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import gossamer as gs

from .tables import METHODS, TinyNet, backward, everything, snapshot, start

# -- arguments of methods ----------------------------------------------------------------------------------------------

ANY = [row for row in METHODS if row.id != "rigl-step"]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ANY])
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        *[("sparsity", v, r"sparsity.*\[0, 1\).*{!r}") for v in (1.0, 1, -0.1, 90, float("nan"), "0.9", True)],
        ("structure", "3", r"structure.*'3'.*'element'.*'2:4'.*'block:4x1'"),
        ("structure", "4:4", r"4:4.*0 < N < M"),
        ("structure", "0:4", r"0:4.*0 < N < M"),
        ("structure", "block:0x4", r"block:0x4.*at least one row"),
        ("structure", "channels", r"structure.*'channels'"),
        ("over", "everything", r"over.*'everything'.*'targets'.*'all'"),
        ("p", 0, r"p.*positive"),
        ("p", -1.0, r"p.*-1"),
        ("seed", -1, r"seed.*-1"),
        ("seed", 1.5, r"seed.*1\.5"),
    ],
)
def test_every_method_refuses_what_it_cannot_mean(row: Any, argument: str, value: Any, message: str) -> None:
    with pytest.raises(gs.ConfigurationError, match=rf"^{row.method.__name__}: ") as error:
        row.make(**{argument: value})
    assert error.match(message.replace("{!r}", repr(value)))


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ANY])
def test_an_unknown_argument_is_refused_by_name(row: Any) -> None:
    with pytest.raises(TypeError, match="drop_ratio"):
        row.make(drop_ratio=0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gs.SET(0.9, every=0), r"SET: every.*at least 1.*0"),
        (lambda: gs.SET(0.9, every=2.0), r"SET: every.*integer.*2\.0"),
        (lambda: gs.SET(0.9, every=True), r"SET: every.*True"),
        (lambda: gs.SET(0.9, until=0), r"SET: until.*0"),
        (lambda: gs.SET(0.9, drop_fraction=1.0), r"SET: drop_fraction.*\[0, 1\).*1\.0"),
        (lambda: gs.RigL(0.9, drop_fraction=-0.5), r"RigL: drop_fraction.*-0\.5"),
        (lambda: gs.RigL(0.9, drop_score="magnitud"), r"RigL: drop_score: .*'magnitud'.*did you mean 'magnitude'\?"),
        (lambda: gs.RigL(0.9, every=1), r"RigL: every=1 with skip_step=True leaves out every step"),
        (lambda: gs.GMP(0.9, end=10, score="size"), r"GMP: score.*'size'.*'magnitude'"),
        (lambda: gs.GMP(0.9, end=0), r"GMP: end: .*got 0"),
        (lambda: gs.GMP(0.9, end=5, begin=5), r"GMP: end: .*6.*got 5"),
        (lambda: gs.RigL(0.9, every=gs.schedule.Periodic(1)), r"RigL: every=Periodic.* leaves out every step"),
        (lambda: gs.RigL(0.9, every=gs.schedule.EpochPeriods({0: 4, 3: 1}, 10)), r"RigL: every=Epoch.* leaves out ev"),
        (lambda: gs.GMP(0.5, end=5, initial_sparsity=0.6), r"GMP: initial_sparsity=0\.6.*sparsity=0\.5"),
        (lambda: gs.DSR(0.9, heuristic="papper"), r"DSR: heuristic.*'papper'.*'anti-paper'.*did you mean 'paper'\?"),
        (lambda: gs.DSR(0.9, threshold=0.0), r"DSR: threshold"),
        (lambda: gs.DSR(0.9, threshold=float("inf")), r"DSR: threshold.*inf"),
        (lambda: gs.DSR(0.9, gain=1.0), r"DSR: .*gain=1\.0"),
        (lambda: gs.DSR(0.9, tolerance=1.0), r"DSR: tolerance.*1\.0"),
        (lambda: gs.DSR(0.9, prune_fraction=1.0), r"DSR: prune_fraction.*1\.0"),
        (lambda: gs.DSR(0.9, prune_count=0), r"DSR: prune_count.*0"),
        (
            lambda: gs.SET(0.9, every=gs.schedule.EpochPeriods({0: 5}, 10), until=5),
            r"SET: until=5.*schedule itself",
        ),
        (lambda: gs.schedule.EpochPeriods({5: 100}, 10), r"periods.*epoch 0.*\{5: 100\}"),
        (lambda: gs.schedule.EpochPeriods({0: 0}, 10), r"periods.*epoch 0.*at least 1.*0"),
        (lambda: gs.schedule.EpochPeriods({0: 5}, 0), r"steps_per_epoch.*0"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(gs.ConfigurationError, match=message):
        make()


# -- models and selections ---------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """Every kind of tensor that cannot be masked, beside one that can."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(8, 8)
        self.odd = nn.Linear(6, 3)
        self.embedding = nn.Embedding(4, 4)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.counts = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)
        self.complex = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))


GOOD = {"targets": "good.weight"}
BAD_ATTACH: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], list[str]]] = {
    "a glob that matches nothing": (
        lambda: gs.SET(0.5, targets="god.*"), {}, gs.ConfigurationError,
        [r"'god\.\*' matches no weight", r"eligible are .*good\.weight"],
    ),
    "a name that is nearly one": (
        lambda: gs.SET(0.5, targets="good.wieght"), {}, gs.ConfigurationError,
        [r"'good\.wieght'", r"did you mean 'good\.weight'\?"],
    ),
    "a glob that matches only biases": (
        lambda: gs.SET(0.5, targets="*.bias"), {}, gs.ConfigurationError,
        [r"'\*\.bias'", r"it does match .*good\.bias", r"name such a parameter exactly"],
    ),
    "an exclusion that matches nothing": (
        lambda: gs.SET(0.5, targets=["!stem*"]), {}, gs.ConfigurationError, [r"'!stem\*' matches no weight"],
    ),
    "exclusions that leave nothing": (
        lambda: gs.SET(0.5, targets=["!*"]), {}, gs.ConfigurationError, [r"no weight to make sparse in Zoo"],
    ),
    "a type that is not there": (
        lambda: gs.SET(0.5, targets=nn.Conv2d), {}, gs.ConfigurationError, [r"no Conv2d", r"Linear"],
    ),
    "a predicate that never holds": (
        lambda: gs.SET(0.5, targets=lambda *_: False), {}, gs.ConfigurationError,
        [r"predicate .* holds for no parameter"],
    ),
    "a target of another kind": (
        lambda: gs.SET(0.5, targets=[3]), {}, gs.ConfigurationError, [r"targets: expected globs.*got 3 \(int\)"],
    ),
    "a bias": (
        lambda: gs.SET(0.5, targets="good.bias"), {}, gs.ConfigurationError,
        [r"good\.bias: has shape \(8,\)", r"two or more dimensions"],
    ),
    "an integer tensor": (
        lambda: gs.SET(0.5, targets="counts"), {}, gs.ConfigurationError,
        [r"counts: has dtype torch\.int64", r"exclude it with targets=\['!counts'\]"],
    ),
    "a complex tensor": (
        lambda: gs.SET(0.5, targets="complex"), {}, gs.ConfigurationError, [r"complex: has dtype torch\.complex64"],
    ),
    "a frozen tensor": (
        lambda: gs.SET(0.5, targets=["good.weight", "frozen.weight"]), {}, gs.ConfigurationError,
        [r"frozen\.weight: is frozen \(requires_grad=False\)", r"targets=\['!frozen\.weight'\]"],
    ),
    "2:4 that does not divide": (
        lambda: gs.SET(structure="2:4", targets="o*"), {}, gs.ConfigurationError,
        [r"SET: odd\.weight: 2:4 .* 4 divides, but shape \(3, 6\) has 6 along dimension 1", r"\['!odd\.weight'\]"],
    ),
    "a block that does not divide": (
        lambda: gs.DSR(0.5, structure="block:4x1", targets="odd*"), {}, gs.ConfigurationError,
        [r"DSR: odd\.weight: block:4x1", r"\(3, 6\) has 3 outputs and 6 inputs", r"targets=\['!odd\.weight'\]"],
    ),
    "N:M beside another sparsity": (
        lambda: gs.SET(0.9, structure="2:4", **GOOD), {}, gs.ConfigurationError,
        [r"sparsity=0\.9 disagrees with structure 2:4", r"leave sparsity out"],
    ),
    "methods that cannot be listed": (
        lambda: (each for each in [gs.SET(0.5, **GOOD)]), {}, gs.ConfigurationError, [r"methods: expected methods"],
    ),
    "masks that are a number": (
        lambda: gs.SET(**GOOD), {"masks": 5}, gs.ConfigurationError, [r"masks: expected None, 'zeros' or a mapping"],
    ),
    "a mask that is a list": (
        lambda: gs.SET(**GOOD), {"masks": {"good.weight": [1, 0]}}, gs.ConfigurationError,
        [r"masks: expected tensors by parameter name, got list for 'good\.weight'"],
    ),
    "a mask without a name": (
        lambda: gs.SET(**GOOD), {"masks": {0: torch.ones(8, 8)}}, gs.ConfigurationError,
        [r"masks: expected tensors by parameter name, got Tensor for 0"],
    ),
    "a mask of halves": (
        lambda: gs.SET(**GOOD), {"masks": {"good.weight": torch.full((8, 8), 0.5)}}, gs.ConfigurationError,
        [r"the mask of good\.weight .*must be a dense tensor of True and False"],
    ),
    "a mask of NaN": (
        lambda: gs.SET(**GOOD), {"masks": {"good.weight": torch.full((8, 8), torch.nan)}}, gs.ConfigurationError,
        [r"the mask of good\.weight .*must be a dense tensor"],
    ),
    "a mask on the meta device": (
        lambda: gs.SET(**GOOD), {"masks": {"good.weight": torch.ones(8, 8, device="meta")}}, gs.ConfigurationError,
        [r"the mask of good\.weight .*must be a dense tensor"],
    ),
    "a distribution over numbers": (
        lambda: gs.SET(distribution={5: 0.5}, **GOOD), {}, gs.ConfigurationError,
        [r"distribution: expected globs over parameter names, got 5"],
    ),
    "a module as target": (
        lambda: gs.SET(0.5, targets=nn.Linear(2, 2)), {}, gs.ConfigurationError, [r"targets: expected globs"],
    ),
    "a class of tensors as target": (
        lambda: gs.SET(0.5, targets=torch.Tensor), {}, gs.ConfigurationError, [r"targets: expected globs"],
    ),
    "a predicate of one argument": (
        lambda: gs.SET(0.5, targets=lambda name: True), {}, gs.ConfigurationError,
        [r"targets: the predicate .* failed .*; it takes a name, a module and a parameter"],
    ),
    "pruning more than is active": (
        lambda: gs.DSR(0.5, prune_count=32, **GOOD), {}, gs.ConfigurationError,
        [r"prune_count: got 32, but only 31 of 32 active weights can go .*choose a tenth"],
    ),
    "a global ranking that leaves less than one weight a tensor": (
        lambda: gs.GMP(0.99, end=5, distribution="global", targets=["good.weight", "odd.weight"]), {},
        gs.ConfigurationError, [r"fewer than one group for each of the 2 tensors; choose a lower sparsity"],
    ),
    "no sparsity": (lambda: gs.SET(**GOOD), {}, gs.ConfigurationError, [r"SET: no sparsity; give it \(in \[0, 1\)\)"]),
    "an unknown distribution": (
        lambda: gs.SET(0.5, distribution="erc", **GOOD), {}, gs.ConfigurationError,
        [r"distribution: got 'erc'", r"'uniform', 'er', 'erk', 'global'", r"did you mean 'er"],
    ),
    "global without scores": (
        lambda: gs.SET(0.5, distribution="global", **GOOD), {}, gs.ConfigurationError,
        [r"distribution='global' needs scores", r"choose 'uniform', 'er', 'erk'"],
    ),
    "an explicit distribution that leaves one out": (
        lambda: gs.SET(distribution={"good*": 0.5}, targets=["good.weight", "odd.weight"]), {}, gs.ConfigurationError,
        [r"distribution: no glob of \['good\*'\] gives odd\.weight a sparsity", r"add one"],
    ),
    "an explicit distribution with an unused glob": (
        lambda: gs.SET(distribution={"good*": 0.5, "stem*": 0.5}, **GOOD), {}, gs.ConfigurationError,
        [r"'stem\*' matches none"],
    ),
    "an explicit sparsity out of range": (
        lambda: gs.SET(distribution={"*": 1.5}, **GOOD), {}, gs.ConfigurationError, [r"distribution\['\*'\].*1\.5"],
    ),
    "a sparsity that empties the tensors": (
        lambda: gs.SET(0.999, **GOOD), {}, gs.ConfigurationError, [r"0 active weights", r"choose a lower sparsity"],
    ),
    "a sparsity over all that dense parameters exceed": (
        lambda: gs.SET(0.9, over="all", **GOOD), {}, gs.ConfigurationError,
        [r"sparsity=0\.9 over all \d+ parameters", r"choose a lower sparsity or over='targets'"],
    ),
    "two methods that overlap": (
        lambda: [gs.SET(0.5, targets="good*"), gs.DSR(0.75, targets=["good.weight", "odd.weight"])], {},
        gs.ConfigurationError,
        [r"good\.weight: belongs to both SET and DSR", r"that do not overlap"],
    ),
    "what is no method": (
        lambda: ["set"], {}, gs.ConfigurationError, [r"methods: expected methods such as gossamer\.SET.*got \['set'\]"],
    ),
    "a class instead of a method": (
        lambda: gs.SET, {}, gs.ConfigurationError, [r"methods: expected methods such as gossamer\.SET"],
    ),
    "an unknown second moment": (
        lambda: gs.SET(0.5, **GOOD), {"second_moment": "median"}, gs.ConfigurationError,
        [r"second_moment: got 'median'; allowed are 'zero' and 'mean'"],
    ),
    "a word for masks": (
        lambda: gs.SET(0.5, **GOOD), {"masks": "zeroes"}, gs.ConfigurationError,
        [r"masks: got 'zeroes'; allowed are 'zeros' or a mapping"],
    ),
    "masks of another shape": (
        lambda: gs.SET(**GOOD), {"masks": {"good.weight": torch.ones(8, 4)}}, gs.ConfigurationError,
        [r"masks: good\.weight has shape \(8, 8\), its mask \(8, 4\)"],
    ),
    "masks without one target": (
        lambda: gs.SET(targets=["good.weight", "odd.weight"]), {"masks": {"good.weight": torch.ones(8, 8)}},
        gs.ConfigurationError, [r"masks: none for odd\.weight; there are \['good\.weight'\]"],
    ),
    "masks of no target": (
        lambda: gs.SET(**GOOD), {"masks": {"good.weight": torch.ones(8, 8), "god.weight": torch.ones(8, 8)}},
        gs.ConfigurationError, [r"masks: 'god\.weight' is no target; leave it out.*; did you mean 'good\.weight'\?"],
    ),
    "an empty mask": (
        lambda: gs.SET(**GOOD), {"masks": {"good.weight": torch.zeros(8, 8)}}, gs.ConfigurationError,
        [r"good\.weight: its mask has no active weight", r"exclude it from targets"],
    ),
    "masks of another sparsity": (
        lambda: gs.SET(0.5, **GOOD), {"masks": {"good.weight": torch.ones(8, 8)}}, gs.ConfigurationError,
        [r"sparsity=0\.5 asks for 32 active weights, but the given masks have 64", r"leave sparsity out"],
    ),
    "masks that are not N:M": (
        lambda: gs.SET(structure="2:4", **GOOD), {"masks": {"good.weight": torch.eye(8)}}, gs.ConfigurationError,
        [r"good\.weight: 16 of 16 cells of 4 weights do not have exactly 2 active", r"gossamer\.prune"],
    ),
    "masks that tear blocks": (
        lambda: gs.SET(structure="block:4x1", **GOOD), {"masks": {"good.weight": torch.eye(8)}}, gs.ConfigurationError,
        [r"good\.weight: its mask has 24 pruned weights in active groups", r"block:4x1", r"gossamer\.prune"],
    ),
    "gradual pruning that would have to grow": (
        lambda: gs.GMP(0.5, end=5, **GOOD), {"masks": {"good.weight": torch.eye(8)}}, gs.ConfigurationError,
        [r"GMP: good\.weight starts with 8 active groups, fewer than the 32 of the end", r"choose a higher sparsity"],
    ),
    "an optimizer of another kind": (
        lambda: gs.SET(0.5, **GOOD), {"optimizer": "sgd"}, gs.ConfigurationError,
        [r"optimizer: expected a torch\.optim\.Optimizer, got str"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ATTACH)
def test_attach_refuses_and_changes_nothing(case: str) -> None:
    make, options, error, messages = BAD_ATTACH[case]
    model = Zoo()
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad and not p.is_complex()], lr=0.1)
    given = make()
    before, defaults = snapshot(model.state_dict()), dict(optimizer.defaults)
    options = {"optimizer": optimizer} | options
    with pytest.raises(error) as raised:
        gs.attach(model, given, **options)
    for message in messages:
        assert raised.match(message)
    assert snapshot(model.state_dict()) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert optimizer.defaults == defaults
    for method in given if isinstance(given, list) else [given]:
        assert not getattr(method, "tensors", ()), "the method given was changed"
    model.good(torch.ones(1, 8)).sum().backward()
    optimizer.step()  # nobody watches over the model
    gs.attach(model, gs.SET(0.5, **GOOD), optimizer)


def test_a_lazy_layer_and_a_meta_tensor_are_refused() -> None:
    with pytest.raises(gs.ConfigurationError, match=r"0\.weight: the layer is lazy.*run one forward first"):
        gs.attach(nn.Sequential(nn.LazyLinear(4)), gs.SET(0.5, targets="0.weight"))
    with pytest.raises(gs.ConfigurationError, match=r"0\.weight: is on the meta device.*to_empty"):
        gs.attach(nn.Sequential(nn.Linear(4, 4, device="meta")), gs.SET(0.5))


@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: parametrizations.orthogonal(layer),
        lambda layer: torch_prune.random_unstructured(layer, "weight", 0.5),
    ],
)
def test_a_weight_that_others_compute_is_refused(compute: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    compute(model[0])
    name = next(name for name, _ in model.named_parameters() if name != "0.bias")
    with pytest.raises(gs.ConfigurationError, match=r"computed from others.*remove"):
        gs.attach(model, gs.SET(0.5, targets=name))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(gs.ConfigurationError, match=r"model: expected a torch\.nn\.Module, got list"):
        gs.attach([TinyNet()], gs.SET(0.5))  # type: ignore[arg-type]


# -- order and optimizers ----------------------------------------------------------------------------------------------


def test_attaching_twice_is_refused_and_leaves_the_first_in_force() -> None:
    run = start(gs.SET(0.75, every=2)).train(1)
    before = everything(run)
    with pytest.raises(
        gs.OrderError, match=r"already has a mask from an earlier attach; call finalize\(\) or detach\(\)"
    ):
        gs.attach(run.model, gs.DSR(0.5), run.optimizers)
    assert everything(run) == before
    assert everything(run.train(range(1, 5))) == everything(start(gs.SET(0.75, every=2)).train(5))


def test_two_handles_on_one_optimizer_are_refused() -> None:
    model = TinyNet()
    first = gs.attach(model, gs.SET(0.75, targets="conv*"))
    second = gs.attach(model, gs.DSR(0.5, targets="h*"))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    first.follow(optimizer)
    backward(model, 0)
    with pytest.raises(gs.OrderError, match=r"hidden\.weight: has a mask, but no sparsity\.follow"):
        optimizer.step()
    with pytest.raises(gs.OrderError, match=r"already keeps the masks of another handle; attach all methods at once"):
        second.follow(optimizer)
    first.detach()
    second.follow(optimizer)
    optimizer.step()
    assert int(model.hidden.weight.count_nonzero() + model.head.weight.count_nonzero()) == 288


@pytest.mark.parametrize("wrapper", ["compile", "DDP", "DataParallel"])
def test_attaching_after_a_wrapper_is_refused_with_the_right_order(wrapper: str) -> None:
    model = TinyNet()
    before = snapshot(model.state_dict())
    if wrapper == "compile":
        wrapped: Any = torch.compile(model, backend="eager")
    elif wrapper == "DataParallel":
        wrapped = nn.DataParallel(model)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(model)
        finally:
            dist.destroy_process_group()
    with pytest.raises(
        gs.OrderError, match=r"model: is already wrapped \(.*\); the order is: attach\(model, methods\) -> wrap"
    ):
        gs.attach(wrapped, gs.SET(0.75))
    assert snapshot(model.state_dict()) == before


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        (lambda m: optim.SGD(m.conv.parameters(), lr=0.1), r"hidden\.weight: is in 0 of the 1 optimizers given"),
        (lambda m: [optim.SGD(m.parameters(), lr=0.1)] * 2, r"conv\.weight: is in 2 of the 2 optimizers given"),
        (
            lambda m: [optim.SGD(m.parameters(), lr=0.1), optim.SGD(m.head.parameters(), lr=0.1)],
            r"head\.weight: is in 2 of the 2 optimizers given",
        ),
        (lambda m: [], r"conv\.weight: is in 0 of the 0 optimizers given"),
        (lambda m: optim.SGD(TinyNet().parameters(), lr=0.1), r"conv\.weight: is in 0 of the 1 optimizers given"),
    ],
)
def test_an_optimizer_that_lacks_a_weight_or_shares_it_is_refused(optimizers: Any, message: str) -> None:
    model = TinyNet()
    before = snapshot(model.state_dict())
    given = optimizers(model)
    with pytest.raises(gs.OrderError, match=message + r".*must be in one.*the order is"):
        gs.attach(model, gs.SET(0.75), given)
    assert snapshot(model.state_dict()) == before
    sparsity = gs.attach(model, gs.SET(0.75))
    masks = sparsity.masks()
    with pytest.raises(gs.OrderError, match=message):
        sparsity.follow(given)
    assert all(mask.equal(masks[name]) for name, mask in sparsity.masks().items())
    for each in given if isinstance(given, list) else [given]:
        assert not each._optimizer_step_pre_hooks


def test_a_follow_that_fails_leaves_the_one_before_in_force() -> None:
    run = start(gs.SET(0.75, every=2)).train(2)
    with pytest.raises(gs.OrderError, match="is in 0 of the 1"):
        run.sparsity.follow(optim.SGD(run.model.head.parameters(), lr=0.1))
    with pytest.raises(gs.ConfigurationError, match="LBFGS cannot train masked weights"):
        run.sparsity.follow(optim.LBFGS(run.model.parameters()))
    assert everything(run.train(range(2, 6))) == everything(start(gs.SET(0.75, every=2)).train(6))


def test_a_weight_of_another_shape_is_refused_when_followed() -> None:
    model = TinyNet()
    sparsity = gs.attach(model, gs.SET(0.75))
    model.head.weight = nn.Parameter(torch.ones(4, 8))
    with pytest.raises(gs.ConfigurationError, match=r"head\.weight: had shape \(4, 16\).*\(4, 8\) now"):
        sparsity.follow(optim.SGD(model.parameters(), lr=0.1))


# -- scores that mean nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.id) for row in METHODS if row.method is not gs.Static and not row.measures]
)
def test_weights_that_are_nan_stop_the_update_and_leave_the_masks(row: Any) -> None:
    run = start(row, optimizer="sgd").train(3)
    masks, state = run.sparsity.masks(), snapshot(run.sparsity.state_dict()["masks"])
    with torch.no_grad():
        name, mask = next(iter(masks.items()))
        run.model.get_parameter(name)[mask] = float("nan")
    with pytest.raises(gs.NonFiniteError, match=r"conv\.weight: its scores contain NaN.*training has diverged"):
        run.sparsity.update()
    assert snapshot(run.sparsity.state_dict()["masks"]) == state


def test_gradients_that_are_nan_stop_growth_by_gradient_and_leave_the_masks() -> None:
    run = start(gs.RigL(0.75, every=1, skip_step=False), optimizer="sgd")
    backward(run.model, 0)
    run.model.hidden.weight.grad[~run.sparsity.masks()["hidden.weight"]] = float("nan")
    before = everything(run)["sparsity"]["masks"]
    with pytest.raises(gs.NonFiniteError, match=r"hidden\.weight: its scores contain NaN"):
        run.optimizers[0].step()
    assert everything(run)["sparsity"]["masks"] == before


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in METHODS if row.reads_gradients])
def test_growth_by_gradient_without_any_gradient_is_refused_and_leaves_the_masks(row: Any) -> None:
    run = start(row).train(1)
    run.model.zero_grad()
    before = everything(run)
    with pytest.raises(gs.ConfigurationError, match=r"no weight has a gradient to grow by; update between backward"):
        run.sparsity.update()
    assert everything(run) == before


def test_growth_by_gradient_leaves_a_layer_without_gradient_as_it_is() -> None:
    run = start(gs.RigL(0.75, every=1, skip_step=False), optimizer="sgd")
    before = run.sparsity.masks()
    run.model.hidden(torch.ones(1, 32)).sum().backward()
    run.optimizers[0].step()
    after = run.sparsity.masks()
    assert after["conv.weight"].equal(before["conv.weight"])
    assert after["head.weight"].equal(before["head.weight"])
    assert not after["hidden.weight"].equal(before["hidden.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, r"Prune: sparsity.*1\.5"),
        ({"sparsity": 0.5, "score": "gradient"}, r"conv\.weight.*gradient"),
        ({"sparsity": 0.5, "score": "momentum"}, r"'momentum' needs an optimizer"),
        ({"sparsity": 0.5, "score": "hessian"}, r"score.*'hessian'"),
        ({"sparsity": 0.5, "targets": "stem*"}, r"'stem\*' matches no weight"),
        ({"structure": "3:7"}, r"conv\.weight: 3:7"),
        ({}, r"no sparsity"),
    ],
)
def test_pruning_in_one_shot_refuses_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = TinyNet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gs.ConfigurationError, match=message):
        gs.prune(model, **options)
    assert snapshot(model.state_dict()) == snapshot(before)


def test_a_second_handle_on_one_optimizer_is_refused_before_anything_is_pruned() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    first = gs.attach(model, gs.SET(0.5, targets="0.*"), optimizer)
    before = snapshot(model.state_dict())
    with pytest.raises(gs.OrderError, match="attach all methods at once"):
        gs.attach(model, gs.SET(0.5, targets="1.*"), optimizer)
    assert snapshot(model.state_dict()) == before
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    first.finalize()
    optimizer.step()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda view: view.weight > 0, "torch.bool"),
        (lambda view: view.weight.long(), "torch.int64"),
        (lambda view: 1.0, "float"),
        (lambda view: view.weight.to(torch.complex64), "torch.complex64"),
    ],
)
def test_a_score_of_another_kind_is_refused(value: Any, kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(gs.ConfigurationError, match=rf"0\.weight: its score is a {kind}; a score returns a tensor of"):
        gs.prune(model, 0.5, score=value)


def test_a_score_that_is_one_number_for_all_is_taken() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    summary = gs.prune(model, 0.5, score=lambda view: torch.ones(()).expand(view.weight.shape))
    assert summary.totals["targets_active"] == 32


@pytest.mark.parametrize("thing", [None, "model", 5])
def test_what_is_no_module_is_refused(thing: Any) -> None:
    sparsity = gs.attach(nn.Sequential(nn.Linear(8, 8)), gs.Static(0.5))
    for call in (gs.import_torch_masks, sparsity.project, lambda each: gs.prune(each, 0.5)):
        with pytest.raises(gs.ConfigurationError, match=type(thing).__name__):
            call(thing)


@pytest.mark.parametrize(("structure", "divides"), [("2:4", False), ("1:2", True), ("block:1x4", False)])
def test_cells_and_blocks_stay_within_the_groups_of_a_transposed_convolution(structure: str, divides: bool) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(8, 16, 3, groups=4))
    sparsity = 0.5 if structure.startswith("block") else None
    if divides:
        gs.attach(model, gs.Static(sparsity, structure=structure))
    else:
        with pytest.raises(gs.ConfigurationError, match=r"0\.weight: .* 2 (along|inputs).*in each of 4 groups"):
            gs.attach(model, gs.Static(sparsity, structure=structure))
