"""Data sets from the servers that publish them, decompressed and verified while they arrive."""

from __future__ import annotations

import gzip
import http.client
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import wrap_file

from gossamer.data.catalogue import Entry, File
from gossamer.data.store import Readable, install
from gossamer.errors import DataError

TIMEOUT = 15.0
"""Seconds without any answer after which a server is given up."""

_FAILURES = (OSError, EOFError, zlib.error, tarfile.TarError, http.client.HTTPException, DataError)


def download(entry: Entry, wanted: list[File], place: Path) -> None:
    """Fetch files of a data set into its folder, trying one server after the other.

    Raises:
        DataError: No server gave all of them; tells what went wrong at each. Files that did arrive stay.
    """
    remaining = list(wanted)
    problems = []
    for address in (*entry.archives, *entry.mirrors):
        take = _from_archive if address in entry.archives else _from_mirror
        try:
            take(address, remaining, place)
        except _FAILURES as error:
            problems.append(f"{address}: {error}")
        else:
            return
    raise DataError("; ".join(problems))


def _from_mirror(address: str, remaining: list[File], place: Path) -> None:
    for file in remaining.copy():
        with _open(f"{address}{file.name}.gz") as response, gzip.GzipFile(fileobj=response) as content:  # type: ignore[call-overload]  # it only reads
            install(content, file, place)
        remaining.remove(file)


def _from_archive(address: str, remaining: list[File], place: Path) -> None:
    files = {file.name: file for file in remaining}
    with _open(address) as response, tarfile.open(fileobj=response, mode="r|gz") as archive:  # type: ignore[call-overload]  # it only reads
        for member in archive:
            # Only the last part of a member's name is used, and only to recognise it: an archive chooses no path.
            file = files.get(Path(member.name).name)
            content = archive.extractfile(member) if file in remaining else None
            if file is not None and content is not None:
                install(content, file, place)
                remaining.remove(file)
    if remaining:
        others = f" and {len(remaining) - 1} more" if len(remaining) > 1 else ""
        raise DataError(f"the archive does not hold {remaining[0].name}{others}")


@contextmanager
def _open(address: str) -> Iterator[Readable]:
    """Open an address, with a progress bar on standard error if that is a terminal."""
    console = Console(stderr=True)
    request = urllib.request.Request(address, headers={"User-Agent": "gossamer"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        size = int(response.headers.get("Content-Length") or 0)
        name = address.rpartition("/")[2]
        with wrap_file(
            response, size, description=name, console=console, transient=True, disable=not console.is_terminal
        ) as reader:
            yield reader
