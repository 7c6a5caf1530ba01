"""What makes a weight worth keeping or growing: functions from a `View` of a weight to a score for every weight.

A score is called with a `View` and returns a *new* tensor of the view's shape; larger means more worth. A view may
hold only some weights of a tensor (those that are ranked), so a score works weight by weight. A score that reads
gradients says so by an attribute `needs_gradient = True`, one that can be negative by `signed = True`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gossamer.checks import closest
from gossamer.errors import ConfigurationError
from gossamer.masks import MaskedTensor
from gossamer.strengths import coactivation, correlation
from gossamer.targets import local

__all__ = [
    "SCORES",
    "Score",
    "StateOf",
    "View",
    "as_score",
    "coactivation",
    "correlation",
    "gradient",
    "magnitude",
    "momentum",
    "movement",
]

Score = Callable[["View"], Tensor]

StateOf = Callable[[MaskedTensor], Mapping[str, Any]]
"""Gives the optimizer's state of a tensor's parameter; empty before its first step."""


class View:
    """What a score may look at, for all weights of a tensor or for those at `index` (flat, on this rank)."""

    def __init__(self, tensor: MaskedTensor, state: Mapping[str, Any], index: Tensor | None = None) -> None:
        self._tensor = tensor
        self._state = state
        self._index = index

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self._tensor.name

    @property
    def weight(self) -> Tensor:
        """The weights."""
        return self.take(self._tensor.values())

    @property
    def gradient(self) -> Tensor:
        """The gradient of the coming step, dense, accumulated and reduced over ranks.

        Raises:
            ConfigurationError: There is none.
        """
        self._refuse_computed()
        gradient = self._tensor.parameter.grad
        if gradient is None:
            raise ConfigurationError(
                f"{self.name}: has no gradient, which its score needs: it took no part in the last backward, or there "
                "was none; leave it out of targets, or score by 'magnitude'"
            )
        return self.take(gradient)

    @property
    def momentum(self) -> Tensor:
        """The optimizer's running mean of gradients.

        Raises:
            ConfigurationError: The optimizer keeps none, or has made no step yet.
        """
        self._refuse_computed()
        for key in ("exp_avg", "momentum_buffer"):
            if self._state.get(key) is not None:
                return self.take(self._state[key])
        raise ConfigurationError(
            f"{self.name}: score 'momentum' needs an optimizer that keeps a running mean of gradients (SGD with "
            f"momentum, Adam and its kin) and has made a step; the state here has {sorted(self._state) or 'nothing'}"
        )

    def _refuse_computed(self) -> None:
        if self._tensor.computed is not None:
            raise ConfigurationError(
                f"{self.name}: is computed from other numbers, and no gradient or momentum of its own is kept; score "
                "by 'magnitude', grow at random (SET, DSR), or leave it out of targets"
            )

    def take(self, tensor: Tensor) -> Tensor:
        """Of a tensor with a value for each weight, those that belong to the weights of this view.

        A tensor sharded as the weight is; of a whole one `gossamer.masks.rows_like` gives this rank's part.
        """
        part = local(tensor)
        return part if self._index is None else part.reshape(-1)[self._index]


def magnitude(view: View) -> Tensor:
    """`|w|`."""
    return view.weight.abs()


def gradient(view: View) -> Tensor:
    """`|∂L/∂w|`, the dense gradient, also of pruned weights (RigL: Evci et al., 2020)."""
    return view.gradient.abs()


def momentum(view: View) -> Tensor:
    """`|m|`, the optimizer's running mean of gradients (SNFS: Dettmers & Zettlemoyer, 2019)."""
    return view.momentum.abs()


def movement(view: View) -> Tensor:
    """`-w · ∂L/∂w` at the coming step: positive where a step moves a weight away from zero (Sanh et al., 2020, eq. 4).

    The paper sums this over training; a one-step score needs no buffer.
    """
    return view.weight.mul(view.gradient).neg_()


for _score in (gradient, movement):
    _score.needs_gradient = True  # type: ignore[attr-defined]
movement.signed = True  # type: ignore[attr-defined]

SCORES: dict[str, Score] = {
    "magnitude": magnitude,
    "gradient": gradient,
    "momentum": momentum,
    "movement": movement,
}


def as_score(score: str | Score, name: str = "score", more: Mapping[str, Score] | None = None) -> Score:
    """Look up a score by name; a function is returned as it is.

    Args:
        score: A name or a function.
        name: What the argument is called in messages.
        more: Scores that have names beside `SCORES`.

    Raises:
        ConfigurationError: An unknown name.
    """
    if callable(score):
        return score
    known = SCORES | dict(more or {})
    if not isinstance(score, str) or score not in known:
        raise ConfigurationError(
            f"{name}: got {score!r}; allowed are {', '.join(map(repr, known))}, or a function of a View"
            + closest(str(score), known)
        )
    return known[score]
