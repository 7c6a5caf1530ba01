"""Hebbian sparsity under the names of Numenta's notebook: layers that count which of their connections are in use.

The count is `gossamer.scores.coactivation`; `gossamer.Hebbian` does the same to any model behind `attach`, counts over
all processes and keeps optimizers in step. As in the notebook a script makes the connections progress by hand, layer by
layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from gossamer.checks import MAX_SEED, check_integer, check_number
from gossamer.choice import largest_in_slices
from gossamer.collect import recomputing
from gossamer.errors import ConfigurationError, OrderError, StateError
from gossamer.masks import enforce
from gossamer.scores import coactivation

__all__ = ["DSConv2d", "DSLayer", "DSLinear"]

EVERY = 20
"""Of so many forward passes in training one is counted, the first among them."""


class DSLayer(nn.Module):
    """What the layers below share; for others derive from it and from a layer of PyTorch's.

    Args:
        args: Those of the layer of PyTorch's.
        prune_dims: See below.
        seed: Of what is drawn, at least 0: layers of one shape and seed draw the same. `None` for one that PyTorch's
            global generator gives.
        options: Those of the layer of PyTorch's.

    The count is of forward passes in training mode, every 20th, and once where a pass is computed again for activation
    checkpointing. What is pruned is exactly +0.0 from then on, after every step of any optimizer of `torch.optim`'s
    kind, until the connections progress. A state of a dense layer is loaded too; it prunes nothing. In training the
    graph of a compiled model breaks after the layer; that with `gossamer.Hebbian` does not.

    Attributes:
        learning_iterations: Forward passes in training so far; saved.
        activity_threshold: An input or output is active where its sigmoid is above this.
        k1: Of each slice so many connections stay, the strongest.
        k2: Of each slice so many live in all: those ranked k1 + 1 to k2 are drawn anew.
        prune_dims: Dimensions of the weight that slices are taken along; what is ranked are the others.
        connections_tensor: How often both ends of each connection were active, float32 in the weight's shape, a buffer.
        mask: int8 in the weight's shape, -1 where a weight lives and 0 where it is pruned, a buffer.
        seed: int64 `()`, a buffer: of what is drawn next.

    Raises:
        ConfigurationError: A `seed` or `prune_dims` out of range.
    """

    weight: Tensor
    connections_tensor: Tensor
    mask: Tensor
    seed: Tensor

    def __init__(self, *args: Any, prune_dims: Sequence[int], seed: int | None, **options: Any) -> None:
        if seed is not None:
            check_integer("seed", seed, at_least=0, at_most=MAX_SEED)
        super().__init__(*args, **options)
        self.learning_iterations = 0
        self.activity_threshold = 0.5
        self.prune_dims = list(prune_dims)
        self.k1, self.k2 = (max(int(part * self._slice_size()), 1) for part in (0.1, 0.15))
        if seed is None:
            seed = int(torch.randint(MAX_SEED, (), device="cpu"))
        self.register_buffer("connections_tensor", torch.zeros_like(self.weight, dtype=torch.float32).detach())
        self.register_buffer("mask", torch.full_like(self.weight, -1, dtype=torch.int8).detach())
        self.register_buffer("seed", torch.tensor(seed))
        self._counted = False  # whether a pass was since the connections progressed
        _watch(self)

    def forward(self, input: Tensor) -> Tensor:
        """The output of the dense layer with these weights; counted in training, see the class."""
        output: Tensor = super().forward(input)
        if self.training:
            self._after_pass(input, output)
        return output

    # Compiled code takes a number on a module for a constant, and would be compiled again in every pass.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_pass(self, input: Tensor, output: Tensor) -> None:
        if recomputing():
            return
        if self.learning_iterations % EVERY == 0:
            self.update_connections_tensor(input, output)
        self.learning_iterations += 1

    def update_connections_tensor(self, input: Tensor, output: Tensor) -> None:
        """Count for one forward pass how often both ends of each connection are active.

        As in the notebook this takes the place of what was counted before; `gossamer.Hebbian` adds up.

        Args:
            input: What went into the layer.
            output: What came out.

        Raises:
            ConfigurationError: Tensors that do not belong to the layer, or an `activity_threshold` that is no number.
        """
        check_number(f"{self}: activity_threshold", self.activity_threshold, -math.inf, math.inf)
        # Not into the buffer, which has lower precision in a model in half precision.
        self.connections_tensor = coactivation(input, output, self, threshold=self.activity_threshold, sigmoid=True)
        self._counted = True

    @torch.no_grad()
    def progress_connections(self) -> None:
        """In each slice along `prune_dims` keep the k1 strongest connections, draw the next anew, prune the others.

        As many live in every slice, k2; of equal counts those with the lowest index are the strongest. What is drawn is
        from `U(-√(6/n), √(6/n))`, n being the inputs of an output in the dense layer (He et al., 2015). What was pruned
        and is among the strongest begins at 0. The count begins anew.

        Raises:
            OrderError: No forward pass was counted since the last time.
            ConfigurationError: No connection was active at both ends; or not 1 ≤ k1 ≤ k2 ≤ the size of a slice.
        """
        size = self._slice_size()
        check_integer(f"{self}: k1", self.k1, at_least=1)
        check_integer(f"{self}: k2", self.k2, at_least=1)
        if not self.k1 <= self.k2 <= size:
            raise ConfigurationError(
                f"{self}: k1={self.k1} and k2={self.k2} of slices of {size} connections along "
                f"prune_dims={self.prune_dims}; expected k1 ≤ k2 ≤ {size}"
            )
        if not self._counted:
            raise OrderError(
                f"{self}: no forward pass was counted since the connections progressed, or were made; every "
                f"{EVERY}th in training is, and there were {self.learning_iterations} in all. Train first"
            )
        if not self.connections_tensor.any():
            raise ConfigurationError(
                f"{self}: no connection had its input and its output above activity_threshold="
                f"{self.activity_threshold} (of their sigmoid), so that none can be ranked; lower it, or see whether "
                "the layer is dead"
            )
        kept, alive = self._strongest(self.k1), self._strongest(self.k2)
        bound = math.sqrt(6 / self.weight[0].numel())
        drawn = torch.rand(self.weight.shape, generator=self._generator(), device="cpu").mul_(2 * bound).sub_(bound)
        self.mask.copy_(alive).neg_()
        self.weight.copy_(torch.where(alive & ~kept, drawn.to(self.weight), self.weight))
        enforce(self.weight.detach(), self.mask)
        self.connections_tensor = torch.zeros_like(self.connections_tensor)
        self._counted = False

    @torch.no_grad()
    def prune_randomly(self, fraction: float = 0.15) -> None:
        """Prune each weight with the same probability, whatever its strength; what is pruned already stays so.

        Args:
            fraction: That probability, in [0, 1].

        Raises:
            ConfigurationError: It is out of range.
        """
        check_number("fraction", fraction, 0, 1)
        pruned = torch.rand(self.weight.shape, generator=self._generator(), device="cpu") < fraction
        self.mask.masked_fill_(pruned.to(self.mask.device), 0)
        enforce(self.weight.detach(), self.mask)

    def _slice_size(self) -> int:
        """Connections in a slice along `prune_dims`."""
        dims, rank = self.prune_dims, self.weight.dim()
        known = isinstance(dims, list | tuple) and all(type(dim) is int and 0 <= dim < rank for dim in dims)
        if not known or len(set(dims)) < len(dims):
            raise ConfigurationError(
                f"{self}: prune_dims={dims!r}; expected a list of different dimensions, 0 to {rank - 1}"
            )
        return math.prod(side for dim, side in enumerate(self.weight.shape) if dim not in dims)

    def _strongest(self, count: int) -> Tensor:
        """Of each slice so many, bool in the weight's shape; equal ones from the lowest index."""
        strengths = self.connections_tensor
        return largest_in_slices(strengths, torch.tensor([count], device=strengths.device), self.prune_dims)

    def _generator(self) -> torch.Generator:
        """A generator for one time; it also gives the seed of the next."""
        generator = torch.Generator().manual_seed(int(self.seed))
        self.seed.fill_(int(torch.randint(MAX_SEED, (), generator=generator, device="cpu")))
        return generator

    # -- copies and states -------------------------------------------------------------------------------------------

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _watch(self)  # copies as well

    def get_extra_state(self) -> Tensor:
        """Forward passes in training, and whether one was counted since the connections progressed: int64 `(2,)`."""
        return torch.tensor([self.learning_iterations, self._counted], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` gave.

        Raises:
            StateError: It is something else.
        """
        if not isinstance(state, Tensor) or state.shape != (2,) or state.is_floating_point() or (state < 0).any():
            raise StateError(
                f"{self}: the saved number of forward passes is {state!r:.60}; the file is damaged, use an earlier one"
            )
        self.learning_iterations, counted = state.tolist()
        self._counted = bool(counted)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if f"{prefix}weight" in state_dict:  # of a dense layer, or of the notebook's
            state_dict.pop(f"{prefix}stacked_conv.weight", None)
            state_dict.setdefault(f"{prefix}connections_tensor", torch.zeros_like(self.connections_tensor))
            state_dict.setdefault(f"{prefix}mask", torch.full_like(self.mask, -1))
            state_dict.setdefault(f"{prefix}seed", self.seed)
            state_dict.setdefault(f"{prefix}_extra_state", torch.zeros(2, dtype=torch.int64))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DSConv2d(DSLayer, nn.Conv2d):
    """`torch.nn.Conv2d` that counts the use of its connections, and keeps the strongest of each kernel.

    Args:
        args: Those of `torch.nn.Conv2d`.
        seed: Of what is drawn, see `DSLayer`.
        options: Those of `torch.nn.Conv2d`.

    `prune_dims` begins as `[0, 1]`, k1 and k2 as a tenth and 15 % of a kernel, rounded down, and 1 at least. See
    `DSLayer` for the attributes.
    """

    def __init__(self, *args: Any, seed: int | None = None, **options: Any) -> None:
        super().__init__(*args, prune_dims=[0, 1], seed=seed, **options)


class DSLinear(DSLayer, nn.Linear):
    """`torch.nn.Linear` that counts the use of its connections, and keeps the strongest of each output.

    Args:
        args: Those of `torch.nn.Linear`.
        seed: Of what is drawn, see `DSLayer`.
        options: Those of `torch.nn.Linear`.

    `prune_dims` begins as `[0]`, k1 and k2 as a tenth and 15 % of the inputs, rounded down, and 1 at least. See
    `DSLayer` for the attributes.
    """

    def __init__(self, *args: Any, seed: int | None = None, **options: Any) -> None:
        super().__init__(*args, prune_dims=[0], seed=seed, **options)


# -- zeros stay --------------------------------------------------------------------------------------------------------

_layers: WeakSet[DSLayer] = WeakSet()
_hooks: list[RemovableHandle] = []


def _watch(layer: DSLayer) -> None:
    if not _hooks:  # who makes no such layer is left alone
        _hooks.append(register_optimizer_step_post_hook(torch.compiler.disable(_after_step)))  # type: ignore[no-untyped-call]
    _layers.add(layer)


def _after_step(optimizer: Optimizer, *_: object) -> None:
    """Momentum and weight decay have moved pruned weights: they are zero again."""
    found = {id(layer.weight): layer for layer in _layers}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if layer := found.get(id(parameter)):
                enforce(parameter.detach(), layer.mask)
