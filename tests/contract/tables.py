"""What the contract tests run over: one table of methods and one of optimizers.

A new method costs one row in METHODS, a new optimizer class one in OPTIMIZERS; `test_tables.py` fails until it has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn, optim

import gossamer as gs
from gossamer.structure import Structure

STRUCTURES = ("element", "2:4", "block:4x1")
SPARSITY = 0.75


@dataclass(frozen=True, eq=False)
class MethodRow:
    """A method under test: `make(structure=..., **overrides)` builds it for `TinyNet`.

    `updates` are the steps of its updates among the first 12. One that does not keep its count starts dense, and the
    last of its updates leaves the number of weights that was asked. One that `measures` ranks by what it sees of
    forward passes, of linear layers and convolutions only, also in steps that are skipped then.
    """

    id: str
    method: type[gs.Method]
    options: dict[str, Any]
    grows: bool = True
    reads_gradients: bool = False
    keeps_count: bool = True
    measures: bool = False
    updates: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    structures: tuple[str, ...] = STRUCTURES

    @property
    def settles(self) -> int:
        """The step from which masks can be updated by hand, and the number of active weights is as asked."""
        return self.updates[-1] if not self.keeps_count else int(self.measures)

    def make(self, structure: str | Structure = "element", **overrides: Any) -> Any:
        budget = {"sparsity": None if re.fullmatch(r"\d+:\d+", str(structure)) else SPARSITY}
        return self.method(**budget | self.options | {"structure": structure} | overrides)


METHODS = [
    MethodRow("static", gs.Static, {}, grows=False, updates=()),
    MethodRow("set", gs.SET, {"every": 2, "drop_fraction": 0.5}),
    MethodRow("rigl", gs.RigL, {"every": 2, "drop_fraction": 0.5, "skip_step": True}, reads_gradients=True),
    MethodRow("rigl-step", gs.RigL, {"every": 2, "drop_fraction": 0.5, "skip_step": False}, reads_gradients=True),
    MethodRow("dsr", gs.DSR, {"every": 2, "threshold": 0.1, "prune_fraction": 0.05}),
    MethodRow(
        "hebbian",
        gs.Hebbian,
        {
            "every": 2,
            "drop_fraction": 0.5,
            "threshold": -0.5,
            "count_every": 1,
            "decay": 0.5,
            "reinitialize": False,
        },
        measures=True,
    ),
    MethodRow("gmp", gs.GMP, {"every": 2, "end": 8}, grows=False, keeps_count=False, updates=(2, 4, 6, 8)),
    MethodRow(
        "imp",
        gs.IMP,
        {"length": 3, "rounds": 2, "rewind": 1, "distribution": "erk"},
        grows=False,
        keeps_count=False,
        updates=(4, 7),
    ),
]


@dataclass(frozen=True, eq=False)
class LearnedRow:
    """A method that learns masks: `make(structure, **overrides)` builds it for `TinyNet`.

    After `steps` steps nothing changes any more when masks become hard. `scatter` is how far apart scores start, so
    that few steps decide about some.
    """

    id: str
    method: type[gs.Method]
    options: dict[str, Any]
    steps: int
    scatter: float
    structures: tuple[str, ...] = ("element", "block:4x1", "filter", "channel", "row+column")

    def make(self, structure: str | Structure = "element", **overrides: Any) -> Any:
        return self.method(**self.options | {"structure": structure} | overrides)


LEARNED = [
    LearnedRow(
        "continuous",
        gs.ContinuousSparsification,
        {"initial_value": 0.1, "penalty": 1e-6, "rounds": 2, "rewind": 2, "length": 4, "lr": 0.05},
        steps=10,
        scatter=0.1,
    ),
    LearnedRow(
        "continuous-steered",
        gs.ContinuousSparsification,
        {
            "initial_value": 0.2,
            "penalty": 1e-6,
            "rounds": 2,
            "length": 4,
            "lr": 0.005,
            "sparsity": 0.3,
            "ranking": True,
            "scaling": "code",
        },
        steps=10,
        scatter=0.1,
    ),
    LearnedRow("hard_concrete", gs.HardConcrete, {"penalty": 1e-4, "drop_rate": 0.9}, steps=8, scatter=3.0),
    LearnedRow("str", gs.STR, {"initial_value": -3.0, "penalty": 0.1, "lr": 0.1}, 8, 0.0, structures=("element",)),
]

METHOD_CASES = [pytest.param(row, s, id=f"{row.id}-{s}") for row in METHODS for s in row.structures]
GROWING_CASES = [pytest.param(row, s, id=f"{row.id}-{s}") for row in METHODS if row.grows for s in row.structures]


VARIANTS = {"forloop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@dataclass(frozen=True, eq=False)
class OptimizerRow:
    """An optimizer, or several beside each other, under test.

    `groups` splits the parameters of a model over the classes: a predicate on (name, parameter) for each, the first
    that holds counts. `variants` are the implementations to run, as keyword arguments.
    """

    id: str
    classes: tuple[type[optim.Optimizer], ...]
    options: tuple[dict[str, Any], ...]
    variants: tuple[str, ...]
    split: Callable[[str, nn.Parameter], int] = lambda name, parameter: 0

    def make(self, model: nn.Module, variant: str | None = None, **overrides: Any) -> list[optim.Optimizer]:
        variant = variant or self.variants[0]
        flags = VARIANTS[variant]
        members: list[list[nn.Parameter]] = [[] for _ in self.classes]
        for name, parameter in model.named_parameters():
            members[self.split(name, parameter)].append(parameter)
        return [
            cls(parameters, **options | ({} if cls is optim.Muon else flags) | overrides)
            for cls, options, parameters in zip(self.classes, self.options, members, strict=True)
        ]


ALL = tuple(VARIANTS)
TWO = ALL[:2]


def _row(id: str, cls: type[optim.Optimizer], variants: tuple[str, ...] = TWO, **options: Any) -> OptimizerRow:
    return OptimizerRow(id, (cls,), (options,), variants)


OPTIMIZERS = [
    _row("sgd", optim.SGD, ALL, lr=0.1, weight_decay=0.01),
    _row("sgd-momentum", optim.SGD, ALL, lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.01),
    _row("sgd-nesterov", optim.SGD, ALL, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    _row("adam", optim.Adam, ALL, lr=0.01, weight_decay=0.01),
    _row("adam-amsgrad", optim.Adam, ALL, lr=0.01, amsgrad=True, weight_decay=0.01),
    _row("adamw", optim.AdamW, ALL, lr=0.01, weight_decay=0.1),
    _row("adamw-amsgrad", optim.AdamW, ALL, lr=0.01, amsgrad=True, weight_decay=0.1),
    _row("adamax", optim.Adamax, lr=0.01, weight_decay=0.01),
    _row("nadam", optim.NAdam, lr=0.01, weight_decay=0.01),
    _row("radam", optim.RAdam, lr=0.01, weight_decay=0.01),
    _row("adagrad", optim.Adagrad, ALL, lr=0.05, weight_decay=0.01),
    _row("adagrad-initial", optim.Adagrad, ALL, lr=0.05, initial_accumulator_value=0.3, weight_decay=0.01),
    _row("adadelta", optim.Adadelta, lr=1.0, weight_decay=0.01),
    _row("adafactor", optim.Adafactor, lr=0.01, weight_decay=0.01),
    _row("rmsprop", optim.RMSprop, lr=0.01, weight_decay=0.01),
    _row("rmsprop-centered", optim.RMSprop, lr=0.01, centered=True, momentum=0.9, weight_decay=0.01),
    _row("rprop", optim.Rprop, lr=0.01),
    _row("asgd", optim.ASGD, lr=0.05, t0=2, weight_decay=0.01),
    OptimizerRow(
        "muon+adamw",
        (optim.Muon, optim.AdamW),
        ({"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.01, "weight_decay": 0.1}),
        ALL,
        lambda name, parameter: 0 if parameter.dim() == 2 else 1,
    ),
]

OPTIMIZER_CASES = [pytest.param(row, v, id=f"{row.id}-{v}") for row in OPTIMIZERS for v in row.variants]
ONE_OF_EACH = [pytest.param(row, id=row.id) for row in OPTIMIZERS]
FUSED = [pytest.param(row, id=row.id) for row in OPTIMIZERS if "fused" in row.variants and len(row.classes) == 1]
ALONE = [pytest.param(row, id=row.id) for row in OPTIMIZERS if len(row.classes) == 1]


class TinyNet(nn.Module):
    """A convolution and two linear layers whose weights every structure of STRUCTURES divides."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(4, 8, 3, padding=1)
            self.hidden = nn.Linear(32, 16)
            self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """The data of one step: the same for the same step, in whatever run."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(8, 4, 4, 4, generator=generator).to(dtype), torch.randint(4, (8,), generator=generator)


def backward(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Fresh gradients for one step."""
    model.zero_grad()
    x, y = batch(step, dtype)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def train(model: nn.Module, optimizers: list[optim.Optimizer], steps: range | int, **options: Any) -> None:
    """Plain training over a range of steps."""
    for step in range(steps) if isinstance(steps, int) else steps:
        backward(model, step, **options)
        for optimizer in optimizers:
            optimizer.step()


@dataclass
class Run:
    """A model, its optimizers and its sparsity."""

    model: nn.Module
    optimizers: list[optim.Optimizer]
    sparsity: gs.Sparsity

    def train(self, steps: range | int) -> Run:
        train(self.model, self.optimizers, steps)
        return self


def start(
    method: MethodRow | Any,
    structure: str = "element",
    optimizer: OptimizerRow | str = "adamw",
    variant: str | None = None,
    seed: int = 0,
    model: nn.Module | None = None,
    **options: Any,
) -> Run:
    """Attach a method to a new TinyNet and follow new optimizers."""
    model = TinyNet(seed) if model is None else model
    row = next(each for each in OPTIMIZERS if each.id == optimizer) if isinstance(optimizer, str) else optimizer
    optimizers = row.make(model, variant)
    made = method.make(structure) if isinstance(method, MethodRow) else method
    return Run(model, optimizers, gs.attach(model, made, optimizers, **options))


def weights(model: nn.Module, masks: dict[str, torch.Tensor]) -> Iterator[tuple[str, nn.Parameter, torch.Tensor]]:
    """Every masked weight with its name and mask."""
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        yield name, parameters[name], mask


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as integers, so that NaN equals NaN and −0.0 differs from 0.0."""
    tensor = tensor.detach().contiguous()
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor if tensor.dtype == torch.bool else tensor.view(integer)


def snapshot(value: Any) -> Any:
    """A deep copy of nested state, tensors as bits with their dtype."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), bits(value).clone().flatten().tolist())
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [snapshot(item) for item in value]
    return value


def everything(run: Run) -> Any:
    """All that a run consists of, for comparison to the bit."""
    return snapshot(
        {
            "model": run.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
            "sparsity": run.sparsity.state_dict(),
        }
    )


def assert_zeros(model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
    """Pruned weights are +0.0 to the bit, and some weight is not zero."""
    for name, weight, mask in weights(model, masks):
        assert not bits(weight)[~mask].any(), f"{name}: a pruned weight is not +0.0"
        assert weight.detach()[mask].count_nonzero() > 0, f"{name}: no active weight left"
