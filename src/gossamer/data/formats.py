"""The files of the data sets as uint8 tensors: idx (MNIST), binary batches (CIFAR), and the digits of scikit-learn.

None of these formats can hold code: they are plain bytes, unlike CIFAR's Python batches, which are pickles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import DataError

_UBYTE = 0x08
"""The idx type code of unsigned bytes."""


@dataclass(frozen=True, eq=False)
class Raw:
    """A data set as published.

    Attributes:
        images: uint8, (N, C, H, W).
        labels: int64, (N,).
        test_images: As `images`.
        test_labels: As `labels`; `None` where the authors define no test set.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor | None
    test_labels: Tensor | None


def read_idx(path: Path) -> Tensor:
    """Read an uncompressed idx file of unsigned bytes.

    The format: two zero bytes, the type code 8, the number of dimensions, each dimension as a big-endian 32-bit
    integer, then the values in row-major order.

    Returns:
        uint8 tensor of the shape that the file states.

    Raises:
        DataError: The file is not idx, not of unsigned bytes, or shorter or longer than it states.
    """
    content = _read(path)
    if len(content) < 4 or content[0] or content[1] or content[2] != _UBYTE:
        raise DataError(f"{path}: not an idx file of unsigned bytes: it begins with {bytes(content[:4].tolist())!r}")
    start = 4 + 4 * int(content[3])
    if len(content) < start:
        raise DataError(f"{path}: the idx header is cut off at byte {len(content)} of {start}")
    shape = [int(size) for size in content[4:start].numpy().view(">u4")]
    if len(content) != start + math.prod(shape):
        raise DataError(
            f"{path}: states the shape {tuple(shape)}, that is {start + math.prod(shape)} bytes, but has {len(content)}"
        )
    return content[start:].view(shape)


def read_cifar(path: Path, label_bytes: int) -> tuple[Tensor, Tensor]:
    """Read a CIFAR file in the binary version: records of the label bytes and 3×32×32 pixels.

    Args:
        path: The file.
        label_bytes: 1 for CIFAR-10; 2 for CIFAR-100, the coarse label and then the fine one, which is taken.

    Returns:
        uint8 images (N, 3, 32, 32) and int64 labels (N,).

    Raises:
        DataError: The file is empty or not a whole number of records.
    """
    content = _read(path)
    record = label_bytes + 3 * 32 * 32
    if not len(content) or len(content) % record:
        raise DataError(f"{path}: has {len(content)} bytes, not a positive multiple of {record} (one CIFAR record)")
    records = content.view(-1, record)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return images, records[:, label_bytes - 1].to(torch.int64)


def read_mnist(folder: Path) -> Raw:
    """Read the four idx files of MNIST or of a data set of its form."""
    images, labels, test_images, test_labels = (
        read_idx(folder / f"{part}-{content}-ubyte")
        for part in ("train", "t10k")
        for content in ("images-idx3", "labels-idx1")
    )
    return Raw(images[:, None], labels.long(), test_images[:, None], test_labels.long())


def read_cifar10(folder: Path) -> Raw:
    """Read the six binary batches of CIFAR-10, in the official order."""
    batches = [read_cifar(folder / f"data_batch_{number}.bin", 1) for number in range(1, 6)]
    images, labels = zip(*batches, strict=True)
    return Raw(torch.cat(images), torch.cat(labels), *read_cifar(folder / "test_batch.bin", 1))


def read_cifar100(folder: Path) -> Raw:
    """Read the two binary files of CIFAR-100, with fine labels."""
    return Raw(*read_cifar(folder / "train.bin", 2), *read_cifar(folder / "test.bin", 2))


def read_digits() -> Raw:
    """Take the 1,797 8×8 digits (values 0 to 16) out of scikit-learn; their authors define no test set here."""
    # Only here: scikit-learn takes a second to import.
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    return Raw(images, torch.from_numpy(digits.target.astype(np.int64)), None, None)


def _read(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}; fetch it with gossamer.data.fetch"
        ) from error
