"""Models of torchvision and timm by name; neither is imported before one of its models is asked for."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from gossamer.errors import ConfigurationError

_schemas: list[torch.library.Library] = []
"""Operator schemas defined by `import_torchvision`; a `Library` withdraws them when it is collected."""


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its compiled operators cannot be loaded.

    torchvision from PyPI beside a CPU-only torch fails to load its own library, and then its import stops because
    the schema of `torchvision::nms` is missing. No classification model needs that operator, so the schemas alone
    make the import work.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # untyped in torch
    for operator in ("nms", "qnms"):
        schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]  # untyped in torch
    _schemas.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")


def build_torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Build `torchvision.models.NAME` without pretrained weights unless `weights=` is given."""
    try:
        import_torchvision()
    except ModuleNotFoundError as error:
        raise _missing("torchvision", name) from error
    models = importlib.import_module("torchvision.models")
    known = models.list_models(module=models)  # those that classify
    if name not in known:
        raise unknown(f"torchvision:{name}", (f"torchvision:{other}" for other in known))
    model: nn.Module = models.get_model(name, **arguments)
    return model


def build_timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Build a timm model without pretrained weights unless `pretrained=True` is given."""
    try:
        import_torchvision()  # timm imports it
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise _missing("timm", name) from error
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise unknown(f"timm:{name}", (f"timm:{other}" for other in known))
    model: nn.Module = timm.create_model(name, **arguments)
    return model


def unknown(name: str, known: Iterable[str]) -> ConfigurationError:
    """Return the error for a network that does not exist, with the nearest names that do."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known[:10])}"
    return ConfigurationError(f"zoo: no network {name!r}; {hint}")


def _missing(package: str, name: str) -> ConfigurationError:
    return ConfigurationError(
        f"zoo: '{package}:{name}' needs the package {package}; install it with: pip install 'gossamer[vision]' "
        "(in a clone: pip install -e '.[vision]')"
    )
