"""The residual networks for CIFAR of He, Zhang, Ren & Sun 2016 (CVPR), section 4.2."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.zoo._layers import check_sizes, conv3x3, initialise_residual, scaled


class PaddedShortcut(nn.Module):
    """Shortcut without parameters (option A): subsample by the stride and add zero channels on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions, each with batch norm, added to the shortcut before the last ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else PaddedShortcut(inputs, outputs, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


class CifarResNet(nn.Module):
    """Stem convolution, three stages of basic blocks, global average pooling and a classifier; see `cifar_resnet`."""

    SPARSE_TARGETS: ClassVar[tuple[str, ...]] = ("*conv*.weight",)

    def __init__(self, blocks: int, channels: tuple[int, int, int], in_channels: int, classes: int) -> None:
        super().__init__()
        self.conv = conv3x3(in_channels, channels[0])
        self.norm = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        self.stage1 = _stage(blocks, channels[0], channels[0], 1)
        self.stage2 = _stage(blocks, channels[0], channels[1], 2)
        self.stage3 = _stage(blocks, channels[1], channels[2], 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[2], classes)
        initialise_residual(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape (N, in_channels, H, W) to logits of shape (N, classes)."""
        x = self.relu(self.norm(self.conv(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        out: Tensor = self.classifier(self.pool(x).flatten(1))
        return out


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def cifar_resnet(depth: int = 20, width: float = 1.0, in_channels: int = 3, classes: int = 10) -> CifarResNet:
    """Build ResNet-`depth` for 32×32 images: 16, 32 and 64 channels, shortcuts without parameters (option A).

    ResNet-20 has 269,722 parameters, 267,696 of them in the convolutions (`SPARSE_TARGETS`).

    Args:
        depth: Layers with weights, 6n + 2: 20, 32, 44, 56 or 110 in the paper.
        width: Multiplier of the channels, > 0; below 1 for a thin dense baseline.
        in_channels: Channels of the images.
        classes: Number of logits.

    Raises:
        ConfigurationError: A size that is not positive, or a depth that is not 6n + 2.
    """
    check_sizes("cifar_resnet", width=width, depth=depth, in_channels=in_channels, classes=classes)
    if depth < 8 or (depth - 2) % 6:
        raise ConfigurationError(f"cifar_resnet: depth={depth}; expected 6n + 2, n ≥ 1: 20, 32, 44, 56, 110")
    channels = (scaled(16, width), scaled(32, width), scaled(64, width))
    return CifarResNet((depth - 2) // 6, channels, in_channels, classes)
