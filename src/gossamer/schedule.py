"""When masks change, and how far. Steps are optimizer steps, counted from 1; epochs are counted from 0."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from gossamer.checks import check_integer
from gossamer.errors import ConfigurationError


class Schedule(ABC):
    """Says at which optimizer steps a mask update is due."""

    end: int | None = None
    """The last step at which an update can be due, where there is one."""

    shortest: int | None = None
    """The least number of steps from one update to the next, where it is known."""

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether an update belongs to this step (the first step of a run is 1)."""


@dataclass(frozen=True)
class Periodic(Schedule):
    """Due every `every` steps after step `begin`, the last time at `until` (included; `None` for no end).

    Raises:
        ConfigurationError: `every` below 1, `begin` below 0, or `until` not above `begin`.
    """

    every: int
    begin: int = 0
    until: int | None = None

    def __post_init__(self) -> None:
        check_integer("every", self.every, at_least=1)
        check_integer("begin", self.begin, at_least=0)
        if self.until is not None:
            check_integer("until", self.until, at_least=self.begin + 1)
        object.__setattr__(self, "end", self.until)
        object.__setattr__(self, "shortest", self.every)

    def due(self, step: int) -> bool:
        """See `Schedule.due`."""
        past = step - self.begin
        return past > 0 and past % self.every == 0 and (self.until is None or step <= self.until)


@dataclass(frozen=True)
class EpochPeriods(Schedule):
    """A period for each range of epochs, as in Mostafa & Wang (2019): 100 steps at first, 200 from epoch 25 on.

    Args:
        periods: First epoch of a range → period in steps, e.g. `{0: 100, 25: 200, 80: 400, 140: 800}`.
        steps_per_epoch: Optimizer steps in one epoch.
        until: Epoch from which masks no longer change (`None` for no end).

    Raises:
        ConfigurationError: No period for epoch 0, or a value out of range.
    """

    periods: Mapping[int, int]
    steps_per_epoch: int
    until: int | None = None

    def __post_init__(self) -> None:
        check_integer("steps_per_epoch", self.steps_per_epoch, at_least=1)
        if not isinstance(self.periods, Mapping):
            raise ConfigurationError(f"periods: expected a mapping of epochs to steps, got {self.periods!r}")
        if 0 not in self.periods:
            raise ConfigurationError(f"periods: must say the period from epoch 0, got {dict(self.periods)}")
        for epoch, period in self.periods.items():
            check_integer("periods: an epoch", epoch, at_least=0)
            check_integer(f"periods: the period from epoch {epoch}", period, at_least=1)
        if self.until is not None:
            check_integer("until", self.until, at_least=1)
            object.__setattr__(self, "end", self.until * self.steps_per_epoch)
        object.__setattr__(self, "shortest", min(self.periods.values()))

    def due(self, step: int) -> bool:
        """See `Schedule.due`."""
        epoch = (step - 1) // self.steps_per_epoch
        if step < 1 or (self.until is not None and epoch >= self.until):
            return False
        start = max(first for first in self.periods if first <= epoch)
        return step % self.periods[start] == 0


def as_schedule(every: int | Schedule, begin: int = 0, until: int | None = None) -> Schedule:
    """Return `every` itself where it is a schedule, else `Periodic(every, begin, until)`.

    Raises:
        ConfigurationError: `until` beside a schedule, which has an end of its own.
    """
    if isinstance(every, Schedule):
        if until is not None:
            raise ConfigurationError(f"until={until}: give the end in the schedule itself, {every!r}")
        return every
    return Periodic(every, begin, until)


def cubic_ramp(step: int, begin: int, end: int, initial: Fraction, final: Fraction) -> Fraction:
    """`s_t = s_f + (s_i - s_f)(1 - (t - t_0)/(t_1 - t_0))³`, constant outside (Zhu & Gupta, 2017, eq. 1); exact."""
    left = 1 - min(max(Fraction(step - begin, end - begin), Fraction(0)), Fraction(1))
    return final + (initial - final) * left**3


def cosine_decay(step: int, end: int | None, initial: float) -> float:
    """`α/2 (1 + cos(π t/T))`, 0 after `end` (Evci et al., 2020, eq. 1); constant where `end` is `None`."""
    if end is None:
        return initial
    return initial / 2 * (1.0 + math.cos(math.pi * min(step / end, 1.0)))
