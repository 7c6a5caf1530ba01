"""Groups: what a structure makes of a weight.

Methods rank, drop and grow groups: one flat vector for each `Groups`, whatever the structure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.masks import Change, MaskedTensor
from gossamer.scores import Score, StateOf, View
from gossamer.structure import Division, Element, Layout, Structure
from gossamer.targets import Target, local

Spread = Callable[[Tensor], Tensor]
"""Lays values of all groups, one each, over a whole weight: a factor for each of its elements, in its shape."""


class Groups:
    """The groups of one weight.

    Methods rank groups through this interface alone, so that groups over several weights are another class with it.

    Attributes:
        tensors: The weights that are divided; here one.
        structure: How, for messages.
        name: Name of the weight, for messages.
        shape: Its global shape.
        size: Number of weights in a whole group; those at the edges of a weight may have fewer.
        total: Number of groups of the global weight.
    """

    def __init__(self, tensor: MaskedTensor, structure: Division) -> None:
        self.tensors: tuple[MaskedTensor, ...] = (tensor,)
        self.structure: Structure = structure
        self.name = tensor.name
        self.shape = tensor.shape
        self._division = structure
        self._layout = layout_of(tensor.target)
        self.size = structure.size(self._layout)
        self.total = structure.count(self._layout)

    @property
    def cell(self) -> tuple[int, int] | None:
        """(N, M) where N of every M consecutive groups live."""
        return self.structure.cell

    @property
    def first(self) -> int:
        """The first group that this rank holds."""
        multiple = self._division.row_multiple(self._layout)
        bands = -(-self.shape[0] // multiple)
        return -(-self.tensors[0].first_row // multiple) * (self.total // bands)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the weight."""
        return self.tensors[0].process_group

    @property
    def device(self) -> torch.device:
        """Where masks and scores are."""
        return self.tensors[0].mask.device

    def alive(self) -> Tensor:
        """A copy of the mask of this rank's groups, int8 −1 active and 0 pruned, shape (groups on this rank,)."""
        return self.collapse({tensor.name: tensor.mask for tensor in self.tensors})

    def collapse(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Masks of this rank's weights, by name → mask of its groups, always a copy."""
        return self._division.collapse(masks[self.name], self._layout)

    def expand(self, alive: Tensor) -> dict[str, Tensor]:
        """Mask of this rank's groups → masks of its weights, by name."""
        return {self.name: self._division.expand(alive, len(self.tensors[0].mask), self._layout)}

    def spreads(self) -> dict[str, Spread]:
        """How values of groups act on each weight that has some of its elements in them, by the weight's name.

        Differentiable; nothing of a spread depends on the masks, or on how weights are sharded.
        """
        return {self.name: partial(self._division.expand, rows=self.shape[0], layout=self._layout)}

    def scores(self, score: Score, state: StateOf, p: float = 2.0, index: Tensor | None = None) -> Tensor:
        """Scores of groups: the Lp-norm of the scores of their weights, their sum where the score is `signed`.

        Args:
            score: The score of single weights.
            state: The optimizer's state of a weight.
            p: The norm's order.
            index: Groups wanted, int64 `(n,)`; `None` for all on this rank.

        Returns:
            New tensor `(n,)`.

        Raises:
            ConfigurationError: The score has another shape than its View.
        """
        tensor = self.tensors[0]
        if isinstance(self.structure, Element):
            return score_weights(tensor, score, state, index).reshape(-1)
        whole = score_weights(tensor, score, state)
        values = self._division.reduce(whole, self._layout, None if getattr(score, "signed", False) else p)
        return values if index is None else values[index]

    def first_values(self, alive: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """What the weights of groups that become active with a new mask of groups start from, by name.

        Weights that are left out start from 0, and so do all here.
        """
        return {}


def changes(
    groups: Sequence[Groups], alive: Sequence[Tensor], generator: torch.Generator | None = None
) -> list[Change]:
    """The changes to these masks of groups; a weight in several groups lives where all of them do.

    Args:
        groups: The groups of each weight.
        alive: Their new masks.
        generator: Random state, where groups become active that cannot start from zero (`Groups.first_values`).
    """
    tensors = {tensor.name: tensor for each in groups for tensor in each.tensors}
    masks: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for each, mask in zip(groups, alive, strict=True):
        for name, kept in each.expand(mask).items():
            masks[name] = kept & masks[name] if name in masks else kept
        for name, first in each.first_values(mask, generator).items() if generator is not None else ():
            values[name] = values[name] + first if name in values else first
    return [Change(tensors[name], mask, values=values.get(name)) for name, mask in masks.items()]


def layout_of(target: Target) -> Layout:
    """How a target's weight lies in memory."""
    convolution_groups = getattr(target.places[0][0], "groups", 1)
    return Layout(target.shape, target.input_dim, convolution_groups)


def score_weights(tensor: MaskedTensor, score: Score, state: StateOf, index: Tensor | None = None) -> Tensor:
    """A new tensor with the scores of a weight's elements, of all or of those at `index`.

    Raises:
        ConfigurationError: The score has another shape than its View.
    """
    values = score(View(tensor, state(tensor), index))
    expected = tensor.mask.shape if index is None else index.shape
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise ConfigurationError(
            f"{tensor.name}: its score is a {kind}; a score returns a tensor of floating-point numbers"
        )
    if values.shape != expected:
        raise ConfigurationError(
            f"{tensor.name}: its score has shape {tuple(values.shape)}, expected {tuple(expected)}: one for each "
            "weight of the View"
        )
    sources = [each for each in (tensor.parameter, tensor.parameter.grad) if each is not None]
    shared = {local(each).untyped_storage().data_ptr() for each in sources}
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(values.stride(), values.shape, strict=True))
    return values.clone() if overlaps or values.untyped_storage().data_ptr() in shared else values
