"""Parametrizations that multiply weights by learned gates: soft masks, hard-concrete gates, soft thresholds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEPT = 1e30
"""The score of a weight that is to stay for good; of one that is suppressed for good it is the negative.

At it masks are exactly 1 and 0 at every temperature, and no gradient reaches the score. A step of an optimizer would
have to be 4e22 long to change it at all, in single precision.
"""


def lasting(dtype: torch.dtype) -> float:
    """`KEPT`, or what of it a type of numbers can hold."""
    return min(KEPT, torch.finfo(dtype).max / 4)


def soft_mask(scores: Tensor, temperature: Tensor | float) -> Tensor:
    """`σ(β·s)` (Savarese et al., 2020, eq. 6), with 0 for what is so small that a weight under it might be denormal.

    Args:
        scores: `s`, any shape.
        temperature: `β`, above 0.
    """
    mask = torch.sigmoid(temperature * scores)
    return F.threshold(mask, max(torch.finfo(mask.dtype).tiny, 1e-18), 0.0)


def code_scale(initial: float) -> float:
    """`1 / σ(s₀)`, what the authors' code multiplies masks by, so that they begin at 1."""
    return 1 + math.exp(-initial)


def suppress(scores: Tensor, temperature: Tensor | float, initial: float, kept: Tensor | None = None) -> Tensor:
    """Scores for the next round: `min(β·s, s₀)` where `s > 0`, and of all others what never comes back.

    The paper (Savarese et al., 2020, section 4.2) has the minimum for all; a score just below 0 could then rise again.

    Args:
        scores: `s`, any shape.
        temperature: `β` at the end of the round.
        initial: `s₀`.
        kept: bool, which stay, where these are not those above 0.
    """
    return torch.where(
        scores > 0 if kept is None else kept, (temperature * scores).clamp(max=initial), -lasting(scores.dtype)
    )


def centered_in_cells(scores: Tensor, n: int, m: int) -> Tensor:
    """Scores of N:M, shifted so that of every `m` consecutive ones `n` are above 0, but for those that are equal.

    Args:
        scores: `(cells · m,)`.
        n: How many of a cell live.
        m: Groups in a cell.
    """
    cells = scores.view(-1, m)
    top = cells.topk(n + 1, dim=1).values
    return (cells - top[:, n - 1 :].mean(1, keepdim=True)).view(-1)


class Gates(nn.Module):
    """A parametrization: a weight times the gates of its elements.

    Args:
        scores: A parameter for each division of the weight into groups, `(groups,)`, or in the weight's shape where
            every element is a group.
        spreads: For each of them how values of groups are laid over the weight.

    Attributes:
        scores: What the gates are learned as. Where groups run over several weights, those share the parameter.
    """

    not_rewound = ("scores", "temperature")

    def __init__(self, scores: Sequence[nn.Parameter], spreads: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.scores = nn.ParameterList(scores)
        self.spreads = tuple(spreads)

    def gates(self, index: int) -> Tensor:
        """The gates of the groups of division `index`, in the shape of its scores."""
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        """The weight under its gates, in its shape and dtype."""
        factors = [spread(self.gates(i)) for i, spread in enumerate(self.spreads)]
        gated: Tensor = weight * reduce(mul, factors).to(weight.dtype)
        return gated


class SoftMask(Gates):
    """Gates `σ(β·s)`, times a constant (Savarese et al., 2020).

    Args:
        scores: See `Gates`.
        spreads: See `Gates`.
        cells: For each division N and M, where N of M consecutive groups are to live; else `None`.
        scale: What the mask is multiplied by; see `code_scale`.

    Attributes:
        temperature: The buffer `β`, 0-dim.
    """

    def __init__(
        self,
        scores: Sequence[nn.Parameter],
        spreads: Sequence[Callable[[Tensor], Tensor]],
        cells: Sequence[tuple[int, int] | None],
        scale: float = 1.0,
    ) -> None:
        super().__init__(scores, spreads)
        self.cells = tuple(cells)
        self.scale = scale
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones((), device=scores[0].device))

    def gates(self, index: int) -> Tensor:
        """See `Gates.gates`."""
        scores, cell = self.scores[index], self.cells[index]
        mask = soft_mask(scores if cell is None else centered_in_cells(scores, *cell), self.temperature)
        return mask * self.scale if index == 0 and self.scale != 1 else mask

    def extra_repr(self) -> str:
        """The scale, where there is one."""
        return "" if self.scale == 1 else f"scale={self.scale:g}"


class HardConcreteGates(Gates):
    """Gates that are 0 or 1 with some probability (Louizos et al., 2018, eq. 10-13): one draw of noise at a time.

    `hard_concrete` of the scores, which are `log α`: in training with noise, in evaluation without.

    Attributes:
        noise_0: The noise of the first scores, in their shape; `noise_1` that of the second. Not in the state.
    """

    def __init__(self, scores: Sequence[nn.Parameter], spreads: Sequence[Callable[[Tensor], Tensor]]) -> None:
        super().__init__(scores, spreads)
        for i, each in enumerate(scores):
            self.register_buffer(f"noise_{i}", torch.zeros_like(each.detach()), persistent=False)

    def gates(self, index: int) -> Tensor:
        """See `Gates.gates`."""
        return hard_concrete(self.scores[index], self.get_buffer(f"noise_{index}") if self.training else None)


_TEMPERATURE, _LOW, _HIGH = 2 / 3, -0.1, 1.1  # β, γ and ζ of the paper


def hard_concrete(scores: Tensor, noise: Tensor | None = None) -> Tensor:
    """`min(1, max(0, (ζ - γ)·σ((L + log α)/β) + γ))` for logistic noise `L`, `σ(log α)` without; as `scores`."""
    open = torch.sigmoid(scores if noise is None else (noise + scores) / _TEMPERATURE)
    return (open * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)


def chance(scores: Tensor) -> Tensor:
    """`P(gate > 0) = σ(log α - β·log(-γ/ζ))` of hard-concrete gates (Louizos et al., 2018, eq. 12); as `scores`."""
    return torch.sigmoid(scores - _TEMPERATURE * math.log(-_LOW / _HIGH))


class SoftThreshold(Gates):
    """`sign(w)·relu(|w| - σ(s))`, with one score `s` for the weight (Kusupati et al., 2020, eq. 3)."""

    def __init__(self, scores: Sequence[nn.Parameter]) -> None:
        super().__init__(scores, ())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, shrunk towards 0 by its threshold; in its shape and dtype."""
        threshold = torch.sigmoid(self.scores[0]).to(weight.dtype)
        return torch.sign(weight) * F.relu(weight.abs() - threshold)
