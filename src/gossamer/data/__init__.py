"""Data sets as tensors: fetched and verified once, loaded whole, batched and augmented on the device."""

from gossamer.data.augment import Augment
from gossamer.data.catalogue import NAMES
from gossamer.data.dataset import Dataset, Split, load
from gossamer.data.loader import Batches, BatchLoader
from gossamer.data.sources import available, fetch
from gossamer.data.store import folder
from gossamer.data.text import StreamLoader, TextSplit

__all__ = [
    "NAMES",
    "Augment",
    "BatchLoader",
    "Batches",
    "Dataset",
    "Split",
    "StreamLoader",
    "TextSplit",
    "available",
    "fetch",
    "folder",
    "load",
]
