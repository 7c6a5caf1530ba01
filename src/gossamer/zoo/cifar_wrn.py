"""Wide residual networks for CIFAR: Zagoruyko & Komodakis 2016 (BMVC)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.zoo._layers import check_sizes, conv3x3, initialise_residual, scaled


class WideBlock(nn.Module):
    """Batch norm and ReLU before each of two 3×3 convolutions; a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = self.relu1(self.norm1(x))
        # The 1×1 shortcut reads the normalised input, the identity the input itself, as in the authors' code.
        kept = x if self.shortcut is None else self.shortcut(y)
        y = self.relu2(self.norm2(self.conv1(y)))
        out: Tensor = kept + self.conv2(y)
        return out


class WideResNet(nn.Module):
    """Stem, three stages of wide blocks, batch norm, global average pooling and a classifier; see `cifar_wrn`."""

    SPARSE_TARGETS: ClassVar[tuple[str, ...]] = ("stage*conv*.weight",)

    def __init__(self, blocks: int, channels: tuple[int, int, int, int], in_channels: int, classes: int) -> None:
        super().__init__()
        self.stem = conv3x3(in_channels, channels[0])
        self.stage1 = _stage(blocks, channels[0], channels[1], 1)
        self.stage2 = _stage(blocks, channels[1], channels[2], 2)
        self.stage3 = _stage(blocks, channels[2], channels[3], 2)
        self.norm = nn.BatchNorm2d(channels[3])
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[3], classes)
        initialise_residual(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape (N, in_channels, H, W) to logits of shape (N, classes)."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        x = self.pool(self.relu(self.norm(x)))
        out: Tensor = self.classifier(x.flatten(1))
        return out


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    first = WideBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(WideBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def cifar_wrn(depth: int = 28, width: float = 2.0, in_channels: int = 3, classes: int = 10) -> WideResNet:
    """Build WRN-`depth`-`width`: 16 stem features, stages of 16, 32 and 64 times `width`.

    WRN-28-2 has 1,467,610 parameters: 1,451,520 in the 3×3 convolutions of the blocks (`SPARSE_TARGETS`, the weights
    that Mostafa & Wang 2019 make sparse) and 16,090 that stay dense in the stem, the 1×1 shortcuts, the batch norms
    and the classifier.

    Args:
        depth: 6n + 4: 16, 22, 28 or 40 in the papers.
        width: Widening factor, > 0; fractions give thin dense baselines. The stem keeps its 16 features.
        in_channels: Channels of the images.
        classes: Number of logits.

    Raises:
        ConfigurationError: A size that is not positive, or a depth that is not 6n + 4.
    """
    check_sizes("cifar_wrn", width=width, depth=depth, in_channels=in_channels, classes=classes)
    if depth < 10 or (depth - 4) % 6:
        raise ConfigurationError(f"cifar_wrn: depth={depth}; expected 6n + 4, n ≥ 1: 10, 16, 22, 28, 40")
    channels = (16, scaled(16, width), scaled(32, width), scaled(64, width))
    return WideResNet((depth - 4) // 6, channels, in_channels, classes)
