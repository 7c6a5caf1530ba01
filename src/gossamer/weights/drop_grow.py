"""Drop and grow: every so often the least worthy weights of each tensor make room for as many others.

SET and RigL are this with different ways to grow; the budget of every tensor stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import compress
from typing import TypeVar

import torch
from torch import Tensor

from gossamer.checks import check_number
from gossamer.errors import ConfigurationError
from gossamer.groups import Groups
from gossamer.masks import Change, count_over_shards
from gossamer.method import Proposal, StateOf
from gossamer.schedule import Schedule, as_schedule
from gossamer.scores import Score, as_score
from gossamer.weights.masked import MaskMethod
from gossamer.weights.ranking import drop, grow, scores_of_active

_ROUNDING = 1e-9
"""What is below a whole number by less is one: `1 - 4/5` of 5 is 1, though a little less in floating point."""

_Count = TypeVar("_Count", int, Tensor)


def portion(fraction: float, count: _Count) -> _Count:
    """This fraction of a count, or of each of several, int64; rounded down."""
    if isinstance(count, Tensor):
        return (fraction * count.double() + _ROUNDING).long()
    return int(fraction * count + _ROUNDING)


@dataclass(eq=False)
class DropGrow(MaskMethod):
    """A method that drops and grows the same number of groups in each tensor.

    Args:
        every: Steps between updates, or a schedule.
        until: Last step at which masks change.
        drop_fraction: Fraction of the active groups of each tensor that is dropped, in [0, 1).
        drop_score: What is dropped is smallest in this score.
    """

    _: KW_ONLY
    every: int | Schedule = 100
    until: int | None = None
    drop_fraction: float = 0.3
    drop_score: str | Score = "magnitude"

    def _check(self) -> None:
        super()._check()
        self._schedule = as_schedule(self.every, until=self.until)
        check_number("drop_fraction", self.drop_fraction, 0, 1, open_high=True)
        self._scores()

    def _drop_by(self) -> Score:
        """What is dropped is smallest in this score."""
        return as_score(self.drop_score, "drop_score")

    def _grow_by(self) -> Score | None:
        """What is grown is largest in this score; at random, but for what was just dropped, where it is `None`."""
        return None

    def _scores(self) -> list[Score]:
        return [score for score in (self._drop_by(), self._grow_by()) if score is not None]

    def due(self, step: int) -> bool:
        """See `Method.due`."""
        return self._schedule.due(step) and self.fraction(step) > 0

    def fraction(self, step: int) -> float:
        """Fraction of active groups to drop at a step."""
        return self.drop_fraction

    def update(self, step: int, state: StateOf) -> Proposal:
        """See `Method.update`."""
        fraction = self.fraction(step)
        alive, moving = self._alive(), self._moving()
        groups, masks = list(compress(self.groups, moving)), list(compress(alive, moving))
        stay: list[Tensor] = []
        if groups:
            stay = self._drop(groups, masks, fraction, state)
            self._grow(groups, masks, stay, state)
        changed = iter(stay)
        kept = [next(changed) if moves else mask for mask, moves in zip(alive, moving, strict=True)]
        return Proposal(self._renew(kept, alive), {"drop_fraction": fraction})

    def _renew(self, kept: list[Tensor], alive: list[Tensor]) -> list[Change]:
        """The changes to these masks of all groups, of which some were kept."""
        return self._changes(alive)

    def _moving(self) -> list[bool]:
        """Whether the groups of each division are dropped and grown now."""
        trained = self._trained()
        if any(trained) and getattr(self._grow_by(), "needs_gradient", False):
            # A layer that took no part in this step (a branch, an expert) has nothing to grow by and keeps its mask.
            graded = [all(t.parameter.grad is not None for t in groups.tensors) for groups in self.groups]
            trained = [each and has for each, has in zip(trained, graded, strict=True)]
            if not any(trained):
                raise ConfigurationError(
                    f"{self.name}: no weight has a gradient to grow by; update between backward and zero_grad"
                )
        return trained

    def _drop(self, groups: list[Groups], alive: list[Tensor], fraction: float, state: StateOf) -> list[Tensor]:
        """New masks of what stays of these."""
        return self._without(fraction, self._drop_by(), groups, alive, state)

    def _without(
        self, fraction: float, score: Score, groups: list[Groups], alive: list[Tensor], state: StateOf
    ) -> list[Tensor]:
        """New masks of what is left of these where such a fraction of each goes, the lowest in a score."""
        kept = [mask.clone() for mask in alive]
        active = self._counts(groups, alive)
        rooms = self._rooms(groups, active)
        drops = [min(portion(fraction, now), room) for now, room in zip(active, rooms, strict=True)]
        if any(drops):
            index, ranked = scores_of_active(groups, kept, score, state, self.p)
            drop(groups, kept, index, ranked, drops)
        return kept

    def _rooms(self, groups: list[Groups], active: list[int]) -> list[int]:
        """How many groups of each division may be dropped, so that as many others can grow."""
        if self._grow_by() is not None:  # what was just dropped may grow, and so stay
            return active
        return [each.total - now for each, now in zip(groups, active, strict=True)]

    def _grow(self, groups: list[Groups], alive: list[Tensor], kept: list[Tensor], state: StateOf) -> None:
        """Make of these masks those with as many active, of which some were kept; in place."""
        score = self._grow_by()
        was, now = self._counts(groups, alive), self._counts(groups, kept)
        # What was just dropped does not grow at random.
        taken, full = (was, alive) if score is None else (now, kept)
        free, rooms = [mask == 0 for mask in full], [each.total - n for each, n in zip(groups, taken, strict=True)]
        wanted = self._wanted(was, now, rooms)
        for mask, stays in zip(alive, kept, strict=True):
            mask.copy_(stays)
        if wanted if isinstance(wanted, int) else any(wanted):
            grow(groups, alive, free, rooms, wanted, self._growth(groups, wanted, alive, state))

    def _wanted(self, was: list[int], now: list[int], rooms: list[int]) -> list[int] | int:
        """How many groups of each division grow, or of all together."""
        return [first - left for first, left in zip(was, now, strict=True)]

    def _counts(self, groups: list[Groups], masks: list[Tensor]) -> list[int]:
        return count_over_shards(groups, [mask.count_nonzero() for mask in masks])

    def _growth(
        self, groups: Sequence[Groups], counts: Sequence[int] | int, alive: Sequence[Tensor], state: StateOf
    ) -> torch.Generator | list[Tensor]:
        score = self._grow_by()
        if score is None:
            return self.generator
        counts = [counts] * len(groups) if isinstance(counts, int) else counts
        return [
            each.scores(score, state, self.p) if count else torch.zeros(len(mask), device=mask.device)
            for each, mask, count in zip(groups, alive, counts, strict=True)
        ]
