"""Data sets are split once and for all: classes in proportion, nothing shared, the same in every run."""

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer import ConfigurationError, DataError, data
from gossamer.data import dataset, loader


def test_digits_are_split_into_disjoint_parts_that_are_the_whole():
    digits = data.load("digits")
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (1293, 144, 360)
    assert digits.shape == (1, 8, 8)
    assert digits.train.images.dtype == torch.uint8
    assert digits.train.images.shape == (1293, 1, 8, 8)
    assert digits.train.labels.dtype == torch.int64
    assert int(torch.cat([digits.train.images, digits.test.images]).max()) == digits.train.maximum == 16


def test_digits_mean_and_deviation_are_those_of_the_training_digits():
    train = data.load("digits", validation=0).train
    scaled = train.images.double() / train.maximum
    assert scaled.mean().item() == pytest.approx(train.mean[0], abs=6e-5)
    assert scaled.std(correction=0).item() == pytest.approx(train.std[0], abs=6e-5)


def test_the_test_digits_do_not_depend_on_the_validation_split():
    first, second = data.load("digits"), data.load("digits", validation=30, seed=7)
    assert torch.equal(first.test.images, second.test.images)
    assert not torch.equal(first.validation.images[:30], second.validation.images)
    assert torch.equal(first.train.images, data.load("digits").train.images)


def test_no_validation_trains_on_all():
    digits = data.load("digits", validation=0)
    assert digits.validation is None
    assert len(digits.train) == 1437


@pytest.mark.parametrize("validation", [-1, 1437, 0.1, True])
def test_impossible_validation_splits_are_refused(validation):
    with pytest.raises(ConfigurationError, match=rf"validation={validation} of digits; expected .* from 0 to 1436"):
        data.load("digits", validation=validation)


def test_fewer_images_are_trained_on_where_asked_each_class_in_proportion():
    digits, all_of_them = data.load("digits", train=200), data.load("digits")
    assert torch.equal(digits.validation.images, all_of_them.validation.images)
    assert len(digits.train) == 200
    known = {image.numpy().tobytes() for image in all_of_them.train.images}
    assert all(image.numpy().tobytes() in known for image in digits.train.images)
    shares = [torch.bincount(part.train.labels) / len(part.train) for part in (digits, all_of_them)]
    assert (shares[0] - shares[1]).abs().max() < 1 / 200


@pytest.mark.parametrize("train", [0, 1294, True, 0.5])
def test_impossible_numbers_of_images_to_train_on_are_refused(train):
    with pytest.raises(ConfigurationError, match=rf"train={train} of digits; expected .* from 1 to 1293"):
        data.load("digits", train=train)


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=80),
    share=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 9),
)
def test_set_apart_takes_each_class_in_proportion_and_shares_nothing(labels, share, seed):
    size = len(labels)
    count = max(1, int(share * size))
    names = torch.arange(size)
    split = data.Split(names, torch.tensor(labels), (0.0,), (1.0,))
    rest, picked = dataset.set_apart(split, count, seed)
    assert len(picked) == count
    assert sorted(rest.images.tolist() + picked.images.tolist()) == names.tolist()
    for part in (rest, picked):
        assert part.images.tolist() == sorted(part.images.tolist())
        assert part.labels.tolist() == [labels[name] for name in part.images.tolist()]
    for label in set(labels):
        exact = count * labels.count(label) / size
        assert abs(picked.labels.tolist().count(label) - exact) < 1


def test_set_apart_follows_its_seed():
    split = data.load("digits", validation=0).train
    picked = [dataset.set_apart(split, 100, seed)[1].images for seed in (0, 0, 1)]
    assert torch.equal(picked[0], picked[1])
    assert not torch.equal(picked[0], picked[2])


def test_missing_files_are_named_when_downloading_is_not_wanted(tmp_path):
    with pytest.raises(DataError, match=r"'mnist': .*train-images-idx3-ubyte is missing; .*fetch\('mnist'\)"):
        data.load("mnist", tmp_path, download=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "first", "first_test"),
    [
        ("mnist", [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]),
        ("fashion_mnist", [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]),
        ("cifar10", [6, 9, 9, 4, 1, 1, 2, 7, 8, 3], [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]),
    ],
)
def test_the_real_data_sets_are_what_is_known_of_them(name, first, first_test):
    if not data.available(name):
        pytest.skip(f"{name} is not in {data.folder()}; get it with gossamer.data.fetch({name!r})")
    loaded = data.load(name, validation=0, download=False)
    images = loaded.train.images
    assert images.shape[1:] == loaded.shape
    assert loaded.train.labels[:10].tolist() == first
    assert loaded.test.labels[:10].tolist() == first_test
    assert len(loaded.test) == 10_000
    # Every class has as many images as every other, in all sets but MNIST.
    counts = loaded.train.labels.bincount(minlength=loaded.classes)
    assert len(counts) == loaded.classes
    assert int(counts.min()) > 0
    assert name == "mnist" or len(set(counts.tolist())) == 1
    for channel, (mean, std) in enumerate(zip(loaded.mean, loaded.std, strict=True)):
        # By the histogram, since a float64 copy of all pixels takes a gigabyte.
        histogram = images[:, channel].flatten().bincount(minlength=256).double()
        values = torch.arange(256).double() / 255
        exact = (histogram * values).sum() / histogram.sum()
        spread = ((histogram * (values - exact) ** 2).sum() / histogram.sum()).sqrt()
        assert exact.item() == pytest.approx(mean, abs=1e-4)
        assert spread.item() == pytest.approx(std, abs=1e-4)


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(loader).failed == 0
    assert doctest.testmod(loader).attempted > 0
