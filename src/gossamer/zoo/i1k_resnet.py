"""ResNets for ImageNet, from torchvision."""

from __future__ import annotations

from torch import nn

from gossamer.errors import ConfigurationError
from gossamer.zoo._layers import check_sizes
from gossamer.zoo._vision import build_torchvision

DEPTHS = (18, 34, 50, 101, 152)
SPARSE_TARGETS = ("layer*.conv*.weight", "fc.weight")


def i1k_resnet(depth: int = 50, classes: int = 1000) -> nn.Module:
    """Build torchvision's ResNet-`depth` with fresh weights (He et al., 2016).

    ResNet-50 has 25,557,032 parameters. Sparse are the convolutions of the blocks and the classifier, 22,724,608
    weights (`SPARSE_TARGETS`); the stem and the 1×1 convolutions of shortcuts stay dense, as in Mostafa & Wang (2019).

    Args:
        depth: 18, 34, 50, 101 or 152.
        classes: Number of logits.

    Raises:
        ConfigurationError: Another depth, or torchvision is not installed.
    """
    if depth not in DEPTHS or isinstance(depth, bool):
        raise ConfigurationError(f"i1k_resnet: depth={depth!r}; expected one of {', '.join(map(str, DEPTHS))}")
    check_sizes("i1k_resnet", width=1, classes=classes)
    model = build_torchvision(f"resnet{depth}", {"num_classes": classes})
    model.SPARSE_TARGETS = SPARSE_TARGETS  # type: ignore[assignment]  # a plain attribute of the module
    return model
