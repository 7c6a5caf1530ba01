"""Soft threshold reparameterization: what is below a threshold that each layer learns is zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.checks import check_number
from gossamer.errors import ConfigurationError
from gossamer.groups import Groups, Spread
from gossamer.masks import rows_like
from gossamer.nn.gates import SoftThreshold
from gossamer.structure import Element, as_structure
from gossamer.targets import whole
from gossamer.weights.learned import LearnedMethod, Scored, whole_sums


@dataclass(eq=False)
class STR(LearnedMethod):
    """Soft threshold reparameterization: each weight acts as `sign(w)·relu(|w| - σ(s))` (Kusupati et al., 2020, eq. 3).

    The score `s` of a tensor is trained with its weights, and drawn towards 0, where the threshold is 0.5, by the term
    `λ/2·s²` of `Sparsity.penalty()`; the authors have the optimizer's weight decay do that. Zeros are exact all along,
    and a weight returns when the threshold falls or the weight grows past it.

    Args:
        initial_value: First score, at most 0. The authors start where σ vanishes and let the decay do the rest; from
            -10 the threshold is 4.5e-5 at once.
        penalty: The factor λ, at least 0. λ, the first score and the length of training say how sparse it becomes.

    See `LearnedMethod` for the other arguments; `structure` is `"element"`.

    Raises:
        ConfigurationError: A value out of range, when the method is made.
    """

    initial_value: float = -10.0
    penalty: float = 1e-4
    _: KW_ONLY

    name = "str"
    steps = ()

    def _check(self) -> None:
        super()._check()
        check_number("initial_value", self.initial_value, -1e6, 0)
        check_number("penalty", self.penalty, 0, float("inf"), open_high=True)
        if not isinstance(as_structure(self.structure), Element):
            raise ConfigurationError(f"structure: got {self.structure!r}; a threshold is for single weights, 'element'")

    def _divide(self, groups: Sequence[Groups]) -> list[Scored]:
        return [Scored(each.name, each.size * each.total, 1, None, each.spreads(), False) for each in groups]

    def _first_score(self) -> float:
        return float(self.initial_value)

    def _gates(
        self, scores: Sequence[nn.Parameter], spreads: Sequence[Spread], cells: Sequence[tuple[int, int] | None]
    ) -> SoftThreshold:
        return SoftThreshold(scores)

    @property
    def penalized(self) -> bool:  # type: ignore[override]
        """See `Method.penalized`."""
        return self.penalty != 0

    def loss_term(self) -> Tensor | None:
        """See `Method.loss_term`."""
        return self.penalty / 2 * whole_sums([each.scores for each in self.scored], torch.square).sum()

    def finalize(self) -> None:
        """See `Method.finalize`: weights as they act."""
        self._put_under_masks([rows_like(mask.to(torch.int8).neg(), t.parameter) for t, mask in self._alive()])
        super().finalize()

    def _learned(self) -> list[dict[str, Any]]:
        """Of every tensor the threshold, and how many weights are above it."""
        return [
            {"name": target.name, "threshold": float(whole(each.scores).sigmoid()), "above": int(mask.sum())}
            for each, (target, mask) in zip(self.scored, self._alive(), strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        """See `Method.metrics`: the fraction of weights above their thresholds."""
        if not self._placed():
            return {}
        return {"hard_density": sum(row["above"] for row in self._learned()) / self._total()}

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return {"initial_value": self.initial_value, "penalty": self.penalty, "lr": self.lr}

    def _alive(self) -> list[tuple[Any, Tensor]]:
        """Which weights of every target are not 0, bool, whole."""
        return [(target, self._gated(target) != 0) for target in self._claimed]
