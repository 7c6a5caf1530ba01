"""Groups: what a structure makes of a weight, and the choice of exactly k of them.

Methods rank, drop and grow groups: one flat vector a weight, for all weights of a method at once, so that sharded
weights need a fixed small number of collectives whatever their number. Ranks exchange counts and histograms, never
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.errors import ConfigurationError, NonFiniteError
from gossamer.masks import INTEGER, Change, MaskedTensor, count_over_shards, sum_over_ranks, sum_over_shards
from gossamer.scores import Score, StateOf, View
from gossamer.structure import Element, Structure
from gossamer.targets import Target, local

_DIGIT = 11  # bits a histogram resolves at once: 2,048 bins, three rounds for float32


class Groups:
    """The groups of one weight.

    Methods rank groups through this interface alone, so that a structure over several weights, where a weight may be in
    several groups, is another class with it.

    Attributes:
        tensors: The weights that are divided; here one.
        structure: How.
        name: Name of the weight, for messages.
        shape: Its global shape.
        size: Number of weights in a group.
        total: Number of groups of the global weight.
    """

    def __init__(self, tensor: MaskedTensor, structure: Structure) -> None:
        self.tensors = (tensor,)
        self.structure = structure
        self.name = tensor.name
        self.shape = tensor.shape
        self.size = structure.size(tensor.shape, tensor.input_dim)
        self.total = tensor.weights // self.size

    @property
    def cell(self) -> tuple[int, int] | None:
        """(N, M) where N of every M consecutive groups live."""
        return self.structure.cell

    @property
    def active(self) -> int:
        """Number of active groups of the global weight."""
        return self.tensors[0].active // self.size

    @property
    def first(self) -> int:
        """The first group that this rank holds."""
        return self.tensors[0].first_row * self.total // self.shape[0]

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
        tensor = self.tensors[0]
        return self.structure.collapse(masks[tensor.name], tensor.input_dim)

    def expand(self, alive: Tensor) -> dict[str, Tensor]:
        """Mask of this rank's groups → masks of its weights, by name."""
        tensor = self.tensors[0]
        return {tensor.name: self.structure.expand(alive, tensor.mask.shape, tensor.input_dim)}

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
            return _checked(score(View(tensor, state(tensor), index)), tensor, index).reshape(-1)
        whole = _checked(score(View(tensor, state(tensor))), tensor, None)
        values = self.structure.reduce(whole, tensor.input_dim, None if getattr(score, "signed", False) else p)
        return values if index is None else values[index]


def divide(targets: Sequence[Target], structure: Structure) -> list[Groups]:
    """Put weights under full masks, and divide them into groups.

    Raises:
        ConfigurationError: A weight that cannot be divided so.
    """
    found = []
    for target in targets:
        shape = target.parameter.shape
        convolution_groups = getattr(target.places[0][0], "groups", 1)
        structure.validate(target.name, shape, target.input_dim, convolution_groups)
        tensor = MaskedTensor(target, str(structure), structure.row_multiple(shape, target.input_dim))
        found.append(Groups(tensor, structure))
    return found


def changes(groups: Sequence[Groups], alive: Sequence[Tensor]) -> list[Change]:
    """The changes to these masks of groups; a weight in several groups lives where all of them do."""
    tensors = {tensor.name: tensor for each in groups for tensor in each.tensors}
    masks: dict[str, Tensor] = {}
    for each, mask in zip(groups, alive, strict=True):
        for name, kept in each.expand(mask).items():
            masks[name] = kept & masks[name] if name in masks else kept
    return [Change(tensors[name], mask) for name, mask in masks.items()]


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


def _checked(values: object, tensor: MaskedTensor, index: Tensor | None) -> Tensor:
    """Check a score's shape, and copy it where it shares memory with the weight or its gradient: rankings overwrite."""
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
