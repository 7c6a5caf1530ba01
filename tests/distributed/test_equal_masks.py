"""Two processes under DDP and FSDP2 have the masks of one: the same on both ranks after each of 20 updates."""

from pathlib import Path

import pytest
import torch

import gossamer as gs

from . import ranks
from .training import METHODS, PADDED, STRUCTURED, UPDATES, Run, adamw, run

WRAPPERS = ("ddp", "fsdp")
NAMES = (*METHODS, *STRUCTURED, *PADDED)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHANGING = [name for name in NAMES if name != "static"]
RANKED = [name for name in CHANGING if not name.startswith("hebbian")]  # that ranks by forward passes
GIVEN = [(name, "float32") for name in RANKED] + [(name, "bfloat16") for name in ("rigl", "dsr", "gmp-global")]


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)  # weights are given at every step


VARIATIONS = {
    "accumulated": ("rigl", {"micro_batches": 2}),
    "clipped": ("rigl", {"max_norm": 0.05}),
    "evaluated": ("rigl-step", {"evaluate": True}),
    "adamw": ("rigl-step", {"optimizer": adamw}),
    "mean second moment": ("set", {"optimizer": adamw, "second_moment": "mean"}),
    "two methods": (None, {}),
}


def variation(name, wrapper):
    method, options = VARIATIONS[name]
    if method is not None:
        return run(method, wrapper, **options)
    both = [
        gs.RigL(0.6, every=1, skip_step=False, targets=["stem*", "head*"]),
        gs.DSR(0.8, every=1, threshold=0.05, prune_fraction=0.05, targets=["up*", "hidden*"]),
    ]
    return Run(both, wrapper)


def cases():
    listed = {}
    for wrapper in WRAPPERS:
        for name in NAMES:
            listed[f"train {wrapper} {name}"] = lambda _, n=name, w=wrapper: run(n, w).train().record()
        for name, dtype in GIVEN:
            listed[f"given {wrapper} {name} {dtype}"] = lambda _, n=name, w=wrapper, d=dtype: given(n, w, d).record()
        for name in VARIATIONS:
            listed[f"train {wrapper} {name}"] = lambda _, n=name, w=wrapper: variation(n, w).train().record()
    listed["train ddp-view rigl"] = lambda _: run("rigl", "ddp-view").train().record()
    listed["train hsdp rigl"] = lambda _: run("rigl", "hsdp").train().record()
    return listed


def given(name, wrapper, dtype):
    return run(name, wrapper, dtype=DTYPES[dtype], optimizer=still).given()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks.start(cases, Path(tmp_path_factory.mktemp("ranks")))


_alone = {}


def alone(kind, name, make):
    """The run of one process, made once for all wrappers."""
    if (kind, name) not in _alone:
        _alone[kind, name] = make().record()
    return _alone[kind, name]


def assert_same_masks(both, one):
    for rank in both:
        assert rank["masks"].shape == one["masks"].shape
        assert (rank["masks"] != one["masks"]).sum(1).tolist() == [0] * len(one["masks"])
        assert rank["updates"] == one["updates"]
        assert rank["totals"] == one["totals"]


def assert_same_weights(both, one):
    for key, weight in one["weights"].items():
        assert both[0]["weights"][key].equal(both[1]["weights"][key])
        torch.testing.assert_close(both[0]["weights"][key], weight, rtol=1e-8, atol=1e-11)
        assert both[0]["weights"][key].eq(0).equal(weight.eq(0))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", NAMES)
def test_training_gives_the_masks_of_one_process(results, wrapper, name):
    both = results[f"train {wrapper} {name}"]
    one = alone("train", name, lambda: run(name, "plain").train())
    assert len(one["masks"]) == UPDATES == 20
    assert_same_masks(both, one)
    assert_same_weights(both, one)


@pytest.mark.parametrize("name", CHANGING)
def test_these_trainings_do_change_their_masks(name):
    masks = alone("train", name, lambda: run(name, "plain").train())["masks"]
    least = 1 if name == "gmp 2:4" else 4  # 3 of 4 from the first update, then 2 of 4
    assert (masks[1:] != masks[:-1]).any(1).sum() >= least


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize(("name", "dtype"), GIVEN)
def test_same_weights_and_gradients_give_the_same_masks(results, wrapper, name, dtype):
    # Coarse numbers, so that many scores are equal and their order must not depend on who holds them.
    one = alone(f"given {dtype}", name, lambda: given(name, "plain", dtype))
    assert_same_masks(results[f"given {wrapper} {name} {dtype}"], one)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", list(VARIATIONS))
def test_variation_gives_the_masks_of_one_process(results, wrapper, name):
    one = alone("train", name, lambda: variation(name, "plain").train())
    both = results[f"train {wrapper} {name}"]
    assert_same_masks(both, one)
    assert_same_weights(both, one)
    for rank in both:
        assert rank["norms"] == pytest.approx(one["norms"], rel=1e-9)
    assert (one["norms"] != []) == (name == "clipped")


def test_gradients_that_are_views_of_buckets_survive_a_skipped_step(results):
    one = alone("train", "rigl", lambda: run("rigl", "plain").train())
    assert_same_masks(results["train ddp-view rigl"], one)
    assert all(rank["gradients kept"] for rank in results["train ddp-view rigl"])


def test_two_dimensional_mesh_gives_the_masks_of_one_process(results):
    one = alone("train", "rigl", lambda: run("rigl", "plain").train())
    assert_same_masks(results["train hsdp rigl"], one)
