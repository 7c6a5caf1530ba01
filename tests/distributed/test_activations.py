"""Activation methods in two processes: the thresholds and masks of one, under DDP and FSDP2."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import gossamer as gs
from gossamer.nn import LossyHardSparsifier

from . import ranks
from .training import Run, Uneven, adamw, names

STEPS = 6
WRAPPERS = ("ddp", "fsdp")
LOSSY = {
    "one": {},
    "per channel": {"per_channel": True},
    "before": {"per_channel": True, "position": "before"},
    "hard": {"hard": True, "norm": "l1"},
}


def lossy(name="one", wrapper="plain", more=(), **options):
    method = gs.LossyThreshold(**{"strength": 0.5, "eps": 0.2, "double_at": [2, 4], "lr": 0.05} | LOSSY[name])
    return Run([method, *more], wrapper, **options)


def with_weights(wrapper="plain"):
    return lossy("per channel", wrapper, [gs.DSR(0.6, every=2, threshold=0.05)])


def cases():
    listed = {}
    for wrapper in WRAPPERS:
        for name in LOSSY:
            listed[f"train {wrapper} {name}"] = lambda _, n=name, w=wrapper: trained(lossy(n, w))
        listed[f"accumulated {wrapper}"] = lambda _, w=wrapper: trained(lossy("one", w, micro_batches=2))
        listed[f"weights {wrapper}"] = lambda _, w=wrapper: trained(with_weights(w))
        listed[f"twice {wrapper}"] = lambda _, w=wrapper: called_twice(w)
        listed[f"end {wrapper}"] = lambda _, w=wrapper: ended(w)
        listed[f"resume {wrapper}"] = lambda _, w=wrapper: resumed(w)
    listed["train ddp-view one"] = lambda _: trained(lossy("one", "ddp-view"))
    listed["half precision"] = lambda _: trained(lossy("per channel", "fsdp", dtype=torch.bfloat16))
    for name in AGGREGATES:
        listed[f"aggregate {name}"] = lambda _, n=name: aggregated(n)
    listed["aggregate wrapped"] = aggregated_in_wrapper
    listed["aggregate order"] = aggregated_in_another_order
    listed["aggregate refused"] = refused
    return listed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.start(cases, Path(tmp_path_factory.mktemp("ranks")))


# -- learned thresholds ----------------------------------------------------------------------------------------------


def trained(run):
    run.train(0, STEPS)
    return {"weights": run.weights(), "learned": run.sparsity.summary().learned, "local": local_sizes(run)}


def local_sizes(run):
    """How many numbers of every threshold this rank holds."""
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in names(run.wrapped).items()}
    return {name: part.numel() for name, part in local.items() if name.endswith("eps")}


def assert_same(both, one, rtol=1e-8):
    assert any(key.endswith("sparsifier.eps") for key in one["weights"])
    for key, weight in one["weights"].items():
        assert both[0]["weights"][key].equal(both[1]["weights"][key]), key
        torch.testing.assert_close(both[0]["weights"][key], weight, rtol=rtol, atol=1e-11)
    for rank in both:
        for row, expected in zip(rank["learned"], one["learned"], strict=True):
            assert row["site"] == expected["site"]
            assert [row[key] for key in ("threshold", "least", "most")] == pytest.approx(
                [expected[key] for key in ("threshold", "least", "most")]
            )
            assert row["sharpness"] == expected["sharpness"] == 4


@pytest.mark.parametrize(("name", "wrapper"), [*itertools.product(LOSSY, WRAPPERS), ("one", "ddp-view")])
def test_thresholds_are_those_of_one_process(results, wrapper, name):
    one = trained(lossy(name))
    assert_same(results[f"train {wrapper} {name}"], one)
    assert all((one["weights"][f"{site}.sparsifier.eps"] != 0.2).all() for site in ("stem", "up", "hidden"))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_parts_of_a_batch_and_masked_weights_go_along(results, wrapper):
    assert_same(results[f"accumulated {wrapper}"], trained(lossy("one", micro_batches=2)))
    one = trained(with_weights())
    assert_same(results[f"weights {wrapper}"], one)
    assert one["weights"]["hidden.weight"].eq(0).sum() > 50


def test_thresholds_are_sharded_also_where_a_rank_has_none(results):
    first, second = (rank["local"] for rank in results["train fsdp one"])
    assert (set(first.values()), set(second.values())) == ({1}, {0})
    first, second = (rank["local"] for rank in results["train fsdp per channel"])
    assert list(first.values()) == [3, 2, 4]
    assert list(second.values()) == [2, 2, 3]


def test_models_of_half_precision_are_sharded(results):
    first, second = results["half precision"]
    for key, weight in first["weights"].items():
        assert weight.dtype == torch.bfloat16
        assert second["weights"][key].equal(weight)


def called_twice(wrapper):
    """Two forward passes before the backward pass."""
    run = lossy("one", wrapper)
    for _ in range(2):
        total = sum(run.wrapped(run.batch(step)[0]).square().mean() for step in range(2))
        (total + run.sparsity.penalty()).backward()
        run.step()
    return run.weights()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_model_may_be_called_twice_in_a_step(results, wrapper):
    one = called_twice("plain")
    for rank in results[f"twice {wrapper}"]:
        for key, weight in one.items():
            torch.testing.assert_close(rank[key], weight, rtol=1e-8, atol=1e-11)


def ended(wrapper):
    run = lossy("per channel", wrapper, optimizer=adamw).train(0, STEPS)
    run.model.eval()
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with torch.no_grad():
        run.wrapped(x)  # FSDP2 leaves whole thresholds in the model
    run.sparsity.finalize()
    with torch.no_grad():
        y = run.wrapped(x)
    hard = [module for module in run.model.modules() if isinstance(module, LossyHardSparsifier)]
    found = {
        "y": y,
        "thresholds": [module.eps.clone() for module in hard],
        "plain": not any(isinstance(module.eps, DTensor | nn.Parameter) for module in hard),
        "groups": len(run.optimizer.param_groups),
        "keys": sorted(key.removeprefix("module.") for key in run.wrapped.state_dict()),
    }
    run.model.train()
    before = run.weights()
    if not wrapper.startswith("ddp"):  # whose reducer waits for the thresholds' gradients
        run.backward(9)
        run.optimizer.step()
        found["moved"] = any(not weight.equal(before[key]) for key, weight in run.weights().items())
    return found


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_finalized_thresholds_are_whole_and_hard_on_every_rank(results, wrapper):
    one = ended("plain")
    assert len(one["thresholds"]) == 3
    for rank in results[f"end {wrapper}"]:
        assert rank["plain"]
        assert rank["groups"] == one["groups"] == 1
        assert rank["keys"] == one["keys"]
        assert rank.get("moved", True)
        torch.testing.assert_close(rank["y"], one["y"])
        for found, expected in zip(rank["thresholds"], one["thresholds"], strict=True):
            torch.testing.assert_close(found, expected)


def resumed(wrapper):
    """Stops twice, each time into objects made anew, and an unbroken run beside it."""
    unbroken = lossy("per channel", wrapper, optimizer=adamw).train(0, STEPS)
    saved = None
    for first, last in itertools.pairwise((0, 2, 3, STEPS)):
        part = lossy("per channel", wrapper, optimizer=adamw, seed=first)
        if saved is not None:
            part.wrapped.load_state_dict(saved["model"])
            part.optimizer.load_state_dict(saved["optimizer"])
            part.sparsity.load_state_dict(saved["sparsity"])
        part.train(first, last)
        holders = {"model": part.wrapped, "optimizer": part.optimizer, "sparsity": part.sparsity}
        saved = {key: copy.deepcopy(holder.state_dict()) for key, holder in holders.items()}
    return {"unbroken": unbroken.weights(), "resumed": part.weights()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(results, wrapper):
    for rank in results[f"resume {wrapper}"]:
        for key, weight in rank["unbroken"].items():
            assert rank["resumed"][key].equal(weight), key


# -- masks from aggregated activations -------------------------------------------------------------------------------

AGGREGATES = {
    "sum": {"aggregate_fn": torch.add, "features": None},
    "sum of features": {"aggregate_fn": torch.add, "features": [0, [2, 1]], "feature_dim": 1},
    **{name: {"aggregate_fn": name} for name in ("mean", "running_mean", "max", "quantile")},
}
SIZES = ((4, 4, 3), (2, 4))
"""Of the batches that each process sees."""


def seen(rank):
    return [
        torch.randn(size, 3, 4, generator=torch.Generator().manual_seed(10 * rank + step), dtype=torch.float64)
        for step, size in enumerate(SIZES[rank])
    ]


def sparsifier(name):
    net = nn.Sequential(nn.Identity())
    made = gs.ActivationSparsifier(net, reduce_fn="batch_mean", mask_fn="magnitude")
    made.register_layers("0", threshold=threshold(name), **AGGREGATES[name])
    return net, made


def threshold(name):
    return 1.5 if name == "max" else 0.15


def aggregated(name):
    net, made = sparsifier(name)
    for x in seen(dist.get_rank()):
        net(x)
    made.step()
    return made.get_mask("0")


def by_hand(name):
    """What is aggregated, from all batches of both processes."""
    ranks_ = [seen(0), seen(1)]
    samples = torch.cat([x for each in ranks_ for x in each])
    if name.startswith("sum"):
        total = torch.zeros(4, 3, 4, dtype=torch.float64)
        for x in itertools.chain(*ranks_):
            total[: len(x)] += x
        return total.mean(0, keepdim=True)
    if name == "running_mean":
        weighed = [(0.9 ** (len(each) - 1 - i), x) for each in ranks_ for i, x in enumerate(each)]
        return sum(w * x.sum(0, keepdim=True) for w, x in weighed) / sum(w * len(x) for w, x in weighed)
    if name == "mean":
        return samples.mean(0, keepdim=True)
    return samples.amax(0, keepdim=True) if name == "max" else torch.quantile(samples, 0.5, 0, keepdim=True)


@pytest.mark.parametrize("name", AGGREGATES)
def test_masks_are_made_of_what_all_processes_saw(results, name):
    expected = by_hand(name).abs() > threshold(name)
    assert 0 < expected.sum() < expected.numel()
    expected = [expected[:, [0]], expected[:, [2, 1]]] if "features" in name else [expected]
    for rank in results[f"aggregate {name}"]:
        found = rank if isinstance(rank, list) else [rank]
        for mask, wanted in zip(found, expected, strict=True):
            assert mask.equal(wanted)


def aggregated_in_wrapper(_):
    net = DistributedDataParallel(Uneven())
    made = gs.ActivationSparsifier(net, "mean", "channel_mean", "top_fraction", fraction=0.5)
    made.register_layers(["up", "hidden"])
    torch.manual_seed(dist.get_rank())
    net(torch.randn(4, 1, 4, 4))
    made.step()
    made.squash_mask()
    alone = Uneven()
    alone.load_state_dict(net.module.state_dict())
    gs.ActivationSparsifier(alone).load_state_dict(made.state_dict())
    x = torch.randn(4, 1, 4, 4)
    return {"names": list(made.data_groups), "mask": made.get_mask("up"), "same": bool(net(x).equal(alone(x)))}


def test_names_are_those_of_the_model_in_its_wrapper(results):
    first, second = results["aggregate wrapped"]
    assert first["names"] == ["up", "hidden"]
    assert first["same"]
    assert second["same"]
    assert first["mask"].equal(second["mask"])
    assert first["mask"].sum() == 2


def aggregated_in_another_order(_):
    net = nn.Sequential(nn.Identity(), nn.Identity())
    made = gs.ActivationSparsifier(net, "mean", "batch_mean", "magnitude", threshold=0.5)
    for name in ("01", "10")[dist.get_rank()]:
        made.register_layers(name)
        net[int(name)](torch.full((2, 3 + int(name)), float(name)))
    made.step()
    return [made.get_mask("0"), made.get_mask("1")]


def test_layers_may_be_registered_in_another_order(results):
    for masks in results["aggregate order"]:
        assert [mask.tolist() for mask in masks] == [[[False] * 3], [[True] * 4]]


def refused(_):
    rank = dist.get_rank()
    found = {}
    for name in ("idle", "shape", "layers", "aggregate"):
        net = nn.Sequential(nn.Identity(), nn.Identity())
        aggregate = "max" if name == "aggregate" and rank else "mean"
        made = gs.ActivationSparsifier(net, aggregate, "batch_mean", "magnitude", threshold=0.1)
        made.register_layers("0" if name != "layers" or rank == 0 else "1")
        if name != "idle" or rank == 0:
            net(torch.ones(2, 3 + rank if name == "shape" else 3))
        before = copy.deepcopy(made.state_dict())
        found[name] = ranks.error_of(made.step)
        found[f"{name} unchanged"] = str(made.state_dict()) == str(before)
    return found


def test_processes_refuse_together_what_does_not_fit(results):
    for rank in results["aggregate refused"]:
        assert rank["idle"].startswith("OrderError: 0: nothing was aggregated since the last step in process 1")
        assert rank["shape"].startswith("ConfigurationError: 0: processes have kept inputs of other shapes")
        assert rank["layers"].startswith("ConfigurationError: processes watch other layers: ['0'], and ['1']")
        assert rank["aggregate"].startswith("ConfigurationError: 0: processes watch it in other ways: ['Mean(")
        assert rank["aggregate unchanged"]
        assert rank["idle unchanged"]
        assert rank["shape unchanged"]
        assert rank["layers unchanged"]
