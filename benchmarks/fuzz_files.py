"""Damage files of tensors in every way, and see that reading them never crashes, hangs or gives a wrong tensor.

    python benchmarks/fuzz_files.py [--files 100000] [--seed 0] [--only N] [--out benchmarks/results/fuzz_files.json]

Each damaged file must be refused with a StateError, or give every tensor as it was, bit for bit, within two seconds and
256 MiB; and the safetensors library must not refuse what gossamer reads. Files of other libraries have no checksums:
what is read of them must be what the safetensors library reads. The first failure is printed and ends the run with
exit status 1; `--only N` does file N alone.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gossamer as gs
from gossamer.files import File

SECONDS, MEMORY = 2, 256 << 20
HOSTILE = (
    *(0, -1, 1, 2, 255, 2**20, 2**31, 2**53, 2**62, 2**63, 2**64, 10**30, 1.5, -0.0, 1e999, True, None, "", "x", "F64"),
    *("BOOL", "dense", "bitmask", "positions", "cells", [], {}, [[]], [0], [1, 1, 1], [2**40, 2**40], [4, 4], {"a": 1}),
)


def tensors() -> dict[str, Tensor]:
    """One of every encoding and some types; small, so that damage hits numbers and tables alike."""
    torch.manual_seed(0)

    def sparse(tensor: Tensor, zero: Tensor) -> Tensor:
        return torch.where(zero, torch.zeros_like(tensor), tensor)

    weight = torch.randn(24, 32)
    cells = torch.zeros(6144).view(-1, 4).scatter(1, torch.rand(1536, 4).argsort(1)[:, :2], torch.randn(1536, 2))
    blocks = (torch.rand(8, 8, 1) < 0.8).repeat_interleave(16, 0).repeat_interleave(16, 1)[..., 0]
    state = {
        "dense": weight,
        "bitmask": sparse(torch.randn(48, 32), torch.rand(48, 32) < 0.5),
        "positions": sparse(torch.randn(64, 48), torch.rand(64, 48) < 0.95),
        "cells": cells.view(48, 128),
        "rows": sparse(torch.randn(64, 32), torch.rand(64, 1) < 0.7),
        "blocks": sparse(torch.randn(128, 128), blocks)[:100],
        "half": sparse(torch.randn(40, 50).bfloat16(), torch.rand(40, 50) < 0.9),
        "bool": torch.rand(5000) < 0.02,
        "int": torch.arange(7),
        "none": torch.zeros(50, 50),
        "tied": weight,
    }
    state["positions"][3] = -0.0
    return state


def originals(folder: Path) -> list[tuple[bytes, dict[str, Tensor] | None]]:
    """Files to damage, with what they hold; None for one without checksums."""
    state = tensors()
    found: list[tuple[bytes, dict[str, Tensor] | None]] = []
    for names in (list(state), ["positions", "int"], ["bitmask", "tied", "dense"], ["cells", "rows"], ["blocks"]):
        part = {name: state[name] for name in names}
        gs.save(part, folder / "f")
        found.append(((folder / "f").read_bytes(), part))
    save_file({name: state[name] for name in ("dense", "int", "half", "bool")}, folder / "f", {"format": "pt"})
    found.append(((folder / "f").read_bytes(), None))
    return found


def span(draw: random.Random, content: bytes) -> slice:
    start = draw.randrange(len(content))
    return slice(start, min(len(content), start + draw.choice((1, 2, 4, 8, 16, 64, 500))))


def flip(draw: random.Random, content: bytes) -> bytes:
    damaged = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(draw.choice((1, 1, 1, 2, 10))):
        damaged[draw.randrange(draw.choice((header, len(content))))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def cut(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.choice((draw.randrange(len(content)), len(content) - draw.randrange(1, 20)))]


def lengthen(draw: random.Random, content: bytes) -> bytes:
    return content + draw.randbytes(draw.choice((1, 8, 1000)))


def remove(draw: random.Random, content: bytes) -> bytes:
    part = span(draw, content)
    return content[: part.start] + content[part.stop :]


def repeat(draw: random.Random, content: bytes) -> bytes:
    part = span(draw, content)
    return content[: part.stop] + content[part] + content[part.stop :]


def overwrite(draw: random.Random, content: bytes) -> bytes:
    part = span(draw, content)
    size = part.stop - part.start
    return (
        content[: part.start] + draw.choice((bytes(size), b"\xff" * size, draw.randbytes(size))) + content[part.stop :]
    )


def swap(draw: random.Random, content: bytes) -> bytes:
    size = draw.choice((1, 4, 16, 100, 1000))
    first, second = sorted(draw.randrange(max(1, len(content) - size)) for _ in range(2))
    if second - first < size:
        return overwrite(draw, content)
    a, b = content[first : first + size], content[second : second + size]
    return content[:first] + b + content[first + size : second] + a + content[second + size :]


def relength(draw: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    near = length + draw.randrange(-20, 20)
    return (draw.choice((near, 0, 2**63, 10**8, len(content))) % 2**64).to_bytes(8, "little") + content[8:]


def edit_header(draw: random.Random, content: bytes) -> bytes:
    """A header that says something else, of the right length."""
    header, data = parts(content)
    edit(draw, header)
    return joined(header, data)


def exchange(draw: random.Random, content: bytes) -> bytes:
    """Two tensors exchange a part of their entries, as their offsets."""
    header, data = parts(content)
    first, second = draw.sample([name for name in header if name != "__metadata__"], 2)
    keys = draw.choice((["data_offsets"], ["shape"], ["dtype"], ["data_offsets", "shape", "dtype"]))
    for key in keys:
        header[first][key], header[second][key] = header[second][key], header[first][key]
    return joined(header, data)


def rename(draw: random.Random, content: bytes) -> bytes:
    header, data = parts(content)
    names = [name for name in header if name != "__metadata__"]
    new = draw.choice((draw.choice(names), "x", "\ud800", "a" * 1000, "\x1b[0m"))
    text = json.dumps(header).replace(json.dumps(draw.choice(names)), json.dumps(new))
    return joined(text, data)


def nest(draw: random.Random, content: bytes) -> bytes:
    deep = "[" * (depth := draw.choice((10, 900, 10**5))) + "]" * depth
    header, data = parts(content)
    return joined(json.dumps(header).replace("[", deep, 1), data)


def edit_contents(draw: random.Random, content: bytes) -> bytes:
    """A table of contents that says something else, mostly with its checksum corrected."""
    header, data = parts(content)
    metadata = header["__metadata__"]
    if "gossamer" not in metadata:
        return edit_header(draw, content)
    about = json.loads(metadata["gossamer"])
    for _ in range(draw.choice((1, 1, 2))):
        edit(draw, about)
    text = json.dumps(about)
    if draw.random() < 0.1:
        text = text.replace('"shape"', '"kept": 3, "shape"', draw.choice((1, -1)))
    metadata["gossamer"] = text
    if draw.random() < 0.9:
        metadata["gossamer_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return joined(header, data)


DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    *(flip, cut, lengthen, remove, repeat, overwrite, swap, relength),
    *(edit_header, exchange, rename, nest, edit_contents, edit_contents),
)


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def edit(draw: random.Random, value: Any) -> None:
    """Change one thing somewhere in nested dicts and lists."""
    places: list[tuple[Any, Any]] = []

    def walk(holder: Any) -> None:
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                walk(holder[key])

    walk(value)
    holder, key = draw.choice(places)
    old = holder[key]
    if isinstance(holder, dict) and draw.random() < 0.15:
        del holder[key]
    elif type(old) is int and draw.random() < 0.5:
        holder[key] = old + draw.choice((-1, 1, 8, -8, old))
    elif isinstance(old, list) and draw.random() < 0.5:
        draw.shuffle(old)
    elif draw.random() < 0.3:
        other_holder, other_key = draw.choice(places)
        holder[key] = copy.deepcopy(other_holder[other_key])
    else:
        holder[key] = copy.deepcopy(draw.choice(HOSTILE))


def bits(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def outcome(path: Path, original: dict[str, Tensor] | None, forged: bool) -> str:
    """What became of a damaged file: `refused` or `read`; an AssertionError where that is wrong."""
    try:
        loaded = gs.load(path)
    except gs.StateError as error:
        if str(path) not in str(error):
            raise AssertionError("the error does not name the file") from error
        return "refused"
    theirs = load_file(path)  # raises where the library refuses
    with File(path) as file:
        compressed, tied = file.compressed, set(file.tied)
    if not compressed:
        assert all(bits(loaded[name]) == bits(theirs[name]) for name in theirs), "the library reads something else"
    if original is None:
        assert not compressed, "taken for a file of gossamer"
        return "read"
    # Whoever corrects the checksum of the table of contents may leave names out, or say with what they are tied.
    assert forged or not compressed or loaded.keys() == original.keys(), "has other names"
    for name in loaded.keys() & original.keys():
        if not (forged and name in tied):
            assert bits(loaded[name]) == bits(original[name]), f"{name} is wrong"
    return "read"


def run(files: int, seed: int, only: int | None) -> dict[str, Any]:
    counts: dict[str, Counter[str]] = {damage.__name__: Counter() for damage in DAMAGES}
    start = time.perf_counter()
    slowest = 0.0

    def too_long(*_: object) -> None:
        raise AssertionError(f"takes longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "f"
        made = originals(Path(folder))
        for content, _ in made:  # what is loaded once is loaded before memory is bounded
            path.write_bytes(content)
            gs.load(path)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        for number in range(files) if only is None else [only]:
            draw = random.Random(f"{seed}/{number}")
            content, original = made[number % len(made)]
            damage = draw.choice(DAMAGES)
            try:
                damaged = damage(draw, content)
                path.write_bytes(damaged)
                begun = time.perf_counter()
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                try:
                    result = outcome(path, original, damage is edit_contents)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                slowest = max(slowest, time.perf_counter() - begun)
            except BaseException:
                print(f"file {number}, {damage.__name__}: again with --seed {seed} --only {number}", file=sys.stderr)
                raise
            counts[damage.__name__]["unchanged" if damaged == content else result] += 1
    return {
        "files": sum(counter.total() for counter in counts.values()),
        "wrong": 0,
        "outcomes": {name: dict(sorted(counter.items())) for name, counter in counts.items()},
        "slowest_ms": 1e3 * slowest,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "fuzz_files.json")
    arguments = parser.parse_args()
    result = {
        "command": f"python benchmarks/fuzz_files.py --files {arguments.files} --seed {arguments.seed}",
        "versions": {"torch": torch.__version__, "safetensors": safetensors.__version__},
    } | run(arguments.files, arguments.seed, arguments.only)
    text = json.dumps(result, indent=2)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
