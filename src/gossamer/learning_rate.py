"""The learning rate of a recipe over its run."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from gossamer.section import Section


class _Schedule(Section):
    """A learning rate over the run, as a factor of the optimizer's.

    The factor is set before every optimizer step or before every epoch (`per`). During the first `warmup` epochs it
    rises in equal steps to its full value, which the first step after them is the last to reach. After every `cycle`
    epochs, such as those of a round of pruning, the schedule begins anew.
    """

    warmup: Annotated[float, Field(ge=0)] = 0.0
    per: Literal["step", "epoch"] = "step"
    cycle: Annotated[int, Field(ge=1)] | None = None

    def factor(self, count: int, units: int, epochs: int) -> float:
        """The factor before unit `count` (from 0), where an epoch has `units` of them: its steps, or 1."""
        if self.cycle is not None:
            count, epochs = count % (self.cycle * units), self.cycle
        warmup = self.warmup * units
        rise = min((count + 1) / warmup, 1.0) if warmup > 0 else 1.0
        past = max(count - warmup, 0.0) / max(epochs * units - warmup, 1.0)
        return rise * self.decay(count // units, min(past, 1.0))

    def decay(self, epoch: int, past: float) -> float:
        """The factor without warm-up, in epoch `epoch`, when the fraction `past` of the time after warm-up is over."""
        return 1.0


class ConstantSchedule(_Schedule):
    """The optimizer's learning rate throughout."""

    type: Literal["constant"] = "constant"


class MultiStepSchedule(_Schedule):
    """Multiplied by `gamma` at the beginning of each epoch in `milestones`."""

    type: Literal["multistep"]
    milestones: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1

    def decay(self, epoch: int, past: float) -> float:
        """See `_Schedule.decay`."""
        return self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


class CosineSchedule(_Schedule):
    """Half a cosine from 1 to `final`."""

    type: Literal["cosine"]
    final: Annotated[float, Field(ge=0, le=1)] = 0.0

    def decay(self, epoch: int, past: float) -> float:
        """See `_Schedule.decay`."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * past)) / 2


ScheduleRecipe = Annotated[ConstantSchedule | MultiStepSchedule | CosineSchedule, Field(discriminator="type")]
