"""Drop, grow and prune by rank: what the methods of hard masks share.

All work on int8 masks of groups (−1 active, 0 pruned) of this rank, one a weight, and change them in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.choice import largest, largest_in_cells, refuse_nan, sample, smallest
from gossamer.groups import Groups
from gossamer.masks import count_over_shards
from gossamer.scores import Score, StateOf


def scores_of_active(
    groups: Sequence[Groups], alive: Sequence[Tensor], score: Score, state: StateOf, p: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The active groups of each weight, int64 `(active on this rank,)`, and their scores, of the same shape."""
    index = [(mask != 0).nonzero().view(-1) for mask in alive]
    return index, [each.scores(score, state, p, i) for each, i in zip(groups, index, strict=True)]


def drop(
    groups: Sequence[Groups],
    alive: Sequence[Tensor],
    index: Sequence[Tensor],
    scores: Sequence[Tensor],
    counts: Sequence[int] | int,
) -> list[Tensor]:
    """Deactivate the groups with the smallest scores.

    Args:
        groups: The groups of each weight.
        alive: Their masks, changed in place.
        index: The groups that may be dropped.
        scores: Their scores; overwritten.
        counts: How many to drop of each weight, or of all ranked together.

    Returns:
        The groups dropped, int64 indices.

    Raises:
        NonFiniteError: A score is NaN.
    """
    chosen = smallest(groups, scores, counts)
    dropped = [positions[choice] for positions, choice in zip(index, chosen, strict=True)]
    for mask, gone in zip(alive, dropped, strict=True):
        mask.index_fill_(0, gone, 0)
    return dropped


def grow(
    groups: Sequence[Groups],
    alive: Sequence[Tensor],
    eligible: Sequence[Tensor],
    rooms: Sequence[int],
    counts: Sequence[int] | int,
    source: torch.Generator | Sequence[Tensor],
) -> None:
    """Activate exactly so many eligible groups of each weight; under N:M, what brings every cell to N active groups.

    In a cell without enough eligible groups the others that are not active return.

    Args:
        groups: The groups of each weight.
        alive: Their masks, changed in place.
        eligible: bool, which may become active; none that is active; overwritten.
        rooms: Number of eligible groups of each global weight.
        counts: How many to activate of each weight, or, by scores, of all ranked together; ignored under N:M.
        source: A generator, for random growth; or scores of all groups, of which the largest grow; overwritten.

    Raises:
        NonFiniteError: A score is NaN.
    """
    if groups[0].cell is not None:
        for i, each in enumerate(groups):
            scores = random_scores(each, len(alive[i]), source) if isinstance(source, torch.Generator) else source[i]
            _fill_cells(each, alive[i], eligible[i], scores)
        return
    if isinstance(source, torch.Generator):
        assert not isinstance(counts, int)
        chosen = sample(groups, eligible, rooms, counts, source)
    else:
        for scores, free in zip(source, eligible, strict=True):
            scores.masked_fill_(~free, -torch.inf)
        chosen = largest(groups, source, counts)
    for mask, grown in zip(alive, chosen, strict=True):
        mask.index_fill_(0, grown, -1)


def prune_to(
    groups: Sequence[Groups],
    alive: Sequence[Tensor],
    counts: Sequence[int],
    score: Score,
    state: StateOf,
    p: float = 2.0,
) -> list[int]:
    """Deactivate the lowest-scoring active groups until exactly `counts` are left.

    Args:
        groups: The groups of each weight.
        alive: Their masks, changed in place.
        counts: Active groups wanted of each weight; or one number for all ranked together, where each weight keeps
            at least its best group. Under N:M the largest equal number a cell that is not above it, at least N.
        score: What is pruned is smallest in this score.
        state: The optimizer's state of a weight.
        p: Order of the norm that scores a group.

    Returns:
        Active groups of each global weight afterwards.
    """
    if groups[0].cell is not None:
        return [_prune_cells(*each, score, state, p) for each in zip(groups, alive, counts, strict=True)]
    index, scores = scores_of_active(groups, alive, score, state, p)
    active = count_over_shards(groups, [torch.tensor(len(each), device=each.device) for each in index])
    drops: int | list[int]
    if len(counts) == 1:
        best = largest(groups, [each.clone() for each in scores], [1] * len(groups))
        others = [torch.ones_like(each, dtype=torch.bool) for each in scores]
        for other, top in zip(others, best, strict=True):
            other.index_fill_(0, top, False)
        index = [each[other] for each, other in zip(index, others, strict=True)]
        scores = [each[other] for each, other in zip(scores, others, strict=True)]
        drops = max(0, sum(active) - counts[0])
    else:
        drops = [max(0, now - wanted) for now, wanted in zip(active, counts, strict=True)]
    dropped = drop(groups, alive, index, scores, drops)
    gone = count_over_shards(groups, [torch.tensor(len(each), device=each.device) for each in dropped])
    return [now - lost for now, lost in zip(active, gone, strict=True)]


def random_scores(groups: Groups, here: int, generator: torch.Generator) -> Tensor:
    """Random scores of this rank's groups, float64, all different.

    Drawn for the groups of all ranks, so that they do not depend on the sharding. A permutation takes the generator's
    numbers modulo what is left. `torch.rand` would give them as they are: those that a layer was initialized with,
    where `torch.manual_seed` had the same seed, and so rank by the weights.
    """
    whole = torch.randperm(groups.total, generator=generator).double()
    return whole[groups.first : groups.first + here].to(groups.device)


def _fill_cells(groups: Groups, alive: Tensor, eligible: Tensor, scores: Tensor) -> None:
    assert groups.cell is not None
    n, m = groups.cell
    scores.masked_fill_(~eligible, torch.finfo(scores.dtype).min)
    scores.masked_fill_(alive != 0, -torch.inf)
    refuse_nan([groups], [scores])
    missing = alive.view(-1, m).sum(1).add(n)
    alive.sub_(largest_in_cells(scores, missing, m).to(torch.int8))


def _prune_cells(groups: Groups, alive: Tensor, count: int, score: Score, state: StateOf, p: float) -> int:
    assert groups.cell is not None
    n, m = groups.cell
    kept = max(n, count * m // groups.total)
    scores = groups.scores(score, state, p).masked_fill_(alive == 0, -torch.inf)
    refuse_nan([groups], [scores])
    alive.copy_(largest_in_cells(scores, torch.tensor([kept], device=alive.device), m)).neg_()
    return groups.total // m * kept
