"""ImageNet, or any folder of images laid out like it: read by torchvision, decoded when a batch needs them."""

from __future__ import annotations

import _thread
import hashlib
import importlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gossamer.checks import MAX_SEED, check_integer, closest
from gossamer.data.augment import Augment
from gossamer.data.catalogue import IMAGE_FOLDER
from gossamer.data.dataset import check_held_out, choose
from gossamer.data.loader import BatchLoader
from gossamer.data.store import folder
from gossamer.errors import ConfigurationError, DataError, reason
from gossamer.zoo._vision import import_torchvision

IMAGE_SIZE = 224
"""Height and width of the images that networks for ImageNet are trained and tested on."""

MEAN = (0.485, 0.456, 0.406)
"""Mean of each channel of ImageNet's training images, pixels scaled to [0, 1]."""

STD = (0.229, 0.224, 0.225)
"""Standard deviation of each channel, likewise."""

_MARGIN = 256 / 224
"""For evaluation an image's shorter side becomes this many times the size of the square cut from its centre."""

_MOST_WORKERS = 8

TEST_SEED = 0
"""Seed of the generator that chooses the test images of a folder without `val`; the same ones for every run."""

_LAYOUT = "expected train/CLASS/*.JPEG and val/CLASS/*.JPEG, or CLASS/*.JPEG and how many images are for the test"


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Images in files, with their labels; see `load_image_folder`.

    Attributes:
        place: The folder that `files` are in.
        files: Paths relative to it, bytes, (N,). An array, since a list of a million texts would be copied into every
            worker as soon as that counts its references.
        labels: int64, (N,).
        image_size: Height and width of the images given, in pixels.
        augmented: Whether images are cropped and flipped at random; else they are cut from the centre.
        workers: Processes that decode; `None` for one for each CPU of this process, at most eight.
        mean: Mean of each channel of ImageNet's training images, pixels scaled to [0, 1].
        std: Standard deviation of each channel, likewise.
        maximum: Largest pixel value.
    """

    place: Path
    files: np.ndarray[Any, np.dtype[np.bytes_]]
    labels: Tensor
    image_size: int = IMAGE_SIZE
    augmented: bool = False
    workers: int | None = None
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    maximum: int = 255

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, **options: Any) -> BatchLoader:
        """Its batches; `options` are the other arguments of `BatchLoader`.

        Raises:
            ConfigurationError: As `BatchLoader`; an `augment`, which is for images in memory; or a batch of more images
                than there are to train on.
        """
        if self.augmented and isinstance(batch_size, int) and batch_size > len(self):
            raise ConfigurationError(
                f"batch_size={batch_size}: {self.place} has only {len(self)} images to train on; take at most as many"
            )
        return BatchLoader(self, batch_size, **options)

    def pixels(self, augment: Augment | None, device: torch.device) -> FilePixels:
        """See `gossamer.data.loader.Images`."""
        if augment is not None:
            raise ConfigurationError(
                "augment: images of a folder are cropped and flipped at random as published for ImageNet; leave it out"
            )
        return FilePixels(self, device)

    def part(self, chosen: Tensor, augmented: bool) -> FolderSplit:
        """The images that a bool tensor, (N,), chooses."""
        files, labels = self.files[chosen.numpy()], self.labels[chosen]
        return FolderSplit(self.place, files, labels, self.image_size, augmented, self.workers)


@dataclass(frozen=True, eq=False)
class FolderDataset:
    """A data set in a folder; `shape` is (3, image_size, image_size), other attributes as of `Dataset`."""

    name: str
    classes: int
    shape: tuple[int, int, int]
    train: FolderSplit
    validation: FolderSplit | None
    test: FolderSplit


def load_image_folder(
    root: str | os.PathLike[str] | None = None,
    *,
    validation: int | None = None,
    test: int | None = None,
    exclude: Sequence[str] = (),
    image_size: int = IMAGE_SIZE,
    workers: int | None = None,
    seed: int = 0,
) -> FolderDataset:
    """Find the images of ImageNet, or of a folder laid out like it: `train/CLASS/*.JPEG`, `val/CLASS/*.JPEG`.

    A folder may also hold the classes alone, `CLASS/*.JPEG`, as Caltech-101 does: `test` is then the number of images
    set apart for the test.

    Nothing is decoded yet. Training images are cropped at random (8 to 100 % of the area, sides from 3:4 to 4:3),
    scaled to `image_size` and flipped with probability 1/2 (Szegedy et al., 2015); others are scaled until the shorter
    side has 256/224 of `image_size`, and cut from the centre. What happens to an image follows from the loader's seed,
    the epoch and its place in it, whichever process decodes it.

    The labels of ImageNet's own test images are not public, so papers report accuracy on `val/`: it is the `test` split
    here. Validation images are held out of the training images.

    Args:
        root: The folder with `train` and `val`, or with the classes, in it; `None` for `imagenet` in the folder of the
            data sets.
        validation: Training images set apart for validation, each class in its proportion; `None` or 0 to train on all.
        test: Images of a folder that holds the classes alone that are set apart for the test, likewise; the same ones
            whatever `seed` is. `None` for those in `val`.
        exclude: Names of classes that are left out, such as Caltech-101's `BACKGROUND_Google`, which is no category.
        image_size: Height and width of the images given, in pixels.
        workers: Processes that decode; 0 to decode in this one, `None` for one for each CPU of this process, at
            most eight.
        seed: Seed of the `torch.Generator` that chooses the validation images.

    Raises:
        ConfigurationError: An argument out of range, no class of a name to exclude, or torchvision is not installed.
        DataError: No such folder, no class in it, a class without an image, or other classes in `val` than in `train`.
    """
    check_integer("image_size", image_size, at_least=1)
    if workers is not None:
        check_integer("workers", workers, at_least=0)
    place = folder() / IMAGE_FOLDER if root is None else Path(os.path.expanduser(root)).absolute()
    _torchvision("datasets")
    if test is None:
        names, train = _scan(place / "train", place, exclude, image_size, workers)
        test_names, tested = _scan(place / "val", place, exclude, image_size, workers)
        if odd := sorted(set(names) ^ set(test_names)):
            here, there = ("train", "val") if odd[0] in names else ("val", "train")
            raise DataError(
                f"{place}: class {odd[0]!r} is in {here} and not in {there} ({len(odd)} such in all); train and val "
                "must have the same classes, a folder each: add or remove it"
            )
    else:
        names, train = _scan(place, place, exclude, image_size, workers)
        if {"train", "val"} <= set(names):
            raise ConfigurationError(
                f"data: test={test!r}: {place} has train and val, and the images in val are for the test; leave it out"
            )
        check_held_out("test", test, IMAGE_FOLDER, len(train), at_least=1)
        chosen = choose(train.labels, test, TEST_SEED)
        train, tested = train.part(~chosen, augmented=True), train.part(chosen, augmented=False)
    count = validation or 0
    check_held_out("validation", count, IMAGE_FOLDER, len(train))
    chosen = choose(train.labels, count, seed) if count else torch.zeros(len(train), dtype=torch.bool)
    return FolderDataset(
        name=IMAGE_FOLDER,
        classes=len(names),
        shape=(3, image_size, image_size),
        train=train.part(~chosen, augmented=True),
        validation=train.part(chosen, augmented=False) if count else None,
        test=tested,
    )


def _scan(
    place: Path, root: Path, exclude: Sequence[str], image_size: int, workers: int | None
) -> tuple[list[str], FolderSplit]:
    """The names of the classes in a folder, which is `root` or in it, and its images."""
    if not place.is_dir():
        raise DataError(
            f"{place}: no such folder; {_LAYOUT} in {root}: give another as root (in a recipe, or in the "
            "recipe.yaml of a run that goes on, as data.root), or set DATAPATH to the folder that holds "
            f"{IMAGE_FOLDER}/"
        )
    try:
        found = _torchvision("datasets").ImageFolder(place)
    except OSError as error:
        raise DataError(f"{place}: {reason(error).rstrip('.')}; {_LAYOUT}: every class needs an image") from None
    if unknown := [name for name in exclude if name not in found.classes]:
        raise ConfigurationError(
            f"data: exclude: {place} has no class {unknown[0]!r}{closest(unknown[0], found.classes)}; leave it out"
        )
    start = len(str(place)) + 1
    files = np.array([os.fsencode(path[start:]) for path, _ in found.samples])
    kept = torch.tensor([name not in exclude for name in found.classes])
    labels = torch.tensor(found.targets)
    split = FolderSplit(place, files, (kept.cumsum(0) - 1)[labels], image_size, workers=workers)
    names = [name for name in found.classes if name not in exclude]
    return names, split.part(kept[labels], augmented=False)


class FilePixels:
    """Images decoded by worker processes, ahead of the batch that needs them; see `gossamer.data.loader.Pixels`."""

    def __init__(self, split: FolderSplit, device: torch.device) -> None:
        self.split = split
        self.device = device

    def draw(self, generator: torch.Generator) -> Tensor | None:
        """See `Pixels.draw`: a seed for each image."""
        return torch.randint(MAX_SEED, (len(self.split),), generator=generator) if self.split.augmented else None

    def give(self, order: Tensor, draws: Tensor | None, parts: list[slice]) -> Iterator[Tensor]:
        """See `Pixels.give`.

        Raises:
            DataError: A file that is gone, cannot be decoded, or has more than 8 bits a channel.
        """
        seeds = torch.zeros_like(order) if draws is None else draws
        batches = DataLoader(
            _Files(self.split),
            # Made when asked for: all those of an epoch of ImageNet take hundreds of megabytes.
            batch_sampler=(list(zip(order[part].tolist(), seeds[part].tolist(), strict=True)) for part in parts),
            num_workers=min(_workers() if self.split.workers is None else self.split.workers, len(parts)),
            collate_fn=_stack,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the global one, which weights and dropout come from
        )
        decoded: Iterator[Tensor | str] = iter(())
        left = False  # by a `break`: what is raised while a generator is closed may be forgotten
        try:
            with _interrupts_held():
                decoded = iter(batches)  # starts the workers
            for images in decoded:
                if isinstance(images, str):
                    raise DataError(images)
                yield images.to(self.device, non_blocking=True)
        except GeneratorExit:
            left = True
            raise
        finally:
            with _interrupts_held(later=left):
                del decoded  # ends them, now and not when a traceback that refers to it is forgotten

    def settings(self) -> dict[str, Any]:
        """See `Pixels.settings`."""
        return {
            "image_size": self.split.image_size,
            "augmented": self.split.augmented,
            "files and labels": self._digest,
        }

    @cached_property
    def _digest(self) -> str:
        """Of every path and label; asked for with every checkpoint, and over a million of them for ImageNet."""
        digest = hashlib.sha256(b"\0".join(self.split.files.tolist()))
        digest.update(self.split.labels.numpy().tobytes())
        return digest.hexdigest()


@contextmanager
def _interrupts_held(later: bool = False) -> Iterator[None]:
    """Let an interrupt (Ctrl-C) wait until the end of the block, or a tenth of a second longer.

    Starting a process runs Python's at-fork handlers, and torch ends its workers in a `__del__`; what is raised in one
    of those is printed and forgotten, a `KeyboardInterrupt` as well.
    """
    usual = signal.getsignal(signal.SIGINT)
    # Handlers run in the main thread and only it may change them. One that is not callable ignores the signal, ends the
    # process, or is not Python's to put back.
    if not callable(usual) or threading.current_thread() is not threading.main_thread():
        yield
        return
    process, held = os.getpid(), False

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal held
        if os.getpid() == process:
            held = True
        else:  # a worker, which has this handler from the process that started it
            usual(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if held and later:
            threading.Timer(0.1, _thread.interrupt_main).start()
        elif held:
            signal.raise_signal(signal.SIGINT)


class _Files(Dataset[Tensor | str]):
    """A split for torch's `DataLoader`: image number and seed → pixels, or what is wrong with the file.

    An error that a worker raises arrives as the text of its traceback, so it is returned instead.
    """

    def __init__(self, split: FolderSplit) -> None:
        self.split = split
        v2 = _torchvision("transforms.v2")
        size = split.image_size
        cut = (
            [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
            if split.augmented
            else [v2.Resize(round(size * _MARGIN)), v2.CenterCrop(size)]
        )
        self.transform = v2.Compose([*cut, v2.PILToTensor()])

    def __getitem__(self, request: tuple[int, int]) -> Tensor | str:
        index, seed = request
        path = self.split.place / os.fsdecode(self.split.files[index])
        try:
            image = _read(path)
        except DataError as error:
            return str(error)
        except Exception as error:  # a damaged file ends in many kinds of error
            why = reason(error).partition(" <")[0]  # Pillow names the stream, which tells nobody anything
            return f"{path}: cannot be decoded as an image: {why}; repair it, or remove it before a new run"
        # torchvision draws from the global generator, which must be as if this image had been the first.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            pixels: Tensor = self.transform(image)
        return pixels


def _read(path: Path) -> Any:
    """Decode a file as Pillow's RGB image.

    Raises:
        DataError: Pixels of more than 8 bits a channel, which Pillow would clip to white or black.
    """
    with path.open("rb") as stream, importlib.import_module("PIL.Image").open(stream) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            raise DataError(
                f"{path}: has pixels of mode {image.mode}, which 8 bits a channel cannot hold; convert it to 8 bits a "
                "channel, or remove it before a new run"
            )
        return image.convert("RGB")


def _stack(images: list[Tensor | str]) -> Tensor | str:
    """One batch, or the first error in it."""
    pixels = []
    for image in images:
        if isinstance(image, str):
            return image
        pixels.append(image)
    return torch.stack(pixels)


def _workers() -> int:
    """The CPUs of this process, shared with the other processes of the run on this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_WORKERS, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _torchvision(part: str) -> Any:
    """A module of torchvision."""
    try:
        import_torchvision()
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"data: {IMAGE_FOLDER!r} needs the package torchvision; install it with: pip install 'gossamer[vision]' "
            "(in a clone: pip install -e '.[vision]')"
        ) from error
    return importlib.import_module(f"torchvision.{part}")
