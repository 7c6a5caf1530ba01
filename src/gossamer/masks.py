"""Masks: storage, exact enforcement, and the choice of exactly k weights.

A mask is an int8 tensor of its weight's shape, −1 where the weight is active and 0 where it is pruned. Read as an
integer of the weight's own width, −1 is all ones, so a bitwise *and* leaves active weights as they are and makes
pruned ones +0.0 whatever they were: negative zero, infinity and NaN included, which a product would keep. One byte
a weight, no second copy, one pass.

The choice functions work on the groups of a structure (see `gossamer.structure`), one flat vector a tensor, and
on all tensors of a method at once, so that sharded weights need a fixed small number of collectives whatever the
number of tensors. Ranks exchange counts and histograms, never weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.structure import Structure
from gossamer.targets import Target, local

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 19  # weights a part
_DIGIT = 11  # bits a histogram resolves at once: 2,048 bins, three rounds for float32


class MaskedTensor:
    """A weight under a mask.

    Attributes:
        target: The weight, found by its owner, so that a replaced Parameter is seen.
        structure: How the weight is divided into groups.
        shape: The weight's global shape.
        group_size: Number of weights in a group.
        groups: Number of groups of the global weight.
        mask: int8 mask (−1 active, 0 pruned) of the part of the weight that this rank holds.
        active: Number of active weights of the global weight.
    """

    def __init__(self, target: Target, structure: Structure) -> None:
        parameter = target.parameter
        structure.validate(target.name, parameter.shape, target.input_dim)
        self.target = target
        self.structure = structure
        self.shape = tuple(parameter.shape)
        self.weights = parameter.numel()
        self.group_size = structure.size(self.shape, target.input_dim)
        self.groups = self.weights // self.group_size
        self.mask = torch.full_like(parameter, -1, dtype=torch.int8, requires_grad=False)
        self.active = self.weights
        self.process_group: dist.ProcessGroup | None = None
        self.first_group = 0
        self._sharded: nn.Parameter | None = None

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.target.name

    @property
    def active_groups(self) -> int:
        """Number of active groups of the global weight."""
        return self.active // self.group_size

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is in the model now; of a sharded weight always the shard that the optimizer holds.

        After a forward without a backward FSDP2 leaves whole weights in the model.
        """
        found = self.target.parameter
        return found if self._sharded is None or isinstance(found, DTensor) else self._sharded

    @property
    def input_dim(self) -> int:
        """The dimension that runs over inputs."""
        return self.target.input_dim

    def alive(self) -> Tensor:
        """A copy of the mask of this rank's groups, −1 active and 0 pruned, shape (groups on this rank,)."""
        return self.structure.collapse(self.mask, self.input_dim)

    def set_alive(self, alive: Tensor, active_groups: int) -> Tensor:
        """Replace the mask; weights that were or become pruned are set to 0.

        Args:
            alive: Mask of this rank's groups, shape (groups on this rank,).
            active_groups: Number of active groups of the global weight.

        Returns:
            int8 mask of this rank's weights, −1 where a weight is newly active.
        """
        new = self.structure.expand(alive, self.mask.shape, self.input_dim)
        weight = local(self.parameter)
        enforce(weight, new)
        enforce(weight, self.mask)
        grown = self.mask.bitwise_not().bitwise_and_(new)
        self.mask.copy_(new)
        self.active = active_groups * self.group_size
        return grown

    def sharding(self) -> tuple[dist.ProcessGroup | None, int]:
        """How the weight is sharded now: the ranks that share it (None where it is whole) and this rank's first group.

        Raises:
            ConfigurationError: The weight is sharded in a way that splits groups, or over several mesh dimensions; on
                every rank alike.
        """
        parameter = self.parameter
        if tuple(parameter.shape) != self.shape:
            raise ConfigurationError(
                f"{self.name}: had shape {self.shape} when it was attached and has {tuple(parameter.shape)} now"
            )
        if not isinstance(parameter, DTensor):
            return None, 0
        placements = parameter.placements
        sharded = [dim for dim, placement in enumerate(placements) if placement.is_shard()]
        if not sharded:
            return None, 0
        placement = placements[sharded[0]]
        if len(sharded) > 1 or type(placement) is not Shard or placement.dim != 0:
            raise ConfigurationError(
                f"{self.name}: is sharded as {placements}; masks follow weights that are sharded once, along "
                "dimension 0, as `fully_shard` does"
            )
        group = parameter.device_mesh.get_group(sharded[0])
        rank = dist.get_rank(group)
        rows = torch.zeros(dist.get_world_size(group), dtype=torch.int64)
        rows[rank] = len(local(parameter))
        rows = _all_reduce(rows, group, local(parameter).device)
        multiple = self.structure.row_multiple(self.input_dim)
        if (rows % multiple).any():
            raise ConfigurationError(
                f"{self.name}: structure {self.structure} needs shards of a multiple of {multiple} rows, but the ranks "
                f"hold {rows.tolist()} of its {self.shape[0]} rows; shard over fewer ranks, or exclude this weight"
            )
        return group, int(rows[:rank].sum()) * self.groups // self.shape[0]

    def follow_sharding(self, process_group: dist.ProcessGroup | None, first_group: int) -> None:
        """Keep of the mask what belongs to this rank, in the layout and on the device of the weight as it is now.

        Args:
            process_group: As `sharding` found it.
            first_group: Likewise.
        """
        mask = self.mask if self.process_group is not None else rows_like(self.mask, self.parameter)
        self.process_group, self.first_group = process_group, first_group
        self._sharded = self.parameter if isinstance(self.parameter, DTensor) else None
        self.mask = torch.empty_like(local(self.parameter), dtype=torch.int8).copy_(mask)
        enforce(local(self.parameter), self.mask)

    def distribute(self, part: Tensor) -> Tensor:
        """A tensor of this rank's rows as a DTensor sharded as the weight is, or as it is where nothing is sharded."""
        parameter = self.parameter
        if not isinstance(parameter, DTensor):
            return part
        shape = torch.Size((self.shape[0], *part.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        )


def rows_like(values: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of values that are whole or sharded in any way, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return values.full_tensor() if isinstance(values, DTensor) else values
    mesh, placements = parameter.device_mesh, parameter.placements
    if isinstance(values, DTensor):
        return values.redistribute(mesh, placements).to_local()
    device = local(parameter).device
    return distribute_tensor(values.to(device), mesh, placements, src_data_rank=None).to_local()


def enforce(tensor: Tensor, mask: Tensor) -> None:
    """Make `tensor` exactly +0.0 where the int8 `mask` is 0, in place; NaN, infinity and −0.0 too."""
    bits = tensor.view(_INTEGER[tensor.element_size()])
    if bits.device.type != "cpu" or bits.numel() <= _CHUNK:
        bits.bitwise_and_(mask)
        return
    # On the CPU torch first widens the whole mask into a new tensor; in parts that stay in the cache it costs half.
    rows = max(1, _CHUNK * len(bits) // bits.numel())
    for part, kept in zip(torch.split(bits, rows), torch.split(mask, rows), strict=True):
        part.bitwise_and_(kept)


def largest(tensors: Sequence[MaskedTensor], scores: Sequence[Tensor], counts: Sequence[int] | int) -> list[Tensor]:
    """Indices of the groups with the largest scores, exactly as many as asked.

    A radix selection: histograms of the scores' leading bits narrow down the one bin that holds the smallest score
    taken, so that no sort and no copy of all scores is needed. Equal scores are taken from the lowest index (tensor
    by tensor, in global order).

    Args:
        tensors: The tensors ranked.
        scores: Scores of this rank's groups, `(groups on this rank,)` each; overwritten. `-inf` is never chosen
            while others are left.
        counts: How many to take of each tensor, or of all tensors ranked together; at most what there is.

    Returns:
        int64 indices into each score vector, in no particular order.

    Raises:
        NonFiniteError: A score is NaN.
    """
    together = isinstance(counts, int)
    need = np.array([counts] if isinstance(counts, int) else counts, dtype=np.int64)
    keys = _ordered_keys(tensors, scores)
    shifts = _shifts(8 * keys[0].element_size())
    row = [0] * len(keys) if together else list(range(len(keys)))
    taken: list[list[Tensor]] = [[] for _ in keys]
    where: list[Tensor | None] = [None] * len(keys)  # indices of the candidates; None while all are
    for shift in shifts:
        bins = 1 << (_DIGIT if shift else shifts[-2])
        digits = [_digit(key, shift, bins, first=shift == shifts[0]) for key in keys]
        histogram = _sum_over_shards(tensors, [torch.bincount(digit, minlength=bins) for digit in digits])
        if together:
            histogram = histogram.sum(0, keepdims=True)
        above = np.flip(np.cumsum(np.flip(histogram, 1), 1), 1) - histogram  # how many lie in higher bins
        pivot = (above < need[:, None]).argmax(1)
        need = need - above[np.arange(len(need)), pivot]
        for i, digit in enumerate(digits):
            edge = int(pivot[row[i]]) if need[row[i]] > 0 else bins
            taken[i].append(_pick(where[i], digit > edge))
            candidates = (digit == edge).nonzero().view(-1)
            keys[i] = keys[i][candidates]
            where[i] = candidates if where[i] is None else where[i][candidates]  # type: ignore[index]
    for i, first in enumerate(_order_of_ties(tensors, [len(key) for key in keys], together)):
        ties = max(0, min(int(need[row[i]]) - first, len(keys[i])))
        taken[i].append(where[i][:ties])  # type: ignore[index]
    return [torch.cat(parts) for parts in taken]


def smallest(tensors: Sequence[MaskedTensor], scores: Sequence[Tensor], counts: Sequence[int] | int) -> list[Tensor]:
    """As `largest`, for the smallest scores; `+inf` is never chosen while others are left."""
    return largest(tensors, [score.neg_() for score in scores], counts)


def sample(
    tensors: Sequence[MaskedTensor],
    eligible: Sequence[Tensor],
    available: Sequence[int],
    counts: Sequence[int],
    generator: torch.Generator,
) -> list[Tensor]:
    """Indices of randomly chosen groups, exactly as many as asked, every choice equally likely.

    Positions are drawn over the *global* groups with a CPU generator that every rank has in the same state, and
    drawn again where they are not eligible: the result depends neither on the device nor on how weights are sharded.

    Args:
        tensors: The tensors chosen from.
        eligible: bool vectors over this rank's groups; overwritten.
        available: Number of eligible groups of each global tensor.
        counts: How many to choose of each tensor; at most what is available.
        generator: Random state, on the CPU; the same on all ranks.

    Returns:
        int64 indices into each vector.
    """
    return [_sample_one(*each, generator) for each in zip(tensors, eligible, available, counts, strict=True)]


def largest_in_cells(scores: Tensor, counts: Tensor, size: int) -> Tensor:
    """The `counts[i]` largest of each cell of `size` consecutive scores; equal scores from the lowest index.

    Args:
        scores: `(cells · size,)`, without NaN; `-inf` is never chosen while others are left.
        counts: `(cells,)` or `(1,)`, integers.
        size: Groups in a cell (the M of N:M).

    Returns:
        bool, `(cells · size,)`.
    """
    cells = scores.view(-1, size)
    order = cells.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(size, device=order.device).expand_as(order))
    return (rank < counts.view(-1, 1)).view(-1)


def refuse_nan(tensors: Sequence[MaskedTensor], scores: Sequence[Tensor]) -> None:
    """Raise a NonFiniteError, on all ranks, where a tensor's scores contain NaN."""
    nan = [score.amax().isnan() if len(score) else torch.zeros((), device=score.device) for score in scores]
    for tensor, found in zip(tensors, count_over_shards(tensors, nan), strict=True):
        if found:
            raise NonFiniteError(
                f"{tensor.name}: its scores contain NaN, so its weights cannot be ranked and its mask was left as "
                "it is; training has diverged (lower the learning rate, clip gradients) or the data contain NaN"
            )


def count_over_shards(tensors: Sequence[MaskedTensor], counts: Sequence[Tensor]) -> list[int]:
    """Add up one count a tensor over the ranks that share it; one transfer and at most one collective for all."""
    return [int(n) for n in _sum_over_shards(tensors, [count.view(1) for count in counts])[:, 0]]


def pack(mask: Tensor) -> Tensor:
    """Pack a mask into bits, row by row along dim 0: `(rows, …)` → uint8 `(rows, ⌈weights a row / 8⌉)`."""
    rows = (mask != 0).reshape(mask.shape[0], prod(mask.shape[1:]))
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8))
    octets = padded.view(len(rows), padded.shape[1] // 8, 8) << torch.arange(8, device=mask.device, dtype=torch.uint8)
    return octets.sum(2).to(torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack`: uint8 `(rows, bytes)` → int8 mask of `shape`, −1 active and 0 pruned."""
    bits = (packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, : prod(shape[1:])].to(torch.int8).neg_().reshape(*shape)


def _ordered_keys(tensors: Sequence[MaskedTensor], scores: Sequence[Tensor]) -> list[Tensor]:
    """Integers in the order of the scores, in the scores' own memory where it is wide enough."""
    refuse_nan(tensors, scores)
    dtype = max((torch.float32, *(score.dtype for score in scores)), key=lambda each: each.itemsize)
    keys = []
    for score in scores:
        wide = score.to(dtype).add_(0.0)  # −0.0 and 0.0 are equal scores
        bits = wide.view(_INTEGER[wide.element_size()])
        sign = bits >> (8 * wide.element_size() - 1)
        keys.append(bits.bitwise_xor_(sign.bitwise_and_(torch.iinfo(bits.dtype).max)))
    return keys


def _shifts(width: int) -> list[int]:
    return [*range(width - _DIGIT, 0, -_DIGIT), 0]


def _digit(key: Tensor, shift: int, bins: int, first: bool) -> Tensor:
    digit = key >> shift
    return digit.add_(bins // 2) if first else digit.bitwise_and_(bins - 1)


def _pick(where: Tensor | None, chosen: Tensor) -> Tensor:
    return chosen.nonzero().view(-1) if where is None else where[chosen]


def _sample_one(
    tensor: MaskedTensor, eligible: Tensor, available: int, count: int, generator: torch.Generator
) -> Tensor:
    if count > available:
        raise ValueError(f"{tensor.name}: cannot choose {count} of {available} groups")
    chosen: list[Tensor] = []
    left_out = count > available // 2  # then it is quicker to choose those to leave out
    missing = available - count if left_out else count
    while missing:
        draws = int(1.2 * missing * tensor.groups / available) + 16
        positions = torch.unique(torch.randint(tensor.groups, (draws,), generator=generator))
        here = positions - tensor.first_group
        inside = (here >= 0) & (here < len(eligible))
        accepted = torch.zeros(len(positions), dtype=torch.bool)
        accepted[inside] = eligible[here[inside].to(eligible.device)].cpu()
        if tensor.process_group is not None:
            accepted = _all_reduce(accepted.byte(), tensor.process_group, eligible.device).bool()
        fresh = positions[accepted]
        if len(fresh) > missing:
            fresh = fresh[torch.randperm(len(fresh), generator=generator)[:missing]]
        missing -= len(fresh)
        available -= len(fresh)
        here = fresh - tensor.first_group
        here = here[(here >= 0) & (here < len(eligible))].to(eligible.device)
        eligible[here] = False
        chosen.append(here)
    if left_out:
        return eligible.nonzero().view(-1)
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=eligible.device)


def _all_reduce(values: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Sum over a group's ranks; the values come from and return to the CPU, and travel on the weights' device."""
    moved = values.to(device)
    dist.all_reduce(moved, group=group)
    return moved.cpu()


def _sum_over_shards(tensors: Sequence[MaskedTensor], rows: Sequence[Tensor]) -> np.ndarray:
    """Stack one vector a tensor and add each up over the ranks that share the tensor; one transfer to the host."""
    if not rows:
        return np.zeros((0, 1), dtype=np.int64)
    device = rows[0].device
    matrix = torch.stack([row.to(device=device, dtype=torch.int64) for row in rows])
    for group in dict.fromkeys(t.process_group for t in tensors if t.process_group is not None):
        members = torch.tensor([t.process_group is group for t in tensors], device=device)
        part = matrix[members]
        dist.all_reduce(part, group=group)
        matrix[members] = part
    return matrix.cpu().numpy()


def _order_of_ties(tensors: Sequence[MaskedTensor], ties: Sequence[int], together: bool) -> list[int]:
    """How many equal candidates come before this rank's, of each tensor (of all tensors where ranked together)."""
    before = [0] * len(ties)
    total = list(ties)
    for group in dict.fromkeys(t.process_group for t in tensors if t.process_group is not None):
        members = [i for i, t in enumerate(tensors) if t.process_group is group]
        rank = dist.get_rank(group)
        counts = torch.zeros(dist.get_world_size(group), len(members), dtype=torch.int64)
        counts[rank] = torch.tensor([ties[i] for i in members])
        counts = _all_reduce(counts, group, tensors[members[0]].mask.device)
        for column, i in enumerate(members):
            before[i] = int(counts[:rank, column].sum())
            total[i] = int(counts[:, column].sum())
    if together:
        earlier = np.cumsum([0, *total[:-1]])
        before = [int(first + own) for first, own in zip(earlier, before, strict=True)]
    return before
