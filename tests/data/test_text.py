"""Text is read in parallel streams: every character is predicted once, from all that its stream had before it."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer import ConfigurationError, DataError, StateError, data
from gossamer.data import catalogue, text
from gossamer.data.text import IGNORED, RawText, StreamLoader, TextSplit, divide, read_works


def numbers(size):
    """A text of different characters, so that a batch tells which characters it holds."""
    return TextSplit(torch.arange(size, dtype=torch.int32), "".join(map(chr, range(size))))


def spelled(split):
    return "".join(split.symbols[code] for code in split.codes.tolist())


def streams(batches):
    """The chunks of a pass put together again: inputs and targets, a row a stream."""
    return tuple(torch.cat(parts, 1) for parts in zip(*batches, strict=True))


@given(size=st.integers(2, 60), batch=st.integers(1, 12), length=st.integers(1, 9))
def test_an_ordered_pass_predicts_every_character_once_except_the_first_of_each_stream(size, batch, length):
    if size < 2 * batch:
        with pytest.raises(ConfigurationError, match=f"batch_size={batch} streams of two .* the text has {size}"):
            StreamLoader(numbers(size), batch, length=length)
        return
    loader = StreamLoader(numbers(size), batch, length=length)
    batches = list(loader)
    assert len(batches) == len(loader)
    assert all(x.dtype == y.dtype == torch.int64 and x.shape == y.shape for x, y in batches)
    assert all(x.shape == (batch, length) for x, _ in batches[:-1])
    x, y = streams(batches)
    expected = [number for number in range(size) if number not in [size * row // batch for row in range(batch)]]
    assert y[y != IGNORED].tolist() == expected  # row after row: in the order of the text
    assert torch.equal(y[y != IGNORED], x[y != IGNORED] + 1)
    assert len({int((row != IGNORED).sum()) for row in y}) <= 2


@given(size=st.integers(1, 60), batch=st.integers(1, 6), length=st.integers(1, 6), seed=st.integers(0, 3))
def test_training_reads_the_text_as_a_ring_in_whole_chunks(size, batch, length, seed):
    if size < batch * length:
        with pytest.raises(ConfigurationError, match=f"batch_size={batch} chunks of length={length} .* {size}"):
            StreamLoader(numbers(size), batch, length=length, shuffle=True)
        return
    loader = StreamLoader(numbers(size), batch, length=length, shuffle=True, seed=seed)
    batches = list(loader)
    assert len(batches) == len(loader) == size // (batch * length)
    x, y = streams(batches)
    assert all(part.shape == (batch, length) for pair in batches for part in pair)
    assert x.flatten().tolist() == [(int(x[0, 0]) + place) % size for place in range(x.numel())]
    assert torch.equal(y, (x + 1) % size)


def test_epochs_begin_in_different_places_and_seeds_too():
    loader = StreamLoader(numbers(1000), 2, length=10, shuffle=True, seed=1)
    begins = [next(iter(loader))[0][0, 0].item() for _ in range(3)]
    begins.append(next(iter(StreamLoader(numbers(1000), 2, length=10, shuffle=True, seed=2)))[0][0, 0].item())
    assert len(set(begins)) == 4
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_read_the_streams_of_one(world_size, shuffle):
    settings = {"length": 4, "shuffle": shuffle, "seed": 3}
    alone = StreamLoader(numbers(80), 6, **settings)
    ranks = [StreamLoader(numbers(80), 6, rank=r, world_size=world_size, **settings) for r in range(world_size)]
    assert all(rank.smallest == 6 // world_size for rank in ranks)
    for (x, y), *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(x, torch.cat([part[0] for part in parts]))
        assert torch.equal(y, torch.cat([part[1] for part in parts]))


@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_a_pass_that_was_stopped_goes_on_with_the_batches_that_were_left(stop):
    def make(seed=7):
        return StreamLoader(numbers(50), 2, length=5, shuffle=True, seed=seed)

    unbroken = make()
    expected = [batch for _ in range(2) for batch in unbroken]
    loader, seen, state = make(), [], None
    while state is None:
        for batch in loader:
            seen.append(batch)
            if len(seen) == stop:
                state = copy.deepcopy(loader.state_dict())
                break
    resumed = make(seed=8)
    resumed.load_state_dict(state)
    while resumed.epoch < 2:
        seen += list(resumed)
    assert len(seen) == len(expected) == 10
    assert all(
        torch.equal(a, b) for one, two in zip(seen, expected, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_a_state_of_other_chunks_is_refused():
    state = StreamLoader(numbers(50), 2, length=5).state_dict()
    with pytest.raises(StateError, match="StreamLoader: saved with length=5, but this loader has length=6"):
        StreamLoader(numbers(50), 2, length=6).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"length": 0}, "^length: expected an integer of at least 1, got 0"),
        ({"augment": {"flip": True}}, r"^augment: got .*text has no augmentation; leave it out"),
        ({"batch_size": 0}, "StreamLoader: batch_size=0; expected a positive integer"),
        ({"batch_size": 3, "world_size": 2}, "batch_size=3 .* make it a multiple of their number, 2"),
        ({"rank": 1}, "expected 0 ≤ rank < world_size"),
    ],
)
def test_impossible_arguments_are_refused(arguments, said):
    with pytest.raises(ConfigurationError, match=said):
        numbers(50).batches(**{"batch_size": 2, **arguments})


@given(sizes=st.lists(st.integers(1, 90), min_size=1, max_size=6), share=st.floats(0, 1, exclude_max=True))
def test_each_work_gives_its_proportion_and_every_character_is_in_one_part(sizes, share):
    symbols = [chr(0x4E00 + number) for number in range(sum(sizes))]
    left = iter(symbols)
    works = ["".join(next(left) for _ in range(size)) for size in sizes]
    count = int(share * (sum(sizes) - sum(sizes) // 20))
    train, held, test = divide(RawText(tuple(works)), count)
    parts = [spelled(train), "" if held is None else spelled(held), spelled(test)]
    assert [len(part) for part in parts[1:]] == [count, sum(sizes) // 20]
    assert sorted("".join(parts)) == symbols
    for work in works:
        pieces = ["".join(c for c in part if c in work) for part in parts]
        assert "".join(pieces) == work  # first what trains, then what validates, then what tests
        assert all(piece in part for piece, part in zip(pieces, parts, strict=True))
        assert abs(len(pieces[2]) - len(work) * len(parts[2]) / sum(sizes)) < 1


def test_symbols_are_those_of_the_whole_text_in_order():
    train, held, test = divide(RawText(("ba" * 10, "Z\n" * 10)), 4)
    assert train.symbols == held.symbols == test.symbols == "\nZab"
    assert (spelled(train), spelled(held), spelled(test)) == ("ba" * 8 + "b" + "Z\n" * 8 + "Z", "ab" + "\nZ", "a\n")


@pytest.mark.parametrize("validation", [-1, 38, 0.5, True])
def test_impossible_validation_parts_are_refused(validation):
    with pytest.raises(ConfigurationError, match=rf"validation={validation}; expected .* characters from 0 to 37"):
        divide(RawText(("a" * 40,)), validation)


def test_works_are_read_to_the_byte_in_the_order_given(tmp_path):
    (tmp_path / "a").write_bytes(b"one\r\ntwo")
    (tmp_path / "b").write_bytes(b"three\n")
    assert read_works(tmp_path, ["b", "a"]).works == ("three\n\n", "one\r\ntwo\n")
    (tmp_path / "b").write_bytes("é".encode())
    with pytest.raises(DataError, match=r"b: cannot be read: 'ascii' codec"):
        read_works(tmp_path, ["b"])
    with pytest.raises(DataError, match=r"c: cannot be read: .*No such file"):
        read_works(tmp_path, ["c"])


def test_a_text_is_a_data_set_of_symbols_without_shape(monkeypatch, tmp_path):
    entry = catalogue.Entry("tale", 3, (), (), (), 10, lambda _: RawText(("abc" * 100,)))
    monkeypatch.setitem(catalogue.DATASETS, "tale", entry)
    tale = data.load("tale", tmp_path)
    assert (tale.classes, tale.shape, tale.train.symbols) == (3, (), "abc")
    assert (len(tale.train), len(tale.validation), len(tale.test)) == (275, 10, 15)
    assert data.load("tale", tmp_path, validation=0).validation is None
    with pytest.raises(ConfigurationError, match="data: tale: validation=285; expected a number of characters"):
        data.load("tale", tmp_path, validation=285)


def test_the_parts_of_shakespeare_have_the_sizes_that_its_files_say():
    entry = catalogue.DATASETS["shakespeare"]
    assert len(entry.files) == 42
    assert [file.name for file in entry.files] == sorted(file.name for file in entry.files)
    characters = sum(file.size + 1 for file in entry.files)
    assert entry.validation == characters // text.TEST == 252_862
