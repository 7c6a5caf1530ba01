"""Iterative magnitude pruning with rewinding: the lottery-ticket baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    Weights that are frozen then keep their masks and values. Where they have more than their share after the last
    round, further ones follow until they are trained again at the end of one, which prunes and rewinds once more.

    Args:
        length: Optimizer steps of a round.
        rounds: How often it is pruned, at least 1.
        rewind: Steps of the first round after which all is kept, from 0 on (what the model is when its optimizer is
            followed); `None` to go on with the weights as they are.

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

    def followed(self) -> None:
        """See `Method.followed`."""
        self._rounds.followed(self._model)

    def check_run(self, steps: int) -> None:
        """See `Method.check_run`."""
        self._rounds.check_run(steps, more=1)

    def due(self, step: int) -> bool:
        """See `Method.due`."""
        # After the rounds too where something is left to prune: weights that were frozen when the last one ended.
        return not self._ended and self._rounds.over(step)

    def update(self, step: int, state: StateOf) -> Proposal:
        """See `Method.update`: ends the present round; after the last one, if there is something left to prune."""
        over = self._rounds.done == self.rounds
        alive = self._alive()
        before = self._active(alive)
        self._prune(alive, self._left(self._rounds.done + 1), state)
        self._rounds.end()
        self._ended = self._rounds.done == self.rounds and all(self._trained())
        proposal = Proposal(self._changes(alive), {"round": self._rounds.done})
        if over and self._active(alive) == before:
            return proposal
        if self.rewind is not None:
            back = self._rounds.back(self._model)
            proposal.restarted, proposal.write = back.restarted, back.write
        proposal.skip_step = True
        return proposal

    def phases(self) -> dict[str, Callable[..., Proposal]]:
        """See `Method.phases`."""
        return self._rounds.phases(self._model)

    def after_step(self, step: int) -> None:
        """See `Method.after_step`: keeps the rewind point."""
        self._rounds.reach(step, self._model)

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
        self._rounds.check_state(self.name, state, self._model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        super().load_state_dict(state)
        self._rounds.load_state_dict(state)
