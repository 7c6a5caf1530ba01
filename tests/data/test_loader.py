"""Batches hold every image once, depend on nothing but seed and settings, and continue where they stopped."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer import ConfigurationError, StateError
from gossamer.data import Augment, BatchLoader, Split

AUGMENTS = [None, Augment(crop=2), Augment(crop=2, padding="zero", flip=False)]


def split_of(size, shape=(2, 5, 6)):
    """Labels number the images, so that a batch tells which images it holds."""
    images = torch.randint(0, 256, (size, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    return Split(images, torch.arange(size), (0.5, 0.25), (0.25, 0.5))


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


@given(size=st.integers(1, 30), batch=st.integers(1, 12), shuffle=st.booleans(), drop_last=st.booleans())
def test_an_epoch_holds_every_image_at_most_once_and_all_unless_the_last_is_dropped(size, batch, shuffle, drop_last):
    if drop_last and batch > size:
        with pytest.raises(ConfigurationError, match=f"no whole batch of {batch} in {size} images"):
            BatchLoader(split_of(size), batch, drop_last=True)
        return
    loader = BatchLoader(split_of(size), batch, shuffle=shuffle, drop_last=drop_last)
    batches = list(loader)
    assert len(batches) == len(loader)
    seen = [label for _, y in batches for label in y.tolist()]
    assert len(seen) == (size - size % batch if drop_last else size)
    assert len(set(seen)) == len(seen)
    assert shuffle or seen == list(range(len(seen)))
    assert all(len(x) == len(y) == batch for x, y in batches[:-1])
    assert loader.smallest == min(len(y) for _, y in batches)


def test_images_are_normalised_and_belong_to_their_labels():
    split = split_of(7)
    for x, y in BatchLoader(split, 3, shuffle=True):
        assert x.dtype == torch.float32
        mean, std = torch.tensor([0.5, 0.25]).view(2, 1, 1), torch.tensor([0.25, 0.5]).view(2, 1, 1)
        torch.testing.assert_close(x, (split.images[y].float() / 255 - mean) / std)


def test_a_smaller_largest_value_is_what_pixels_are_divided_by():
    images = torch.full((1, 1, 2, 2), 16, dtype=torch.uint8)
    x, _ = next(iter(BatchLoader(Split(images, torch.zeros(1, dtype=torch.int64), (0.0,), (1.0,), 16), 1)))
    assert torch.equal(x, torch.ones(1, 1, 2, 2))


def test_epochs_have_different_orders_and_seeds_too():
    loader = BatchLoader(split_of(40), 40, shuffle=True, seed=1)
    orders = [next(iter(loader))[1] for _ in range(3)]
    other = next(iter(BatchLoader(split_of(40), 40, shuffle=True, seed=2)))[1]
    assert len({tuple(order.tolist()) for order in [*orders, other]}) == 4


def test_the_global_generator_is_neither_used_nor_moved():
    before = torch.get_rng_state()
    first = list(BatchLoader(split_of(10), 4, shuffle=True, augment=Augment(crop=2)))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(before[0].item() + 1)
    assert same(first, list(BatchLoader(split_of(10), 4, shuffle=True, augment=Augment(crop=2))))
    torch.set_rng_state(before)


@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
@pytest.mark.parametrize("stops", [(1, 2, 5), (3, 3, 6), (4, 8, 8)])
def test_a_run_stopped_three_times_sees_the_batches_of_an_unbroken_one(augment, stops):
    def make():
        return BatchLoader(split_of(13), 4, shuffle=True, augment=augment, seed=5)

    def run(loader, seen, stop=None):
        while loader.epoch < 3:
            for batch in loader:
                seen.append((*batch, torch.tensor([loader.epoch, loader.position])))
                if len(seen) == stop:
                    return copy.deepcopy(loader.state_dict())
        return None

    unbroken = []
    run(make(), unbroken)
    seen = []
    state = run(make(), seen, stops[0])
    for stop in stops[1:]:
        loader = make()
        loader.load_state_dict(state)
        assert (loader.epoch, loader.position) == (state["epoch"], state["position"])
        state = run(loader, seen, stop) if stop > len(seen) else loader.state_dict()
    loader = make()
    loader.load_state_dict(state)
    run(loader, seen)
    assert len(unbroken) == 12
    assert same(seen, unbroken)


def test_a_state_taken_between_epochs_begins_the_next():
    loader = BatchLoader(split_of(9), 4, shuffle=True, seed=5)
    list(loader)
    assert (loader.epoch, loader.position) == (1, 0)
    other = BatchLoader(split_of(9), 4, shuffle=True, seed=6)
    other.load_state_dict(loader.state_dict())
    assert other.epoch == 1
    assert same(list(loader), list(other))


def test_after_a_break_a_new_epoch_begins():
    loader = BatchLoader(split_of(12), 4, shuffle=True, seed=5)
    first = next(iter(loader))
    again = list(loader)
    assert len(again) == 3
    assert not torch.equal(first[1], again[0][1])
    assert loader.epoch == 1


@given(whole=st.integers(0, 3), rest=st.integers(0, 5), world_size=st.integers(1, 3), augment=st.sampled_from(AUGMENTS))
def test_the_parts_of_all_processes_are_the_global_batches(whole, rest, world_size, augment):
    size = 6 * whole + rest
    settings = {"shuffle": True, "augment": augment, "seed": 3}
    if 0 < rest < world_size or not size:
        with pytest.raises(ConfigurationError):
            BatchLoader(split_of(size), 6, world_size=world_size, **settings)
        return
    expected = list(BatchLoader(split_of(size), 6, **settings))
    ranks = [BatchLoader(split_of(size), 6, rank=r, world_size=world_size, **settings) for r in range(world_size)]
    parts = [list(loader) for loader in ranks]
    assert [len(part) for part in parts] == [len(expected)] * world_size == [len(loader) for loader in ranks]
    joined = [tuple(torch.cat(tensors) for tensors in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)]
    assert same(joined, expected)
    sizes = [len(part[-1][1]) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_state_continues_with_another_number_of_processes():
    settings = {"shuffle": True, "augment": Augment(crop=1), "seed": 3}
    alone = BatchLoader(split_of(12), 4, **settings)
    batches = iter(alone)
    next(batches)
    state = alone.state_dict()
    pair = [BatchLoader(split_of(12), 4, rank=rank, world_size=2, **settings) for rank in range(2)]
    for loader in pair:
        loader.load_state_dict(state)
    *_, expected = batches
    last = [list(loader)[-1] for loader in pair]
    assert same([expected], [tuple(torch.cat(tensors) for tensors in zip(*last, strict=True))])
    assert pair[0].state_dict()["epoch"] == pair[1].state_dict()["epoch"] == 1


def loader_and_state():
    loader = BatchLoader(split_of(12), 4, shuffle=True, augment=Augment(crop=1))
    next(iter(loader))
    return BatchLoader(split_of(12), 4, shuffle=True, augment=Augment(crop=1), seed=1), loader.state_dict()


def test_between_epochs_a_state_fits_whether_the_last_batch_is_dropped_or_not():
    saved, other = (
        BatchLoader(split_of(10), 4, shuffle=True, drop_last=drop, seed=int(drop)) for drop in (False, True)
    )
    first = next(iter(saved))
    with pytest.raises(StateError, match="saved with drop_last=False, but this loader has drop_last=True"):
        other.load_state_dict(saved.state_dict())
    for _ in range(2):
        *_, last = saved
    assert len(last[1]) == 2
    other.load_state_dict(saved.state_dict())
    batches = [labels.tolist() for _, labels in other]
    assert batches == [labels.tolist() for _, labels in saved][:2]
    assert first is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("generator"), "not the state of a loader: 'generator'"),
        (lambda state: state.update(settings=[1]), "'settings' of the state is"),
        (
            lambda state: state["settings"].update(batch_size=8),
            "saved with batch_size=8, but this loader has batch_size=4",
        ),
        (lambda state: state["settings"].update(samples=13), "saved with samples=13"),
        (lambda state: state["settings"].update(augment=None), "saved with augment=None"),
        (lambda state: state.update(position=4), "position=4; expected epoch ≥ 0 and position from 0 to 3"),
        (lambda state: state.update(epoch=-1), "epoch=-1"),
        (lambda state: state.update(epoch=None), "epoch=None"),
        (lambda state: state.update(generator=torch.zeros(3, dtype=torch.uint8)), "not the state of a CPU generator"),
        (lambda state: state.update(generator="x"), "not the state of a CPU generator"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(change, message):
    loader, state = loader_and_state()
    change(state)
    before = copy.deepcopy(loader.state_dict())
    with pytest.raises(StateError, match=message):
        loader.load_state_dict(state)
    after = loader.state_dict()
    assert torch.equal(before.pop("generator"), after.pop("generator"))
    assert before == after
    assert len(list(loader)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0; expected a positive integer"),
        ({"batch_size": 4.0}, "batch_size=4.0"),
        ({"rank": 1}, "rank=1, world_size=1; expected 0 ≤ rank < world_size"),
        ({"world_size": 3}, "batch_size=4 is the batch of all processes; make it a multiple of their number, 3"),
        ({"world_size": 4}, "the last batch has 2 of 10 images, too few for 4 processes"),
        ({"augment": Augment(crop=5)}, "crop=5 needs images of more than 5 pixels"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        BatchLoader(split_of(10), **{"batch_size": 4, **arguments})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
def test_batches_on_a_gpu_are_those_of_the_cpu(augment):
    cpu, gpu = (
        list(BatchLoader(split_of(20), 8, shuffle=True, augment=augment, seed=4, device=device))
        for device in ("cpu", "cuda")
    )
    assert all(x.is_cuda and y.is_cuda for x, y in gpu)
    for (x, y), (gpu_x, gpu_y) in zip(cpu, gpu, strict=True):
        assert torch.equal(y, gpu_y.cpu())
        torch.testing.assert_close(x, gpu_x.cpu())
