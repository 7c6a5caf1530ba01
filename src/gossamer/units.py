"""The hidden units of recurrent layers as groups: intrinsic sparse structures (Wen et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.groups import Groups, Spread, score_weights
from gossamer.masks import MaskedTensor
from gossamer.scores import Score, StateOf
from gossamer.structure import ISS
from gossamer.targets import Target


@dataclass(frozen=True)
class _Columns:
    """The columns of one layer's units in a weight, from `start` on."""

    tensor: MaskedTensor
    start: int


class Units(Groups):
    """The hidden units of one layer and direction, each with its weights in several tensors.

    A unit's incoming weights are its rows, one for each gate; its outgoing ones are columns. Whether a unit lives is
    read from its rows: in the recurrent weight they cross its own column, and in the weight of the inputs they cross
    other units, of which one always lives.
    """

    def __init__(
        self, name: str, hidden: int, rows: Sequence[MaskedTensor], columns: Sequence[_Columns], structure: ISS
    ) -> None:
        self.tensors = (*rows, *(each.tensor for each in columns if all(each.tensor is not row for row in rows)))
        self.structure = structure
        self.name = name
        self.shape = rows[-1].shape
        self._rows = tuple(rows)
        self._columns = tuple(columns)
        self.total = hidden
        own = sum(each.tensor.shape[0] // hidden for each in columns if any(each.tensor is row for row in rows))
        self.size = sum(t.weights // hidden for t in rows) + sum(each.tensor.shape[0] for each in columns) - own

    @property
    def first(self) -> int:
        """See `Groups`; units are never divided over ranks."""
        return 0

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """See `Groups`; units are never divided over ranks."""
        return None

    def collapse(self, masks: Mapping[str, Tensor]) -> Tensor:
        """See `Groups.collapse`."""
        alive = torch.stack([(self._by_unit(masks[row.name]) != 0).any((0, 2)) for row in self._rows]).any(0)
        return alive.to(torch.int8).neg_()

    def expand(self, alive: Tensor) -> dict[str, Tensor]:
        """See `Groups.expand`."""
        kept = alive.neg()
        return {name: spread(kept).neg() for name, spread in self.spreads().items()}

    def spreads(self) -> dict[str, Spread]:
        """See `Groups.spreads`."""
        rows = {row.name for row in self._rows}
        return {
            tensor.name: _OverUnits(
                tensor.shape,
                tensor.name in rows,
                tuple(each.start for each in self._columns if each.tensor is tensor),
            )
            for tensor in self.tensors
        }

    def scores(self, score: Score, state: StateOf, p: float = 2.0, index: Tensor | None = None) -> Tensor:
        """See `Groups.scores`; a weight between a unit and itself counts once."""
        whole = {tensor.name: score_weights(tensor, score, state) for tensor in self.tensors}
        parts = [self._by_unit(whole[row.name]).transpose(0, 1).flatten(1) for row in self._rows]
        for each in self._columns:
            outgoing = self._of_units(whole[each.tensor.name], each)
            if any(each.tensor is row for row in self._rows):
                outgoing = self._by_unit(outgoing.clone())
                outgoing.diagonal(dim1=1, dim2=2).zero_()
            parts.append(outgoing.reshape(-1, self.total).t())
        weights = torch.cat(parts, dim=1)
        signed = getattr(score, "signed", False)
        values: Tensor = weights.sum(1) if signed else torch.linalg.vector_norm(weights, ord=p, dim=1)
        return values if index is None else values[index]

    def first_values(self, alive: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Incoming weights as in a fresh layer, uniform within `±1/√units`; outgoing ones, and so the output, are 0.

        With zeros on both sides no gradient would ever reach the unit.
        """
        grown = (alive & ~self.alive()).nonzero().view(-1)
        if not len(grown):
            return {}
        bound = self.total**-0.5
        values = {}
        for row in self._rows:
            begin = torch.zeros_like(row.mask, dtype=torch.float32)
            rows = self._by_unit(begin)
            drawn = torch.rand(rows.shape[0], len(grown), rows.shape[2], generator=generator) * (2 * bound) - bound
            rows[:, grown] = drawn.to(begin.device)
            values[row.name] = begin
        return values

    def _by_unit(self, x: Tensor) -> Tensor:
        """Rows of a weight as (gates, units, inputs)."""
        return x.view(-1, self.total, x.shape[1])

    def _of_units(self, x: Tensor, columns: _Columns) -> Tensor:
        """The units' columns of a weight, (outputs, units)."""
        return x[:, columns.start : columns.start + self.total]


@dataclass(frozen=True)
class _OverUnits:
    """Lays a value for each unit over its rows in a weight, and over its columns from `starts` on, as products."""

    shape: tuple[int, ...]
    rows: bool
    starts: tuple[int, ...]

    def __call__(self, values: Tensor) -> Tensor:
        factors = []
        if self.rows:
            factors.append(values.repeat(self.shape[0] // len(values))[:, None].expand(self.shape))
        for start in self.starts:
            beyond = self.shape[1] - start - len(values)
            factors.append(torch.nn.functional.pad(values, (start, beyond), value=1).expand(self.shape))
        return reduce(mul, factors)


def units(targets: Sequence[Target], structure: ISS) -> list[Units]:
    """Put the weights of recurrent layers under full masks, and divide them by hidden units.

    Raises:
        ConfigurationError: A weight of another layer that is no consumer, or a layer of which a weight is missing.
    """
    consumers = {module: [*names] for module, names in structure.consumers.items()}
    tensors = {}
    modules: dict[str, nn.RNNBase | nn.RNNCellBase] = {}
    for target in targets:
        owner, module = target.places[0][0], target.name.rpartition(".")[0]
        tensors[target.name] = MaskedTensor(target, str(structure), target.shape[0])
        if isinstance(owner, nn.RNNBase | nn.RNNCellBase):
            modules[module] = owner
        elif not any(target.name in names for names in consumers.values()):
            raise ConfigurationError(
                f"{target.name}: structure 'iss' is for RNN, LSTM and GRU, and {module or 'it'} is a "
                f"{type(owner).__name__}; exclude it with targets=['!{target.name}'], or name what it reads: "
                f"structure='iss:MODULE>{target.name}'"
            )
    if unknown := next((module for module in consumers if module not in modules), None):
        raise ConfigurationError(
            f"consumers: {unknown!r} is no recurrent module of the targets, which are {sorted(modules)}"
        )
    return [each for module, owner in modules.items() for each in _of_module(module, owner, tensors, structure)]


def _of_module(
    module: str, owner: nn.RNNBase | nn.RNNCellBase, tensors: Mapping[str, MaskedTensor], structure: ISS
) -> list[Units]:
    hidden = owner.hidden_size
    if isinstance(owner, nn.RNNCellBase):
        layers, directions, projected = [""], [""], False
    else:
        layers = [f"_l{layer}" for layer in range(owner.num_layers)]
        directions = ["", "_reverse"] if owner.bidirectional else [""]
        projected = owner.proj_size > 0

    def find(name: str) -> MaskedTensor:
        full = f"{module}.{name}" if module else name
        if full not in tensors:
            raise ConfigurationError(
                f"{full}: belongs to the hidden units of {module or 'the model'} and is not among the targets; "
                "structure 'iss' needs all weights of a recurrent module"
            )
        return tensors[full]

    consumers = structure.consumers.get(module, ())
    for name in consumers:
        width = hidden * len(directions)
        if projected or name not in tensors or tensors[name].shape[1] != width or tensors[name].input_dim != 1:
            found = "is not among the targets" if name not in tensors else f"has shape {tensors[name].shape}"
            raise ConfigurationError(
                f"consumers: {name!r} {found}, expected a target with the {width} outputs of {module!r} as inputs"
                + (", which are projected and so no hidden units" if projected else "")
            )
    result = []
    for i, layer in enumerate(layers):
        for turn, direction in enumerate(directions):
            rows = [find(f"weight_{kind}{layer}{direction}") for kind in ("ih", "hh")]
            if projected:
                columns = [_Columns(find(f"weight_hr{layer}{direction}"), 0)]
            else:
                if i + 1 < len(layers):
                    readers = [find(f"weight_ih{layers[i + 1]}{each}") for each in directions]
                else:
                    readers = [tensors[name] for name in consumers]
                columns = [_Columns(rows[1], 0), *(_Columns(each, turn * hidden) for each in readers)]
            result.append(Units(rows[1].name, hidden, rows, columns, structure))
    return result
