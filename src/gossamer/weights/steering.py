"""A controller that steers the strength of a penalty until as many weights are left as were asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

STRONGEST = 3.0
"""How hard a penalty may pull at scores, where the loss pulls with 1 on average. A reward may pull as hard as that."""

ARRIVED = 0.6
"""The part of a round after which a density is to be what the round ends with: later few masks move at all."""

INTEGRAL, PROPORTIONAL = 1.5, 25.0
"""The factors `i` and `p` of a controller, for each measurement."""

SMOOTHING = 0.9
"""How much of the pull of the loss is kept from one measurement to the next."""


class Steering:
    """A proportional-integral controller of a penalty's strength λ, which it moves by factors, through 0 if need be.

    The goal goes from the first density of a round to its last one geometrically, over the first 60 % of it. With
    `e = ln(density / goal)`, within ±1, every measurement makes `I ← I + i·e` and `λ = λ₀·sinh(I + p·e)`. So λ
    grows exponentially while too many weights are left, whatever its right scale is, falls as soon as too few are, and
    becomes a reward for weights where fewer are left than will be in the end. (Not in the first 30 % of a round: scores
    begin alike and need time to part; a reward would lift them all.) It stays within `STRONGEST` times the λ
    with which the penalty pulls as hard at scores as the loss does, and as a reward within that: beyond, scores would
    run to where masks are so hard that nothing brings them back. Nothing is read back from the device.

    Args:
        scale: λ₀, above 0.

    Attributes:
        strength: λ now, 0-dim.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._level = torch.zeros((), dtype=torch.float64)
        self._pull = torch.full((), torch.nan, dtype=torch.float64)
        self.strength = torch.tensor(scale, dtype=torch.float32)

    def steer(self, density: Tensor, first: float, final: float, part: float, pull: Tensor) -> None:
        """Take a measurement into account.

        Args:
            density: The density there is, 0-dim.
            first: The one that the round ought to begin with.
            final: The one that it ought to end with. Between it and the goal λ falls to 0 and no further.
            part: How much of the round is over, in [0, 1].
            pull: The λ with which the penalty would pull as hard at scores as the loss does, 0-dim; not finite where
                that is not known now.
        """
        way = min(part / ARRIVED, 1.0)
        goal, rewards = first * (final / first) ** way, way >= 0.5
        density, pull = density.double(), pull.double()
        before = self._pull.to(pull.device)
        mixed = torch.where(before.isnan(), pull, before + (1 - SMOOTHING) * (pull - before))
        self._pull = torch.where(pull.isfinite(), mixed, before)
        limit = self._pull.nan_to_num(nan=0.0) / self._scale
        highest = torch.asinh(STRONGEST * limit)
        too_few = density < final
        error = (density / torch.where(too_few, final, goal)).log().clamp(-1.0, 1.0)
        lowest = torch.where(too_few & rewards, -torch.asinh(limit), torch.zeros_like(limit))
        self._level = (self._level.to(density.device) + INTEGRAL * error).clamp(min=lowest, max=highest)
        level = (self._level + PROPORTIONAL * error).clamp(min=lowest, max=highest)
        self.strength = (self._scale * level.sinh()).float()

    def state_dict(self) -> dict[str, Any]:
        """What it has come to."""
        return {"level": float(self._level), "pull": float(self._pull), "strength": float(self.strength)}

    def check_state(self, state: object) -> bool:
        """Whether `load_state_dict` can take this."""
        return (
            isinstance(state, Mapping)
            and set(state) == {"level", "pull", "strength"}
            and all(isinstance(each, float) for each in state.values())
            and math.isfinite(state["level"])
            and math.isfinite(state["strength"])
            and not math.isinf(state["pull"])
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._level, self._pull = (torch.tensor(state[name], dtype=torch.float64) for name in ("level", "pull"))
        self.strength = torch.tensor(state["strength"], dtype=torch.float32)
