"""Random crops and flips of whole batches, each image with its own offsets, as one gather of bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError

Padding = Literal["reflect", "zero"]


@dataclass(frozen=True)
class Augment:
    """Crop each image at a random offset from its padded self, then flip it left to right with probability 1/2.

    Attributes:
        crop: Pixels of padding on every side; an image moves by at most as many. 0 for no crop. The CIFAR papers
            take 4.
        padding: "reflect" mirrors the image about its border pixels; "zero" adds black.
        flip: Whether to flip.
    """

    crop: int = 4
    padding: Padding = "reflect"
    flip: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.crop, bool) or not isinstance(self.crop, int) or self.crop < 0:
            raise ConfigurationError(f"augment: crop={self.crop!r}; expected a number of pixels, 0 or more")
        if self.padding not in get_args(Padding):
            raise ConfigurationError(f"augment: padding={self.padding!r}; expected one of {get_args(Padding)}")
        if not isinstance(self.flip, bool):
            raise ConfigurationError(f"augment: flip={self.flip!r}; expected true or false")

    def check(self, shape: torch.Size) -> None:
        """Refuse images of shape (N, C, H, W) that are too small for this crop."""
        if self.crop >= min(shape[2:]):
            raise ConfigurationError(
                f"augment: crop={self.crop} needs images of more than {self.crop} pixels a side, "
                f"these have {shape[2]}×{shape[3]}"
            )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the randomness of `count` images.

        Returns:
            int64, (count, 3): row offset and column offset in [0, 2·crop], and 1 for a flip.
        """
        offsets = torch.randint(0, 2 * self.crop + 1, (count, 2), generator=generator)
        flips = torch.randint(0, 2, (count, 1), generator=generator)
        return torch.cat([offsets, flips if self.flip else torch.zeros_like(flips)], dim=1)

    def take(self, images: Tensor, index: Tensor, draws: Tensor) -> Tensor:
        """Take images and augment them.

        Args:
            images: (N, C, H, W), contiguous, any dtype.
            index: int64, (B,): which images.
            draws: (B, 3) from `draw`, on the device of the images.

        Returns:
            (B, C, H, W), of the images' dtype.
        """
        _, channels, height, width = images.shape
        rows = torch.arange(height, device=images.device) + draws[:, :1] - self.crop
        columns = torch.arange(width, device=images.device)
        columns = torch.where(draws[:, 2:].bool(), columns.flip(0), columns) + draws[:, 1:2] - self.crop
        source_rows, source_columns = _reflect(rows, height), _reflect(columns, width)
        planes = index[:, None] * channels + torch.arange(channels, device=images.device)
        lines = planes[:, :, None] * height + source_rows[:, None, :]
        # One flat gather is three times as fast as indexing with four tensors.
        taken = images.take(lines[..., None] * width + source_columns[:, None, None, :])
        if self.padding == "zero":
            inside = (rows == source_rows)[:, None, :, None] & (columns == source_columns)[:, None, None, :]
            taken = taken * inside
        return taken


def _reflect(position: Tensor, size: int) -> Tensor:
    """Mirror positions outside [0, size) about the first and the last; needs less than `size` outside."""
    return (size - 1) - ((size - 1) - position.abs()).abs()
