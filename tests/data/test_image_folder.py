"""Folders of images: every image once, cropped as published, whichever process decodes it; and what is refused."""

import importlib.util
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from data import pictures
from gossamer import ConfigurationError, DataError, StateError, data

if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed (gossamer[vision])", allow_module_level=True)

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return pictures.write(tmp_path_factory.mktemp("pictures"))


def load(root, **options):
    return data.load_image_folder(root, **{"image_size": 16, "workers": 0, **options})


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_classes_and_images_are_those_of_the_folders(root):
    found = load(root)
    assert (found.classes, found.shape) == (4, (3, 16, 16))
    assert (len(found.train), found.validation, len(found.test)) == (40, None, 16)
    assert found.train.labels.bincount().tolist() == [10] * 4
    paths = [found.test.place / name.decode() for name in found.test.files]
    assert paths == sorted(root.glob("val/*/*"))
    assert [sorted(pictures.COLOURS).index(path.parent.name) for path in paths] == found.test.labels.tolist()


def test_images_are_evaluated_at_their_centre(root):
    split = load(root, image_size=28).test
    batches = list(split.batches(6))
    assert [len(y) for _, y in batches] == [6, 6, 4]
    given = torch.cat([x for x, _ in batches])
    assert given.dtype == torch.float32
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)
    for image, name in zip(given, split.files, strict=True):
        with Image.open(split.place / name.decode()) as picture:
            colour = picture.convert("RGB")
        scale = 32 / min(colour.size)  # 256/224 of 28
        width, height = (max(32, int(side * scale)) for side in colour.size)
        left, top = round((width - 28) / 2), round((height - 28) / 2)
        cut = colour.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + 28, top + 28))
        expected = torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 255
        torch.testing.assert_close(image, (expected - MEAN) / STD, rtol=0, atol=1e-5)


def test_training_images_are_crops_of_the_published_sizes_and_half_of_them_are_flipped(tmp_path):
    # Red tells the column and green the row, so a crop tells where it is from.
    ramp = np.linspace(0, 255, 200).astype(np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], np.uint8(0)), axis=2)
    for part in ("train", "val"):
        (tmp_path / part / "one").mkdir(parents=True)
        for i in range(100 if part == "train" else 1):
            Image.fromarray(picture).save(tmp_path / part / "one" / f"{i}.png")
    ((x, _),) = load(tmp_path, image_size=32).train.batches(100, shuffle=True, seed=3)
    columns, rows = ((x * STD + MEAN)[:, 0].mean(1), (x * STD + MEAN)[:, 1].mean(2))
    width = (columns[:, -4] - columns[:, 3]) * 32 / 25  # away from the edges, which scaling mixes
    height = (rows[:, -4] - rows[:, 3]) * 32 / 25
    area, ratio = width.abs() * height, width.abs() / height
    assert 0.07 < area.min() < 0.25
    assert 0.75 < area.max() < 1.05
    assert 0.7 < ratio.min() < 0.85
    assert 1.2 < ratio.max() < 1.4
    assert 30 < int((width < 0).sum()) < 70


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_batches_do_not_depend_on_the_number_of_workers(root):
    def epochs(workers):
        loader = load(root, workers=workers).train.batches(16, shuffle=True, seed=1)
        return [batch for _ in range(2) for batch in loader]

    alone = epochs(0)
    assert len(alone) == 6
    assert same(alone, epochs(1))
    assert same(alone, epochs(2))


def test_an_epoch_has_every_image_once_and_each_epoch_and_seed_crops_of_its_own(root):
    split = load(root).train
    loader = split.batches(40, shuffle=True, seed=1)
    batches = [next(iter(each)) for each in (loader, loader, split.batches(40, shuffle=True, seed=2))]
    assert all(y.sort().values.tolist() == sorted(split.labels.tolist()) for _, y in batches)
    assert len({y.numpy().tobytes() for _, y in batches}) == 3
    ordered = split.batches(40)
    crops = [next(iter(ordered))[0] for _ in range(2)]
    assert not any(torch.equal(*pair) for pair in zip(*crops, strict=True))


def test_the_global_generator_is_neither_used_nor_moved(root):
    before = torch.get_rng_state()
    first = list(load(root).train.batches(20, shuffle=True))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(before[0].item() + 1)
    assert same(first, list(load(root).train.batches(20, shuffle=True)))
    torch.set_rng_state(before)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_an_epoch_is_continued_with_the_batches_that_were_left(root, stop):
    def make():
        return load(root).train.batches(16, shuffle=True, seed=5)

    unbroken, seen, state = [], [], None
    loader = make()
    while loader.epoch < 2:
        for batch in loader:
            unbroken.append(batch)
            if len(unbroken) <= stop:
                seen.append(batch)
            if len(unbroken) == stop:
                state = loader.state_dict()
    again = make()
    again.load_state_dict(state)
    while again.epoch < 2:
        seen.extend(again)
    assert len(unbroken) == 6
    assert same(seen, unbroken)


def test_a_state_of_other_images_is_refused(root):
    state = load(root).train.batches(16, shuffle=True).state_dict()
    with pytest.raises(StateError, match="saved with image_size=16, but this loader has image_size=20"):
        load(root, image_size=20).train.batches(16, shuffle=True).load_state_dict(state)


def test_the_parts_of_all_processes_are_the_global_batches(root):
    split = load(root).train
    expected = list(split.batches(12, shuffle=True, seed=3))
    parts = [list(split.batches(12, shuffle=True, seed=3, rank=rank, world_size=2)) for rank in range(2)]
    joined = [tuple(torch.cat(tensors) for tensors in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)]
    assert same(joined, expected)


def test_validation_images_come_from_each_class_and_are_not_trained_on(root):
    found = load(root, validation=8)
    assert found.validation.labels.bincount().tolist() == [2] * 4
    assert (len(found.train), len(found.test)) == (32, 16)
    assert sorted([*found.train.files, *found.validation.files]) == sorted(load(root).train.files)
    batches = found.validation.batches(8)
    assert same(list(batches), list(batches))  # from the centre, not at random
    with pytest.raises(ConfigurationError, match=r"validation=40 of imagenet; expected .* from 0 to 39"):
        load(root, validation=40)


@pytest.fixture(scope="module")
def categories(root, tmp_path_factory):
    """Classes alone: ten pictures of each, and a folder that is none."""
    place = shutil.copytree(root / "train", tmp_path_factory.mktemp("categories") / "classes")
    shutil.copytree(place / "n01", place / "a background")
    return place


def test_a_folder_of_classes_alone_is_divided_into_parts_that_have_every_image_once(root, categories):
    found = load(categories, test=8, validation=4, exclude=["a background"])
    assert (found.classes, found.shape) == (4, (3, 16, 16))
    parts = (found.train, found.validation, found.test)
    assert [part.labels.bincount().tolist() for part in parts] == [[7] * 4, [1] * 4, [2] * 4]
    named = {name.decode(): int(label) for part in parts for name, label in zip(part.files, part.labels, strict=True)}
    pictures_of = load(root).train
    expected = {name.decode(): int(y) for name, y in zip(pictures_of.files, pictures_of.labels, strict=True)}
    assert named == expected
    assert [part.augmented for part in parts] == [True, False, False]
    assert [len(x) for x, _ in found.test.batches(5)] == [5, 3]


def test_the_test_images_of_a_folder_are_the_same_in_every_run(categories):
    first, second = (load(categories, test=12, validation=8, seed=seed) for seed in (1, 2))
    assert first.test.files.tolist() == second.test.files.tolist()
    assert first.validation.files.tolist() != second.validation.files.tolist()
    assert first.classes == 5


def test_classes_are_left_out_of_train_and_val_as_well(root):
    found = load(root, exclude=["n02"])
    assert found.classes == 3
    for part, each in ((found.train, 10), (found.test, 4)):
        assert part.labels.bincount().tolist() == [each] * 3
        assert {name.decode().partition("/")[0] for name in part.files} == {"n01", "n03", "n04"}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"test": 50}, ConfigurationError, "test=50 of imagenet; expected a number of images from 1 to 49"),
        ({"test": 0}, ConfigurationError, "test=0 of imagenet"),
        ({"test": 20, "validation": 30}, ConfigurationError, "validation=30 of imagenet; .* from 0 to 29"),
        ({"test": 8, "exclude": ["n1"]}, ConfigurationError, "exclude: .* has no class 'n1'; did you mean 'n01'"),
        ({}, DataError, r"classes/train: no such folder; .* or CLASS/\*.JPEG and how many images are for the test in "),
    ],
)
def test_a_folder_of_classes_that_cannot_be_divided_so_is_refused(categories, options, error, said):
    with pytest.raises(error, match=said):
        load(categories, **options)


def test_test_images_are_not_taken_from_a_folder_that_has_them(root):
    with pytest.raises(
        ConfigurationError, match=r"test=8: .* has train and val, and the images in val are for the test"
    ):
        load(root, test=8)


def test_the_usual_folder_is_that_of_the_data_sets(root, tmp_path, monkeypatch):
    (tmp_path / "imagenet").symlink_to(root)
    monkeypatch.setenv("DATAPATH", str(tmp_path))
    assert len(load(None).train) == 40


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(b"no image"), "cannot identify image file"),
        (lambda file: file.write_bytes(file.read_bytes()[:400]), "image file is truncated"),
        (lambda file: file.unlink(), "No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_decoded_is_named(tmp_path, root, damage, said, workers):
    shutil.copytree(root / "val", tmp_path / "train")
    shutil.copytree(root / "val", tmp_path / "val")
    loader = load(tmp_path, workers=workers).train.batches(4)
    damage(tmp_path / "train" / "n03" / "val_2.JPEG")
    with pytest.raises(DataError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/train/n03/val_2.JPEG: cannot be decoded as an image: ")
    assert said in message
    assert message.endswith("; repair it, or remove it before a new run")
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("name", "kind", "mode"),
    [
        ("deep.png", np.uint16, "I;16"),
        ("deep.tif", ">u2", "I;16B"),
        ("deep.tiff", np.int32, "I"),
        ("float.tif", np.float32, "F"),
    ],
)
def test_a_file_of_more_than_8_bits_a_channel_is_refused_and_not_clipped(tmp_path, root, name, kind, mode, workers):
    for part in ("train", "val"):
        shutil.copytree(root / "val", tmp_path / part)
    file = tmp_path / "train" / "n03" / name
    Image.fromarray(np.full((30, 40), 300, kind)).save(file)
    with Image.open(file) as image:
        assert image.mode == mode
    with pytest.raises(DataError) as caught:
        list(load(tmp_path, workers=workers).train.batches(4))
    assert str(caught.value) == (
        f"{file}: has pixels of mode {mode}, which 8 bits a channel cannot hold; convert it to 8 bits a channel, or "
        "remove it before a new run"
    )


@pytest.mark.parametrize(
    ("moment", "given"), [("os.register_at_fork(before=interrupt)", 0), ("DataLoaderIter.__del__ = interrupt", 4)]
)
def test_an_interrupt_while_workers_start_or_end_is_not_lost(root, moment, given):
    # In a process of its own, since a handler cannot be taken out of Python's list again.
    script = f"""
import os, signal
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as DataLoaderIter
from gossamer import data

def interrupt(*arguments):
    os.kill(os.getpid(), signal.SIGINT)

{moment}
signal.signal(signal.SIGINT, signal.default_int_handler)
batches = data.load_image_folder({str(root)!r}, image_size=16, workers=2).test.batches(4)
try:
    list(batches)
except KeyboardInterrupt:
    print("interrupted after", batches.position)
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    command = [sys.executable, "-W", "ignore:.*use of fork:DeprecationWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == (f"interrupted after {given}\nTrue\n", "", 0)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("usual", [signal.SIG_IGN, signal.SIG_DFL, lambda number, frame: None])
def test_the_handler_of_interrupts_is_put_back_once_workers_have_started(root, usual, workers):
    before = signal.signal(signal.SIGINT, usual)
    try:
        for _ in load(root, workers=workers).test.batches(8):
            assert signal.getsignal(signal.SIGINT) is usual
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers_start_outside_the_main_thread_as_well(root):
    given = []
    thread = threading.Thread(target=lambda: given.extend(load(root, workers=1).test.batches(8)))
    thread.start()
    thread.join()
    assert same(given, list(load(root).test.batches(8)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda place: shutil.rmtree(place), r"/train: no such folder; expected train/CLASS/\*.JPEG .* data.root"),
        (lambda place: shutil.rmtree(place / "val"), r"/val: no such folder; expected train/CLASS/"),
        (lambda place: [shutil.rmtree(each) for each in place.glob("train/*")], "/train: Couldn't find any class"),
        (lambda place: shutil.rmtree(place / "val" / "n02"), "class 'n02' is in train and not in val .1 such in all"),
        (lambda place: shutil.rmtree(place / "train" / "n01"), "class 'n01' is in val and not in train"),
        (lambda place: [each.unlink() for each in place.glob("train/n04/*")], "/train: .* classes n04.*needs an image"),
    ],
)
def test_a_folder_that_is_laid_out_otherwise_is_refused_with_what_is_missing(tmp_path, root, change, said):
    place = tmp_path / "copy"
    for part in ("train", "val"):
        shutil.copytree(root / "val", place / part)
    change(place)
    with pytest.raises(DataError, match=said) as caught:
        load(place)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_size": 0}, "image_size: expected an integer of at least 1, got 0"),
        ({"image_size": 8.5}, "image_size: .* got 8.5"),
        ({"workers": -1}, "workers: expected an integer of at least 0, got -1"),
        ({"validation": -1}, "validation=-1 of imagenet"),
    ],
)
def test_impossible_options_are_refused(root, options, said):
    with pytest.raises(ConfigurationError, match=said):
        load(root, **options)


def test_impossible_batches_are_refused(root):
    split = load(root)
    with pytest.raises(ConfigurationError, match=r"batch_size=41: .*/train has only 40 images to train on; take at mo"):
        split.train.batches(41)
    assert len(split.test.batches(41)) == 1
    with pytest.raises(ConfigurationError, match=r"augment: images of a folder are cropped .*; leave it out"):
        split.train.batches(4, augment=data.Augment())
    with pytest.raises(ConfigurationError, match="batch_size=0; expected a positive integer"):
        split.train.batches(0)


def test_a_missing_torchvision_is_named_with_the_extra_that_brings_it(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigurationError, match=r"needs the package torchvision; .* pip install 'gossamer\[vision\]'"):
        load(root)


def test_data_in_memory_are_not_asked_for_a_folder():
    with pytest.raises(
        ConfigurationError, match=r"no data set 'imagenet'.*; there are .* folder of images .*load_image"
    ):
        data.load("imagenet")
