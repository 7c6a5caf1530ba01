"""Drop and grow: every so often the least worthy weights of each tensor make room for as many others.

SET and RigL are this with different ways to grow; the budget of every tensor stays as it was.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.masks import largest, sample, smallest
from gossamer.method import Proposal, StateOf
from gossamer.schedule import Schedule, as_schedule, check_number
from gossamer.scores import Score, as_score, group_scores
from gossamer.weights.masked import MaskMethod


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

    grow_score: ClassVar[str | None] = None
    """What is grown is largest in this score; at random where it is `None`."""

    regrow_dropped: ClassVar[bool] = False
    """Whether a group may be dropped and grown in one update, and so stay."""

    def _check(self) -> None:
        super()._check()
        self._schedule = as_schedule(self.every, until=self.until)
        check_number("drop_fraction", self.drop_fraction, 0, 1, open_high=True)
        as_score(self.drop_score)

    def due(self, step: int) -> bool:
        """See `Method.due`."""
        return self._schedule.due(step) and self.fraction(step) > 0

    def fraction(self, step: int) -> float:
        """Fraction of active groups to drop at a step."""
        return self.drop_fraction

    def update(self, step: int, state: StateOf) -> Proposal:
        """See `Method.update`."""
        fraction = self.fraction(step)
        kept = self._alive()
        active = self._active()
        drops = [int(fraction * count) for count in active]
        if self.grow_score is not None and getattr(as_score(self.grow_score), "needs_gradient", False):
            # A layer that took no part in this step (a branch, an expert) has nothing to grow by and keeps its mask.
            trained = [tensor.parameter.grad is not None for tensor in self.tensors]
            if not any(trained):
                raise ConfigurationError(
                    f"{self.name}: no weight has a gradient to grow by; update between backward and zero_grad"
                )
            drops = [drop if has else 0 for drop, has in zip(drops, trained, strict=True)]
        if not self.regrow_dropped:
            rooms = [tensor.groups - count for tensor, count in zip(self.tensors, active, strict=True)]
            drops = [min(drop, room) for drop, room in zip(drops, rooms, strict=True)]
        empty = [alive == 0 for alive in kept]
        dropped = self._drop(kept, drops, state)
        if self.regrow_dropped:
            empty = [alive == 0 for alive in kept]
            rooms = [
                tensor.groups - count + drop for tensor, count, drop in zip(self.tensors, active, drops, strict=True)
            ]
        self._grow(kept, dropped, empty, rooms, drops, state)
        changes = list(zip(self.tensors, kept, active, strict=True))
        return Proposal(changes, {"drop_fraction": fraction})

    def _drop(self, kept: list[Tensor], counts: list[int], state: StateOf) -> list[Tensor]:
        active = [(alive != 0).nonzero().view(-1) for alive in kept]
        score = as_score(self.drop_score)
        scores = [
            group_scores(tensor, score, state(tensor), self.p, index)
            for tensor, index in zip(self.tensors, active, strict=True)
        ]
        chosen = smallest(self.tensors, scores, counts)
        dropped = [index[choice] for index, choice in zip(active, chosen, strict=True)]
        for alive, index in zip(kept, dropped, strict=True):
            alive.index_fill_(0, index, 0)
        return dropped

    def _grow(
        self,
        kept: list[Tensor],
        dropped: list[Tensor],
        empty: list[Tensor],
        rooms: list[int],
        counts: list[int],
        state: StateOf,
    ) -> None:
        scores: list[Tensor] | None = None
        if self.grow_score is not None:
            grow = as_score(self.grow_score)
            scores = [
                group_scores(tensor, grow, state(tensor), self.p)
                if count
                else torch.zeros(len(alive), device=alive.device)
                for tensor, alive, count in zip(self.tensors, kept, counts, strict=True)
            ]
        if self.tensors[0].structure.cell is not None:
            for i, alive in enumerate(kept):
                last = dropped[i][:0] if self.regrow_dropped else dropped[i]
                kept[i] = self._refill(i, alive, last, None if scores is None else scores[i])
            return
        if scores is None:
            grown = sample(self.tensors, empty, rooms, counts, self.generator)
        else:
            for score, free in zip(scores, empty, strict=True):
                score.masked_fill_(~free, -torch.inf)
            grown = largest(self.tensors, scores, counts)
        for alive, index in zip(kept, grown, strict=True):
            alive.index_fill_(0, index, -1)
