"""Iterative magnitude pruning with rewinding: the lottery-ticket baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from gossamer.distribution import Distribution
from gossamer.method import Masks, Proposal, StateOf
from gossamer.rewind import Rounds
from gossamer.weights.pruning import PruningMethod


@dataclass(eq=False)
class IMP(PruningMethod):
    """Train, prune the lowest scores, rewind what is left, and again (Frankle & Carbin, 2019; Frankle et al., 2020).

    Each of `rounds` rounds prunes the same fraction of what is left, so that the last one reaches the sparsity; after
    each, weights, buffers and all else go back to the rewind point, and optimizers begin anew. Training then goes on
    with the ticket, usually for as long as a round: a run has `rounds + 1` times `length` steps.

    A round ends with the first step after it: that step is left out, since its gradients are of the model before.

    Args:
        length: Optimizer steps of a round.
        rounds: How often it is pruned, at least 1.
        rewind: Steps of the first round after which all is kept, from 0 on (the first weights); `None` to go on with
            the weights as they are.

    See `PruningMethod` for the other arguments; the distribution is `"global"` unless another is given.
    """

    _: KW_ONLY
    length: int
    rounds: int = 3
    rewind: int | None = 0
    distribution: Distribution = "global"

    name = "imp"
    steps = ("length", "rewind")

    def _check(self) -> None:
        super()._check()
        Rounds(self.length, self.rounds, self.rewind)

    def bind(self, model: nn.Module, masks: Masks) -> None:
        """See `Method.bind`."""
        super().bind(model, masks)
        self._model = model
        self._rounds = Rounds(self.length, self.rounds, self.rewind)

    def install(self) -> None:
        """See `Method.install`."""
        super().install()
        self._rounds.reach(0, self._model)

    def check_run(self, steps: int) -> None:
        """See `Method.check_run`."""
        self._rounds.check_run(steps)

    def due(self, step: int) -> bool:
        """See `Method.due`."""
        return self._rounds.ended(step)

    def update(self, step: int, state: StateOf) -> Proposal:
        """See `Method.update`: ends the present round, if it is not the last."""
        if self._rounds.done == self.rounds:
            return Proposal([])
        restarted = [] if self.rewind is None else self._rounds.check_restore(self._model)
        alive = self._alive()
        self._prune(alive, self._left(self._rounds.done + 1), state)
        self._rounds.end()
        write = None if self.rewind is None else lambda: self._rounds.restore(self._model)
        return Proposal(self._changes(alive), {"round": self._rounds.done}, True, restarted, write)

    def after_step(self, step: int) -> Proposal | None:
        """See `Method.after_step`: keeps the rewind point."""
        self._rounds.reach(step, self._model)
        return None

    def _left(self, done: int) -> Fraction:
        """The fraction of the way to the sparsity that is left after so many rounds, each of which keeps as much."""
        if done >= self.rounds:
            return Fraction(0)
        first, last = sum(self._from), sum(self._to)
        active = first * (last / first) ** (done / self.rounds)
        return Fraction(active - last) / (first - last) if first > last else Fraction(0)

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return {name: value for name, value in super().settings().items() if name != "rounds"}

    def config(self) -> dict[str, Any]:
        """See `Method.config`."""
        return super().config() | {"rounds": self.rounds}

    def state_dict(self) -> dict[str, Any]:
        """See `Method.state_dict`."""
        return super().state_dict() | self._rounds.state_dict()

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """See `Method.check_state`."""
        super().check_state(state, masks)
        self._rounds.check_state(self.name, state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        super().load_state_dict(state)
        self._rounds.load_state_dict(state)
