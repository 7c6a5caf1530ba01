"""The residual networks for CIFAR of He, Zhang, Ren & Sun 2016 (CVPR), section 4.2, and spatial bottlenecks in them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.checks import check_integer
from gossamer.errors import ConfigurationError
from gossamer.nn import SparseActivation, SparseBatchNorm
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
        self.norm1: nn.BatchNorm2d = nn.BatchNorm2d(outputs)
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


def cifar_resnet(
    depth: int = 20,
    width: float = 1.0,
    in_channels: int = 3,
    classes: int = 10,
    *,
    spatial_bottleneck: str | None = None,
    quarters: int | None = None,
    image_size: int = 32,
) -> CifarResNet:
    """Build ResNet-`depth` for 32×32 images: 16, 32 and 64 channels, shortcuts without parameters (option A).

    ResNet-20 has 269,722 parameters, 267,696 of them in the convolutions (`SPARSE_TARGETS`).

    With a spatial bottleneck, what the first convolution of every block gives is computed at some positions only, and
    zero elsewhere; the first batch norm normalises those (Peng et al., 2018, for the regular positions). Of one seed of
    torch the weights are those of the network without it.

    Args:
        depth: Layers with weights, 6n + 2: 20, 32, 44, 56 or 110 in the paper.
        width: Multiplier of the channels, > 0; below 1 for a thin dense baseline.
        in_channels: Channels of the images.
        classes: Number of logits.
        spatial_bottleneck: `"structured"` for the positions of a checkerboard, `"static"` for random ones, `"dynamic"`
            for random ones that change with every forward pass in training, while evaluation is dense, scaled by the
            fraction kept. Each block has its own. `None` for none.
        quarters: Fourths of the positions that a bottleneck keeps: 1, 2 (the default) or 3.
        image_size: Height and width of the images, which the positions depend on.

    Raises:
        ConfigurationError: A size that is not positive, a depth that is not 6n + 2, an unknown bottleneck, quarters
            without one, or images so small that it would keep no position.
    """
    check_sizes(
        "cifar_resnet", width=width, depth=depth, in_channels=in_channels, classes=classes, image_size=image_size
    )
    if depth < 8 or (depth - 2) % 6:
        raise ConfigurationError(f"cifar_resnet: depth={depth}; expected 6n + 2, n ≥ 1: 20, 32, 44, 56, 110")
    channels = (scaled(16, width), scaled(32, width), scaled(64, width))
    if spatial_bottleneck not in (None, *_BOTTLENECKS):
        raise ConfigurationError(
            f"cifar_resnet: spatial_bottleneck={spatial_bottleneck!r}; allowed are {', '.join(_BOTTLENECKS)} and None"
        )
    if quarters is not None:
        check_integer("cifar_resnet: quarters", quarters, at_least=1, at_most=3)
        if spatial_bottleneck is None:
            raise ConfigurationError(
                f"cifar_resnet: quarters={quarters} is of a spatial bottleneck; give spatial_bottleneck="
                f"{_BOTTLENECKS[0]!r}, for example"
            )
    kept = quarters or 2
    smallest = -(-image_size // 4)
    if spatial_bottleneck in ("static", "dynamic") and smallest**2 * kept < 4:
        raise ConfigurationError(
            f"cifar_resnet: image_size={image_size}, whose last stage has {smallest}×{smallest} positions: {kept} "
            "quarters of them are none; give larger images"
        )
    model = CifarResNet((depth - 2) // 6, channels, in_channels, classes)
    if spatial_bottleneck is not None:
        _narrow(model, spatial_bottleneck, kept, image_size)
    return model


_BOTTLENECKS = ("structured", "static", "dynamic")


def _narrow(model: CifarResNet, kind: str, quarters: int, image_size: int) -> None:
    """Put masks at the first batch norms; their seeds are drawn after the weights, so that these stay the same."""
    for number, stage in enumerate((model.stage1, model.stage2, model.stage3)):
        size = -(-image_size // 2**number)
        for block in stage.children():
            assert isinstance(block, BasicBlock)
            if kind == "structured":
                mask = SparseActivation(size, quarters=quarters)
            else:
                seed = int(torch.randint(1 << 62, (), device="cpu"))
                mask = SparseActivation(size, density=quarters / 4, dynamic=kind == "dynamic", seed=seed)
            block.norm1 = SparseBatchNorm(block.conv1.out_channels, mask)
