"""Text in characters: its parts, and batches of parallel streams for truncated back-propagation through time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.checks import check_integer
from gossamer.data.loader import EpochLoader
from gossamer.errors import ConfigurationError, DataError

LENGTH = 64
"""Characters of a chunk unless asked otherwise: gradients reach back so far, the state of a network further."""

TEST = 20
"""One character in so many is test data."""

IGNORED = -100
"""The target of a place where there is nothing to predict; torch's cross-entropy leaves it out."""


@dataclass(frozen=True)
class RawText:
    """A text as published: works one after the other."""

    works: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TextSplit:
    """A part of a text.

    Attributes:
        codes: int32, (N,): each character as its place in `symbols`.
        symbols: The distinct characters of the whole text, in order of their code points.
    """

    codes: Tensor
    symbols: str

    def __len__(self) -> int:
        return len(self.codes)

    def batches(self, batch_size: int, **options: Any) -> StreamLoader:
        """Its batches; `options` are the other arguments of `StreamLoader`."""
        return StreamLoader(self, batch_size, **options)


class StreamLoader(EpochLoader):
    """Reads a text in `batch_size` parallel streams, a chunk of each at a time; see `EpochLoader`.

    A batch is inputs and targets, both int64 of shape (B, T): each target is the character after its input, and each
    row of a batch goes on where that row of the batch before ended, so that a network's state can be carried along. It
    begins anew with an epoch. T is `length`, or less in the last batch of an ordered pass.

    Training (`shuffle`) reads the text as a ring from a place that every epoch draws, in whole chunks only: what is
    left over, less than one batch, is other characters each time. An ordered pass divides the text into streams whose
    lengths differ by at most one character, and its targets are every character once except the first of each stream;
    where a stream is shorter the target is `IGNORED`.

    Args:
        split: The text; it is copied to `device` once.
        batch_size: Streams over all processes, each of which reads its part of them.
        length: Characters of a chunk.
        shuffle: Whether to train, else an ordered pass.
        augment: `None`; text has no augmentation.
        seed: Seed of the generator; the same on every process.
        device: Where batches are made.
        drop_last: As for images, and without effect: the parts of all processes are equal.
        rank: This process.
        world_size: Number of processes; it divides `batch_size`.

    Raises:
        ConfigurationError: An argument out of range, or a text too short for so many streams.
    """

    def __init__(
        self,
        split: TextSplit,
        batch_size: int,
        *,
        length: int = LENGTH,
        shuffle: bool = False,
        augment: object = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, seed, device, rank, world_size)
        if augment is not None:
            raise ConfigurationError(f"augment: got {augment!r}, but text has no augmentation; leave it out")
        check_integer("length", length, 1)
        needed = batch_size * (length if shuffle else 2)
        if len(split) < needed:
            each = f"chunks of length={length}" if shuffle else "streams of two"
            raise ConfigurationError(
                f"StreamLoader: batch_size={batch_size} {each} characters need {needed:,} characters, the text has "
                f"{len(split):,}; take less"
            )
        self.split = split
        self.length = length
        self.shuffle = shuffle
        self._codes = split.codes.to(self.device)
        self._rows = slice(batch_size * rank // world_size, batch_size * (rank + 1) // world_size)

    def __len__(self) -> int:
        """Batches in an epoch, the same on every process."""
        if self.shuffle:
            return len(self.split) // (self.batch_size * self.length)
        longest = -(-len(self.split) // self.batch_size)
        return -(-(longest - 1) // self.length)

    @property
    def smallest(self) -> int:
        """Streams that a process reads."""
        return self.batch_size // self.world_size

    def _settings(self) -> dict[str, Any]:
        return {
            "characters": len(self.split),
            "batch_size": self.batch_size,
            "length": self.length,
            "shuffle": self.shuffle,
        }

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self._ring() if self.shuffle else self._ordered()
        for number in range(self.position, len(self)):
            part = slice(number * self.length, (number + 1) * self.length)
            yield inputs[self._rows, part].long(), targets[self._rows, part].long()

    def _ring(self) -> tuple[Tensor, Tensor]:
        used = len(self) * self.batch_size * self.length
        begin = int(torch.randint(len(self.split), (1,), generator=self._generator))
        ring = self._codes.roll(-begin)
        return ring[:used].view(self.batch_size, -1), ring.roll(-1)[:used].view(self.batch_size, -1)

    def _ordered(self) -> tuple[Tensor, Tensor]:
        size = len(self.split)
        begins = torch.arange(self.batch_size + 1, device=self.device) * size // self.batch_size
        longest = -(-size // self.batch_size)
        index = begins[:-1, None] + torch.arange(longest - 1, device=self.device)
        targets = self._codes[(index + 1).clamp(max=size - 1)]
        return self._codes[index], targets.masked_fill(index + 1 >= begins[1:, None], IGNORED)


def read_works(folder: Path, names: Sequence[str]) -> RawText:
    """Read works in ASCII, one a file; each gets a line end after it.

    Raises:
        DataError: A file cannot be read, or is not ASCII.
    """
    works = []
    for name in names:
        try:
            works.append((folder / name).read_bytes().decode("ascii") + "\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{folder / name}: cannot be read: {error}; fetch it with gossamer.data.fetch") from error
    return RawText(tuple(works))


def divide(raw: RawText, validation: int) -> tuple[TextSplit, TextSplit | None, TextSplit]:
    """Divide works into training, validation and test part: the end of each work is test, what is before it validation.

    The test part is 1/`TEST` of all characters, and validation has as many as it is given; of both, each work gives its
    proportion, to less than a character. The pieces of a part follow each other in the order of the works.

    Raises:
        ConfigurationError: `validation` is not a number of characters that leaves one to train on.
    """
    sizes = [len(work) for work in raw.works]
    tests = _shares(sizes, sum(sizes) // TEST)
    rests = [size - test for size, test in zip(sizes, tests, strict=True)]
    if isinstance(validation, bool) or not isinstance(validation, int) or not 0 <= validation < sum(rests):
        raise ConfigurationError(
            f"validation={validation!r}; expected a number of characters from 0 to {sum(rests) - 1}"
        )
    points, codes = np.unique(np.frombuffer("".join(raw.works).encode("utf-32-le"), np.uint32), return_inverse=True)
    symbols = "".join(map(chr, points))
    held = _shares(rests, validation)
    each = zip(rests, held, tests, strict=True)
    pieces = torch.tensor(codes, dtype=torch.int32).split_with_sizes([n for r, v, t in each for n in (r - v, v, t)])
    train, validated, test = (TextSplit(torch.cat(pieces[part::3]), symbols) for part in range(3))
    return train, validated if validation else None, test


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """Divide a count in proportion to sizes."""
    ends = [0, *accumulate(sizes)]
    return [end * count // ends[-1] - begin * count // ends[-1] for begin, end in pairwise(ends)]
