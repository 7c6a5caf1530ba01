"""Gradual magnitude pruning: from dense to the asked sparsity along a cubic ramp."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from fractions import Fraction

from torch import Tensor

from gossamer.checks import check_integer, check_number
from gossamer.errors import ConfigurationError
from gossamer.method import Proposal, StateOf
from gossamer.schedule import Periodic, cubic_ramp
from gossamer.scores import as_score
from gossamer.weights.pruning import PruningMethod
from gossamer.weights.ranking import prune_to


@dataclass(eq=False)
class GMP(PruningMethod):
    """Prune the lowest scores every so often until the sparsity is reached (Zhu & Gupta, 2017, eq. 1).

    The number of active groups follows the cubic ramp `s_t = s_f + (s_i - s_f)(1 - (t - t_0)/(t_1 - t_0))³`; the
    last pruning is at step `end`, whatever `every` is. A pruned weight does not come back.

    Args:
        end: Step at which the sparsity is reached.
        begin: Step after which pruning starts.
        every: Steps between prunings.
        initial_sparsity: Sparsity pruned to when attached, in [0, sparsity].

    See `PruningMethod` for the other arguments.
    """

    _: KW_ONLY
    end: int
    begin: int = 0
    every: int = 100
    initial_sparsity: float = 0.0

    name = "gmp"

    def _check(self) -> None:
        super()._check()
        check_integer("begin", self.begin, at_least=0)
        check_integer("end", self.end, at_least=self.begin + 1)
        self._schedule = Periodic(self.every, self.begin, self.end)
        check_number("initial_sparsity", self.initial_sparsity, 0, 1, open_high=True)
        if self.sparsity is not None and self.initial_sparsity > self.sparsity:
            raise ConfigurationError(
                f"initial_sparsity={self.initial_sparsity} is above sparsity={self.sparsity}; give at most that"
            )

    def due(self, step: int) -> bool:
        """See `Method.due`."""
        # After the end where something is left to prune: a run resumed with an earlier end, or weights frozen by then.
        late = step >= self.end and not self._ended and (step - self.end) % self.every == 0
        return self._schedule.due(step) or late

    def update(self, step: int, state: StateOf) -> Proposal:
        """See `Method.update`."""
        alive = self._alive()
        self._ended = step >= self.end and all(self._trained())
        self._prune(alive, cubic_ramp(step, self.begin, self.end, Fraction(1), Fraction(0)), state)
        return Proposal(self._changes(alive))

    def _prune_first(self, masks: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
        if not self.initial_sparsity:
            return masks
        self.masks_from_weights = True
        if self.groups[0].cell is not None:
            raise ConfigurationError(
                f"initial_sparsity={self.initial_sparsity}: under {self.groups[0].structure} gradual pruning "
                "starts dense; leave it out"
            )
        alive = [each for each, _ in masks]
        counts = self._counts(self.initial_sparsity)
        active = prune_to(self.groups, alive, counts, as_score(self.score), lambda _: {}, self.p)
        return list(zip(alive, active, strict=True))
