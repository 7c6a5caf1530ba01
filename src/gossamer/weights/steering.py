"""A controller that steers the strength of a penalty until as many weights are left as were asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

LEAST, MOST = 1e-12, 1e3
"""Within these the strength stays."""


class Steering:
    """A proportional-integral controller of the logarithm of a penalty's strength λ.

    With `e = ln(density / goal)`, within ±1, every measurement makes `I ← I + i·e` and `λ = exp(I + p·e)`: λ moves by a
    factor while too many weights are left, whatever its scale is, and falls as soon as too few are. Nothing is read
    back from the device.

    Args:
        strength: The first λ, above 0.
        integral: `i` above, for each measurement.
        proportional: `p` above.

    Attributes:
        strength: λ now, 0-dim.
    """

    def __init__(self, strength: float, integral: float, proportional: float = 8.0) -> None:
        self._i, self._p = integral, proportional
        self._level = torch.tensor(strength, dtype=torch.float64).log()
        self.strength = torch.tensor(strength, dtype=torch.float32)

    def steer(self, density: Tensor, goal: float) -> None:
        """Take a measurement into account: the density there is, 0-dim, and the one that ought to be."""
        error = (density.double() / goal).log().clamp(-1.0, 1.0)
        limits = torch.tensor([LEAST, MOST], dtype=torch.float64).log().tolist()
        self._level = (self._level.to(error.device) + self._i * error).clamp(*limits)
        self.strength = (self._level + self._p * error).clamp(*limits).exp().float()

    def state_dict(self) -> dict[str, Any]:
        """What it has come to."""
        return {"level": float(self._level), "strength": float(self.strength)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._level = torch.tensor(state["level"], dtype=torch.float64)
        self.strength = torch.tensor(state["strength"], dtype=torch.float32)
