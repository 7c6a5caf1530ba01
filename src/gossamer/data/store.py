"""The folder of the data sets: where it is, whether a file in it is whole, and how a file gets into it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import time
from pathlib import Path
from typing import Protocol

from gossamer.data.catalogue import Entry, File
from gossamer.errors import DataError

CHUNK = 1 << 20
MISSING = "is missing"
_PARTIAL = ".part"


STALE = 3600.0
"""Seconds after which a partial file that does not grow is taken for one that a killed process left."""

_DOTENV_LINE = re.compile(r"\s*(?:export\s+)?DATAPATH\s*=(.*)")


class Readable(Protocol):
    """Anything bytes can be read from."""

    def read(self, size: int = ..., /) -> bytes:
        """Return at most `size` bytes; none at the end."""


def folder(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the data sets; each has a folder of its own name in it.

    The first that is given: `root`; the environment variable DATAPATH; a line `DATAPATH=…` of the file `.env` in the
    current directory; `gossamer/data` in the user's cache (XDG_CACHE_HOME, else `~/.cache`).

    Raises:
        DataError: What is given cannot be a folder's name, or names a variable that is not set.
    """
    given = root or os.environ.get("DATAPATH") or _from_dotenv(Path(".env"))
    if given:
        if "\0" in str(given):
            raise DataError(f"DATAPATH: {given!r} holds a character that no path has; set it to a folder")
        try:
            return Path(given).expanduser().absolute()
        except RuntimeError as error:
            raise DataError(f"DATAPATH: {given!r} cannot be a folder: {error}; set it to one") from None
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "gossamer" / "data"


def _from_dotenv(path: Path) -> str | None:
    try:
        # As the system's paths are: a byte that is not UTF-8 in another line must not hide this one.
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError:
        return None
    found = None
    for line in lines:
        if match := _DOTENV_LINE.match(line):
            value = match[1].strip()
            quoted = value[:1] in ("'", '"')
            found, _, rest = value[1:].partition(value[0]) if quoted else (value.partition(" #")[0].rstrip(), "", "")
            if rest.strip() and not rest.lstrip().startswith("#"):
                raise DataError(
                    f"DATAPATH: {value!r} in .env goes on after its quotes; put all of it into them, or none"
                )
            found = found if value[:1] == "'" else _expanded(found)
    return found or None


def _expanded(value: str) -> str:
    """A value of `.env` with `$NAME` and `${NAME}` replaced, as a shell does."""
    expanded = os.path.expandvars(value)
    if unset := re.search(r"\$(\w+|\{[^}]*\}?)", expanded):
        raise DataError(
            f"DATAPATH: {unset[0]} of {value!r} in .env is no variable of the environment; give the folder itself"
        )
    return expanded


def faults(entry: Entry, place: Path) -> dict[File, str]:
    """Return what is wrong with a data set's files in its folder: nothing when all are whole."""
    found = {file: _fault(place / file.name, file) for file in entry.files}
    return {file: fault for file, fault in found.items() if fault is not None}


def _fault(path: Path, file: File) -> str | None:
    try:
        size = path.stat().st_size
        if size != file.size:
            return f"is damaged: {size} bytes instead of {file.size}"
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return MISSING
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None if digest == file.sha256 else f"is damaged: SHA-256 {digest[:12]}… instead of {file.sha256[:12]}…"


def check_writable(place: Path) -> None:
    """Refuse a data set's folder that no file can be put into, before any server is asked for one.

    Raises:
        DataError: Something above it is no folder, or may not be written.
    """
    try:
        existing = next(each for each in (place, *place.parents) if each.exists())
    except OSError as error:
        raise DataError(f"{place}: cannot be a folder: {error.strerror}; set DATAPATH to another") from None
    if not existing.is_dir():
        raise DataError(f"{place}: cannot be made, {existing} is not a folder; set DATAPATH to one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise DataError(f"{place}: {existing} cannot be written; set DATAPATH to a folder that can")


def sweep(place: Path) -> None:
    """Remove partial files that a killed process left in a data set's folder."""
    with contextlib.suppress(OSError):  # another process may be removing them; what is left goes the next time
        for left in place.glob(f".*{_PARTIAL}"):
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def install(stream: Readable, file: File, place: Path) -> None:
    """Write a file into a data set's folder, unless what the stream gives is not exactly that file.

    The file appears whole or not at all: it is written under another name, synced, verified and renamed.

    Raises:
        DataError: Other bytes than expected; the folder is as it was.
    """
    place.mkdir(parents=True, exist_ok=True)
    partial = place / f".{file.name}.{secrets.token_hex(4)}{_PARTIAL}"
    digest = hashlib.sha256()
    size = 0
    try:
        with partial.open("xb") as output:
            # One byte more than expected is enough to know that the source is wrong.
            while size <= file.size and (chunk := stream.read(CHUNK)):
                output.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            output.flush()
            os.fsync(output.fileno())
        if size != file.size or digest.hexdigest() != file.sha256:
            raise DataError(
                f"{file.name} has other content than expected: {size} bytes with SHA-256 {digest.hexdigest()[:12]}…, "
                f"expected {file.size} with {file.sha256[:12]}…"
            )
        partial.replace(place / file.name)
    finally:
        partial.unlink(missing_ok=True)
