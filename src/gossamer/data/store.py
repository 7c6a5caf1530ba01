"""The folder of the data sets: where it is, whether a file in it is whole, and how a file gets into it."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import Protocol

from gossamer.data.catalogue import Entry, File
from gossamer.errors import DataError

CHUNK = 1 << 20
MISSING = "is missing"


class Readable(Protocol):
    """Anything bytes can be read from."""

    def read(self, size: int = ..., /) -> bytes:
        """Return at most `size` bytes; none at the end."""


def folder(root: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the data sets; each has a folder of its own name in it.

    The first that is given: `root`; the environment variable DATAPATH; a line `DATAPATH=…` of the file `.env` in the
    current directory; `gossamer/data` in the user's cache (XDG_CACHE_HOME, else `~/.cache`).
    """
    given = root or os.environ.get("DATAPATH") or _from_dotenv(Path(".env"))
    if given:
        return Path(given).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "gossamer" / "data"


def _from_dotenv(path: Path) -> str | None:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    found = None
    for line in lines:
        key, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and key.strip() == "DATAPATH":
            value = value.strip()
            quoted = value[:1] in ("'", '"')
            found = value[1:].partition(value[0])[0] if quoted else value.partition(" #")[0].rstrip()
    return found or None


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
    return None if digest == file.sha256 else f"is damaged: SHA-256 {digest} instead of {file.sha256}"


def install(stream: Readable, file: File, place: Path) -> None:
    """Write a file into a data set's folder, unless what the stream gives is not exactly that file.

    The file appears whole or not at all: it is written under another name, synced, verified and renamed.

    Raises:
        DataError: Other bytes than expected; the folder is as it was.
    """
    place.mkdir(parents=True, exist_ok=True)
    partial = place / f".{file.name}.{secrets.token_hex(4)}.part"
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
                f"{file.name} has other content than expected: {size} bytes with SHA-256 {digest.hexdigest()}, "
                f"expected {file.size} with {file.sha256}"
            )
        partial.replace(place / file.name)
    finally:
        partial.unlink(missing_ok=True)
