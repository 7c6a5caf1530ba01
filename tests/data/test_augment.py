"""Augmentation of a batch equals padding, cropping and flipping one image after the other."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gossamer import ConfigurationError
from gossamer.data import Augment


def one_by_one(images, draws, augment):
    """The same by the definition: pad every image, cut out a window, turn it round."""
    mode = {"reflect": "reflect", "zero": "constant"}[augment.padding]
    height, width = images.shape[2:]
    found = []
    for image, (row, column, flip) in zip(images, draws.tolist(), strict=True):
        padded = F.pad(image[None].double(), [augment.crop] * 4, mode=mode)[0]
        window = padded[:, row : row + height, column : column + width]
        found.append((window.flip(2) if flip else window).to(images.dtype))
    return torch.stack(found)


@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 6),
    channels=st.integers(1, 3),
    height=st.integers(4, 9),
    width=st.integers(4, 9),
    crop=st.integers(0, 3),
    padding=st.sampled_from(["reflect", "zero"]),
    flip=st.booleans(),
)
def test_a_batch_equals_its_images_one_by_one(seed, count, channels, height, width, crop, padding, flip):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (10, channels, height, width), dtype=torch.uint8, generator=generator)
    index = torch.randint(0, 10, (count,), generator=generator)
    augment = Augment(crop=crop, padding=padding, flip=flip)
    draws = augment.draw(count, generator)
    taken = augment.take(images, index, draws)
    assert taken.dtype == torch.uint8
    assert torch.equal(taken, one_by_one(images[index], draws, augment))


def test_every_offset_and_both_directions_are_drawn_equally_often():
    draws = Augment(crop=1).draw(9000, torch.Generator().manual_seed(0))
    assert draws.shape == (9000, 3)
    counts = torch.bincount(draws[:, 0] * 6 + draws[:, 1] * 2 + draws[:, 2], minlength=18)
    # Five standard deviations of a binomial with 1/18.
    assert ((counts - 500).abs() < 5 * (9000 / 18 * 17 / 18) ** 0.5).all()


def test_images_of_one_batch_are_moved_independently():
    draws = Augment(crop=4).draw(64, torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in draws.tolist()}) > 30


def test_no_flip_is_drawn_when_none_is_wanted_and_the_crops_stay_the_same():
    with_flip, without = (Augment(flip=f).draw(50, torch.Generator().manual_seed(3)) for f in (True, False))
    assert torch.equal(with_flip[:, :2], without[:, :2])
    assert not without[:, 2].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": -1}, "crop=-1; expected a number of pixels"),
        ({"crop": 1.5}, "crop=1.5"),
        ({"padding": "edge"}, r"padding='edge'; expected one of \('reflect', 'zero'\)"),
        ({"flip": 1}, "flip=1; expected true or false"),
    ],
)
def test_impossible_augmentations_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        Augment(**arguments)


def test_images_too_small_for_the_crop_are_refused():
    with pytest.raises(ConfigurationError, match="crop=4 needs images of more than 4 pixels a side, these have 4×8"):
        Augment(crop=4).check(torch.Size((1, 1, 4, 8)))
