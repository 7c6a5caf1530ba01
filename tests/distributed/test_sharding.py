"""What goes over the wire at an update, which shardings and orders are refused, and that all ranks agree."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gossamer as gs

from . import ranks
from .training import Run, Uneven, like, names, whole, wrap

ROWS, COLUMNS = 1024, 1024
TRAFFIC = {
    "set": lambda: gs.SET(0.9),
    "rigl": lambda: gs.RigL(0.9, until=1000),
    "dsr": lambda: gs.DSR(0.9, threshold=0.005),
    "gmp": lambda: gs.GMP(0.9, end=1, initial_sparsity=0.5),
    "gmp-global": lambda: gs.GMP(0.9, end=1, initial_sparsity=0.5, distribution="global"),
    "rigl block:4x1": lambda: gs.RigL(0.9, until=1000, structure="block:4x1"),
    "set 2:4": lambda: gs.SET(structure="2:4"),
}
ORDER = "the order is: attach(model, methods) -> wrap"


def cases():
    listed = {f"traffic {name}": lambda _, n=name: traffic(n) for name in TRAFFIC}
    listed["wrong order"] = wrong_order
    listed["refused shardings"] = refused_shardings
    listed["different first weights ddp"] = lambda _: different_first_weights("ddp")
    listed["different first weights fsdp"] = lambda _: different_first_weights("fsdp")
    listed["phases"] = phases
    listed["diverged"] = diverged
    listed["auto"] = automatic
    listed["late masks"] = late_masks
    return listed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.start(cases, Path(tmp_path_factory.mktemp("ranks")))


# -- traffic --------------------------------------------------------------------------------------------------------


class Wire(TorchDispatchMode):
    """Adds up the bytes that each kind of collective takes in and gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            name = func._schema.name.split("::")[1]
            self.bytes[name] = self.bytes.get(name, 0) + sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def traffic(name):
    torch.manual_seed(0)
    model = nn.Linear(COLUMNS, ROWS, bias=False)
    sparsity = gs.attach(model, TRAFFIC[name]())
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks.WORLD,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.follow(optimizer)
    generator = torch.Generator().manual_seed(1)
    model.weight.grad = like(torch.randn(ROWS, COLUMNS, generator=generator), model.weight)
    before = whole(sparsity.masks()["weight"])
    with Wire() as wire:
        if name.startswith("gmp"):
            optimizer.step()  # the ramp ends at step 1
        else:
            sparsity.update()
    with Wire() as gather:
        after = whole(sparsity.masks()["weight"])
    return {"bytes": wire.bytes, "gathered": gather.bytes, "changed": int((before != after).sum())}


@pytest.mark.parametrize("name", list(TRAFFIC))
def test_an_update_sends_histograms_and_counts_but_no_weights(results, name):
    weight_bytes = 4 * ROWS * COLUMNS
    for rank in results[f"traffic {name}"]:
        assert rank["changed"] > 1000
        assert set(rank["bytes"]) <= {"allreduce_"}, "ranks add up counts; a gather would bring weights together"
        assert 0 < sum(rank["bytes"].values()) < 0.08 * weight_bytes
        assert sum(rank["gathered"].values()) > 0.2 * weight_bytes  # what the meter shows where a mask is gathered


# -- order and shardings --------------------------------------------------------------------------------------------


def shard(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (ranks.WORLD,)))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def step_after_sharding():
    model = Uneven()
    optimizer = sgd(model)
    gs.attach(model, gs.SET(0.5), optimizer)
    shard(model)
    optimizer.step()


def follow_an_optimizer_made_before_sharding():
    model = Uneven()
    sparsity = gs.attach(model, gs.SET(0.5))
    optimizer = sgd(model)
    shard(model)
    sparsity.follow(optimizer)


def step_without_following():
    model = Uneven()
    sparsity = gs.attach(model, gs.SET(0.5))
    shard(model)
    optimizer = sgd(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    del sparsity


WRONG_ORDERS = {
    "attach after fully_shard": (
        lambda: gs.attach(shard(Uneven()), gs.SET(0.5)),
        "OrderError: stem.weight: is already sharded; ",
    ),
    "attach after DDP": (
        lambda: gs.attach(DistributedDataParallel(Uneven()), gs.SET(0.5)),
        "OrderError: model: is already wrapped (DistributedDataParallel); ",
    ),
    "follow an optimizer made before fully_shard": (
        follow_an_optimizer_made_before_sharding,
        "OrderError: stem.weight: is in 0 of the 1 optimizers given",
    ),
    "step an optimizer made before fully_shard": (
        step_after_sharding,
        "OrderError: stem.weight: was replaced after sparsity.follow(optimizer)",
    ),
    "step without follow": (
        step_without_following,
        "OrderError: stem.weight: has a mask, but no sparsity.follow(optimizer) was called; ",
    ),
}


def wrong_order(_):
    return {name: ranks.error_of(action) for name, (action, _) in WRONG_ORDERS.items()}


@pytest.mark.parametrize("name", list(WRONG_ORDERS))
def test_wrong_order_is_an_error_that_states_the_right_one(results, name):
    for rank in results["wrong order"]:
        assert rank[name].startswith(WRONG_ORDERS[name][1])
        assert ORDER in rank[name]


def follow_sharded(model, method, dim=0):
    sparsity = gs.attach(model, method)
    mesh = init_device_mesh("cpu", (ranks.WORLD,))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda parameter: Shard(dim))
    sparsity.follow(sgd(model))


SHARDINGS = {
    "along inputs": (
        lambda: follow_sharded(nn.Linear(8, 8, bias=False), gs.SET(0.5), dim=1),
        "ConfigurationError: weight: is sharded as (Shard(dim=1),); masks follow weights that are sharded once",
    ),
    "blocks over two ranks": (
        lambda: follow_sharded(nn.Linear(8, 12), gs.SET(0.5, structure="block:4x1")),
        "ConfigurationError: weight: structure block:4x1 needs shards of a multiple of 4 rows, but the ranks hold [",
    ),
    "cells over two ranks": (
        lambda: follow_sharded(nn.ConvTranspose2d(4, 8, 2), gs.SET(structure="2:4")),
        "ConfigurationError: weight: structure 2:4 needs shards of a multiple of 4 rows, but the ranks hold [",
    ),
    "columns over two ranks": (
        lambda: follow_sharded(nn.Linear(8, 12), gs.SET(0.5, structure="column")),
        "ConfigurationError: weight: structure column needs shards of a multiple of 12 rows, but the ranks hold [6, 6]",
    ),
    "rows and columns over two ranks": (
        lambda: follow_sharded(nn.Linear(8, 12), gs.SET(0.5, structure="row+column")),
        "ConfigurationError: weight: structure row+column needs shards of a multiple of 12 rows",
    ),
    "hidden units over two ranks": (
        lambda: follow_sharded(nn.GRU(4, 4), gs.SET(0.5, structure="iss")),
        "ConfigurationError: weight_ih_l0: structure iss needs shards of a multiple of 12 rows",
    ),
    "cells along whole rows": (lambda: follow_sharded(nn.Conv2d(4, 3, 2), gs.SET(structure="2:4")), "none"),
    "blocks within each rank": (
        lambda: follow_sharded(nn.Linear(6, 16), gs.SET(0.5, structure="block:4x2")),
        "none",
    ),
}


def refused_shardings(_):
    return {name: ranks.error_of(action) for name, (action, _) in SHARDINGS.items()}


@pytest.mark.parametrize("name", list(SHARDINGS))
def test_sharding_that_would_split_groups_is_refused(results, name):
    for rank in results["refused shardings"]:
        assert rank[name].startswith(SHARDINGS[name][1])


# -- one mask on all ranks ------------------------------------------------------------------------------------------


def zeros_of_this_rank(wrapper):
    torch.manual_seed(torch.distributed.get_rank())
    model = Uneven()
    gs.prune(model, 0.5)
    sparsity = gs.attach(model, gs.SET(), masks="zeros")
    sparsity.follow(sgd(wrap(model, wrapper)))


FROM_WEIGHTS = {
    "by score": lambda wrapper: Run(
        gs.GMP(0.8, end=4, initial_sparsity=0.5), wrapper, seed=torch.distributed.get_rank()
    ),
    "global": lambda wrapper: Run(
        gs.GMP(0.8, end=4, initial_sparsity=0.5, distribution="global"), wrapper, seed=torch.distributed.get_rank()
    ),
    "zeros": zeros_of_this_rank,
}


def different_first_weights(wrapper):
    """Each rank makes a model of its own; DDP then gives all ranks the weights of the first."""
    part = Run(gs.SET(0.7, every=1), wrapper, seed=torch.distributed.get_rank()).train(0, 4)
    found = {"masks": part.masks(), "totals": part.sparsity.summary().totals}
    found["errors"] = {name: ranks.error_of(lambda m=make: m(wrapper)) for name, make in FROM_WEIGHTS.items()}
    return found


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_random_masks_are_equal_where_each_rank_made_other_first_weights(results, wrapper):
    first, second = results[f"different first weights {wrapper}"]
    assert first["masks"].equal(second["masks"])
    assert first["masks"].sum(1).tolist() == [int(384 * 0.3)] * 4
    assert first["totals"] == second["totals"]


@pytest.mark.parametrize("name", list(FROM_WEIGHTS))
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_masks_that_come_from_weights_are_refused_where_ranks_made_others(results, wrapper, name):
    for rank in results[f"different first weights {wrapper}"]:
        assert rank["errors"][name].startswith("ConfigurationError: stem.weight: its first mask comes from its weights")


def phases(_):
    """The three steps of DSR by hand, under FSDP2 and in one process on the same weights."""
    found = {}
    for wrapper in ("plain", "fsdp"):
        part = Run(gs.DSR(0.7, every=1000, threshold=0.1, prune_fraction=0.1), wrapper)
        states = []
        for phase in ("prune", "reallocate", "adjust_threshold", "update"):
            (update,) = part.sparsity.update(phase)
            mask = torch.cat([whole(mask).flatten() for mask in part.sparsity.masks().values()])
            rows = [[row[key] for key in ("pruned", "grown", "active", "total")] for row in update.rows]
            states.append({"mask": mask, "rows": rows, "extras": update.extras})
        found[wrapper] = states
    return found


def test_phases_by_hand_are_those_of_one_process(results):
    for rank in results["phases"]:
        pruned, reallocated, *_ = rank["plain"]
        assert pruned["mask"].sum() < reallocated["mask"].sum() == int(384 * 0.3)
        for alone, together in zip(rank["plain"], rank["fsdp"], strict=True):
            assert together["mask"].equal(alone["mask"])
            assert together["rows"] == alone["rows"]
            assert together["extras"] == alone["extras"]


def diverged(_):
    """A gradient that is NaN on the second rank alone: all ranks must stop, and none change its mask."""
    part = Run(gs.RigL(0.7, every=1, skip_step=False), "fsdp")
    part.backward(0)
    before = {name: whole(mask) for name, mask in part.sparsity.masks().items()}
    if torch.distributed.get_rank() == 1:
        names(part.wrapped)["up.weight"].grad.to_local().view(-1)[0] = torch.nan
    error = ranks.error_of(part.optimizer.step)
    after = {name: whole(mask) for name, mask in part.sparsity.masks().items()}
    return {"error": error, "same": all(after[name].equal(mask) for name, mask in before.items())}


def test_nan_on_one_rank_stops_all_and_changes_nothing(results):
    for rank in results["diverged"]:
        assert rank["error"].startswith("NonFiniteError: up.weight: its scores contain NaN")
        assert rank["same"]


# -- before an optimizer is followed, and after an evaluation ----------------------------------------------------------


def small_run(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
    sparsity = gs.attach(model, gs.SET(0.6, every=2), optimizer)
    fully_shard(model[0], mesh=init_device_mesh("cpu", (ranks.WORLD,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks.WORLD,)))
    return model, sparsity, torch.optim.Adam(model.parameters(), lr=0.01)


def steps(model, optimizer, count, first=0):
    for step in range(first, first + count):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def automatic(_):
    model, sparsity, optimizer = small_run("auto")
    steps(model, optimizer, 3)
    saved = sparsity.state_dict()
    state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again, other, second = small_run("auto")
    again.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    before = other.clip_grad_norm_(1.0)
    other.load_state_dict(saved)
    loaded = {name: whole(mask) for name, mask in other.masks().items()}
    expected = {name: whole(mask) for name, mask in sparsity.masks().items()}
    steps(model, optimizer, 3, first=3)
    steps(again, second, 3, first=3)
    return {
        "norm": before,
        "loaded": all(loaded[name].equal(mask) for name, mask in expected.items()),
        "later": all(whole(a).equal(whole(b)) for a, b in zip(again.parameters(), model.parameters(), strict=True)),
        "error": ranks.error_of(lambda: small_run(None)[1].state_dict()),
    }


def test_a_sharded_model_can_be_resumed_before_its_optimizer_is_followed_of_itself(results):
    for rank in results["auto"]:
        assert rank["norm"] == 0
        assert rank["loaded"]
        assert rank["later"]
        assert rank["error"].startswith("OrderError: the model was sharded, and its masks were not; the order is")


class Late(gs.Static):
    """Claims its weights from the start and masks them when it is asked to."""

    def bind(self, model, masks):
        super().bind(model, masks)
        self.chosen = [tensor.target for tensor in self.tensors]

    def claims(self):
        return self.chosen

    def install(self):
        self.tensors = []

    def phases(self):
        return {"harden": self.harden}

    def harden(self, step, state):
        self.tensors = [gs.method.MaskedTensor(target) for target in self.chosen]
        masks = []
        for tensor in self.tensors:
            mask = torch.full_like(tensor.mask, -1)
            mask[:, ::2] = 0
            masks.append(gs.Change(tensor, mask))
        return gs.Proposal(masks)


def late_masks(_):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
    sparsity = gs.attach(model, Late(0.5))
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks.WORLD,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsity.follow(optimizer)
    steps(model, optimizer, 1)
    with torch.no_grad():
        model(torch.ones(1, 12))  # leaves whole weights in the model
    sparsity.update("harden")
    steps(model, optimizer, 2)
    return {name: whole(mask) for name, mask in sparsity.masks().items()} | {
        "zeros": [int((whole(parameter) == 0).sum()) for parameter in model.parameters() if parameter.dim() == 2]
    }


def test_masks_made_after_an_evaluation_are_those_of_the_shards(results):
    for rank in results["late masks"]:
        assert rank["zeros"] == [60, 20]
        assert rank["0.weight"].shape == (10, 12)
        assert not rank["0.weight"][:, ::2].any()
