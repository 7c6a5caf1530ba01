"""The choice of exactly k groups: by score, at random, or in every cell of N:M.

For all weights of a method at once, so that sharded weights need a fixed small number of collectives whatever their
number. Ranks exchange counts and histograms, never weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.errors import NonFiniteError
from gossamer.groups import Groups
from gossamer.masks import INTEGER, count_over_shards, sum_over_ranks, sum_over_shards

_DIGIT = 11  # bits a histogram resolves at once: 2,048 bins, three rounds for float32


def largest(groups: Sequence[Groups], scores: Sequence[Tensor], counts: Sequence[int] | int) -> list[Tensor]:
    """Indices of the groups with the largest scores, exactly as many as asked.

    A radix selection: histograms of the scores' leading bits narrow down the one bin that holds the smallest score
    taken, so that no sort and no copy of all scores is needed. Equal scores are taken from the lowest index (weight
    by weight, in global order).

    Args:
        groups: The groups ranked, of one weight each.
        scores: Scores of this rank's groups, `(groups on this rank,)` each; overwritten. `-inf` is never chosen
            while others are left.
        counts: How many to take of each weight, or of all ranked together; at most what there is.

    Returns:
        int64 indices into each score vector, in no particular order.

    Raises:
        NonFiniteError: A score is NaN.
    """
    together = isinstance(counts, int)
    need = np.array([counts] if isinstance(counts, int) else counts, dtype=np.int64)
    keys = _ordered_keys(groups, scores)
    shifts = _shifts(8 * keys[0].element_size())
    row = [0] * len(keys) if together else list(range(len(keys)))
    taken: list[list[Tensor]] = [[] for _ in keys]
    where: list[Tensor | None] = [None] * len(keys)  # indices of the candidates; None while all are
    for shift in shifts:
        bins = 1 << (_DIGIT if shift else shifts[-2])
        digits = [_digit(key, shift, bins, first=shift == shifts[0]) for key in keys]
        histogram = sum_over_shards(groups, [torch.bincount(digit, minlength=bins) for digit in digits])
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
    for i, first in enumerate(_order_of_ties(groups, [len(key) for key in keys], together)):
        ties = max(0, min(int(need[row[i]]) - first, len(keys[i])))
        taken[i].append(where[i][:ties])  # type: ignore[index]
    return [torch.cat(parts) for parts in taken]


def smallest(groups: Sequence[Groups], scores: Sequence[Tensor], counts: Sequence[int] | int) -> list[Tensor]:
    """As `largest`, for the smallest scores; `+inf` is never chosen while others are left."""
    return largest(groups, [score.neg_() for score in scores], counts)


def sample(
    groups: Sequence[Groups],
    eligible: Sequence[Tensor],
    available: Sequence[int],
    counts: Sequence[int],
    generator: torch.Generator,
) -> list[Tensor]:
    """Indices of randomly chosen groups, exactly as many as asked, every choice equally likely.

    Positions are drawn over the *global* groups with a CPU generator that every rank has in the same state, and
    drawn again where they are not eligible: the result depends neither on the device nor on how weights are sharded.

    Args:
        groups: The groups chosen from, of one weight each.
        eligible: bool vectors over this rank's groups; overwritten.
        available: Number of eligible groups of each global weight.
        counts: How many to choose of each weight; at most what is available.
        generator: Random state, on the CPU; the same on all ranks.

    Returns:
        int64 indices into each vector.
    """
    return [_sample_one(*each, generator) for each in zip(groups, eligible, available, counts, strict=True)]


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


def largest_in_slices(scores: Tensor, counts: Tensor, dims: Sequence[int]) -> Tensor:
    """The `counts[i]` largest of each slice along some dimensions; equal scores from the lowest index.

    Args:
        scores: Of any shape, without NaN; `-inf` is never chosen while others are left.
        counts: Of each slice, in the order of those dimensions, or `(1,)`; integers.
        dims: The dimensions that slices are taken along; what is ranked are the others.

    Returns:
        bool, of the shape of `scores`.
    """
    along, first = sorted(dims), range(len(dims))
    moved = scores.movedim(along, tuple(first))
    chosen = largest_in_cells(moved.reshape(-1), counts, prod(moved.shape[len(along) :]))
    return chosen.view(moved.shape).movedim(tuple(first), along)


def largest_along(scores: Tensor, count: int, dim: int) -> Tensor:
    """The `count` largest along a dimension; equal scores from the lowest index, NaN as if infinite.

    Args:
        scores: Of any shape.
        count: From 0 to the length of the dimension.
        dim: The dimension.

    Returns:
        bool, of the shape of `scores`, with exactly `count` along the dimension.
    """
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = torch.where(scores.isnan(), torch.inf, scores)
    least = scores.topk(count, dim, sorted=False).values.amin(dim, keepdim=True)
    above, ties = scores > least, scores == least
    return above | (ties & (ties.cumsum(dim, dtype=torch.int32) <= count - above.sum(dim, keepdim=True)))


def refuse_nan(groups: Sequence[Groups], scores: Sequence[Tensor]) -> None:
    """Raise a NonFiniteError, on all ranks, where a weight's scores contain NaN."""
    nan = [score.amax().isnan() if len(score) else torch.zeros((), device=score.device) for score in scores]
    for each, found in zip(groups, count_over_shards(groups, nan), strict=True):
        if found:
            raise NonFiniteError(
                f"{each.name}: its scores contain NaN, so its weights cannot be ranked and its mask was left as "
                "it is; training has diverged (lower the learning rate, clip gradients) or the data contain NaN"
            )


def _ordered_keys(groups: Sequence[Groups], scores: Sequence[Tensor]) -> list[Tensor]:
    """Integers in the order of the scores, in the scores' own memory where it is wide enough."""
    refuse_nan(groups, scores)
    dtype = max((torch.float32, *(score.dtype for score in scores)), key=lambda each: each.itemsize)
    keys = []
    for score in scores:
        wide = score.to(dtype).add_(0.0)  # −0.0 and 0.0 are equal scores
        bits = wide.view(INTEGER[wide.element_size()])
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


def _sample_one(group: Groups, eligible: Tensor, available: int, count: int, generator: torch.Generator) -> Tensor:
    if count > available:
        raise ValueError(f"{group.name}: cannot choose {count} of {available} groups")
    chosen: list[Tensor] = []
    left_out = count > available // 2  # then it is quicker to choose those to leave out
    missing = available - count if left_out else count
    while missing:
        draws = int(1.2 * missing * group.total / available) + 16
        positions = _distinct(torch.randint(group.total, (draws,), generator=generator), group.total)
        here = positions - group.first
        inside = (here >= 0) & (here < len(eligible))
        accepted = torch.zeros(len(positions), dtype=torch.bool)
        accepted[inside] = eligible[here[inside].to(eligible.device)].cpu()
        if group.process_group is not None:
            accepted = sum_over_ranks(accepted.byte(), group.process_group, eligible.device).bool()
        fresh = positions[accepted]
        if len(fresh) > missing:
            fresh = fresh[torch.randperm(len(fresh), generator=generator)[:missing]]
        missing -= len(fresh)
        available -= len(fresh)
        here = fresh - group.first
        here = here[(here >= 0) & (here < len(eligible))].to(eligible.device)
        eligible[here] = False
        chosen.append(here)
    if left_out:
        return eligible.nonzero().view(-1)
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=eligible.device)


def _distinct(positions: Tensor, total: int) -> Tensor:
    """The different positions among these, in order."""
    if len(positions) < total // 32:
        different: Tensor = torch.unique(positions)
        return different
    seen = torch.zeros(total, dtype=torch.bool)  # where many are drawn, one pass over all is quicker than a sort
    seen[positions] = True
    return seen.nonzero().view(-1)


def _order_of_ties(groups: Sequence[Groups], ties: Sequence[int], together: bool) -> list[int]:
    """How many equal candidates come before this rank's, of each weight (of all where ranked together)."""
    before = [0] * len(ties)
    total = list(ties)
    for shards in dict.fromkeys(each.process_group for each in groups if each.process_group is not None):
        members = [i for i, each in enumerate(groups) if each.process_group is shards]
        rank = dist.get_rank(shards)
        counts = torch.zeros(dist.get_world_size(shards), len(members), dtype=torch.int64)
        counts[rank] = torch.tensor([ties[i] for i in members])
        counts = sum_over_ranks(counts, shards, groups[members[0]].device)
        for column, i in enumerate(members):
            before[i] = int(counts[:rank, column].sum())
            total[i] = int(counts[:, column].sum())
    if together:
        earlier = np.cumsum([0, *total[:-1]])
        before = [int(first + own) for first, own in zip(earlier, before, strict=True)]
    return before
