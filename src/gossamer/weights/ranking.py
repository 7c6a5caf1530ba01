"""Pruning down to given counts by rank, which one-shot and gradual pruning share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.masks import MaskedTensor, count_over_shards, largest, largest_in_cells, refuse_nan, smallest
from gossamer.method import StateOf
from gossamer.scores import Score, group_scores


def prune_to(
    tensors: Sequence[MaskedTensor],
    alive: list[Tensor],
    active: Sequence[int],
    counts: Sequence[int],
    score: Score,
    state: StateOf,
    p: float = 2.0,
) -> list[int]:
    """Deactivate the lowest-scoring active groups until exactly `counts` are left.

    Args:
        tensors: The tensors.
        alive: int8 masks of the groups on this rank, changed in place.
        active: Active groups of each global tensor now.
        counts: Active groups wanted of each tensor; or one number for all ranked together, where each tensor keeps
            at least its best group. Under N:M the largest equal number a cell that covers it.
        score: What is pruned is smallest in this score.
        state: The optimizer's state of a tensor.
        p: Order of the norm that scores a group.

    Returns:
        Active groups of each global tensor afterwards.
    """
    if tensors[0].structure.cell is not None:
        return [_prune_cells(*each, score, state, p) for each in zip(tensors, alive, counts, strict=True)]
    index = [(mask != 0).nonzero().view(-1) for mask in alive]
    scores = [group_scores(t, score, state(t), p, i) for t, i in zip(tensors, index, strict=True)]
    drops: int | list[int]
    if len(counts) == 1:
        best = largest(tensors, [each.clone() for each in scores], [1] * len(tensors))
        for each, top in zip(scores, best, strict=True):
            each.index_fill_(0, top, torch.inf)
        drops = max(0, sum(active) - max(counts[0], len(tensors)))
    else:
        drops = [max(0, now - wanted) for now, wanted in zip(active, counts, strict=True)]
    chosen = smallest(tensors, scores, drops)
    for mask, positions, choice in zip(alive, index, chosen, strict=True):
        mask.index_fill_(0, positions[choice], 0)
    gone = count_over_shards(tensors, [torch.tensor(len(choice), device=choice.device) for choice in chosen])
    return [now - lost for now, lost in zip(active, gone, strict=True)]


def _prune_cells(tensor: MaskedTensor, alive: Tensor, count: int, score: Score, state: StateOf, p: float) -> int:
    assert tensor.structure.cell is not None
    m = tensor.structure.cell[1]
    kept = -(-count * m // tensor.groups)
    scores = group_scores(tensor, score, state(tensor), p).masked_fill_(alive == 0, -torch.inf)
    refuse_nan([tensor], [scores])
    alive.copy_(largest_in_cells(scores, torch.tensor([kept], device=alive.device), m)).neg_()
    return tensor.groups // m * kept
