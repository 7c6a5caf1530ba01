"""Drop and grow: every so often the least worthy weights of each tensor make room for as many others.

SET and RigL are this with different ways to grow; the budget of every tensor stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import compress
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.checks import check_number
from gossamer.errors import ConfigurationError
from gossamer.groups import Groups
from gossamer.masks import count_over_shards
from gossamer.method import Proposal, StateOf
from gossamer.schedule import Schedule, as_schedule
from gossamer.scores import Score, as_score
from gossamer.weights.masked import MaskMethod
from gossamer.weights.ranking import drop, grow, scores_of_active


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

    regrow_dropped: ClassVar[bool] = False
    """Whether a group may be dropped and grown in one update, and so stay."""

    def _check(self) -> None:
        super()._check()
        self._schedule = as_schedule(self.every, until=self.until)
        check_number("drop_fraction", self.drop_fraction, 0, 1, open_high=True)
        self._scores()

    def _drop_by(self) -> Score:
        """What is dropped is smallest in this score."""
        return as_score(self.drop_score, "drop_score")

    def _grow_by(self) -> Score | None:
        """What is grown is largest in this score; at random where it is `None`."""
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
        every, moving = self._alive(), self._moving()
        self._replace(list(compress(self.groups, moving)), list(compress(every, moving)), fraction, state)
        return Proposal(self._changes(every), {"drop_fraction": fraction})

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

    def _replace(self, groups: list[Groups], alive: list[Tensor], fraction: float, state: StateOf) -> None:
        """Drop and grow in these masks of groups, in place."""
        active = count_over_shards(groups, [mask.count_nonzero() for mask in alive])
        drops = [int(fraction * count) for count in active]
        rooms = [each.total - count for each, count in zip(groups, active, strict=True)]
        if not self.regrow_dropped:
            drops = [min(count, room) for count, room in zip(drops, rooms, strict=True)]
        if any(drops):
            free = [mask == 0 for mask in alive]
            index, scores = scores_of_active(groups, alive, self._drop_by(), state, self.p)
            drop(groups, alive, index, scores, drops)
            if self.regrow_dropped:
                free = [mask == 0 for mask in alive]
                rooms = [room + count for room, count in zip(rooms, drops, strict=True)]
            grow(groups, alive, free, rooms, drops, self._growth(groups, drops, alive, state))

    def _growth(
        self, groups: Sequence[Groups], counts: Sequence[int], alive: Sequence[Tensor], state: StateOf
    ) -> torch.Generator | list[Tensor]:
        score = self._grow_by()
        if score is None:
            return self.generator
        return [
            each.scores(score, state, self.p) if count else torch.zeros(len(mask), device=mask.device)
            for each, mask, count in zip(groups, alive, counts, strict=True)
        ]
