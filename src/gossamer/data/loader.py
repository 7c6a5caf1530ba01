"""Batches that can be continued in the middle of an epoch; of images on the device: shuffled, augmented, normalised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from gossamer.data.augment import Augment
from gossamer.errors import ConfigurationError, StateError


class Batches(Protocol):
    """What a training loop needs of batches, whatever the data are; `BatchLoader` says what each means."""

    batch_size: int

    @property
    def smallest(self) -> int:
        """Samples in the smallest batch that any process gets."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another loader was."""
        ...


class Pixels(Protocol):
    """Where a loader's images come from, and how they are changed at random."""

    def draw(self, generator: torch.Generator) -> Tensor | None:
        """The randomness of an epoch's images, a row for each place in their order; `None` where there is none."""
        ...

    def give(self, order: Tensor, draws: Tensor | None, parts: list[slice]) -> Iterator[Tensor]:
        """The images of each part of an epoch, (B, C, H, W), pixels from 0 to `maximum`, on the device.

        Args:
            order: int64, (N,), on the CPU: the epoch's images.
            draws: From `draw`.
            parts: Of the order, one for each batch.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """What a state must agree with to be continued here."""
        ...


class Images(Protocol):
    """What a `BatchLoader` needs of a split: `Split` and `FolderSplit` are two."""

    @property
    def labels(self) -> Tensor:
        """Labels, int64, (N,)."""
        ...

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel after division by `maximum`."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel, likewise."""
        ...

    @property
    def maximum(self) -> int:
        """Largest pixel value."""
        ...

    def __len__(self) -> int: ...

    def pixels(self, augment: Augment | None, device: torch.device) -> Pixels:
        """Its images on a device; refuses an `augment` that they cannot have."""
        ...


class EpochLoader(ABC):
    """What loaders share: epochs and the place in them, the processes, and a state to continue from.

    All randomness of an epoch is drawn when it begins, for the global batches, from one generator on the CPU. Hence
    batches depend neither on the device nor on the number of processes, and an interrupted epoch is continued by
    drawing it again.

    It is a plain iterable that puts batches on the device itself: use it as it is, not through a `DataLoader` or
    Accelerate's `prepare`.

    Attributes:
        epoch: Epochs finished.
        position: Batches given of the epoch that is running, or that was left early; 0 between epochs.
    """

    def __init__(self, batch_size: int, seed: int, device: torch.device | str, rank: int, world_size: int) -> None:
        name = type(self).__name__
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigurationError(f"{name}: batch_size={batch_size!r}; expected a positive integer")
        if not 0 <= rank < world_size:
            raise ConfigurationError(f"{name}: rank={rank}, world_size={world_size}; expected 0 ≤ rank < world_size")
        if batch_size % world_size:
            raise ConfigurationError(
                f"{name}: batch_size={batch_size} is the batch of all processes; make it a multiple of their number, "
                f"{world_size}"
            )
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.position = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch_start = self._generator.get_state()
        self._restored = False

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch, the same on every process."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What a state belongs to."""

    @abstractmethod
    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw an epoch from the generator; give its batches from `position` on."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the batches of one epoch, or after `load_state_dict` those that are left of it.

        After a `break`, the next `for` begins a new epoch.

        Yields:
            Inputs and labels on the device.
        """
        if self._restored:
            self._restored = False
        else:
            self._epoch_start = self._generator.get_state()
            self.position = 0
        for batch in self._batches():
            self.position += 1
            yield batch
        self.epoch += 1
        self.position = 0
        self._epoch_start = self._generator.get_state()

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs: nested dicts of tensors, numbers, strings and booleans.

        Taken in the body of the loop, it counts the present batch as used. It is the same on every process.
        """
        return {
            "epoch": self.epoch,
            "position": self.position,
            "generator": self._epoch_start.clone(),
            "settings": self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another loader was: the next `for` gives the batches that were left, perhaps none.

        Raises:
            StateError: The other loader had other data or settings, or the state is not one of a loader; nothing has
                been changed.
        """
        name = type(self).__name__
        try:
            epoch, position, generator, settings = (
                state[key] for key in ("epoch", "position", "generator", "settings")
            )
        except (KeyError, TypeError) as error:
            raise StateError(f"{name}: not the state of a loader: {error}") from error
        if not isinstance(settings, dict):
            raise StateError(f"{name}: 'settings' of the state is {settings!r}; expected a mapping")
        between = position == 0  # then a last batch may be left out from now on: several processes need that
        for key, value in self._settings().items():
            if settings.get(key) != value and not (between and key == "drop_last"):
                raise StateError(
                    f"{name}: saved with {key}={settings.get(key)!r}, but this loader has {key}={value!r}; "
                    "make it with the saved settings"
                )
        numbers = isinstance(epoch, int) and isinstance(position, int)
        if not numbers or epoch < 0 or not 0 <= position <= len(self):
            raise StateError(
                f"{name}: epoch={epoch!r}, position={position!r}; expected epoch ≥ 0 and position from 0 to {len(self)}"
            )
        try:
            self._generator.set_state(generator.cpu())
        except (RuntimeError, TypeError, AttributeError) as error:
            raise StateError(f"{name}: 'generator' is not the state of a CPU generator: {error}") from error
        self._epoch_start = self._generator.get_state()
        self.epoch = epoch
        self.position = position
        self._restored = True


class BatchLoader(EpochLoader):
    """Iterates over images in batches, one epoch for each `for`; see `EpochLoader`.

    A batch is images, float32, normalised, (B, C, H, W), and labels, int64, (B,).

    Args:
        split: The images; those in memory are copied to `device` once, as bytes.
        batch_size: Images in a batch over all processes.
        shuffle: Whether every epoch has its own order; else that of the split.
        augment: Crop and flip; `None` for none.
        seed: Seed of the generator; the same on every process.
        device: Where batches are made.
        drop_last: Whether to leave out the last batch of an epoch where it is smaller.
        rank: This process; it gets its part of each global batch.
        world_size: Number of processes; it divides `batch_size`. The parts of a smaller last batch differ by at most
            one image.

    Raises:
        ConfigurationError: An argument out of range, no whole batch, or a last batch of fewer images than processes.

    Example:
        >>> import torch
        >>> from gossamer import data
        >>> digits = data.load("digits")
        >>> loader = data.BatchLoader(digits.train, 100, shuffle=True, drop_last=True, seed=1)
        >>> x, y = next(iter(loader))
        >>> len(loader), tuple(x.shape), x.dtype, y.dtype
        (12, (100, 1, 8, 8), torch.float32, torch.int64)
    """

    def __init__(
        self,
        split: Images,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, seed, device, rank, world_size)
        _check(len(split), batch_size, drop_last, world_size)
        self.split = split
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._pixels = split.pixels(augment, self.device)
        self._labels = split.labels.to(self.device)
        mean = torch.tensor(split.mean, dtype=torch.float64)
        std = torch.tensor(split.std, dtype=torch.float64)
        self._scale = (1 / (std * split.maximum)).float().view(1, -1, 1, 1).to(self.device)
        self._shift = (-mean / std).float().view(1, -1, 1, 1).to(self.device)

    def __len__(self) -> int:
        """Batches in an epoch, the same on every process."""
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + bool(rest and not self.drop_last)

    @property
    def smallest(self) -> int:
        """Images in the smallest batch that any process gets."""
        rest = 0 if self.drop_last else len(self.split) % self.batch_size
        return (rest or self.batch_size) // self.world_size

    def _settings(self) -> dict[str, Any]:
        return {
            "samples": len(self.split),
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            **self._pixels.settings(),
        }

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        samples = len(self.split)
        order = torch.randperm(samples, generator=self._generator) if self.shuffle else torch.arange(samples)
        draws = self._pixels.draw(self._generator)
        labels = self._labels[order.to(self.device)]
        parts = [self._part(number) for number in range(self.position, len(self))]
        for part, images in zip(parts, self._pixels.give(order, draws, parts), strict=True):
            yield images.to(torch.float32).mul_(self._scale).add_(self._shift), labels[part]

    def _part(self, number: int) -> slice:
        """This process's part of a batch, as a part of the epoch."""
        begin = number * self.batch_size
        size = min(self.batch_size, len(self.split) - begin)
        return slice(begin + size * self.rank // self.world_size, begin + size * (self.rank + 1) // self.world_size)


def _check(samples: int, batch_size: int, drop_last: bool, world_size: int) -> None:
    rest = samples % batch_size
    if samples == 0 or (drop_last and samples < batch_size):
        raise ConfigurationError(
            f"BatchLoader: no whole batch of {batch_size} in {samples} images; take a smaller batch_size or "
            "drop_last=False"
        )
    if not drop_last and 0 < rest < world_size:
        raise ConfigurationError(
            f"BatchLoader: the last batch has {rest} of {samples} images, too few for {world_size} processes; take "
            "drop_last=True or another batch_size"
        )
