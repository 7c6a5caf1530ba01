"""LeNet-300-100, the multi-layer perceptron of the pruning papers (LeCun et al. 1998)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from gossamer.zoo._layers import check_sizes, initialise_plain, scaled


class MLP(nn.Module):
    """Three linear layers with ReLU between them; see `mnist_mlp`."""

    SPARSE_TARGETS: ClassVar[tuple[str, ...]] = ("layer*.weight",)

    def __init__(self, in_features: int, hidden: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(in_features, hidden[0])
        self.relu1 = nn.ReLU()
        self.layer2 = nn.Linear(hidden[0], hidden[1])
        self.relu2 = nn.ReLU()
        self.layer3 = nn.Linear(hidden[1], classes)
        initialise_plain(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs of shape (N, ...) with `in_features` values each to logits of shape (N, classes)."""
        x = self.relu1(self.layer1(x.flatten(1)))
        x = self.relu2(self.layer2(x))
        out: Tensor = self.layer3(x)
        return out


def mnist_mlp(width: float = 1.0, in_features: int = 784, classes: int = 10) -> MLP:
    """Build 784-300-100-10 (266,610 parameters at width 1).

    Args:
        width: Multiplier of the two hidden sizes, > 0; below 1 for a thin dense baseline.
        in_features: Values of one input after flattening: 784 for MNIST, 64 for the 8×8 digits.
        classes: Number of logits.

    Raises:
        ConfigurationError: A size that is not positive.
    """
    check_sizes("mnist_mlp", width=width, in_features=in_features, classes=classes)
    return MLP(in_features, (scaled(300, width), scaled(100, width)), classes)
