"""Files are parsed as their formats say, and refused by name when they are not what they state."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from data.tiny import idx
from gossamer import DataError
from gossamer.data import formats


@given(arrays(np.uint8, array_shapes(min_dims=1, max_dims=4, max_side=5)))
def test_idx_values_and_shape_survive(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("idx") / "values"
    path.write_bytes(idx(values))
    read = formats.read_idx(path)
    assert read.dtype == torch.uint8
    assert np.array_equal(read.numpy(), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an idx file"),
        (b"\x1f\x8b\x08\x00rest", "not an idx file"),
        (struct.pack(">HBBI", 0, 0x0D, 1, 4) + bytes(16), "not an idx file of unsigned bytes"),
        (struct.pack(">HBB", 0, 8, 3) + bytes(5), "header is cut off at byte 9 of 16"),
        (struct.pack(">HBBI", 0, 8, 1, 4) + bytes(3), r"states the shape \(4,\), that is 12 bytes, but has 11"),
        (struct.pack(">HBBI", 0, 8, 1, 4) + bytes(5), "but has 13"),
    ],
)
def test_idx_files_that_are_not_what_they_state_are_named(tmp_path, content, message):
    path = tmp_path / "train-images"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"train-images: .*{message}"):
        formats.read_idx(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone: cannot be read: No such file.*gossamer\.data\.fetch"):
        formats.read_idx(tmp_path / "gone")


def cifar_records(count, label_bytes, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 100, (count, label_bytes), dtype=np.uint8)
    pixels = generator.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    content = b"".join(bytes(label) + image.tobytes() for label, image in zip(labels, pixels, strict=True))
    return content, labels, pixels


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_cifar_records_give_pixels_and_the_last_label_byte(tmp_path, label_bytes):
    content, labels, pixels = cifar_records(5, label_bytes)
    path = tmp_path / "batch.bin"
    path.write_bytes(content)
    images, read = formats.read_cifar(path, label_bytes)
    assert np.array_equal(images.numpy(), pixels)
    assert read.dtype == torch.int64
    assert read.tolist() == labels[:, -1].tolist()


@pytest.mark.parametrize("size", [0, 3072, 3074, 2 * 3073 - 1])
def test_cifar_files_with_part_of_a_record_are_named(tmp_path, size):
    path = tmp_path / "batch.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(DataError, match=f"batch.bin: has {size} bytes, not a positive multiple of 3073"):
        formats.read_cifar(path, 1)


def test_cifar10_batches_are_joined_in_the_official_order(tmp_path):
    expected = []
    for number in range(1, 6):
        content, labels, _ = cifar_records(3, 1, seed=number)
        (tmp_path / f"data_batch_{number}.bin").write_bytes(content)
        expected += labels[:, 0].tolist()
    content, labels, pixels = cifar_records(2, 1, seed=9)
    (tmp_path / "test_batch.bin").write_bytes(content)
    raw = formats.read_cifar10(tmp_path)
    assert raw.labels.tolist() == expected
    assert raw.images.shape == (15, 3, 32, 32)
    assert raw.test_labels.tolist() == labels[:, 0].tolist()
    assert np.array_equal(raw.test_images.numpy(), pixels)


def test_cifar100_gives_fine_labels(tmp_path):
    train, train_labels, pixels = cifar_records(4, 2)
    test, test_labels, _ = cifar_records(3, 2, seed=1)
    (tmp_path / "train.bin").write_bytes(train)
    (tmp_path / "test.bin").write_bytes(test)
    raw = formats.read_cifar100(tmp_path)
    assert raw.labels.tolist() == train_labels[:, 1].tolist()
    assert raw.test_labels.tolist() == test_labels[:, 1].tolist()
    assert np.array_equal(raw.images.numpy(), pixels)
