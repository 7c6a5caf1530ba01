"""Thin dense baselines: the width at which a dense network has no more parameters than a sparse one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gossamer.errors import ConfigurationError
from gossamer.targets import parameter_count

STEPS = 10_000
"""Widths are searched on a grid of 1/STEPS, so that a result can be written into a recipe exactly."""


def width_for_parameters(build: Callable[[float], nn.Module], budget: int) -> float:
    """Find the largest width multiplier at which a network has at most `budget` parameters.

    Args:
        build: Takes a width > 0 and returns the network; its parameter count must not fall as the width grows,
            e.g. `lambda width: cifar_wrn(28, width)`. It is called about 30 times, on the meta device: no memory is
            taken and no random number drawn.
        budget: Largest number of parameters, biases and norms included: for the baseline of a sparse network, its
            active weights plus its dense parameters.

    Returns:
        The width, a multiple of 1/10,000.

    Raises:
        ConfigurationError: Even the smallest width has more parameters, or widening does not add any.
    """

    def count(steps: int) -> int:
        with torch.device("meta"):
            return parameter_count(build(steps / STEPS))

    low, high = 1, STEPS
    smallest = count(low)
    if smallest > budget:
        raise ConfigurationError(
            f"width_for_parameters: budget={budget}, but the thinnest network (one unit a layer) has {smallest} "
            "parameters; raise the budget or take a smaller network"
        )
    while count(high) <= budget:
        low, high = high, 2 * high
        if high > STEPS * 2**12:
            raise ConfigurationError(
                f"width_for_parameters: {count(low)} parameters at width {low / STEPS:g}, still within "
                f"budget={budget}; does `build` use its width?"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= budget else (low, middle)
    return low / STEPS
