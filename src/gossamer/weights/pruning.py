"""What pruning by rank shares: from dense to the asked sparsity in several prunings, after which nothing grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from itertools import compress
from math import floor
from typing import Any

from torch import Tensor

from gossamer.distribution import Distribution, allocate, apportion_groups
from gossamer.errors import ConfigurationError, StateError
from gossamer.method import StateOf
from gossamer.scores import Score, as_score
from gossamer.weights.masked import MaskMethod
from gossamer.weights.ranking import prune_to


@dataclass(eq=False)
class PruningMethod(MaskMethod):
    """A method that prunes the lowest scores in several steps. A pruned weight does not come back.

    Args:
        score: What is pruned is smallest in this score.
        distribution: Also `"global"`: all weights are ranked together, and each tensor keeps at least one group.

    See `MaskMethod` for the other arguments.
    """

    _: KW_ONLY
    score: str | Score = "magnitude"
    distribution: Distribution = "uniform"

    def _check(self) -> None:
        super()._check()
        as_score(self.score)

    def _scores(self) -> list[Score]:
        return [as_score(self.score)]

    def _prune(self, alive: list[Tensor], left: Fraction, state: StateOf) -> None:
        """Prune masks of groups to where this fraction of the way is left; weights that are frozen keep theirs."""
        trained = self._trained()
        active = self._active(alive)
        counts = self._counts_at(left, active)
        if len(counts) == 1 and not all(trained):
            # The others keep their share, or more where a frozen layer has less than its own.
            totals = [groups.total for groups in self.groups]
            frozen = sum(now for now, each in zip(active, trained, strict=True) if not each)
            share = counts[0] * sum(compress(totals, trained)) // sum(totals)
            counts = [max(share, counts[0] - frozen)]
        elif len(counts) > 1:
            counts = list(compress(counts, trained))
        if any(trained):
            groups, masks = list(compress(self.groups, trained)), list(compress(alive, trained))
            prune_to(groups, masks, counts, as_score(self.score), state, self.p)

    def _start(self, given: list[tuple[Tensor, int]] | None) -> list[tuple[Tensor, int]]:
        masks = given or [(groups.alive(), groups.total) for groups in self.groups]
        self._ended = False  # whether nothing is left to prune
        self._to = self._counts(self.sparsity)
        if given is None:
            masks = self._prune_first(masks)
        self._from = [active for _, active in masks]
        if len(self._to) == 1:
            self._from = [sum(self._from)]
        for groups, first, final in zip(self.groups, self._from, self._to, strict=False):
            if first < final:
                raise ConfigurationError(
                    f"{groups.name} starts with {first} active groups, fewer than the {final} of the "
                    "end; choose a higher sparsity, or leave this weight out of targets"
                )
        return masks

    def _prune_first(self, masks: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
        """The masks that pruning starts from, with their active counts, where none were given."""
        return masks

    def _counts_at(self, left: Fraction, active: list[int]) -> list[int]:
        """Active groups where this fraction of the way is left: in all the largest number of weights not above it."""
        wanted = [final + (first - final) * left for first, final in zip(self._from, self._to, strict=True)]
        if len(wanted) < len(self.groups):
            return [floor(wanted[0])]
        if self.groups[0].cell is not None:
            return [floor(count) for count in wanted]
        # What is above the end is split, so that no tensor falls below its end by rounding.
        sizes = [groups.size for groups in self.groups]
        above = [(count - final) * size for count, final, size in zip(wanted, self._to, sizes, strict=True)]
        rooms = [max(0, now - final) for now, final in zip(active, self._to, strict=True)]
        shares = apportion_groups(floor(sum(above)), above, rooms, sizes)
        return [final + share for final, share in zip(self._to, shares, strict=True)]

    def _counts(self, sparsity: float | None) -> list[int]:
        """Active groups of each tensor, or of all together for a global ranking."""
        active = self._active_weights(sparsity)
        if self.distribution != "global":
            return allocate(self.distribution, self.groups, active)
        if self.groups[0].cell is not None:  # leaves nothing to rank across cells
            return allocate("uniform", self.groups, active)
        if len(sizes := {groups.size for groups in self.groups}) > 1:
            raise ConfigurationError(
                f"distribution='global' ranks groups of one size, but those of {self.groups[0].structure} have sizes "
                f"{sorted(sizes)}; choose 'uniform', 'er', 'erk' or an explicit mapping"
            )
        if (most := active // self.groups[0].size) < len(self.groups):
            raise ConfigurationError(
                f"{active} active weights are fewer than one group for each of the {len(self.groups)} tensors; choose "
                "a lower sparsity or fewer targets"
            )
        return [most]

    def _budget_of(self, active: list[int]) -> int:
        return self._weights(self._to) if len(self._to) == len(active) else self._to[0] * self.groups[0].size

    def _admits(self, active: int, budget: int) -> bool:
        return active >= budget

    def state_dict(self) -> dict[str, Any]:
        """See `Method.state_dict`."""
        return super().state_dict() | {"first": self._from, "ended": self._ended}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """See `Method.check_state`."""
        super().check_state(state, masks)
        first = state.get("first")
        most = sum(groups.total for groups in self.groups)
        listed = first if isinstance(first, list) else []
        if len(listed) != len(self._from) or any(type(n) is not int or not 0 < n <= most for n in listed):
            raise StateError(
                f"{self.name}: the saved start of pruning is {first!r}, expected the active groups of "
                f"{len(self._from)} tensors; the file is damaged, or its distribution was not {self.distribution!r}"
            )
        if not isinstance(state.get("ended"), bool):
            raise StateError(
                f"{self.name}: whether pruning has ended is saved as {state.get('ended')!r}, expected True or False; "
                "the file is damaged"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        super().load_state_dict(state)
        self._from = list(state["first"])
        self._ended = state["ended"]
