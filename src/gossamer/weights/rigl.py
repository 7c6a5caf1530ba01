"""RigL: growth by the dense gradient."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from gossamer.checks import check_boolean
from gossamer.errors import ConfigurationError
from gossamer.method import Proposal, StateOf
from gossamer.schedule import cosine_decay
from gossamer.scores import Score, gradient
from gossamer.weights.drop_grow import DropGrow


@dataclass(eq=False)
class RigL(DropGrow):
    """The rigged lottery: drop the smallest weights, grow those with the largest gradient (Evci et al., 2020, Alg. 1).

    The drop fraction decays as `α/2 (1 + cos(π t/T))` with `T = until` or the end of the schedule (the paper: 75 % of
    training), and stays as it is where there is no end. The gradient is the one of the coming step:
    dense, averaged over accumulated micro-batches and over ranks. A weight that is dropped and grown in the same
    update stays as it is. See `DropGrow` and `MaskMethod` for the other arguments.

    Args:
        skip_step: Whether the optimizer's step, of all parameters, is left out at updates, as in the paper.
    """

    _: KW_ONLY
    skip_step: bool = True

    name = "rigl"

    def _grow_by(self) -> Score | None:
        """See `DropGrow._grow_by`."""
        return gradient

    def _check(self) -> None:
        super()._check()
        check_boolean("skip_step", self.skip_step)
        if self.skip_step and self._schedule.shortest == 1:
            raise ConfigurationError(
                f"every={self.every!r} with skip_step=True leaves out every step; give a longer period"
            )

    def update(self, step: int, state: StateOf) -> Proposal:
        """See `Method.update`."""
        proposal = super().update(step, state)
        proposal.skip_step = self.skip_step and any(self._trained())
        return proposal

    def fraction(self, step: int) -> float:
        """See `DropGrow.fraction`."""
        return cosine_decay(step, self._schedule.end, self.drop_fraction)
