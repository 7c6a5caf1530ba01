"""SET: random growth."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.weights.drop_grow import DropGrow


@dataclass(eq=False)
class SET(DropGrow):
    """Sparse evolutionary training: drop the smallest weights, grow as many at random (Mocanu et al., 2018).

    The paper drops the smallest positive and largest negative weights, here the smallest magnitudes; a weight just
    dropped is not grown in the same update. See `DropGrow` and `MaskMethod` for the arguments.
    """

    name = "set"
