"""k-winners: the largest activations of each sample pass, and channels that win seldom are favoured."""

from __future__ import annotations

from collections.abc import Callable
from math import floor, prod

import torch
from torch import Tensor, nn

from gossamer.checks import check_boolean, check_integer, check_number
from gossamer.choice import largest_along
from gossamer.collect import Calls, recomputing
from gossamer.errors import ConfigurationError


class KWinners(nn.Module):
    """Keeps the `k` largest activations of each sample, and sets the others to 0 (Ahmad and Scheinkman, 2019).

    Largest are those of `x · exp(boost · (density − duty_cycle))`, where a channel's duty cycle is how often it has
    won: those that won too seldom are favoured. Winners keep the values they had, and only they have gradients. It
    stands in the place of a ReLU, or after one. Duty cycles are of this process; under DDP they are those of the first.

    Inside activation checkpointing winners are those of the pass that is repeated, where it is the last one; else an
    OrderError says so. A compiled part learns again when it is repeated, and its gradients are then wrong: leave
    k-winners out of checkpoints that are compiled.

    Args:
        channels: Features of `(N, features)`, or channels of `(N, channels, …)`.
        density: Fraction of activations that win in training, in (0, 1]: `k = ⌊density · size⌋`, exactly, where size is
            the number of activations of a sample. Of equal activations the first win.
        local: Whether there are `k` winners among the channels at every position, rather than among all activations.
        inference_factor: By what the density is multiplied in evaluation, above 0; it stays at most 1.
        boost: Strength of boosting at first, at least 0; 0 for none.
        boost_decay: By what `decay_boost`, called after each epoch, multiplies it, in [0, 1].
        period: Samples over which duty cycles are averaged.

    Attributes:
        duty_cycle: `(channels,)`, a buffer in single precision, of training alone: the moving average of the fraction
            of activations of each channel that won. Unlike in the paper a winner that is 0 has not won: where less than
            `k` are above 0 after a ReLU, the rest of them say nothing.
        boost: The present strength, a buffer of shape `()`.

    Raises:
        ConfigurationError: An argument out of range.
    """

    duty_cycle: Tensor
    boost: Tensor
    samples: Tensor
    duty_cycle_in_use: Tensor

    def __init__(
        self,
        channels: int,
        density: float,
        *,
        local: bool = False,
        inference_factor: float = 1.5,
        boost: float = 1.0,
        boost_decay: float = 0.9,
        period: int = 1000,
    ) -> None:
        super().__init__()
        check_integer("channels", channels, at_least=1)
        for name, value, high in (("density", density, 1), ("inference_factor", inference_factor, float("inf"))):
            check_number(name, value, 0, high, open_high=high != 1)
            if not value:
                raise ConfigurationError(f"{name}: must be above 0, got 0")
        check_boolean("local", local)
        check_number("boost", boost, 0, float("inf"), open_high=True)
        check_number("boost_decay", boost_decay, 0, 1)
        check_integer("period", period, at_least=1)
        self.channels, self.density, self.local = channels, density, local
        self.inference_factor, self.boost_decay, self.period = inference_factor, boost_decay, period
        self.register_buffer("duty_cycle", torch.zeros(channels))
        self.register_buffer("boost", torch.tensor(float(boost)))
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64))
        self._calls = Calls()
        # A pass that is computed again for activation checkpointing has the winners of the first.
        self.register_buffer("duty_cycle_in_use", torch.zeros(channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, channels, …)` → the same with zeros; a new tensor.

        Raises:
            ConfigurationError: Another number of channels, no floating point, or so few activations that none wins.
            OrderError: It is computed again for a backward pass, and which call is repeated is not known.
        """
        count = self._count(x)
        again = self.training and recomputing()
        learns = self.training and not again
        if again:
            self._calls.check("KWinners")
        if learns:
            self.duty_cycle_in_use.copy_(self.duty_cycle)
        with torch.no_grad():
            # In the memory format of x, which the output then has too.
            winners = torch.empty_like(x, dtype=torch.bool).copy_(self._winners(x.detach(), count))
            if learns and len(x):
                self._learn(winners & (x != 0))
        y = torch.where(winners, x, torch.zeros_like(x))
        if learns:
            self._calls.add(y)
        return y

    @torch.no_grad()
    def decay_boost(self) -> None:
        """Weaken boosting, after an epoch."""
        self.boost.mul_(self.boost_decay)

    def _count(self, x: Tensor) -> int:
        if x.dim() < 2 or x.shape[1] != self.channels or not x.is_floating_point():
            raise ConfigurationError(
                f"KWinners: is for floating point of shape (N, {self.channels}, …), got {x.dtype}, {tuple(x.shape)}"
            )
        size = self.channels if self.local else prod(x.shape[1:])
        density = self.density if self.training else min(1.0, self.density * self.inference_factor)
        count = floor(density * size + 1e-9)
        if not count:
            raise ConfigurationError(
                f"KWinners: density {density:g} of {size} activations lets none win; give at least {1 / size:.4g}"
            )
        return count

    def _winners(self, x: Tensor, count: int) -> Tensor:
        """Which activations win: bool, of the shape of `x`."""
        wide = x if x.dtype == torch.float64 else x.float()
        duty_cycle = self.duty_cycle_in_use if self.training else self.duty_cycle
        # A factor that is the same for all changes no order: that of the least duty cycle is 1, whatever the boost.
        factors = torch.exp(self.boost * (duty_cycle.min() - duty_cycle))
        scores = wide * factors.view(-1, *[1] * (x.dim() - 2))
        if self.local:
            return largest_along(scores, count, 1)
        return largest_along(scores.flatten(1), count, 1).view(x.shape)

    def _learn(self, won: Tensor) -> None:
        """Take a batch into the duty cycles: the mean of all samples at first, and of about `period` of them then."""
        self.samples.add_(len(won))
        weight = (len(won) / self.samples.clamp(max=self.period)).clamp(max=1)
        others = [dim for dim in range(won.dim()) if dim != 1]
        self.duty_cycle.lerp_(won.float().mean(others), weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KWinners:
        # Steps of a thousandth are lost in half precision: as integers they move to devices, and keep their bits.
        names = ("duty_cycle", "boost", "duty_cycle_in_use")
        bits = {name: getattr(self, name).float().view(torch.int32) for name in names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, each in bits.items():
            setattr(self, name, fn(each).view(torch.float32))
        return self

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.channels}, density={self.density:g}" + ", local" * self.local
