"""Networks by name, for recipes and the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from gossamer.errors import ConfigurationError, reason
from gossamer.zoo._vision import build_timm, build_torchvision, unknown
from gossamer.zoo.char_rnn import char_rnn
from gossamer.zoo.cifar_resnet import cifar_resnet
from gossamer.zoo.cifar_wrn import cifar_wrn
from gossamer.zoo.i1k_resnet import i1k_resnet
from gossamer.zoo.lenet import lenet
from gossamer.zoo.mnist_mlp import mnist_mlp

_OWN: dict[str, Callable[..., nn.Module]] = {
    "char_rnn": char_rnn,
    "cifar_resnet": cifar_resnet,
    "cifar_wrn": cifar_wrn,
    "i1k_resnet": i1k_resnet,
    "lenet": lenet,
    "mnist_mlp": mnist_mlp,
}
_LIBRARIES: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "timm": build_timm,
    "torchvision": build_torchvision,
}


def names() -> list[str]:
    """Return the names of gossamer's own networks, sorted."""
    return sorted(_OWN)


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a network by name, with fresh weights.

    Args:
        name: One of `names()`, `"torchvision:NAME"` or `"timm:NAME"`.
        **kwargs: Arguments of that network, e.g. `build("mnist_mlp", width=0.5)`,
            `build("torchvision:resnet50", num_classes=10)`.

    Raises:
        ConfigurationError: An unknown name (close matches are given), an argument that the network does not have or
            a value it refuses, or a package that is not installed.
    """
    library, colon, model = name.partition(":")
    if colon:
        if library not in _LIBRARIES:
            raise ConfigurationError(
                f"zoo: {name!r}: unknown library {library!r}; models come from {' and '.join(sorted(_LIBRARIES))}"
            )
        try:
            return _LIBRARIES[library](model, kwargs)
        except ConfigurationError:
            raise
        except Exception as error:  # whatever a library makes of arguments that it was not written for
            hint = "; the file or the network that it asks for is not there" if isinstance(error, OSError) else ""
            raise ConfigurationError(f"zoo: {name!r} cannot be built with {kwargs}: {reason(error)}{hint}") from error
    if name not in _OWN:
        raise unknown(name, [*names(), "torchvision:resnet18", "timm:resnet18"])
    allowed = list(inspect.signature(_OWN[name]).parameters)
    for key in kwargs:
        if key not in allowed:
            raise ConfigurationError(f"zoo: {name} has no argument {key!r}; it takes {', '.join(allowed)}")
    return _OWN[name](**kwargs)


def arguments(name: str, shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    """Return the arguments that make a network fit a data set; add a recipe's own to them.

    Args:
        name: As for `build`.
        shape: (channels, height, width) of an image; () of a character.
        classes: Number of classes, or of distinct characters.

    Raises:
        ConfigurationError: An unknown network, one for images where the data are text or the other way round, one that
            needs square images, or a torchvision model (whose stem is fixed) for images without three channels.
    """
    if ":" not in name and name not in _OWN:
        raise unknown(name, [*names(), "torchvision:resnet18", "timm:resnet18"])
    for_text = [each for each in names() if "symbols" in inspect.signature(_OWN[each]).parameters]
    if (name in for_text) == bool(shape):
        takes, given = ("text", "images") if shape else ("images", "text")
        fitting_ones = [each for each in names() if (each in for_text) != bool(shape)]
        raise ConfigurationError(
            f"zoo: {name} takes {takes}, the data are {given}; gossamer's own networks for {given} are "
            f"{', '.join(fitting_ones)}"
        )
    if not shape:
        return {"symbols": classes}
    channels, height, width = shape
    if name.startswith("timm:"):
        return {"in_chans": channels, "num_classes": classes}
    if (name.startswith("torchvision:") or name == "i1k_resnet") and channels != 3:
        raise ConfigurationError(
            f"zoo: {name} takes images of three channels, the data have {channels}; the timm model of that "
            "name takes any number"
        )
    if name.startswith("torchvision:"):
        return {"num_classes": classes}
    if name == "lenet" and height != width:
        raise ConfigurationError(f"zoo: lenet takes square images, the data have {height}×{width}")
    fitting = {
        "in_features": channels * height * width,
        "in_channels": channels,
        "image_size": height,
        "classes": classes,
    }
    return {key: fitting[key] for key in inspect.signature(_OWN[name]).parameters if key in fitting}
