"""The data sets: shapes, statistics, files with their checksums, and where the files are published.

Each data set has one form on disk, that of its authors: raw idx files for MNIST and Fashion-MNIST, the binary batches
for CIFAR. Every source is brought into that form and checked against the same SHA-256, so it does not matter where a
file came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gossamer.checks import closest
from gossamer.data import formats
from gossamer.errors import ConfigurationError


@dataclass(frozen=True)
class File:
    """One file of a data set: its name in the data set's folder, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """One data set.

    Attributes:
        name: Its name, which is also its folder's.
        classes: Number of classes.
        shape: (channels, height, width) of an image.
        mean: Mean of each channel over the training images, pixels scaled to [0, 1].
        std: Standard deviation of each channel, likewise.
        validation: Training images set apart for validation unless asked otherwise.
        read: Takes the folder and returns its images and labels.
        files: What the folder holds; none for data that come inside a library.
        mirrors: Addresses under which each file lies as NAME.gz.
        archives: Addresses of .tar.gz archives that hold all files.
        maximum: Largest pixel value.
    """

    name: str
    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: int
    read: Callable[[Path], formats.Raw]
    files: tuple[File, ...] = ()
    mirrors: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()
    maximum: int = 255


_MNIST_FILES = (
    File("train-images-idx3-ubyte", 47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    File("train-labels-idx1-ubyte", 60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    File("t10k-images-idx3-ubyte", 7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    File("t10k-labels-idx1-ubyte", 10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
)
_FASHION_MNIST_FILES = (
    File("train-images-idx3-ubyte", 47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    File("train-labels-idx1-ubyte", 60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    File("t10k-images-idx3-ubyte", 7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    File("t10k-labels-idx1-ubyte", 10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
)
_CIFAR10_FILES = (
    File("data_batch_1.bin", 30_730_000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
    File("data_batch_2.bin", 30_730_000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
    File("data_batch_3.bin", 30_730_000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
    File("data_batch_4.bin", 30_730_000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
    File("data_batch_5.bin", 30_730_000, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
    File("test_batch.bin", 30_730_000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
)
_CIFAR100_FILES = (
    File("train.bin", 153_700_000, "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29"),
    File("test.bin", 30_740_000, "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a"),
)

DATASETS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry(
            name="digits",
            classes=10,
            shape=(1, 8, 8),
            mean=(0.3057,),
            std=(0.3766,),
            validation=144,
            read=lambda _: formats.read_digits(),
            maximum=16,
        ),
        Entry(
            name="mnist",
            classes=10,
            shape=(1, 28, 28),
            mean=(0.1307,),
            std=(0.3081,),
            validation=5_000,
            read=formats.read_mnist,
            files=_MNIST_FILES,
            mirrors=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
        ),
        Entry(
            name="fashion_mnist",
            classes=10,
            shape=(1, 28, 28),
            mean=(0.2860,),
            std=(0.3530,),
            validation=5_000,
            read=formats.read_mnist,
            files=_FASHION_MNIST_FILES,
            mirrors=(
                "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
                "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            ),
        ),
        Entry(
            name="cifar10",
            classes=10,
            shape=(3, 32, 32),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            validation=5_000,
            read=formats.read_cifar10,
            files=_CIFAR10_FILES,
            archives=(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "https://cave.cs.toronto.edu/kriz/cifar-10-binary.tar.gz",
            ),
        ),
        Entry(
            name="cifar100",
            classes=100,
            shape=(3, 32, 32),
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            validation=5_000,
            read=formats.read_cifar100,
            files=_CIFAR100_FILES,
            archives=(
                "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
                "https://cave.cs.toronto.edu/kriz/cifar-100-binary.tar.gz",
            ),
        ),
    )
}

NAMES: tuple[str, ...] = tuple(DATASETS)
"""The names of the data sets that are loaded into memory."""

IMAGE_FOLDER = "imagenet"
"""The data set that is a folder of images; see `gossamer.data.load_image_folder`."""


def find(name: str) -> Entry:
    """Return a data set's entry.

    Raises:
        ConfigurationError: No data set has this name.
    """
    if name not in DATASETS:
        raise ConfigurationError(
            f"data: no data set {name!r}{closest(name, [*NAMES, IMAGE_FOLDER])}; there are {', '.join(NAMES)}, and "
            f"{IMAGE_FOLDER}, a folder of images (gossamer.data.load_image_folder)"
        )
    return DATASETS[name]
