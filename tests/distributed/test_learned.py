"""Learned masks and rewinding in two processes: those of one, under DDP and FSDP2."""

import copy
import functools
import itertools
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gossamer as gs

from . import ranks
from .training import Run, adamw, names, whole

STEPS = 12
WRAPPERS = ("ddp", "fsdp")
SEARCH = {"initial_value": 0.05, "penalty": 1e-4, "rounds": 2, "rewind": 2, "length": 4, "lr": 0.02}


class Continuous(gs.ContinuousSparsification):
    """Scores start apart, so that few steps decide about some."""

    def _first_scores(self, scored, weight):
        return scattered(super()._first_scores(scored, weight), 0.1)


class HardConcrete(gs.HardConcrete):
    """Likewise."""

    def _first_scores(self, scored, weight):
        return scattered(super()._first_scores(scored, weight), 3.0)


def scattered(scores, scale):
    noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return scores + scale * noise.to(scores.dtype)


METHODS = {
    "continuous": lambda: Continuous(**SEARCH),
    "continuous row": lambda: Continuous(**SEARCH, structure="row"),
    "continuous column": lambda: Continuous(**SEARCH, structure="channel"),
    "steered": lambda: Continuous(**SEARCH | {"rewind": None}, sparsity=0.4),
    "hard_concrete": lambda: HardConcrete(1e-3, drop_rate=0.8, lr=0.2),
    "hard_concrete row": lambda: HardConcrete(1e-3, drop_rate=0.8, lr=0.2, structure="row"),
    "str": lambda: gs.STR(-3.0, 0.1),
    "imp": lambda: gs.IMP(0.6, length=4, rounds=2, rewind=2),
}


def run(name, wrapper="plain", **options):
    return Run(METHODS[name](), wrapper, **options)


def train(each, first, last):
    """As `Run.train`, in steps; masks are soft at first."""
    for step in range(first, last):
        each.backward(step)
        each.optimizer.step()
        each.optimizer.zero_grad()
    return each


def cases():
    listed = {}
    for wrapper in WRAPPERS:
        for name in METHODS:
            listed[f"train {wrapper} {name}"] = lambda _, n=name, w=wrapper: trained(run(n, w))
            listed[f"resume {wrapper} {name}"] = lambda _, n=name, w=wrapper: resumed(n, w)
        listed[f"accumulated {wrapper}"] = lambda _, w=wrapper: trained(run("continuous", w, micro_batches=2))
        listed[f"evaluated {wrapper}"] = lambda _, w=wrapper: trained(run("continuous", w), evaluate=True)
    for name in ("continuous", "imp"):
        listed[f"rewound to the start {name}"] = lambda _, n=name: rewound_to_the_start(n)
    listed["half precision"] = lambda _: trained(run("continuous", "fsdp", dtype=torch.bfloat16))
    return listed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.start(cases, Path(tmp_path_factory.mktemp("ranks")))


def quietly(function):
    """Some layers of so small a network lose all of their weights, which is warned of."""

    @functools.wraps(function)
    def quiet(*arguments, **options):
        with warnings.catch_warnings(action="ignore"):
            return function(*arguments, **options)

    return quiet


@quietly
def trained(each, evaluate=False):
    for step in range(STEPS):
        train(each, step, step + 1)
        if evaluate:
            each.evaluate()
            with each.sparsity.hardened():
                each.evaluate()
            each.evaluate()
    metrics = each.sparsity.methods[0].metrics()
    weights = each.weights()
    x = each.batch(0)[0]
    # DDP's reducer waits for the gradients of scores that are gone, and its forward for their buffers.
    usable = each.model if isinstance(each.wrapped, DistributedDataParallel) else each.wrapped
    each.wrapped.eval()
    before = each.wrapped(x).detach()
    each.sparsity.finalize()
    after = usable(x)
    final = {name: whole(p) for name, p in names(each.model).items()}
    if usable is each.wrapped:
        after.sum().backward()
        each.optimizer.step()
    return {
        "unchanged": bool(torch.equal(after, before)),
        "trained on": [not whole(p).equal(final[name]) for name, p in names(each.model).items()],
        "weights": weights,
        "metrics": metrics,
        "final": final,
        "masks": {name: whole(mask) for name, mask in each.sparsity.masks().items()},
        "density": each.sparsity.density(),
        "groups": len(each.optimizer.param_groups),
    }


def assert_same(ranks, one):
    for rank in ranks:
        assert rank["metrics"] == pytest.approx(one["metrics"], rel=1e-6)
        assert rank["density"] == one["density"]
        assert rank["groups"] == 1
        assert rank["unchanged"]
        assert rank["trained on"] == one["trained on"] or not any(rank["trained on"])
        for part in ("weights", "final", "masks"):
            assert rank[part].keys() == one[part].keys()
            for name, value in one[part].items():
                assert rank[part][name].equal(ranks[0][part][name]), name
                torch.testing.assert_close(rank[part][name], value, rtol=1e-7, atol=1e-10)
        for name, mask in rank["masks"].items():
            assert not rank["final"][name][~mask].count_nonzero()


@pytest.mark.parametrize(("name", "wrapper"), [*itertools.product(METHODS, WRAPPERS)])
def test_masks_and_weights_are_those_of_one_process(results, wrapper, name):
    one = trained(run(name))
    assert 0 < one["density"] < 1
    assert_same(results[f"train {wrapper} {name}"], one)
    if wrapper == "fsdp":
        assert all(any(rank["trained on"]) for rank in results[f"train {wrapper} {name}"])


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("variation", ["accumulated", "evaluated"])
def test_parts_of_a_batch_and_evaluations_change_nothing(results, wrapper, variation):
    assert_same(results[f"{variation} {wrapper}"], trained(run("continuous")))


def test_models_of_half_precision_are_sharded(results):
    first, second = results["half precision"]
    for name, weight in first["final"].items():
        assert weight.dtype == torch.bfloat16
        assert weight.equal(second["final"][name])


@quietly
def rewound_to_the_start(name):
    """DDP gives all ranks the first weights of rank 0 after the model was attached."""
    method = METHODS[name]()
    method.rewind = 0
    each = Run(method, "ddp", seed=dist.get_rank())
    first = each.weights()
    rewound = []
    each.sparsity.on_update(lambda update: rewound.append(each.weights()))
    train(each, 0, 9)
    masks = {key: whole(mask) for key, mask in each.sparsity.masks().items()}
    return {"first": first, "rewound": rewound[-1], "masks": masks, "last": each.weights()}


@pytest.mark.parametrize("name", ["continuous", "imp"])
def test_a_rewind_to_the_start_is_to_what_all_ranks_began_with(results, name):
    ranks = results[f"rewound to the start {name}"]
    for rank in ranks:
        for key, value in rank["rewound"].items():
            if "scores" not in key:
                mask = rank["masks"].get(key.replace("parametrizations.", "").replace(".original", ""))
                first = ranks[0]["first"][key]
                assert value.equal(first if mask is None else torch.where(mask, first, 0.0)), key
            assert rank["last"][key].equal(ranks[0]["last"][key]), key


@quietly
def resumed(name, wrapper):
    """Stops in every phase, each time into objects made anew, and an unbroken run beside it."""
    unbroken = train(run(name, wrapper, optimizer=adamw), 0, STEPS)
    saved = None
    for first, last in itertools.pairwise((0, 1, 3, 5, 9, STEPS)):
        part = run(name, wrapper, optimizer=adamw, seed=first)
        if saved is not None:
            part.wrapped.load_state_dict(saved["model"])
            part.optimizer.load_state_dict(saved["optimizer"])
            part.sparsity.load_state_dict(saved["sparsity"])
        train(part, first, last)
        holders = {"model": part.wrapped, "optimizer": part.optimizer, "sparsity": part.sparsity}
        saved = {key: copy.deepcopy(holder.state_dict()) for key, holder in holders.items()}
    shards = [tensor for tensor in saved["model"].values() if isinstance(tensor, DTensor)]
    return {"unbroken": unbroken.weights(), "resumed": part.weights(), "shards": len(shards)}


@pytest.mark.parametrize(("name", "wrapper"), [*itertools.product(METHODS, WRAPPERS)])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(results, wrapper, name):
    for rank in results[f"resume {wrapper} {name}"]:
        assert bool(rank["shards"]) == (wrapper == "fsdp")
        for key, weight in rank["unbroken"].items():
            assert rank["resumed"][key].equal(weight), key
