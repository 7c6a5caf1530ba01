"""Data sets held in memory as tensors, split into training, validation and test images or text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.data.augment import Augment
from gossamer.data.catalogue import find
from gossamer.data.loader import BatchLoader
from gossamer.data.sources import fetch, missing
from gossamer.data.store import faults, folder
from gossamer.data.text import RawText, TextSplit, divide
from gossamer.errors import ConfigurationError, DataError

DIGITS_TEST = 360
"""Digits held out as test data, a fifth; scikit-learn defines no test set."""

DIGITS_TEST_SEED = 0
"""Seed of the generator that chooses them; fixed, so that the test digits are the same in every run."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels, with what their normalisation needs.

    Attributes:
        images: uint8, (N, C, H, W), values 0 to `maximum`.
        labels: int64, (N,).
        mean: Mean of each channel after division by `maximum`.
        std: Standard deviation of each channel, likewise.
        maximum: Largest pixel value.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    maximum: int = 255

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, **options: Any) -> BatchLoader:
        """Its batches; `options` are the other arguments of `BatchLoader`."""
        return BatchLoader(self, batch_size, **options)

    def pixels(self, augment: Augment | None, device: torch.device) -> TensorPixels:
        """See `gossamer.data.loader.Images`."""
        return TensorPixels(self.images, augment, device)


class TensorPixels:
    """Images in memory, copied to a device once; see `gossamer.data.loader.Pixels`."""

    def __init__(self, images: Tensor, augment: Augment | None, device: torch.device) -> None:
        if augment is not None:
            augment.check(images.shape)
        self.images = images.to(device).contiguous()
        self.augment = augment

    def draw(self, generator: torch.Generator) -> Tensor | None:
        """See `Pixels.draw`."""
        return None if self.augment is None else self.augment.draw(len(self.images), generator)

    def give(self, order: Tensor, draws: Tensor | None, parts: list[slice]) -> Iterator[Tensor]:
        """See `Pixels.give`."""
        order = order.to(self.images.device)
        if self.augment is None or draws is None:
            for part in parts:
                yield self.images[order[part]]
        else:
            draws = draws.to(self.images.device)
            for part in parts:
                yield self.augment.take(self.images, order[part], draws[part])

    def settings(self) -> dict[str, Any]:
        """See `Pixels.settings`."""
        return {"augment": None if self.augment is None else asdict(self.augment)}


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Attributes:
        name: Its name.
        classes: Number of classes; labels are 0 to `classes` - 1. Of text, the number of its symbols.
        shape: (channels, height, width) of an image; () of a character.
        mean: Mean of each channel over the published training images, pixels scaled to [0, 1]; () of text.
        std: Standard deviation of each channel, likewise.
        train: What models are trained on.
        validation: What hyper-parameters and models are chosen on; `None` if nothing was set apart.
        test: The published test images, or the ends of the works of a text: for the final figure only.
    """

    name: str
    classes: int
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split | TextSplit
    validation: Split | TextSplit | None
    test: Split | TextSplit


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    validation: int | None = None,
    train: int | None = None,
    seed: int = 0,
    download: bool = True,
) -> Dataset:
    """Load a data set whole into memory (on the CPU, as bytes: 55 MB for MNIST, 184 MB for CIFAR).

    Args:
        name: One of `NAMES`.
        root: The folder of the data sets, see `folder`.
        validation: Training images set apart for validation, each class in its proportion: `None` for the data
            set's usual number (5,000; 144 of the digits), 0 to train on all. Of text, a number of characters, see
            `gossamer.data.text.divide` (Shakespeare: 252,862, a twentieth).
        train: Images that are trained on, out of the rest, each class in its proportion: `None` for all.
        seed: Seed of the `torch.Generator` that chooses them. It does not depend on the run's seed, so that runs
            with different seeds are compared on the same split.
        download: Whether to fetch what is missing or damaged (see `fetch`) or to refuse.

    Raises:
        ConfigurationError: No data set has this name, `validation` is not between 0 and the training data, or `train`
            not between 1 and the rest, or given for text.
        DataError: A file is missing or damaged and could not be fetched, or `download` is false.
    """
    entry = find(name)
    place = folder(root) / name
    if download:
        fetch(name, root)
    elif faults(entry, place):
        raise DataError(missing(name, place))
    raw = entry.read(place)
    count = entry.validation if validation is None else validation
    if isinstance(raw, RawText):
        if train is not None:
            raise ConfigurationError(f"data: train={train!r} of {name}, which is text; it is for images")
        try:
            parts = divide(raw, count)
        except ConfigurationError as error:
            raise ConfigurationError(f"data: {name}: {error}") from None
        return Dataset(name, len(parts[0].symbols), (), (), (), *parts)

    def split(images: Tensor, labels: Tensor) -> Split:
        return Split(images, labels, entry.mean, entry.std, entry.maximum)

    rest = split(raw.images, raw.labels)
    if raw.test_images is None or raw.test_labels is None:
        rest, test = set_apart(rest, DIGITS_TEST, DIGITS_TEST_SEED)
    else:
        test = split(raw.test_images, raw.test_labels)
    check_held_out("validation", count, name, len(rest))
    held = None
    if count:
        rest, held = set_apart(rest, count, seed)
    if train is not None:
        if isinstance(train, bool) or not isinstance(train, int) or not 1 <= train <= len(rest):
            raise ConfigurationError(
                f"data: train={train!r} of {name}; expected a number of images from 1 to {len(rest)}"
            )
        _, rest = set_apart(rest, train, seed)
    return Dataset(name, entry.classes, entry.shape, entry.mean, entry.std, rest, held, test)


def check_held_out(key: str, count: object, name: str, size: int, at_least: int = 0) -> None:
    """Refuse a number of images, called `key`, to hold out of `size` training images, unless one is left.

    Raises:
        ConfigurationError: Not an integer from `at_least` to `size` - 1.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not at_least <= count < size:
        raise ConfigurationError(
            f"data: {key}={count!r} of {name}; expected a number of images from {at_least} to {size - 1}"
        )


def set_apart(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Divide a split at random into the rest and `count` images, see `choose`; both keep the order of the original."""
    chosen = choose(split.labels, count, seed)
    rest, picked = (
        Split(split.images[part], split.labels[part], split.mean, split.std, split.maximum)
        for part in (~chosen, chosen)
    )
    return rest, picked


def choose(labels: Tensor, count: int, seed: int) -> Tensor:
    """Choose `count` images at random, of each class in its proportion.

    Args:
        labels: int64, (N,).
        count: From 1 to N.
        seed: Of the generator that chooses.

    Returns:
        bool, (N,). The number of a class differs from its exact proportion by less than one.
    """
    size = len(labels)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(size, generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # Equally spaced positions in an order sorted by class meet every class in proportion, `count` in all.
    positions = (2 * torch.arange(count) + 1) * size // (2 * count)
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[by_class[positions]] = True
    return chosen
