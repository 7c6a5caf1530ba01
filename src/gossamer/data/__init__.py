"""Data sets: as tensors, fetched, verified, loaded whole and augmented on the device; or as a folder of images."""

from gossamer.data.augment import Augment
from gossamer.data.catalogue import IMAGE_FOLDER, NAMES
from gossamer.data.dataset import Dataset, Split, load
from gossamer.data.image_folder import FolderDataset, FolderSplit, load_image_folder
from gossamer.data.loader import Batches, BatchLoader
from gossamer.data.sources import available, fetch
from gossamer.data.store import folder
from gossamer.data.text import StreamLoader, TextSplit

__all__ = [
    "IMAGE_FOLDER",
    "NAMES",
    "Augment",
    "BatchLoader",
    "Batches",
    "Dataset",
    "FolderDataset",
    "FolderSplit",
    "Split",
    "StreamLoader",
    "TextSplit",
    "available",
    "fetch",
    "folder",
    "load",
    "load_image_folder",
]
