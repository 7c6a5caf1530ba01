"""The connections of a layer as they are measured while it is trained: a forward hook, and what it has come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.collect import recomputing
from gossamer.errors import ConfigurationError
from gossamer.strengths import occasions

Statistic = Callable[[Tensor, Tensor, nn.Module], Tensor]
"""Takes a layer's input, its output and the layer; returns a number for every connection, in the weight's shape."""


class Connections:
    """A forward hook that measures the connections of a layer, in training, while it is open.

    Args:
        name: The weight's name, for messages.
        shape: Its global shape.
        statistic: What is measured of a forward pass.
        mean: Whether that is a mean over samples and positions, and not a sum.
        activation: Applied to a copy of the output before; `None` for nothing.
        decay: Of a moving average over the steps measured; `None` for sums since it began anew.

    Attributes:
        total: What was measured since it began anew, summed, or the moving average; float32 in the weight's shape.
        samples: The occasions at which it was, 0-dim: samples times positions.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        statistic: Statistic,
        mean: bool,
        activation: Callable[[Tensor], Tensor] | None,
        decay: float | None,
    ) -> None:
        self.name = name
        self.shape = shape
        self._statistic = statistic
        self._mean = mean
        self._activation = activation
        self._decay = decay
        self._open = False
        self._sum = self._count = torch.zeros(())
        self.total, self.samples = torch.zeros(shape), torch.zeros(())
        self._old = torch.zeros((), dtype=torch.bool)  # whether nothing was measured since it began anew

    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """Measure a forward pass.

        Raises:
            ConfigurationError: What went in or came out is no tensor, or does not belong to the layer.
        """
        if not self._open or not module.training or recomputing():
            return
        input = named.get("input", next(iter((*args, *named.values())), None))
        leave = f"leave it out with targets=['!{self.name}']"
        x, y = self._tensor(input, "the layer's input", leave), self._tensor(output, "the layer's output", leave)
        if not (count := occasions(x, y, module)):
            return
        if self._sum.device != output.device:  # the model was moved since
            self._sum, self._count = self._sum.to(output.device), self._count.to(output.device)
        with torch.no_grad():
            if self._activation is not None:  # which may work in place
                y = self._tensor(self._activation(y.clone()), "what `activation` gives", "let it return a tensor")
            try:
                found = self._statistic(x, y, module)
            except ConfigurationError as error:
                raise ConfigurationError(f"{self.name}: {error}") from None
            self._sum.add_(found, alpha=count if self._mean else 1)
            self._count.add_(count)

    def _tensor(self, value: Any, what: str, remedy: str) -> Tensor:
        if not isinstance(value, Tensor):
            raise ConfigurationError(f"{self.name}: {what} is a {type(value).__name__}, expected a tensor; {remedy}")
        return value.detach()

    def open(self, whether: bool, device: torch.device) -> None:
        """Measure the forward passes of the coming step, or leave them."""
        self._open = whether
        if whether:
            self._sum, self._count = torch.zeros(self.shape, device=device), torch.zeros((), device=device)

    def close(self) -> list[Tensor]:
        """End a step; the sums it has come to, which may be added up over ranks before `collect`."""
        self._open = False
        return [self._sum, self._count]

    def collect(self) -> None:
        """Take the last step that was measured into the strengths: into a sum, or a moving average."""
        ran = self._count > 0
        self._move(self._sum.device)
        if self._decay is None:
            keep = ~(self._old & ran)
            self.total = self.total * keep + self._sum
            self.samples = self.samples * keep + self._count
        else:
            mean = self._sum / self._count.clamp(min=1)
            average = torch.where(self.samples > 0, self._decay * self.total + (1 - self._decay) * mean, mean)
            self.total = torch.where(ran, average, self.total)
            self.samples = self.samples + self._count
        self._old = self._old & ~ran
        self._sum = self._count = torch.zeros((), device=self._sum.device)

    def begin_anew(self) -> None:
        """Begin a sum anew with what is measured next, until when it stays; a moving average goes on."""
        self._old = torch.ones_like(self._old)

    def fresh(self) -> Tensor:
        """Whether anything was measured since it began anew, bool, 0-dim."""
        return ~self._old & (self.samples > 0)

    def strength(self) -> Tensor:
        """The strengths, float32 in the weight's shape: means over all occasions, or moving averages."""
        return self.total / self.samples.clamp(min=1) if self._decay is None else self.total

    def state_dict(self) -> dict[str, Tensor]:
        """What it has come to."""
        return {"total": self.total, "samples": self.samples, "old": self._old}

    def fits(self, state: object) -> bool:
        """Whether `load_state_dict` can take this."""
        if not isinstance(state, Mapping) or not all(isinstance(each, Tensor) for each in state.values()):
            return False
        own = self.state_dict()
        alike = own.keys() == state.keys() and all(
            state[key].shape == each.shape and state[key].dtype == each.dtype and bool(state[key].isfinite().all())
            for key, each in own.items()
        )
        counts = ("samples",) if self._mean else ("samples", "total")
        return alike and not any((state[key] < 0).any() for key in counts)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        device = self._sum.device
        self.total, self.samples, self._old = (state[key].to(device) for key in ("total", "samples", "old"))

    def _move(self, device: torch.device) -> None:
        self.total, self.samples, self._old = (each.to(device) for each in (self.total, self.samples, self._old))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = False  # in a copy of the model alone nobody asks; the method of a copy opens it again
