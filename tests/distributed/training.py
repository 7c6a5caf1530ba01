"""One short training, the same in one process, under DDP and under FSDP2; what the tests compare is what it records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import gossamer as gs

UPDATES = 20
BATCH = 8


class Uneven(nn.Module):
    """Rows that two ranks cannot share evenly (5 and 7), and a head of one row, of which the second rank has none."""

    inputs = (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 5, 3, bias=False)
        self.up = nn.ConvTranspose2d(5, 4, 2, bias=False)
        self.hidden = nn.Linear(36, 7, bias=False)
        self.head = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.stem(x).tanh()).tanh().flatten(1)
        return self.head(self.hidden(x).tanh())


class Even(nn.Module):
    """Sides that cells of four and blocks of 2×2 divide on each of two ranks."""

    inputs = (4, 3, 3)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 2, bias=False)
        self.up = nn.ConvTranspose2d(8, 8, 2, bias=False)
        self.hidden = nn.Linear(72, 8, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.stem(x).tanh()).tanh().flatten(1)
        return self.head(self.hidden(x).tanh())


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    """Wrap a model: "plain", "ddp", "ddp-view" (gradients are views of buckets), "fsdp", "hsdp" (a 2-d mesh)."""
    if wrapper.startswith("ddp"):
        return DistributedDataParallel(model, gradient_as_bucket_view=wrapper == "ddp-view")
    if wrapper.endswith("sdp"):
        shape = (dist.get_world_size(),) if wrapper == "fsdp" else (1, dist.get_world_size())
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for part in (model.stem, model):  # one unit of its own, the others with the root
            fully_shard(part, mesh=mesh)
    return model


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor on every rank, as a copy."""
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor.clone()


def like(values: Tensor, parameter: Tensor) -> Tensor:
    """Values of all ranks, laid out as the parameter is."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return values.clone()


def names(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): parameter for name, parameter in model.named_parameters()}


def momentum(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


class Run:
    """A model, its optimizer and its masks, with a stream of batches that depends on the step alone.

    Attributes:
        every: Steps from one update to the next.
        norms: What `clip_grad_norm_` returned.
        updates: The counts that every mask update reported.
        gradients_kept: Whether gradients were the same objects after every step.
    """

    def __init__(
        self,
        method: gs.Method | list[gs.Method],
        wrapper: str = "plain",
        network: Callable[[], nn.Module] = Uneven,
        dtype: torch.dtype = torch.float64,
        optimizer: Callable[..., torch.optim.Optimizer] = momentum,
        micro_batches: int = 1,
        max_norm: float | None = None,
        evaluate: bool = False,
        seed: int = 0,
        **attach: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.model = network().to(dtype)
        self.inputs, self.dtype = network.inputs, dtype
        self.micro_batches, self.max_norm, self.evaluates = micro_batches, max_norm, evaluate
        self.sparsity = gs.attach(self.model, method, **attach)
        self.wrapped = wrap(self.model, wrapper)
        self.shards = 1 if wrapper == "plain" else dist.get_world_size()
        self.shard = 0 if wrapper == "plain" else dist.get_rank()
        self.optimizer = optimizer(self.wrapped.parameters())
        self.sparsity.follow(self.optimizer)
        self.every = getattr(self.sparsity.methods[0], "every", 1)
        self._masks: list[dict[str, Tensor]] = []
        self.norms: list[float] = []
        self.gradients_kept = True
        self.updates: list[list[int]] = []
        self.sparsity.on_update(
            lambda update: self.updates.append(
                [row[key] for row in update.rows for key in ("pruned", "grown", "active", "total")]
            )
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's part of the global batch of a step."""
        generator = torch.Generator().manual_seed(1000 + step)
        x = torch.randn(BATCH, *self.inputs, generator=generator, dtype=torch.float64).to(self.dtype)
        y = x.flatten(1)[:, ::5].sum(1, keepdim=True).sin()
        return x[self.shard :: self.shards], y[self.shard :: self.shards]

    def backward(self, step: int) -> None:
        x, y = self.batch(step)
        parts = list(zip(x.chunk(self.micro_batches), y.chunk(self.micro_batches), strict=True))
        for i, (inputs, wanted) in enumerate(parts):
            with self._gradients_stay_local(i + 1 < len(parts)):
                loss = (self.wrapped(inputs) - wanted).square().mean()
                ((loss + self.sparsity.penalty()) / len(parts)).backward()

    @torch.no_grad()
    def evaluate(self) -> None:
        """A forward without a backward, after which FSDP2 leaves whole weights in the model."""
        self.wrapped(self.batch(0)[0])

    @contextlib.contextmanager
    def _gradients_stay_local(self, local: bool) -> Iterator[None]:
        if isinstance(self.wrapped, DistributedDataParallel) and local:
            with self.wrapped.no_sync():
                yield
            return
        if hasattr(self.wrapped, "set_requires_gradient_sync"):
            self.wrapped.set_requires_gradient_sync(not local)
        yield

    def train(self, first: int = 0, last: int = UPDATES) -> Run:
        """Train from one update to another."""
        for step in range(first * self.every, last * self.every):
            self.backward(step)
            self.step()
        return self

    def given(self) -> Run:
        """Steps with weights and gradients that are given, not computed: coarse numbers, so that many scores tie."""
        for step in range(UPDATES * self.every):
            generator = torch.Generator().manual_seed(2000 + step)
            for parameter in self.wrapped.parameters():
                for target in ("data", "grad"):
                    values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    values = like((values * 4).round().div(4).to(self.dtype), parameter)
                    if target == "grad":
                        parameter.grad = values
                    else:
                        parameter.detach().copy_(values)
            self.sparsity.project(self.model)
            self.step()
        return self

    def step(self) -> None:
        if self.max_norm is not None:
            self.norms.append(float(self.sparsity.clip_grad_norm_(self.max_norm)))
        gradients = [parameter.grad for parameter in self.wrapped.parameters()]
        self.optimizer.step()
        after = [parameter.grad for parameter in self.wrapped.parameters()]
        self.gradients_kept &= all(a is b for a, b in zip(gradients, after, strict=True))
        self.optimizer.zero_grad()
        if self.evaluates:
            self.evaluate()
        if self.sparsity.step % self.every == 0:
            self._masks.append(self.sparsity.masks())

    def masks(self) -> Tensor:
        """The masks after every update: bool (updates, weights of all tensors)."""
        history = []
        for name, last in self._masks[-1].items():
            local = [mask.to_local() if isinstance(last, DTensor) else mask for mask in (m[name] for m in self._masks)]
            rows = torch.stack(local, 1)  # (rows, updates, …), so that one gather is enough for all updates
            if isinstance(last, DTensor):
                shape = torch.Size((last.shape[0], *rows.shape[1:]))
                stride = torch.empty(shape, device="meta").stride()
                rows = whole(DTensor.from_local(rows, last.device_mesh, last.placements, shape=shape, stride=stride))
            history.append(rows.transpose(0, 1).flatten(1))
        return torch.cat(history, 1)

    def weights(self) -> dict[str, Tensor]:
        return {name: whole(parameter) for name, parameter in names(self.wrapped).items()}

    def full_state(self) -> dict[str, Any]:
        """All state as plain tensors and values, that a run in any number of processes can load."""
        order = list(names(self.wrapped))
        saved = self.optimizer.state_dict()["state"]
        sparsity = self.sparsity.state_dict()
        return {
            "model": self.weights(),
            "optimizer": {order[i]: {key: whole(value) for key, value in each.items()} for i, each in saved.items()},
            "sparsity": sparsity | {"masks": {name: whole(mask) for name, mask in sparsity["masks"].items()}},
        }

    def load_full_state(self, state: dict[str, Any]) -> Run:
        parameters = names(self.wrapped)
        with torch.no_grad():
            for name, values in state["model"].items():
                parameters[name].copy_(like(values, parameters[name]))
        laid_out = {
            i: {key: like(v, p) if v.shape == p.shape else v for key, v in state["optimizer"][name].items()}
            for i, (name, p) in enumerate(parameters.items())
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": laid_out, "param_groups": groups})
        self.sparsity.load_state_dict(state["sparsity"])
        return self

    def record(self) -> dict[str, Any]:
        return {
            "masks": self.masks(),
            "norms": self.norms,
            "gradients kept": self.gradients_kept,
            "updates": self.updates,
            "weights": self.weights(),
            "totals": self.sparsity.summary().totals,
        }


METHODS: dict[str, Callable[[], gs.Method]] = {
    "static": lambda: gs.Static(0.7),
    "set": lambda: gs.SET(0.7, every=1),
    "rigl": lambda: gs.RigL(0.7, every=2),  # it leaves out the step at an update, so every step would train nothing
    "rigl-step": lambda: gs.RigL(0.7, every=1, skip_step=False, distribution="uniform"),
    "dsr": lambda: gs.DSR(0.7, every=1, threshold=0.05, prune_fraction=0.05),
    "gmp": lambda: gs.GMP(0.8, end=UPDATES, every=1),
    "gmp-global": lambda: gs.GMP(0.8, end=UPDATES, every=1, distribution="global"),
    "hebbian": lambda: gs.Hebbian(0.7, every=1, count_every=1, threshold=-0.5, grow_score="strength"),
    "hebbian-model": lambda: gs.Hebbian(
        0.7, every=2, count_every=2, scope="model", drop_score="strength_or_magnitude", threshold=-0.5, decay=0.5
    ),
    "hebbian-slice": lambda: gs.Hebbian(
        0.5, every=2, count_every=1, scope="slice", drop_fraction=0.5, drop_score="weighted_magnitude", threshold=-0.5
    ),
}

STRUCTURED: dict[str, Callable[[], gs.Method]] = {
    "set 2:4": lambda: gs.SET(structure="2:4", every=1),
    "rigl 1:4": lambda: gs.RigL(structure="1:4", every=2),
    "dsr 2:4": lambda: gs.DSR(structure="2:4", every=1, threshold=0.05),
    "gmp 2:4": lambda: gs.GMP(structure="2:4", end=UPDATES, every=1),
    "set block:2x2": lambda: gs.SET(0.6, structure="block:2x2", every=1),
    "rigl block:2x1": lambda: gs.RigL(0.6, structure="block:2x1", every=2),
    "dsr block:1x4": lambda: gs.DSR(0.6, structure="block:1x4", every=1, threshold=0.1, prune_fraction=0.05),
    "set row": lambda: gs.SET(0.6, structure="row", every=1, drop_fraction=0.6, targets="!up*"),
    "rigl kernel": lambda: gs.RigL(0.6, structure="kernel", every=2),
    "gmp block:1x4": lambda: gs.GMP(0.6, structure="block:1x4", end=UPDATES, every=1, distribution="global"),
}


PADDED: dict[str, Callable[[], gs.Method]] = {  # the rank that holds the last rows has a smaller block there
    "dsr block:3x3:pad": lambda: gs.DSR(
        0.6, structure="block:3x3:pad", every=1, threshold=0.1, prune_fraction=0.1, targets=["stem*", "up*"]
    ),
}


def run(name: str, wrapper: str, **options: Any) -> Run:
    """A run of a method of one of the tables."""
    if name in METHODS or name in PADDED:
        return Run((METHODS | PADDED)[name](), wrapper, **options)
    return Run(STRUCTURED[name](), wrapper, network=Even, **options)
