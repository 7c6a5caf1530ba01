"""Static sparsity: the masks of the start are the masks of the end."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.weights.masked import MaskMethod


@dataclass(eq=False)
class Static(MaskMethod):
    """Random masks that never change, or masks given to `attach`: sparse fine-tuning and the baseline of all methods.

    See `MaskMethod` for the arguments.
    """

    name = "static"
