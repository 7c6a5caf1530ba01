"""What makes a weight worth keeping or growing: functions from a `View` of a weight to a score for every weight.

A score is called with a `View` and returns a *new* tensor of the view's shape; larger means more worth. A view may
hold only some weights of a tensor (those that are ranked), so a score works weight by weight. A score that reads
gradients says so by an attribute `needs_gradient = True`, one that can be negative by `signed = True`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.groups import Groups
from gossamer.masks import MaskedTensor
from gossamer.structure import Element
from gossamer.targets import closest, local

Score = Callable[["View"], Tensor]


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
        return self._take(self._tensor.parameter)

    @property
    def gradient(self) -> Tensor:
        """The gradient of the coming step, dense, accumulated and reduced over ranks.

        Raises:
            ConfigurationError: There is none.
        """
        gradient = self._tensor.parameter.grad
        if gradient is None:
            raise ConfigurationError(
                f"{self.name}: has no gradient, which its score needs: it took no part in the last backward, or there "
                "was none; leave it out of targets, or score by 'magnitude'"
            )
        return self._take(gradient)

    @property
    def momentum(self) -> Tensor:
        """The optimizer's running mean of gradients.

        Raises:
            ConfigurationError: The optimizer keeps none, or has made no step yet.
        """
        for key in ("exp_avg", "momentum_buffer"):
            if self._state.get(key) is not None:
                return self._take(self._state[key])
        raise ConfigurationError(
            f"{self.name}: score 'momentum' needs an optimizer that keeps a running mean of gradients (SGD with "
            f"momentum, Adam and its kin) and has made a step; the state here has {sorted(self._state) or 'nothing'}"
        )

    def _take(self, tensor: Tensor) -> Tensor:
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


def as_score(score: str | Score) -> Score:
    """Look up a score by name; a function is returned as it is.

    Raises:
        ConfigurationError: An unknown name.
    """
    if callable(score):
        return score
    if score not in SCORES:
        raise ConfigurationError(
            f"score: got {score!r}; allowed are {', '.join(map(repr, SCORES))}, or a function of a View"
            + closest(str(score), SCORES)
        )
    return SCORES[score]


def group_scores(
    groups: Groups, score: Score, state: Mapping[str, Any], p: float = 2.0, index: Tensor | None = None
) -> Tensor:
    """Scores of groups: the Lp-norm of the scores of their weights, their sum where the score is `signed`.

    Args:
        groups: The groups of a weight.
        score: The score of single weights.
        state: The optimizer's state of this parameter (may be empty).
        p: The norm's order.
        index: Groups wanted, int64 `(n,)`; `None` for all on this rank.

    Returns:
        New tensor `(n,)`.
    """
    tensor = groups.tensor
    if isinstance(tensor.structure, Element):
        return _own(score(View(tensor, state, index)), tensor, index).reshape(-1)
    whole = _own(score(View(tensor, state)), tensor, None)
    values = tensor.structure.reduce(whole, tensor.input_dim, None if getattr(score, "signed", False) else p)
    return values if index is None else values[index]


def _own(values: Tensor, tensor: MaskedTensor, index: Tensor | None) -> Tensor:
    """Check a score's shape, and copy it where it shares memory with the weight or its gradient: rankings overwrite."""
    expected = tensor.mask.shape if index is None else index.shape
    if values.shape != expected:
        raise ConfigurationError(
            f"{tensor.name}: its score has shape {tuple(values.shape)}, expected {tuple(expected)}: one for each "
            "weight of the View"
        )
    sources = [each for each in (tensor.parameter, tensor.parameter.grad) if each is not None]
    shared = {local(each).untyped_storage().data_ptr() for each in sources}
    return values.clone() if values.untyped_storage().data_ptr() in shared else values
