"""Invariant 3: stopping and resuming is bit-equal to never stopping; a state that does not match changes nothing."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import gossamer as gs
from gossamer.checkpoint import load_tree, save_tree

from .tables import (
    METHOD_CASES,
    METHODS,
    OPTIMIZER_CASES,
    MethodRow,
    OptimizerRow,
    Run,
    TinyNet,
    everything,
    snapshot,
    start,
)


def state_of(run: Run) -> dict[str, Any]:
    return {
        "model": run.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "sparsity": run.sparsity.state_dict(),
    }


def restore(run: Run, state: dict[str, Any]) -> Run:
    run.model.load_state_dict(state["model"])
    for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    run.sparsity.load_state_dict(state["sparsity"])
    return run


def through_torch(run: Run, again: Callable[[], Run], folder: Path) -> Run:
    file = io.BytesIO()
    torch.save(state_of(run), file)
    file.seek(0)
    return restore(again(), torch.load(file, weights_only=True))


def through_safetensors(run: Run, again: Callable[[], Run], folder: Path) -> Run:
    save_tree(folder / "state.safetensors", state_of(run))
    return restore(again(), load_tree(folder / "state.safetensors"))


def through_memory(run: Run, again: Callable[[], Run], folder: Path) -> Run:
    return restore(again(), copy.deepcopy(state_of(run)))


def through_pickle(run: Run, again: Callable[[], Run], folder: Path) -> Run:
    return Run(*pickle.loads(pickle.dumps((run.model, run.optimizers, run.sparsity))))


WAYS = [through_torch, through_safetensors, through_memory, through_pickle]


def stop_and_resume_three_times(way: Any, make: Callable[[int], Run], folder: Path) -> None:
    whole = make(0).train(13)
    run = make(0).train(3)
    for seed, (begin, end) in enumerate([(3, 6), (6, 7), (7, 13)], start=1):
        run = way(run, lambda seed=seed: make(seed), folder).train(range(begin, end))
    assert everything(run) == everything(whole)
    assert run.sparsity.step == 13


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("method", "structure"), METHOD_CASES)
def test_every_method_resumes_to_the_bit(method: MethodRow, structure: str, way: Any, tmp_path: Path) -> None:
    stop_and_resume_three_times(way, lambda seed: start(method, structure, "adamw", seed=seed), tmp_path)


@pytest.mark.parametrize(("optimizer", "variant"), OPTIMIZER_CASES)
def test_every_optimizer_resumes_to_the_bit(optimizer: OptimizerRow, variant: str, tmp_path: Path) -> None:
    method = next(row for row in METHODS if row.id == "set")
    for way in (through_torch, through_pickle):
        stop_and_resume_three_times(way, lambda seed: start(method, "element", optimizer, variant, seed), tmp_path)


def test_a_grown_weight_that_is_still_zero_stays_alive_over_a_resume(tmp_path: Path) -> None:
    run = start(gs.SET(0.75, every=2), "element").train(2)
    run.sparsity.update()
    zeros = sum(int((p == 0).sum()) for n, p in run.model.named_parameters() if n in run.sparsity.masks())
    active = sum(int(mask.sum()) for mask in run.sparsity.masks().values())
    assert zeros > 864 - active, "no active weight is zero: this test shows nothing"
    again = through_torch(run, lambda: start(gs.SET(0.75, every=2), "element", seed=1), tmp_path)
    for name, mask in run.sparsity.masks().items():
        assert again.sparsity.masks()[name].equal(mask)


def test_gradual_pruning_resumes_on_the_ramp_it_started_from(tmp_path: Path) -> None:
    """Pruning further from zeros that the model had: where the ramp began is no longer visible at the resume."""

    def make(seed: int) -> Run:
        model = TinyNet(0)
        gs.prune(model, 0.3)
        return start(gs.GMP(0.9, end=12, every=2), model=model, masks="zeros")

    whole = make(0).train(13)
    run = make(0).train(5)
    again = through_torch(run, lambda: start(gs.GMP(0.9, end=12, every=2), seed=3), tmp_path)
    assert everything(again.train(range(5, 13))) == everything(whole)


@pytest.mark.parametrize("method", [gs.SET(every=2), gs.RigL(every=2), gs.DSR(every=2, threshold=0.1)])
def test_sparse_fine_tuning_resumes_although_fresh_weights_look_pruned(method: Any, tmp_path: Path) -> None:
    model = TinyNet(0)
    gs.prune(model, 0.6)
    run = start(method, model=copy.deepcopy(model), masks="zeros").train(3)
    run.sparsity.update()
    whole = Run(*copy.deepcopy((run.model, run.optimizers, run.sparsity))).train(range(3, 9))

    def attach_to_loaded_weights() -> Run:
        again = TinyNet(1)
        again.load_state_dict(run.model.state_dict())
        return start(method, model=again, masks="zeros")

    resumed = through_torch(run, attach_to_loaded_weights, tmp_path)
    assert everything(resumed.train(range(3, 9))) == everything(whole)


def test_a_frozen_run_stays_frozen_over_a_resume(tmp_path: Path) -> None:
    run = start(gs.SET(0.75, every=1)).train(2)
    run.sparsity.freeze()
    again = through_torch(run, lambda: start(gs.SET(0.75, every=1), seed=1), tmp_path)
    before = again.sparsity.masks()
    again.train(range(2, 5))
    assert all(mask.equal(before[name]) for name, mask in again.sparsity.masks().items())
    assert everything(again) == everything(run.train(range(2, 5)))


def test_several_methods_resume_together(tmp_path: Path) -> None:
    def make(seed: int) -> Run:
        model = TinyNet(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        methods = [gs.DSR(0.5, every=2, threshold=0.1, targets="conv*"), gs.SET(0.8, every=3, targets="h*")]
        return Run(model, [optimizer], gs.attach(model, methods, optimizer))

    stop_and_resume_three_times(through_safetensors, make, tmp_path)


def test_a_state_holds_one_bit_a_weight_packed_by_rows_and_otherwise_only_json_values() -> None:
    state = start(gs.DSR(0.75)).train(3).sparsity.state_dict()
    shapes = {name: (tuple(bits.shape), bits.dtype) for name, bits in state["masks"].items()}
    assert shapes == {
        "conv.weight": ((8, 5), torch.uint8),
        "hidden.weight": ((16, 4), torch.uint8),
        "head.weight": ((4, 2), torch.uint8),
    }
    json.dumps(state, default=lambda value: "tensor" if isinstance(value, torch.Tensor) else json.loads(str(value)))


def test_packed_bits_are_the_mask_row_by_row() -> None:
    run = start(gs.SET(0.75))
    state = run.sparsity.state_dict()
    for name, mask in run.sparsity.masks().items():
        rows = mask.flatten(1).tolist()
        expected = [
            [sum(row[8 * b + i] << i for i in range(8) if 8 * b + i < len(row)) for b in range(-(-len(row) // 8))]
            for row in rows
        ]
        assert state["masks"][name].tolist() == expected


def test_a_state_dict_does_not_change_when_training_goes_on() -> None:
    run = start(gs.SET(0.75, every=1)).train(2)
    state = run.sparsity.state_dict()
    before = copy.deepcopy(state)
    run.train(range(2, 5))
    assert all(state["masks"][name].equal(mask) for name, mask in before["masks"].items())
    assert state["methods"][0]["state"]["generator"].equal(before["methods"][0]["state"]["generator"])


# -- prefixes of wrappers ----------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """What a user's own wrapper does: everything is below `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


@pytest.mark.parametrize(("method", "structure"), METHOD_CASES)
def test_a_state_saved_below_a_wrapper_loads_into_the_plain_model_and_back(method: MethodRow, structure: str) -> None:
    plain, wrapped = start(method, structure), start(method, structure, model=Wrapped(TinyNet()))
    plain.train(5)
    wrapped.train(3)
    assert set(wrapped.sparsity.masks()) == {f"module.{name}" for name in plain.sparsity.masks()}
    wrapped.sparsity.load_state_dict(plain.sparsity.state_dict())
    again = start(method, structure, seed=2)
    again.sparsity.load_state_dict(wrapped.sparsity.state_dict())
    for name, mask in plain.sparsity.masks().items():
        assert wrapped.sparsity.masks()[f"module.{name}"].equal(mask)
        assert again.sparsity.masks()[name].equal(mask)
    assert again.sparsity.step == 5


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_in_a_saved_state_are_stripped(prefix: str) -> None:
    run = start(gs.SET(0.75, every=1)).train(3)
    state = run.sparsity.state_dict()
    for part in ("masks", "shapes"):
        state[part] = {prefix + name: value for name, value in state[part].items()}
    config = state["methods"][0]["config"]
    config["targets"] = [prefix + name for name in config["targets"]]
    again = start(gs.SET(0.75, every=1), seed=1)
    again.sparsity.load_state_dict(state)
    assert all(mask.equal(again.sparsity.masks()[name]) for name, mask in run.sparsity.masks().items())


# -- refusals ----------------------------------------------------------------------------------------------------------


class Other(nn.Module):
    """TinyNet with one more row in its head."""

    def __init__(self) -> None:
        super().__init__()
        base = TinyNet()
        self.conv, self.hidden, self.head = base.conv, base.hidden, nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.conv(x).flatten(1)))


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def edit(state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        change(state)
        return state

    return edit


def _set_one_more_bit(state: dict[str, Any]) -> None:
    packed = state["masks"]["hidden.weight"]
    row, byte = next(place for place in (packed != 255).nonzero().tolist())
    packed[row, byte] += 1 << next(i for i in range(8) if not int(packed[row, byte]) >> i & 1)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (edited(lambda s: s.update(format=99)), r"format 99.*reads 1"),
    "no format": (edited(lambda s: s.pop("format")), r"format None"),
    "empty": (lambda s: {}, r"format None"),
    "no dict": (lambda s: [], r"format 'list'"),
    "no step": (edited(lambda s: s.pop("step")), r"'step' is None"),
    "no masks": (edited(lambda s: s.pop("masks")), r"'masks' is None"),
    "no shapes": (edited(lambda s: s.pop("shapes")), r"'shapes' is None"),
    "no methods": (edited(lambda s: s.pop("methods")), r"'methods' is None"),
    "no frozen": (edited(lambda s: s.pop("frozen")), r"'frozen' is None"),
    "a mask missing": (edited(lambda s: s["masks"].pop("head.weight")), r"no mask of head\.weight"),
    "a shape missing": (edited(lambda s: s["shapes"].pop("head.weight")), r"head\.weight"),
    "a shape wrong": (edited(lambda s: s["shapes"].update({"head.weight": [8, 8]})), r"head\.weight.*\(8, 8\)"),
    "mask cut": (edited(lambda s: s["masks"].update({"head.weight": s["masks"]["head.weight"][:-1]})), r"head\.weight"),
    "mask dtype": (
        edited(lambda s: s["masks"].update({"head.weight": s["masks"]["head.weight"].int()})),
        r"head\.weight.*torch\.int32.*torch\.uint8",
    ),
    "mask no tensor": (edited(lambda s: s["masks"].update({"head.weight": [1, 2]})), r"head\.weight"),
    "a bit too many": (edited(_set_one_more_bit), r"masks have 217 active weights, their budget is 216"),
    "step negative": (edited(lambda s: s.update(step=-1)), r"step.*-1"),
    "step true": (edited(lambda s: s.update(step=True)), r"'step' is True"),
    "step absurd": (edited(lambda s: s.update(step=2**70)), r"'step' is 1180591620717411303424"),
    "tensors in a shape": (
        edited(lambda s: s["shapes"].update({"head.weight": [torch.ones(2), 16]})),
        r"head\.weight is for shape \[tensor",
    ),
    "step no number": (edited(lambda s: s.update(step="five")), r"step.*'five'"),
    "method config missing": (edited(lambda s: s["methods"][0].pop("config")), r"config"),
    "method state missing": (edited(lambda s: s["methods"][0].pop("state")), r"state"),
    "methods no list": (edited(lambda s: s.update(methods=None)), r"methods"),
    "generator missing": (edited(lambda s: s["methods"][0]["state"].pop("generator")), r"random state"),
    "generator cut": (
        edited(lambda s: s["methods"][0]["state"].update(generator=s["methods"][0]["state"]["generator"][:-8])),
        r"random state",
    ),
    "generator dtype": (
        edited(lambda s: s["methods"][0]["state"].update(generator=s["methods"][0]["state"]["generator"].long())),
        r"random state",
    ),
    "generator garbage": (
        edited(lambda s: s["methods"][0]["state"]["generator"].fill_(255)),
        r"random state is damaged",
    ),
    "generator on meta": (
        edited(lambda s: s["methods"][0]["state"].update(generator=s["methods"][0]["state"]["generator"].to("meta"))),
        r"random state",
    ),
    "format a tensor": (edited(lambda s: s.update(format=torch.ones(2))), r"format tensor"),
    "a mask without a name": (edited(lambda s: s["masks"].update({5: s["masks"]["head.weight"]})), r"got 5"),
    "mask on meta": (
        edited(lambda s: s["masks"].update({"head.weight": s["masks"]["head.weight"].to("meta")})),
        r"head\.weight",
    ),
    "an empty mask": (edited(lambda s: s["masks"]["head.weight"].zero_()), r"head\.weight: .* no active weight"),
    "second moment": (edited(lambda s: s.update(second_moment="bogus")), r"second_moment.*bogus"),
    "budget missing": (edited(lambda s: s["methods"][0]["state"].pop("budget")), r"budget is None"),
}


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in METHODS])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused_and_changes_nothing(row: MethodRow, damage: str) -> None:
    break_it, message = DAMAGE[damage]
    if damage == "a bit too many" and not row.keeps_count:  # there may be more than in the end, but not than there were
        message = r"masks have \[.*\] active weights, and when they were saved \["
    state = break_it(start(row).train(5).sparsity.state_dict())
    run = start(row, seed=1).train(3)
    before = everything(run)
    with pytest.raises(gs.StateError, match=message):
        run.sparsity.load_state_dict(state)
    assert everything(run) == before


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        (gs.GMP(0.75, every=2, end=8), 10),
        (gs.GMP(0.75, every=2, end=8), 5),
        (gs.IMP(0.75, length=3, rounds=2), 7),
        (gs.IMP(0.75, length=3, rounds=2), 5),
        (gs.DSR(0.75, every=2), 5),
    ],
    ids=["gradual pruning, ended", "gradual pruning", "rounds, ended", "rounds", "dsr"],
)
def test_a_mask_with_other_counts_than_when_it_was_saved_is_refused(method: gs.Method, steps: int) -> None:
    run = start(method).train(steps)
    before = everything(run)
    for byte in (0, 255):
        state = copy.deepcopy(run.sparsity.state_dict())
        state["masks"]["hidden.weight"][1:] = byte
        with pytest.raises(gs.StateError, match=r"the saved masks have .* active weights"):
            run.sparsity.load_state_dict(state)
    assert everything(run) == before


def test_gradual_pruning_resumed_with_an_earlier_end_ends_at_its_next_update() -> None:
    run = start(gs.GMP(0.75, every=4, end=40)).train(20)
    state = run.sparsity.state_dict()
    assert run.sparsity.density() > 0.26
    late = start(gs.GMP(0.75, every=4, end=10))
    updates: list[gs.MaskUpdate] = []
    late.sparsity.load_state_dict(state)
    late.sparsity.on_update(updates.append)
    late.train(6)
    assert late.sparsity.density() == 0.25
    assert [update.step for update in updates] == [22]


@pytest.mark.parametrize("order", list(itertools.permutations(("model", "optimizer", "sparsity"))), ids="-".join)
@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in METHODS])
def test_state_loads_in_any_order_through_the_functions_of_torch_for_checkpoints(
    row: MethodRow, order: tuple[str, ...]
) -> None:
    # They step an optimizer that has no state, so that it makes one.
    run = start(row).train(5)
    parts = {
        "model": copy.deepcopy(get_model_state_dict(run.model)),
        "optimizer": copy.deepcopy(get_optimizer_state_dict(run.model, run.optimizers)),
        "sparsity": copy.deepcopy(run.sparsity.state_dict()),
    }
    again = start(row, seed=1)
    for part in order:
        if part == "model":
            set_model_state_dict(again.model, parts["model"])
        elif part == "optimizer":
            set_optimizer_state_dict(again.model, again.optimizers, parts["optimizer"])
        else:
            again.sparsity.load_state_dict(parts["sparsity"])
    assert everything(again) == everything(run)
    assert everything(again.train(range(5, 9))) == everything(run.train(range(5, 9)))


def test_asking_for_the_state_of_a_fresh_optimizer_is_no_step() -> None:
    run = start(gs.DSR(0.75, every=1, threshold=0.1))
    masks = snapshot(run.sparsity.masks())
    get_optimizer_state_dict(run.model, run.optimizers)
    assert run.sparsity.step == 0
    assert snapshot(run.sparsity.masks()) == masks


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        (gs.GMP(0.75, end=9), "ended", None),
        (gs.DSR(0.75), "threshold", None),
        (gs.DSR(0.75), "threshold", -1.0),
        (gs.DSR(0.75), "threshold", float("nan")),
        (gs.GMP(0.75, end=9), "first", None),
        (gs.GMP(0.75, end=9), "first", [5]),
        (gs.GMP(0.75, end=9), "first", ["a", "b", "c"]),
        (gs.IMP(0.75, length=3), "ended", 1),
        (gs.IMP(0.75, length=3), "rounds", None),
        (gs.IMP(0.75, length=3), "rounds", [0, 0]),
        (gs.IMP(0.75, length=3), "rounds", [4, 0, 3]),
        (gs.IMP(0.75, length=3), "rounds", [-1, 0, 3]),
        (gs.IMP(0.75, length=3), "rounds", [0, 4, 3]),
        (gs.IMP(0.75, length=3), "rounds", [0, -1, 3]),
        (gs.IMP(0.75, length=3), "rounds", [True, 0, 3]),
        (gs.IMP(0.75, length=3), "rounds", [0, 0.0, 3]),
        (gs.IMP(0.75, length=3), "kept", [torch.ones(2)]),
        (gs.IMP(0.75, length=3), "kept", {1: torch.ones(2)}),
    ],
)
def test_a_state_without_what_its_method_keeps_is_refused_and_changes_nothing(
    method: Any, key: str, value: object
) -> None:
    run = start(method).train(3)
    state = run.sparsity.state_dict()
    state["methods"][0]["state"][key] = value
    before = everything(run)
    messages = {
        "threshold": "saved threshold",
        "first": "start of pruning",
        "ended": "whether pruning has ended",
        "rounds": "the saved rounds are",
        "kept": "the saved rewind point is",
    }
    with pytest.raises(gs.StateError, match=f"^{method.name}: .*{messages[key]}"):
        run.sparsity.load_state_dict(state)
    assert everything(run) == before


def mismatches() -> list[Any]:
    set_ = gs.SET(0.75, every=2)
    cases = [
        ("method", set_, gs.RigL(0.75, every=2), TinyNet, r"\['set'\].*\['rigl'\]"),
        (
            "number of methods",
            set_,
            [gs.SET(0.75, targets="c*"), gs.SET(0.75, targets="h*")],
            TinyNet,
            r"\['set', 'set'\]",
        ),
        ("targets", set_, gs.SET(0.75, every=2, targets="h*"), TinyNet, r"targets"),
        ("shape", set_, gs.SET(0.75, every=2), Other, r"head\.weight.*\(4, 16\).*\(8, 16\)"),
        ("structure", set_, gs.SET(0.75, every=2, structure="block:4x1"), TinyNet, r"structure='?element"),
    ]
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


@pytest.mark.parametrize(("saved", "here", "model", "message"), mismatches())
def test_a_state_of_something_else_is_refused_and_changes_nothing(
    saved: Any, here: Any, model: Any, message: str
) -> None:
    state = start(saved).train(3).sparsity.state_dict()
    run = start(here, model=model())
    before = everything(run)
    with pytest.raises(gs.StateError, match=message):
        run.sparsity.load_state_dict(state)
    assert everything(run) == before


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in METHODS])
def test_a_state_of_another_budget_is_refused_and_changes_nothing(row: MethodRow) -> None:
    for steps in (0, 3, 9):
        state = start(row.make(sparsity=0.8)).train(steps).sparsity.state_dict()
        run = start(row.make(sparsity=0.75)).train(3)
        before = everything(run)
        with pytest.raises(gs.StateError, match=r"budget|sparsity"):
            run.sparsity.load_state_dict(state)
        assert everything(run) == before


@pytest.mark.parametrize("way", [through_torch, through_safetensors])
@pytest.mark.parametrize("structure", ["element", "block:4x1", "2:4"])
def test_dsr_resumes_between_its_steps(way: Callable[..., Run], structure: str, tmp_path: Path) -> None:
    def make() -> Run:
        row = next(row for row in METHODS if row.id == "dsr")
        return start(row.make(structure, every=10**6, threshold=0.3))

    whole, stopped = (make().train(3) for _ in range(2))
    for phase in ("prune", "reallocate", "adjust_threshold"):
        (expected,), (found,) = whole.sparsity.update(phase), stopped.sparsity.update(phase)
        assert (found.rows, found.extras) == (expected.rows, expected.extras)
        stopped = way(stopped, make, tmp_path)
    assert expected.extras["threshold"] != 0.3
    assert everything(stopped) == everything(whole)


def test_saved_masks_of_what_was_just_pruned_must_fit() -> None:
    run = start(gs.DSR(0.75, threshold=0.3, every=10**6))
    run.sparsity.update("prune")
    state = run.sparsity.state_dict()
    state["methods"][0]["state"]["spared"].popitem()
    with pytest.raises(gs.StateError, match=r"dsr: the saved masks of what was just pruned do not fit"):
        run.sparsity.load_state_dict(state)


def test_other_settings_than_the_saved_ones_are_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def make(every: int, score: Any, second_moment: str) -> gs.Sparsity:
        model = TinyNet()
        method = gs.SET(0.75, every=every, drop_score=score)
        return gs.attach(model, method, torch.optim.Adam(model.parameters()), second_moment=second_moment)

    state = make(5, "magnitude", "zero").state_dict()
    same, other = make(5, "magnitude", "zero"), make(7, gs.scores.movement, "mean")
    same.load_state_dict(state)
    assert not caplog.records
    other.load_state_dict(state)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(";")[0] for line in lines] == [
        "set: saved with every=5, goes on with 7",
        "set: saved with drop_score='magnitude', goes on with 'movement'",
        "attach: saved with second_moment='zero', goes on with 'mean'",
    ]


@pytest.mark.parametrize(("row", "structure"), METHOD_CASES)
def test_a_run_that_goes_on_as_it_was_is_not_warned_about(
    row: MethodRow, structure: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = start(row.make(structure)).train(5).sparsity.state_dict()
    start(row.make(structure)).sparsity.load_state_dict(state)
    assert not caplog.records


@pytest.mark.parametrize("structure", ["2:4", "block:4x1"])
@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in METHODS])
def test_saved_masks_that_break_the_structure_are_refused(row: MethodRow, structure: str) -> None:
    run = start(row.make(structure)).train(row.settles)
    state = copy.deepcopy(run.sparsity.state_dict())
    packed = state["masks"]["hidden.weight"]
    flipped = packed.clone()
    flipped[0] = packed[0].bitwise_not()
    flipped[1] = packed[1].bitwise_not() if structure == "2:4" else packed[1]
    if structure == "2:4":
        flipped[0], flipped[1] = 255, 0  # the right number, in the wrong cells
    state["masks"]["hidden.weight"] = flipped
    before = everything(run)
    with pytest.raises(gs.StateError, match=r"hidden\.weight: the saved mask has"):
        run.sparsity.load_state_dict(state)
    assert everything(run) == before


@pytest.mark.parametrize(
    "damage",
    [
        {"threshold": float("inf")},
        {"threshold": True},
        {"before": 5},
        {"before": torch.ones(3)},
        {"last_pruned": -1},
        {"spared": 5},
        {"spared": {}},
    ],
    ids=str,
)
def test_a_damaged_state_of_dsr_is_refused(damage: dict[str, Any]) -> None:
    run = start(gs.DSR(0.75)).train(3)
    state = copy.deepcopy(run.sparsity.state_dict())
    state["methods"][0]["state"] |= damage
    before = everything(run)
    with pytest.raises(gs.StateError, match="dsr: the saved"):
        run.sparsity.load_state_dict(state)
    assert everything(run) == before


def test_numbers_of_numpy_are_saved_as_plain_ones() -> None:
    model = TinyNet()
    sparsity = gs.attach(model, gs.SET(np.float64(0.75), drop_fraction=np.float64(0.25)))
    file = io.BytesIO()
    torch.save(sparsity.state_dict(), file)
    file.seek(0)
    sparsity.load_state_dict(torch.load(file, weights_only=True))


def test_what_dsr_is_to_prune_follows_the_budget_of_a_state() -> None:
    kept = torch.zeros(40, 40, dtype=torch.bool)
    kept[:1] = True

    def attach(model: torch.nn.Module, masks: object) -> gs.Sparsity:
        return gs.attach(model, gs.DSR(prune_fraction=0.01, threshold=0.05), masks=masks)

    model = torch.nn.Linear(40, 40)
    first = attach(model, {"weight": kept})
    for _ in range(3):
        first.update()
    resumed = torch.nn.Linear(40, 40)
    resumed.load_state_dict(model.state_dict())
    second = attach(resumed, "zeros")  # grown weights that are zero still look pruned here
    second.load_state_dict(first.state_dict())
    assert second.methods[0].intended == first.methods[0].intended == 16
