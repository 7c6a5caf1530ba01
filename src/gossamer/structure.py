"""Which weights live or die together.

A structure divides a weight into groups. Methods rank groups: `reduce` turns the scores of weights into scores of
groups, `expand` a mask of groups into a mask of weights, `collapse` the other way round.

Groups are numbered so that a part of the rows (dimension 0) of a weight has consecutive groups: a sharded weight
then has a contiguous range of them. `Both` and `ISS` are divisions into groups that share weights; what they need
beyond this module is in `gossamer.groups`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import mul

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError


@dataclass(frozen=True)
class Layout:
    """How a weight lies in memory.

    Attributes:
        shape: Its global shape, of two or more dimensions.
        input_dim: The dimension that runs over inputs (0 for transposed convolutions, else 1).
        convolution_groups: `groups` of a convolution. Each sees a part of the inputs: in an ordinary convolution all
            have the same columns, in a transposed one their inputs follow each other along dimension 0.
    """

    shape: tuple[int, ...]
    input_dim: int = 1
    convolution_groups: int = 1

    @property
    def kernel(self) -> int:
        """Number of positions of a kernel; 1 where there is none."""
        return math.prod(self.shape[2:])

    @property
    def inputs(self) -> int:
        """Inputs that an output has in one convolution group."""
        return self.shape[self.input_dim] // (self.convolution_groups if self.input_dim == 0 else 1)

    @property
    def outputs(self) -> int:
        """Outputs that an input has in one convolution group."""
        outputs = self.shape[1 - self.input_dim]
        return outputs // (self.convolution_groups if self.input_dim == 1 else 1)


class Structure:
    """A way to divide weights into groups."""

    cell: tuple[int, int] | None = None
    """(N, M) where N of every M consecutive groups live, else `None`: any groups may live."""

    overlapping: bool = False
    """Whether a weight may be in several groups, and lives where all of them do; then a sparsity is one of groups."""

    def parts(self) -> tuple[Structure, ...]:
        """The structures that divide a weight at the same time."""
        return (self,)

    def __mul__(self, other: object) -> Structure:
        return _product(self, other) if isinstance(other, Structure) else NotImplemented

    def __add__(self, other: object) -> Structure:
        return Both(self, other) if isinstance(other, Structure) else NotImplemented


class Division(Structure, ABC):
    """A structure that divides each weight by itself, into groups that do not overlap.

    Shapes: weights `(rows, …)` as in the layout, or so many rows of it as a rank holds; groups `(groups,)`.
    """

    def size(self, layout: Layout) -> int:
        """Number of weights in a whole group; those at an edge may have fewer."""
        return 1

    def count(self, layout: Layout) -> int:
        """Number of groups of the whole weight."""
        return math.prod(layout.shape)

    def row_multiple(self, layout: Layout) -> int:
        """A shard of the weight must begin at a multiple of so many rows."""
        return 1

    def validate(self, name: str, layout: Layout) -> None:
        """Raise a ConfigurationError, naming the layer, where such a weight cannot be divided so."""

    @abstractmethod
    def reduce(self, scores: Tensor, layout: Layout, p: float | None = 2.0) -> Tensor:
        """Scores of weights → scores of groups: the Lp-norm over each group, `(Σ|s|^p)^(1/p)`; the sum for p=None."""

    @abstractmethod
    def expand(self, groups: Tensor, rows: int, layout: Layout) -> Tensor:
        """Values of groups → the same value for every weight of the group, `(rows, …)`."""

    @abstractmethod
    def collapse(self, mask: Tensor, layout: Layout) -> Tensor:
        """Mask of weights → mask of groups (a group is active where any of its weights is); always a copy."""


@dataclass(frozen=True)
class Element(Division):
    """Every weight on its own."""

    def reduce(self, scores: Tensor, layout: Layout, p: float | None = 2.0) -> Tensor:
        """See `Division.reduce`; a single weight keeps its score, sign included."""
        return scores.reshape(-1)

    def expand(self, groups: Tensor, rows: int, layout: Layout) -> Tensor:
        """See `Division.expand`."""
        return groups.view(rows, *layout.shape[1:])

    def collapse(self, mask: Tensor, layout: Layout) -> Tensor:
        """See `Division.collapse`."""
        return mask.reshape(-1).clone() if mask.is_contiguous() else mask.reshape(-1)

    def __str__(self) -> str:
        return "element"


@dataclass(frozen=True)
class NM(Division):
    """`n` of every `m` consecutive weights along the inputs are active (Zhou et al., 2021: N:M sparsity)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not all(type(each) is int for each in (self.n, self.m)) or not 0 < self.n < self.m:
            raise ConfigurationError(f"structure {self}: expected N:M with 0 < N < M, such as '2:4'")
        object.__setattr__(self, "cell", (self.n, self.m))

    def row_multiple(self, layout: Layout) -> int:
        """See `Division.row_multiple`."""
        return self.m if layout.input_dim == 0 else 1

    def validate(self, name: str, layout: Layout) -> None:
        """See `Division.validate`."""
        if layout.inputs % self.m:
            raise ConfigurationError(
                f"{name}: {self} needs a number of inputs that {self.m} divides, but shape {layout.shape} has "
                f"{layout.inputs} along dimension {layout.input_dim}{_each(layout)}; choose another N:M or exclude "
                f"this weight with targets=['!{name}']"
            )

    def reduce(self, scores: Tensor, layout: Layout, p: float | None = 2.0) -> Tensor:
        """See `Division.reduce`; a single weight keeps its score, sign included."""
        return self._inputs_last(scores, layout).reshape(-1)

    def expand(self, groups: Tensor, rows: int, layout: Layout) -> Tensor:
        """See `Division.expand`."""
        shape = (rows, *layout.shape[1:])
        if layout.input_dim == 0:
            return groups.view(rows // self.m, math.prod(shape[1:]), self.m).transpose(1, 2).reshape(shape)
        return groups.view(rows, *shape[2:], shape[1]).movedim(-1, 1)

    def collapse(self, mask: Tensor, layout: Layout) -> Tensor:
        """See `Division.collapse`."""
        return self._inputs_last(mask, layout).reshape(-1).clone()

    def _inputs_last(self, x: Tensor, layout: Layout) -> Tensor:
        if layout.input_dim == 0:
            return x.reshape(x.shape[0] // self.m, self.m, math.prod(x.shape[1:])).transpose(1, 2)
        return x.movedim(1, -1)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block(Division):
    """Blocks of `rows` outputs × `columns` inputs, for each position of a kernel by itself or for whole kernels.

    Attributes:
        rows: Outputs in a block; `None` for all that an input has.
        columns: Inputs in a block; `None` for all that an output has.
        kernel: Whether the positions of a kernel belong together.
        pad: Whether blocks at the edges may reach beyond the weight and have fewer weights than others. A budget
            counts them as whole ones.
    """

    rows: int | None
    columns: int | None
    kernel: bool = False
    pad: bool = False

    def __post_init__(self) -> None:
        sides = [side for side in (self.rows, self.columns) if side is not None]
        if not all(type(side) is int and side >= 1 for side in sides):
            raise ConfigurationError(f"structure {self}: expected at least one row and one column, as in 'block:4x1'")

    def size(self, layout: Layout) -> int:
        """See `Division.size`."""
        return math.prod(self._sides(layout))

    def count(self, layout: Layout) -> int:
        """See `Division.count`."""
        return math.prod(self._grid(layout.shape[0], layout))

    def row_multiple(self, layout: Layout) -> int:
        """See `Division.row_multiple`."""
        return self._sides(layout)[0]

    def validate(self, name: str, layout: Layout) -> None:
        """See `Division.validate`."""
        # Blocks of a transposed convolution must not reach from the inputs of one of its groups into the next.
        across = layout.input_dim == 0 and layout.convolution_groups > 1
        outputs = 0 if self.rows is None or self.pad else layout.shape[1 - layout.input_dim] % self.rows
        inputs = 0 if self.columns is None or (self.pad and not across) else layout.inputs % self.columns
        if outputs or inputs:
            raise ConfigurationError(
                f"{name}: {self} needs outputs that {self.rows} and inputs that {self.columns} divides, but shape "
                f"{layout.shape} has {layout.shape[1 - layout.input_dim]} outputs and {layout.inputs} inputs"
                f"{_each(layout)}; choose a block that divides both, "
                + ("" if self.pad or (inputs and across) else f"let those at the edges be smaller ('{self}:pad'), ")
                + f"or exclude this weight with targets=['!{name}']"
            )

    def reduce(self, scores: Tensor, layout: Layout, p: float | None = 2.0) -> Tensor:
        """See `Division.reduce`."""
        blocks = self._blocks(scores, layout)
        if p is None:
            return blocks.sum((1, 3, 5)).reshape(-1)
        norms: Tensor = torch.linalg.vector_norm(blocks, ord=p, dim=(1, 3, 5))
        return norms.reshape(-1)

    def expand(self, groups: Tensor, rows: int, layout: Layout) -> Tensor:
        """See `Division.expand`."""
        (first, second, position), grid = self._sides(layout), self._grid(rows, layout)
        whole = groups.view(grid[0], 1, grid[1], 1, grid[2], 1).expand(-1, first, -1, second, -1, position)
        whole = whole.reshape(grid[0] * first, grid[1] * second, layout.kernel)
        return whole[:rows, : layout.shape[1]].reshape(rows, *layout.shape[1:])

    def collapse(self, mask: Tensor, layout: Layout) -> Tensor:
        """See `Division.collapse`."""
        return self._blocks(mask != 0, layout).any((1, 3, 5)).reshape(-1).to(mask.dtype).neg_()

    def _sides(self, layout: Layout) -> tuple[int, int, int]:
        """Extent of a block along dimension 0, dimension 1 and the positions of a kernel."""
        rows = layout.outputs if self.rows is None else self.rows
        columns = layout.inputs if self.columns is None else self.columns
        return *((columns, rows) if layout.input_dim == 0 else (rows, columns)), layout.kernel if self.kernel else 1

    def _grid(self, rows: int, layout: Layout) -> tuple[int, int, int]:
        """How many blocks so many rows have along each of these."""
        first, second, position = self._sides(layout)
        return -(-rows // first), -(-layout.shape[1] // second), layout.kernel // position

    def _blocks(self, x: Tensor, layout: Layout) -> Tensor:
        """(dim 0, dim 1, kernel…) → (blocks, in one, blocks, in one, blocks, in one)."""
        rows, (first, second, position), grid = x.shape[0], self._sides(layout), self._grid(x.shape[0], layout)
        x = x.reshape(rows, layout.shape[1], layout.kernel)
        if (more := (grid[0] * first - rows, grid[1] * second - layout.shape[1])) != (0, 0):
            x = torch.nn.functional.pad(x, (0, 0, 0, more[1], 0, more[0]))
        return x.view(grid[0], first, grid[1], second, grid[2], position)

    def __str__(self) -> str:
        for name, block in NAMED.items():
            if self == block:
                return name
        sides = "x".join("all" if side is None else str(side) for side in (self.rows, self.columns))
        return f"block:{sides}" + ":kernel" * self.kernel + ":pad" * self.pad


NAMED = {
    "row": Block(1, None, kernel=True),
    "filter": Block(1, None, kernel=True),
    "column": Block(None, 1, kernel=True),
    "channel": Block(None, 1, kernel=True),
    "kernel": Block(1, 1, kernel=True),
}
"""Blocks with a name: all weights of an output (row, filter), of an input (column, input channel), of one kernel."""


@dataclass(frozen=True)
class Both(Structure):
    """Two divisions at a time: outputs as wholes, and inputs as wholes. A weight lives where both its groups live.

    A sparsity is a fraction of groups: with `"row+column"`, at 0.5 half of the rows and half of the columns of a single
    weight live, and so a quarter of it. Over several weights the distribution splits the budget.
    """

    first: Structure
    second: Structure

    overlapping = True

    def __post_init__(self) -> None:
        # The groups that live are read from the mask of weights. A row that crosses no living column would look dead;
        # where every group of the one crosses every group of the other, none does.
        blocks = [each for each in (self.first, self.second) if isinstance(each, Block) and each.kernel]
        across = {(each.rows is None, each.columns is None) for each in blocks}
        if len(blocks) != 2 or across != {(False, True), (True, False)}:
            raise ConfigurationError(
                f"structure {self}: a sum is of groups of whole outputs and groups of whole inputs, as 'row+column'; "
                "groups that do not all cross each other cannot be told apart in a mask"
            )

    def parts(self) -> tuple[Structure, ...]:
        """See `Structure.parts`."""
        return self.first, self.second

    def __str__(self) -> str:
        return f"{self.first}+{self.second}"


@dataclass(frozen=True)
class ISS(Structure):
    """Intrinsic sparse structures of recurrent layers: all weights of a hidden unit (Wen et al., 2018, figure 2).

    These are its rows in the weights of every gate, its column in the recurrent weight, and its column in the next
    layer of the same module. A weight between two units lives where both live. For RNN, LSTM and GRU, modules and
    cells. A sparsity is a fraction of units.

    Attributes:
        consumers: Module name → names of the weights that read its output, such as `{"rnn": ["decoder.weight"]}`; the
            unit's columns there belong to it too. They must be among the targets.
    """

    consumers: Mapping[str, Sequence[str]] = field(default_factory=dict)

    overlapping = True

    def __post_init__(self) -> None:
        whole = isinstance(self.consumers, Mapping) and all(
            isinstance(module, str) and isinstance(names, list | tuple) and all(isinstance(each, str) for each in names)
            for module, names in self.consumers.items()
        )
        if not whole:
            raise ConfigurationError(
                f"structure iss: consumers={self.consumers!r:.100}; expected a mapping of module names to lists of "
                'weight names, such as {"rnn": ["decoder.weight"]}'
            )

    def __str__(self) -> str:
        named = ";".join(f"{module}>{','.join(names)}" for module, names in self.consumers.items() if names)
        return f"iss:{named}" if named else "iss"


class ByName(Structure):
    """A structure for each weight: the first glob over parameter names that matches it counts.

    Attributes:
        structures: Glob → structure.
    """

    def __init__(self, structures: Mapping[str, str | Structure]) -> None:
        self.structures = {glob: as_structure(each) for glob, each in structures.items()}
        if not self.structures:
            raise ConfigurationError("structure: got an empty mapping, expected globs over parameter names")
        for glob, each in self.structures.items():
            if not isinstance(glob, str) or isinstance(each, ByName) or each.cell is not None:
                raise ConfigurationError(
                    f"structure: got {each} for {glob!r}; a mapping is from globs over parameter names to structures "
                    "other than N:M, whose number of active weights is no choice; give that to a method of its own"
                )
        self.overlapping = any(each.overlapping for each in self.structures.values())

    def __str__(self) -> str:
        return "; ".join(f"{glob} {each}" for glob, each in self.structures.items())


def _product(first: Structure, second: Structure) -> Structure:
    """The common refinement: two weights are together where they are together in both."""
    both = (first, second)
    if any(isinstance(each, Element) for each in both) and all(isinstance(each, Element | Block) for each in both):
        return Element()
    if not (isinstance(first, Block) and isinstance(second, Block)):
        raise ConfigurationError(f"structure {first}*{second}: a product is of elements, rows, columns or blocks")

    def side(a: int | None, b: int | None) -> int | None:
        if a is not None and b is not None and max(a, b) % min(a, b):
            raise ConfigurationError(
                f"structure {first}*{second}: blocks of {a} and of {b} overlap in blocks of several sizes; one must "
                "divide the other"
            )
        return min((each for each in (a, b) if each is not None), default=None)

    rows, columns = side(first.rows, second.rows), side(first.columns, second.columns)
    return Block(rows, columns, kernel=first.kernel and second.kernel, pad=first.pad or second.pad)


def _each(layout: Layout) -> str:
    of_several = layout.input_dim == 0 and layout.convolution_groups > 1
    return f" in each of {layout.convolution_groups} groups" if of_several else ""


def as_structure(structure: str | Structure | Mapping[str, str | Structure]) -> Structure:
    """Read a structure; a Structure is returned as it is, and a mapping of globs becomes a `ByName`.

    `"element"`, `"N:M"` (as `"2:4"`), `"row"` or `"filter"`, `"column"` or `"channel"`, `"kernel"`, `"block:RxC"` (as
    `"block:4x1"`; `":kernel"` appended where whole kernels belong together, `":pad"` where blocks at the edges may be
    smaller), `"iss"` (`"iss:rnn>decoder.weight"` with what reads a module's output, several as
    `"iss:a>b.weight,c.weight;d>e.weight"`), products (`"row*block:4x4"`) and sums (`"row+column"`) of these.

    Raises:
        ConfigurationError: Any other value.
    """
    if isinstance(structure, Structure):
        return structure
    if isinstance(structure, Mapping):
        return ByName(structure)
    text = str(structure)
    found: Structure | None = None
    for term in text.split("+"):
        factors = [_named(factor, text) for factor in term.split("*")]
        product = reduce(mul, factors)
        found = product if found is None else found + product
    assert found is not None
    return found


def _named(name: str, text: str) -> Structure:
    if name == "element":
        return Element()
    if name == "iss":
        return ISS()
    if re.fullmatch(r"iss:{0}>{0}(,{0})*(;{0}>{0}(,{0})*)*".format(r"[^>;,\s]+"), name):
        consumers: dict[str, list[str]] = {}
        for module, names in (each.split(">") for each in name.removeprefix("iss:").split(";")):
            consumers.setdefault(module, []).extend(names.split(","))
        return ISS(consumers)
    if name in NAMED:
        return NAMED[name]
    if found := re.fullmatch(r"(\d+):(\d+)", name):
        return NM(int(found[1]), int(found[2]))
    if found := re.fullmatch(r"block:(\d+|all)x(\d+|all)(:kernel)?(:pad)?", name):
        rows, columns = (None if side == "all" else int(side) for side in found.groups()[:2])
        return Block(rows, columns, kernel=found[3] is not None, pad=found[4] is not None)
    raise ConfigurationError(
        f"structure: got {text!r}; allowed are 'element', 'N:M' such as '2:4', {', '.join(map(repr, NAMED))}, "
        "'block:RxC' such as 'block:4x1' (also 'block:4x1:kernel', 'block:4x1:pad'), 'iss' (also "
        "'iss:rnn>decoder.weight'), products such as "
        "'row*block:8x8' and the sum 'row+column'"
    )
