"""Where data sets are kept, and that a file is there whole or not at all."""

import hashlib
import io
from pathlib import Path

import pytest

from gossamer import DataError, data
from gossamer.data import store
from gossamer.data.catalogue import File


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No folder is configured."""
    monkeypatch.delenv("DATAPATH", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_folder_is_the_first_that_is_given(nowhere, monkeypatch):
    assert data.folder() == nowhere / "home/.cache/gossamer/data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere / "cache"))
    assert data.folder() == nowhere / "cache/gossamer/data"
    (nowhere / ".env").write_text("DATAPATH=/from/dotenv\n")
    assert data.folder() == Path("/from/dotenv")
    monkeypatch.setenv("DATAPATH", "/from/environment")
    assert data.folder() == Path("/from/environment")
    assert data.folder("/from/argument") == Path("/from/argument")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# DATAPATH=/no\nOTHER=1\nDATAPATH=/a b/c", "/a b/c"),
        ("export DATAPATH='/a # b'", "/a # b"),
        ('  DATAPATH = "/a/b" # where', "/a/b"),
        ("DATAPATH=/a/b # where", "/a/b"),
        ("DATAPATH=/old\nDATAPATH=/new", "/new"),
        ("DATAPATH=~/x", "~/x"),
        ("export\tDATAPATH=/a/b", "/a/b"),
        ("\ufeffDATAPATH=/a/b", "/a/b"),
        ("DATAPATH=$HOME/data", "~/data"),
        ('DATAPATH="${HOME}/data"', "~/data"),
        ("DATAPATH='/a/$b'", "/a/$b"),
        ("NAME=\udce9\nDATAPATH=/a/b", "/a/b"),
        ("DATAPATH=/a/\udce9", "/a/\udce9"),
    ],
)
def test_dotenv_lines_are_read_as_shells_read_them(nowhere, text, expected):
    (nowhere / ".env").write_text(text, encoding="utf-8", errors="surrogateescape")
    assert data.folder() == Path(expected).expanduser()


def test_a_variable_that_is_not_set_is_refused(nowhere):
    (nowhere / ".env").write_text("DATAPATH=${NOT_SET_HERE}/data")
    with pytest.raises(DataError, match=r"DATAPATH: \$\{NOT_SET_HERE\} of .* in \.env is no variable"):
        data.folder()
    (nowhere / ".env").write_text('DATAPATH="$HOME"/data')
    with pytest.raises(DataError, match=r"DATAPATH: .* in \.env goes on after its quotes"):
        data.folder()


@pytest.mark.parametrize("content", [b"DATAPATH=", b"DATAPATHS=/x", b"\xff\xfe", b"DATAPATH"])
def test_dotenv_files_without_a_folder_are_ignored(nowhere, content):
    (nowhere / ".env").write_bytes(content)
    assert data.folder() == nowhere / "home/.cache/gossamer/data"


@pytest.mark.parametrize("given", ["~nosuchuser/x", "/a\0b"])
def test_what_cannot_be_a_folder_is_refused_by_name(nowhere, monkeypatch, given):
    (nowhere / ".env").write_text(f"DATAPATH={given}")
    with pytest.raises(DataError, match=r"^DATAPATH: .*; set it to"):
        data.folder()


def test_relative_folders_are_those_of_the_current_directory(nowhere):
    assert data.folder("here") == nowhere / "here"


def file_of(content):
    return File("part", len(content), hashlib.sha256(content).hexdigest())


def test_the_right_bytes_are_installed(tmp_path):
    content = bytes(range(256)) * 10_000
    store.install(io.BytesIO(content), file_of(content), tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["part"]
    assert (tmp_path / "new/part").read_bytes() == content


class Endless(io.RawIOBase):
    taken = 0

    def read(self, size=-1):
        self.taken += size
        return bytes(size)


@pytest.mark.parametrize("wrong", [b"", b"abcde", b"abcdeX", b"abcdefg"])
def test_wrong_bytes_leave_the_folder_as_it_was(tmp_path, wrong):
    (tmp_path / "part").write_bytes(b"old")
    with pytest.raises(DataError, match=r"part has other content than expected: \d+ bytes"):
        store.install(io.BytesIO(wrong), file_of(b"abcdef"), tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("part", b"old")]


def test_a_source_without_end_is_given_up(tmp_path):
    endless = Endless()
    with pytest.raises(DataError, match="other content"):
        store.install(endless, file_of(b"abcdef"), tmp_path)
    assert endless.taken <= 2 * store.CHUNK


def test_an_interrupted_source_leaves_nothing(tmp_path):
    class Interrupted(io.BytesIO):
        def read(self, size=-1):
            if self.tell():
                raise KeyboardInterrupt
            return super().read(3)

    with pytest.raises(KeyboardInterrupt):
        store.install(Interrupted(b"abcdef"), file_of(b"abcdef"), tmp_path)
    assert not list(tmp_path.iterdir())
