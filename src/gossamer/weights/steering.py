"""A controller that steers the strength of a penalty until as many weights are left as were asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

HIGHEST = 30.0
"""Within this the controller's level stays: at it λ is 5e12 times what it starts from."""


class Steering:
    """A proportional-integral controller of a penalty's strength λ, which it moves by factors, through 0 if need be.

    With `e = ln(density / goal)`, within ±1, every measurement makes `I ← I + i·e` and `λ = λ₀·sinh(I + p·e)`. So λ
    grows exponentially while too many weights are left, whatever its right scale is, falls as soon as too few are, and
    becomes a reward for weights where fewer are left than will be in the end. Nothing is read back from the device.

    Args:
        scale: λ₀, above 0.
        integral: `i` above, for each measurement.
        proportional: `p` above.

    Attributes:
        strength: λ now, 0-dim.
    """

    def __init__(self, scale: float, integral: float, proportional: float = 25.0) -> None:
        self._scale, self._i, self._p = scale, integral, proportional
        self._level = torch.zeros((), dtype=torch.float64)
        self.strength = torch.tensor(scale, dtype=torch.float32)

    def steer(self, density: Tensor, goal: float, final: float, rewards: bool) -> None:
        """Take a measurement into account.

        Args:
            density: The density there is, 0-dim.
            goal: The one that ought to be by now.
            final: The one that ought to be in the end, at most the goal. Between the two λ falls to 0 and no further.
            rewards: Whether λ may be below 0 where the density is below `final`.
        """
        density = density.double()
        too_few = density < final
        error = (density / torch.where(too_few, final, goal)).log().clamp(-1.0, 1.0)
        least = torch.where(too_few, -HIGHEST, 0.0) if rewards else torch.zeros_like(density)
        self._level = (self._level.to(density.device) + self._i * error).clamp(
            min=least, max=torch.full_like(least, HIGHEST)
        )
        level = (self._level + self._p * error).clamp(min=least, max=torch.full_like(least, HIGHEST))
        self.strength = (self._scale * level.sinh()).float()

    def state_dict(self) -> dict[str, Any]:
        """What it has come to."""
        return {"level": float(self._level), "strength": float(self.strength)}

    def check_state(self, state: object) -> bool:
        """Whether `load_state_dict` can take this."""
        return (
            isinstance(state, Mapping)
            and set(state) == {"level", "strength"}
            and all(isinstance(each, float) and math.isfinite(each) for each in state.values())
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._level = torch.tensor(state["level"], dtype=torch.float64)
        self.strength = torch.tensor(state["strength"], dtype=torch.float32)
