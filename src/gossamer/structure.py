"""Which weights live or die together.

A structure divides a weight into groups of equal size, which may differ from weight to weight. Methods rank groups:
`reduce` turns the scores of weights into scores of groups, `expand` a mask of groups into a mask of weights, `collapse`
the other way round. N:M is the structure whose groups are single weights of which N live in each `cell` of M
consecutive ones along the inputs.

Groups are numbered so that a part of the rows (dimension 0) of a weight has consecutive groups: a sharded weight
then has a contiguous range of them.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError


class Structure(ABC):
    """A division of a weight into groups.

    Shapes: weights `(rows, …)` with inputs along `input_dim`; groups `(groups,)`.
    """

    cell: tuple[int, int] | None = None
    """(N, M) where N of every M consecutive groups live, else `None`: any groups may live."""

    def size(self, shape: Sequence[int], input_dim: int) -> int:
        """Number of weights in each group of a weight of this shape."""
        return 1

    def row_multiple(self, shape: Sequence[int], input_dim: int) -> int:
        """A shard of the weight must begin and end at a multiple of so many rows."""
        return 1

    def validate(self, name: str, shape: Sequence[int], input_dim: int, convolution_groups: int = 1) -> None:
        """Raise a ConfigurationError, naming the layer, where a weight of this shape cannot be divided so.

        In a transposed convolution the inputs of its several groups follow each other along dimension 0.
        """

    @abstractmethod
    def reduce(self, scores: Tensor, input_dim: int, p: float | None = 2.0) -> Tensor:
        """Scores of weights → scores of groups: the Lp-norm over each group, `(Σ|s|^p)^(1/p)`; the sum for p=None."""

    @abstractmethod
    def expand(self, groups: Tensor, shape: Sequence[int], input_dim: int) -> Tensor:
        """Values of groups → the same value for every weight of the group, in the weight's shape."""

    @abstractmethod
    def collapse(self, mask: Tensor, input_dim: int) -> Tensor:
        """Mask of weights → mask of groups (a group is active where any of its weights is); always a copy."""


@dataclass(frozen=True)
class Element(Structure):
    """Every weight on its own."""

    def reduce(self, scores: Tensor, input_dim: int, p: float | None = 2.0) -> Tensor:
        """See `Structure.reduce`; a single weight keeps its score, sign included."""
        return scores.reshape(-1)

    def expand(self, groups: Tensor, shape: Sequence[int], input_dim: int) -> Tensor:
        """See `Structure.expand`."""
        return groups.view(*shape)

    def collapse(self, mask: Tensor, input_dim: int) -> Tensor:
        """See `Structure.collapse`."""
        return mask.reshape(-1).clone() if mask.is_contiguous() else mask.reshape(-1)

    def __str__(self) -> str:
        return "element"


@dataclass(frozen=True)
class NM(Structure):
    """`n` of every `m` consecutive weights along the inputs are active (Zhou et al., 2021: N:M sparsity)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not all(type(each) is int for each in (self.n, self.m)) or not 0 < self.n < self.m:
            raise ConfigurationError(f"structure {self}: expected N:M with 0 < N < M, such as '2:4'")
        object.__setattr__(self, "cell", (self.n, self.m))

    def row_multiple(self, shape: Sequence[int], input_dim: int) -> int:
        """See `Structure.row_multiple`."""
        return self.m if input_dim == 0 else 1

    def validate(self, name: str, shape: Sequence[int], input_dim: int, convolution_groups: int = 1) -> None:
        """See `Structure.validate`."""
        inputs = _inputs(shape, input_dim, convolution_groups)
        if inputs % self.m:
            raise ConfigurationError(
                f"{name}: {self} needs a number of inputs that {self.m} divides, but shape {tuple(shape)} has "
                f"{inputs} along dimension {input_dim}{_each(convolution_groups)}; exclude this weight with "
                f"targets=['!{name}']"
            )

    def reduce(self, scores: Tensor, input_dim: int, p: float | None = 2.0) -> Tensor:
        """See `Structure.reduce`; a single weight keeps its score, sign included."""
        return self._inputs_last(scores, input_dim).reshape(-1)

    def expand(self, groups: Tensor, shape: Sequence[int], input_dim: int) -> Tensor:
        """See `Structure.expand`."""
        if input_dim == 0:
            return groups.view(shape[0] // self.m, math.prod(shape[1:]), self.m).transpose(1, 2).reshape(*shape)
        others = [size for dim, size in enumerate(shape) if dim != input_dim]
        return groups.view(*others, shape[input_dim]).movedim(-1, input_dim)

    def collapse(self, mask: Tensor, input_dim: int) -> Tensor:
        """See `Structure.collapse`."""
        return self._inputs_last(mask, input_dim).reshape(-1).clone()

    def _inputs_last(self, x: Tensor, input_dim: int) -> Tensor:
        if input_dim == 0:
            return x.reshape(x.shape[0] // self.m, self.m, math.prod(x.shape[1:])).transpose(1, 2)
        return x.movedim(input_dim, -1)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block(Structure):
    """Blocks of `rows` outputs × `columns` inputs, for each position of a kernel by itself."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if not all(type(each) is int and each >= 1 for each in (self.rows, self.columns)):
            raise ConfigurationError(f"structure {self}: expected at least one row and one column, as in 'block:4x1'")

    def size(self, shape: Sequence[int], input_dim: int) -> int:
        """See `Structure.size`."""
        return self.rows * self.columns

    def row_multiple(self, shape: Sequence[int], input_dim: int) -> int:
        """See `Structure.row_multiple`."""
        return self.columns if input_dim == 0 else self.rows

    def validate(self, name: str, shape: Sequence[int], input_dim: int, convolution_groups: int = 1) -> None:
        """See `Structure.validate`."""
        outputs, inputs = shape[1 - input_dim], _inputs(shape, input_dim, convolution_groups)
        if outputs % self.rows or inputs % self.columns:
            raise ConfigurationError(
                f"{name}: {self} needs outputs that {self.rows} and inputs that {self.columns} divides, but shape "
                f"{tuple(shape)} has {outputs} outputs and {inputs} inputs"
                f"{_each(convolution_groups)}; choose a block that divides both, or "
                f"exclude this weight with targets=['!{name}']"
            )

    def reduce(self, scores: Tensor, input_dim: int, p: float | None = 2.0) -> Tensor:
        """See `Structure.reduce`."""
        if p is None:
            return self._blocks(scores, input_dim).sum((1, 4)).reshape(-1)
        norms: Tensor = torch.linalg.vector_norm(self._blocks(scores, input_dim), ord=p, dim=(1, 4))
        return norms.reshape(-1)

    def expand(self, groups: Tensor, shape: Sequence[int], input_dim: int) -> Tensor:
        """See `Structure.expand`."""
        first, second = self._sides(input_dim)
        grid = groups.view(shape[0] // first, 1, shape[1] // second, math.prod(shape[2:]), 1)
        whole = grid.expand(-1, first, -1, -1, second).transpose(3, 4)
        return whole.reshape(*shape)

    def collapse(self, mask: Tensor, input_dim: int) -> Tensor:
        """See `Structure.collapse`."""
        return self._blocks(mask != 0, input_dim).any(4).any(1).reshape(-1).to(mask.dtype).neg_()

    def _sides(self, input_dim: int) -> tuple[int, int]:
        return (self.columns, self.rows) if input_dim == 0 else (self.rows, self.columns)

    def _blocks(self, x: Tensor, input_dim: int) -> Tensor:
        """(dim 0, dim 1, kernel…) → (dim 0 / first, first, dim 1 / second, kernel positions, second)."""
        first, second = self._sides(input_dim)
        split = x.reshape(x.shape[0] // first, first, x.shape[1] // second, second, math.prod(x.shape[2:]))
        return split.transpose(3, 4)

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}"


def _inputs(shape: Sequence[int], input_dim: int, convolution_groups: int) -> int:
    return shape[input_dim] // (convolution_groups if input_dim == 0 else 1)


def _each(convolution_groups: int) -> str:
    return "" if convolution_groups == 1 else f" in each of {convolution_groups} groups"


def as_structure(structure: str | Structure) -> Structure:
    """Read `"element"`, `"N:M"` (as `"2:4"`) or `"block:RxC"` (as `"block:4x1"`); a Structure is returned as it is.

    Raises:
        ConfigurationError: Any other value.
    """
    if isinstance(structure, Structure):
        return structure
    if structure == "element":
        return Element()
    if found := re.fullmatch(r"(\d+):(\d+)", str(structure)):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"block:(\d+)x(\d+)", str(structure)):
        return Block(int(found[1]), int(found[2]))
    raise ConfigurationError(
        f"structure: got {structure!r}; allowed are 'element', 'N:M' such as '2:4', and 'block:RxC' such as 'block:4x1'"
    )
