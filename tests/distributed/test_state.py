"""State under FSDP2: resume to the bit, another number of processes, copies, and the end of training."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from gossamer.checkpoint import load_tree, save_tree

from . import ranks
from .training import UPDATES, Uneven, adamw, names, run, whole, wrap

HALF = UPDATES // 2
KINDS = ("set", "rigl", "dsr", "gmp-global")


def cases():
    listed = {}
    for name in KINDS:
        listed[f"resume fsdp {name}"] = lambda _, n=name: resumed(n, "fsdp")
        listed[f"resume ddp {name}"] = lambda _, n=name: resumed(n, "ddp")
        listed[f"two to one {name}"] = lambda _, n=name: half_of(n, "fsdp").full_state()
        listed[f"one to two {name}"] = lambda folder, n=name: continued(n, "fsdp", load_tree(folder / f"{n}.saved"))
    listed["checkpoint"] = sharded_checkpoint
    listed["evaluated"] = evaluated
    listed["clip"] = clipped
    listed["finalize"] = finalized
    listed["project"] = projected
    listed["project average"] = projected_average
    return listed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = Path(tmp_path_factory.mktemp("ranks"))
    for name in KINDS:
        save_tree(folder / f"{name}.saved", half_of(name, "plain").full_state())
    results = ranks.start(cases, folder)
    results.folder = folder
    return results


def half_of(name, wrapper):
    return run(name, wrapper, optimizer=adamw).train(0, HALF)


def continued(name, wrapper, state):
    return run(name, wrapper, optimizer=adamw).load_full_state(state).train(HALF, UPDATES).record()


# -- resume -------------------------------------------------------------------------------------------------------


def resumed(name, wrapper):
    """Stops three times, each time into objects made anew, and an unbroken run beside it."""
    unbroken = run(name, wrapper, optimizer=adamw).train().record()
    stops = [0, 5, 11, 16, UPDATES]
    saved = None
    for first, last in itertools.pairwise(stops):
        part = run(name, wrapper, optimizer=adamw, seed=0 if saved is None else first)
        if saved is not None:
            part.wrapped.load_state_dict(saved["model"])
            part.optimizer.load_state_dict(saved["optimizer"])
            part.sparsity.load_state_dict(saved["sparsity"])
        part.train(first, last)
        holders = {"model": part.wrapped, "optimizer": part.optimizer, "sparsity": part.sparsity}
        saved = {key: copy.deepcopy(holder.state_dict()) for key, holder in holders.items()}
    return {
        "unbroken": unbroken["weights"],
        "resumed": part.weights(),
        "masks": unbroken["masks"][-(UPDATES - stops[-2]) :],
        "resumed masks": part.masks(),
    }


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", KINDS)
def test_three_times_resumed_run_is_the_unbroken_one_to_the_bit(results, wrapper, name):
    for rank in results[f"resume {wrapper} {name}"]:
        assert rank["resumed masks"].equal(rank["masks"])
        for key, weight in rank["unbroken"].items():
            assert rank["resumed"][key].equal(weight), key


# -- another number of processes ------------------------------------------------------------------------------------


def unbroken_alone(name):
    return run(name, "plain", optimizer=adamw).train().record()


@pytest.mark.parametrize("name", KINDS)
def test_state_of_two_processes_goes_on_in_one(results, name):
    first, second = results[f"two to one {name}"]
    assert all(first["sparsity"]["masks"][key].equal(mask) for key, mask in second["sparsity"]["masks"].items())
    later, whole_run = continued(name, "plain", first), unbroken_alone(name)
    assert later["masks"].equal(whole_run["masks"][HALF:])
    for key, weight in whole_run["weights"].items():
        torch.testing.assert_close(later["weights"][key], weight, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", KINDS)
def test_state_of_one_process_goes_on_in_two(results, name):
    whole_run = unbroken_alone(name)
    for later in results[f"one to two {name}"]:
        assert later["masks"].equal(whole_run["masks"][HALF:])
        for key, weight in whole_run["weights"].items():
            torch.testing.assert_close(later["weights"][key], weight, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", KINDS)
def test_state_is_the_same_whoever_saved_it(results, name):
    two = results[f"two to one {name}"][0]["sparsity"]
    one = half_of(name, "plain").full_state()["sparsity"]
    assert two.keys() == one.keys()
    assert {key: mask.tolist() for key, mask in two["masks"].items()} == {
        key: mask.tolist() for key, mask in one["masks"].items()
    }
    assert two["shapes"] == one["shapes"]
    assert two["step"] == one["step"]
    for a, b in zip(two["methods"], one["methods"], strict=True):
        assert a["config"] == b["config"]
        assert a["state"].pop("generator").equal(b["state"].pop("generator"))
        assert a["state"] == b["state"]


def sharded_checkpoint(folder):
    """Writes the packed masks as they are sharded, each rank its own rows."""
    part = run("rigl", "fsdp").train(0, 3)
    masks = part.sparsity.state_dict()["masks"]
    checkpoint.save({"masks": masks}, checkpoint_id=str(folder / "checkpoint"))
    local = {name: list(mask.to_local().shape) for name, mask in masks.items()}
    return {"local": local, "masks": part.masks()[-1]}


def test_packed_masks_are_sharded_by_rows_and_read_back_from_a_distributed_checkpoint(results):
    first, second = results["checkpoint"]
    assert list(first["local"].values()) == [[3, 2], [3, 2], [4, 5], [1, 1]]
    assert list(second["local"].values()) == [[2, 2], [2, 2], [3, 5], [0, 1]]
    fresh = run("rigl", "plain").train(0, 3)
    state = fresh.sparsity.state_dict()
    state["masks"] = {name: torch.zeros_like(mask) for name, mask in state["masks"].items()}
    with pytest.warns(UserWarning, match="load in a single process"):
        checkpoint.load({"masks": state["masks"]}, checkpoint_id=str(results.folder / "checkpoint"), no_dist=True)
    other = run("rigl", "plain", seed=5)
    other.sparsity.load_state_dict(state)
    assert torch.cat([mask.flatten() for mask in other.sparsity.masks().values()]).equal(first["masks"])


def evaluated(_):
    """Everything that reads or writes masks, while the model holds whole weights."""
    part = run("dsr", "fsdp").train(0, 3)
    mask, weights = part.masks()[-1], part.weights()
    part.evaluate()
    sharded = [isinstance(parameter, DTensor) for parameter in part.wrapped.parameters()]
    state = part.sparsity.state_dict()
    part.sparsity.load_state_dict(state)
    part.sparsity.project(part.model)
    read = torch.cat([whole(each).flatten() for each in part.sparsity.masks().values()])
    (update,) = part.sparsity.update()
    after = torch.cat([whole(each).flatten() for each in part.sparsity.masks().values()])
    part.sparsity.finalize()
    part.backward(3)  # FSDP2 gathers the weights anew
    return {
        "sharded": sharded,
        "before": mask,
        "read": read,
        "packed": {name: whole(each) for name, each in state["masks"].items()},
        "active": [sum(row["active"] for row in update.rows), int(after.sum())],
        "moved": int((after != mask).sum()),
        "mask": after,
        "weights": [weights, part.weights()],
    }


def test_masks_are_those_of_the_shards_while_the_model_holds_whole_weights(results):
    alone = run("dsr", "plain").train(0, 3)
    packed = alone.sparsity.state_dict()["masks"]
    (update,) = alone.sparsity.update()
    expected = torch.cat([mask.flatten() for mask in alone.sparsity.masks().values()])
    for rank in results["evaluated"]:
        assert not all(rank["sharded"]), "the forward left all weights sharded, so this test shows nothing"
        assert rank["read"].equal(rank["before"])
        assert all(rank["packed"][name].equal(bits) for name, bits in packed.items())
        assert rank["active"] == [sum(row["active"] for row in update.rows)] * 2
        assert rank["mask"].equal(expected)
        assert rank["moved"] > 0
        before, after = rank["weights"]
        for name in ("stem", "up", "hidden", "head"):
            grown = after[f"{name}.weight"] != before[f"{name}.weight"]
            assert after[f"{name}.weight"][grown].eq(0).all()  # pruned or newly active: zero; all others as they were


# -- clipping -------------------------------------------------------------------------------------------------------

NORMS = (2.0, 1.0, torch.inf)
LIMIT = 0.01
CLIPPED = ("set", "set block:2x2")  # in the first, one rank holds nothing of the head


def clipped(_):
    return {
        f"{wrapper} {name}": [norms_and_gradients(name, wrapper, order) for order in NORMS]
        for wrapper in ("ddp", "fsdp")
        for name in CLIPPED
    }


def norms_and_gradients(name, wrapper, order):
    part = run(name, wrapper)
    part.backward(0)
    norm = part.sparsity.clip_grad_norm_(LIMIT, norm_type=order)
    assert not isinstance(norm, DTensor)
    return {"norm": norm, "gradients": {name: whole(p.grad) for name, p in names(part.wrapped).items()}}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
@pytest.mark.parametrize("order", NORMS)
@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_counts_active_weights_over_all_ranks(results, wrapper, name, order):
    one = run(name, "plain")
    one.backward(0)
    before = {name: whole(parameter.grad) for name, parameter in names(one.wrapped).items()}
    masks = one.sparsity.masks()
    counted = torch.cat([(grad * masks.get(name, 1)).flatten() for name, grad in before.items()])
    expected = torch.linalg.vector_norm(counted, order)
    assert expected > LIMIT
    for rank in results["clip"]:
        found = rank[f"{wrapper} {name}"][NORMS.index(order)]
        torch.testing.assert_close(found["norm"], expected, rtol=1e-9, atol=0)
        for key, gradient in before.items():  # those of pruned weights are scaled with the others
            torch.testing.assert_close(found["gradients"][key], gradient * LIMIT / (expected + 1e-6))


# -- the end --------------------------------------------------------------------------------------------------------


def finalized(_):
    part = run("dsr", "fsdp", optimizer=adamw).train(0, 4)
    mask, before = part.masks()[-1], part.weights()
    keys = list(part.wrapped.state_dict())
    model = part.sparsity.finalize()
    after = part.weights()
    part.backward(99)
    part.optimizer.step()  # no mask any more: weights that were pruned move
    return {
        "same": model is part.model,
        "keys": keys == list(part.wrapped.state_dict()) == list(Uneven().state_dict()),
        "mask": mask,
        "before": before,
        "after": after,
        "moved": [int((whole(p) != 0).sum()) for p in part.wrapped.parameters()],
        "refused": ranks.error_of(part.sparsity.update),
    }


def test_finalized_model_is_plain_with_exact_zeros(results):
    for rank in results["finalize"]:
        assert rank["same"]
        assert rank["keys"]
        weights = [rank["after"][f"{name}.weight"].flatten() for name in ("stem", "up", "hidden", "head")]
        assert torch.cat(weights)[~rank["mask"]].eq(0).all()
        assert not torch.signbit(torch.cat(weights)[~rank["mask"]]).any()
        for key, weight in rank["before"].items():
            assert rank["after"][key].equal(weight)
        assert sum(rank["moved"]) > int(rank["mask"].sum()) + 1
        assert rank["refused"].startswith("OrderError: this handle was detached or finalized")


def projected(_):
    """An average that is sharded alike, one in another sharding, and one that is whole on every rank."""
    part = run("rigl", "fsdp").train(0, 2)
    found = {"mask": part.masks()[-1]}
    torch.manual_seed(1)
    for name, wrapper in (("sharded", "fsdp"), ("whole", "plain")):
        average = wrap(Uneven().double(), wrapper)
        with torch.no_grad():
            for parameter in average.parameters():
                parameter.fill_(torch.nan)
        part.sparsity.project(average)
        found[name] = {key: whole(parameter) for key, parameter in average.named_parameters()}
    return found


@pytest.mark.parametrize("kind", ["sharded", "whole"])
def test_masks_are_projected_into_an_average(results, kind):
    for rank in results["project"]:
        weights = [rank[kind][f"{name}.weight"].flatten() for name in ("stem", "up", "hidden", "head")]
        assert torch.cat(weights).isnan().equal(rank["mask"])
        assert torch.cat(weights)[~rank["mask"]].eq(0).all()
        assert rank[kind]["head.bias"].isnan().all()


def projected_average(_):
    part = run("set", "ddp").train(0, 2)
    average = AveragedModel(part.wrapped)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.fill_(1.0)
    part.sparsity.project(average)
    return {"mask": part.masks()[-1], "weights": dict(average.state_dict())}


def test_average_of_a_wrapped_model_is_projected(results):
    for rank in results["project average"]:
        weights = [rank["weights"][f"module.module.{name}.weight"] for name in ("stem", "up", "hidden", "head")]
        assert torch.cat([weight.flatten() for weight in weights]).bool().equal(rank["mask"])
