"""A tiny data set in MNIST's format, with its checksums, and a server for it made of files."""

import gzip
import hashlib
import struct

import numpy as np

from gossamer.data import catalogue, formats


def idx(values):
    """The bytes of an idx file, built from the format's definition."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()


def contents(train=60, test=20, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "train-images-idx3-ubyte": idx(generator.integers(0, 256, (train, 6, 5))),
        "train-labels-idx1-ubyte": idx(generator.integers(0, 3, train)),
        "t10k-images-idx3-ubyte": idx(generator.integers(0, 256, (test, 6, 5))),
        "t10k-labels-idx1-ubyte": idx(generator.integers(0, 3, test)),
    }


def entry(files, **sources):
    return catalogue.Entry(
        name="tiny",
        classes=3,
        shape=(1, 6, 5),
        mean=(0.5,),
        std=(0.25,),
        validation=10,
        read=formats.read_mnist,
        files=tuple(catalogue.File(name, len(b), hashlib.sha256(b).hexdigest()) for name, b in files.items()),
        **sources,
    )


def serve(files, folder):
    """Put each file into a folder as NAME.gz; return the folder's address."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder.as_uri() + "/"
