"""What the networks share: scaled layer sizes, the convolution of residual networks and its initial values."""

from __future__ import annotations

import math

from torch import nn

from gossamer.errors import ConfigurationError


def scaled(size: int, width: float) -> int:
    """Return a layer's size times the width multiplier, rounded half up, at least 1."""
    return max(1, math.floor(size * width + 0.5))


def check_sizes(network: str, *, width: float, **sizes: int) -> None:
    """Refuse a width that is not a positive finite number, or a size that is not a positive integer.

    Raises:
        ConfigurationError: Names the network, the argument and the value.
    """
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < math.inf:
        raise ConfigurationError(f"{network}: width={width!r}; expected a positive number, 1 is the paper's size")
    for key, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"{network}: {key}={size!r}; expected a positive integer")


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3×3 convolution with padding 1 and no bias."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def initialise_plain(model: nn.Module) -> None:
    """Give a network without batch norm the initial values of He et al. 2015, equation 10.

    Weights are normal with variance 2 / inputs, biases zero. PyTorch's own default has a sixth of that variance, and a
    sparse network, whose weights have fewer inputs, then passes on next to nothing.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialise_residual(model: nn.Module) -> None:
    """Give a residual network the initial values of He et al. 2015.

    Convolutions are normal with variance 2 / (kernel area × output channels), batch norms start as the identity
    (PyTorch's own default), and the classifier's bias is zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
