"""LeNet-5 (LeCun et al., 1998), with ReLU and maximum pooling as everybody trains it now."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.zoo._layers import check_sizes, initialise_plain, scaled

SIZES = (6, 16, 120, 84)
"""Maps of the two convolutions, units of the two hidden linear layers."""


class LeNet(nn.Module):
    """Two 5×5 convolutions, each with ReLU and 2×2 maximum pooling, and three linear layers; see `lenet`."""

    SPARSE_TARGETS: ClassVar[tuple[str, ...]] = ("conv*.weight", "linear*.weight")

    def __init__(self, in_channels: int, image_size: int, sizes: tuple[int, ...], classes: int) -> None:
        super().__init__()
        pooled = ((image_size - 4) // 2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, sizes[0], 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(sizes[0], sizes[1], 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.linear1 = nn.Linear(sizes[1] * pooled * pooled, sizes[2])
        self.relu3 = nn.ReLU()
        self.linear2 = nn.Linear(sizes[2], sizes[3])
        self.relu4 = nn.ReLU()
        self.linear3 = nn.Linear(sizes[3], classes)
        initialise_plain(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images of shape (N, in_channels, image_size, image_size) to logits of shape (N, classes)."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.linear1(x.flatten(1)))
        out: Tensor = self.linear3(self.relu4(self.linear2(x)))
        return out


def lenet(width: float = 1.0, in_channels: int = 1, image_size: int = 28, classes: int = 10) -> LeNet:
    """Build LeNet-5, 6-16-120-84 (61,706 parameters at width 1 on 1×32×32, 44,426 on 1×28×28).

    Unlike the original, every map of the second convolution sees all maps of the first, activations are ReLU and
    pooling takes the maximum.

    Args:
        width: Multiplier of the four hidden sizes, > 0; below 1 for a thin dense baseline.
        in_channels: 1 for MNIST, 3 for CIFAR.
        image_size: Height and width of the images, at least 16: 28 for MNIST, 32 for CIFAR.
        classes: Number of logits.

    Raises:
        ConfigurationError: A size that is not positive, or images too small for the two convolutions.
    """
    check_sizes("lenet", width=width, in_channels=in_channels, image_size=image_size, classes=classes)
    if image_size < 16:
        raise ConfigurationError(
            f"lenet: image_size={image_size}; two 5×5 convolutions and two poolings need at least 16; use mnist_mlp"
        )
    return LeNet(in_channels, image_size, tuple(scaled(size, width) for size in SIZES), classes)
