"""Ready-made functions of an `ActivationSparsifier`, which takes them by name too.

An aggregate says what is kept of a layer's inputs, a reduction what of that is judged, a mask what may pass. All keep
the dimensions of the inputs, so that a dimension has the same number everywhere and masks broadcast over batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor, inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.checks import check_boolean, check_number, closest
from gossamer.choice import largest_along
from gossamer.errors import ConfigurationError

# -- aggregates --------------------------------------------------------------------------------------------------------


class Aggregate(ABC):
    """What is kept of the batches that enter a layer: a tensor like them, but of another length along dimension 0.

    Attributes:
        rows: This length, `None` for any.
    """

    rows: ClassVar[int | None] = None

    @abstractmethod
    def start(self, x: Tensor) -> Tensor:
        """What is kept of one batch, `(N, …)`; a new tensor."""

    @abstractmethod
    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """What is kept of all batches, from what two processes kept of theirs."""

    def update(self, before: Tensor, x: Tensor) -> Tensor:
        """What is kept of all batches up to this one."""
        return self.join(before, self.start(x))

    def finish(self, kept: Tensor) -> Tensor:
        """The aggregate, which is reduced."""
        return kept


@dataclass(frozen=True)
class RowByRow(Aggregate):
    """A function of two batches that returns one; of the larger, the rows that the other lacks stay as they are."""

    function: Callable[[Tensor, Tensor], Tensor]

    def start(self, x: Tensor) -> Tensor:
        """See `Aggregate.start`."""
        return x.clone()

    def update(self, before: Tensor, x: Tensor) -> Tensor:
        """See `Aggregate.update`."""
        return self.join(before, x)

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """See `Aggregate.join`.

        Raises:
            ConfigurationError: The function returns something else than a tensor of this shape.
        """
        rows = min(len(one), len(other))
        # Copies: the function may write into them or return one, and others hold the batch that enters the layer.
        both = self.function(one[:rows].clone(), other[:rows].clone())
        if not isinstance(both, Tensor) or both.shape != other[:rows].shape:
            found = tuple(both.shape) if isinstance(both, Tensor) else type(both).__name__
            raise ConfigurationError(
                f"aggregate_fn returned {found}, expected a tensor of shape {tuple(other[:rows].shape)}"
            )
        longer = one if len(one) > len(other) else other
        return both.detach() if len(longer) == rows else torch.cat([both.detach(), longer[rows:]])


@dataclass(frozen=True, kw_only=True)
class _OfSamples(Aggregate, ABC):
    """An aggregate over samples, `(1, …)`, whatever the batches they come in and the processes that see them.

    Args:
        absolute: Whether it is of absolute values.

    Raises:
        ConfigurationError: An argument out of range.
    """

    absolute: bool = False

    def __post_init__(self) -> None:
        check_boolean("absolute", self.absolute)

    def values(self, x: Tensor) -> Tensor:
        """What is aggregated, in single precision at least."""
        wide = x if x.dtype == torch.float64 else x.float()
        return wide.abs() if self.absolute else wide


@dataclass(frozen=True)
class Mean(_OfSamples):
    """The mean of all samples; or the running mean, where a batch weighs the less the more batches came after it.

    Args:
        decay: By what earlier samples' weights are multiplied at each batch, in (0, 1]; 1 for the mean.
        absolute: Whether it is the mean of absolute values.
    """

    decay: float = 1.0
    rows: ClassVar[int | None] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("decay", self.decay, 0, 1)
        if not self.decay:
            raise ConfigurationError("decay: must be above 0, got 0")

    def start(self, x: Tensor) -> Tensor:
        """See `Aggregate.start`: the mean, and the weight of all samples, `(2, …)`."""
        mean = self.values(x).mean(0)
        return torch.stack([mean, torch.full_like(mean, len(x))])

    def update(self, before: Tensor, x: Tensor) -> Tensor:
        """See `Aggregate.update`."""
        mean, weight = before
        return super().update(torch.stack([mean, weight * self.decay]), x)

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """See `Aggregate.join`."""
        weight = one[1] + other[1]
        return torch.stack([torch.lerp(one[0], other[0], other[1] / weight), weight])

    def finish(self, kept: Tensor) -> Tensor:
        """See `Aggregate.finish`."""
        return kept[:1]


@dataclass(frozen=True)
class Max(_OfSamples):
    """The maximum over samples.

    Args:
        absolute: Whether it is that of absolute values.
    """

    rows: ClassVar[int | None] = 1

    def start(self, x: Tensor) -> Tensor:
        """See `Aggregate.start`."""
        return self.values(x).amax(0, keepdim=True)

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """See `Aggregate.join`."""
        return torch.maximum(one, other)


@dataclass(frozen=True)
class Quantile(_OfSamples):
    """A quantile over samples, exact: all of them are kept until masks are made.

    Args:
        q: Which, in [0, 1]; between two samples it is interpolated, as by `torch.quantile`.
        absolute: Whether it is that of absolute values.
    """

    q: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("q", self.q, 0, 1)

    def start(self, x: Tensor) -> Tensor:
        """See `Aggregate.start`."""
        return self.values(x).clone()

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """See `Aggregate.join`."""
        return torch.cat([one, other])

    def finish(self, kept: Tensor) -> Tensor:
        """See `Aggregate.finish`."""
        return _quantile(kept, self.q, 0)


# -- reductions --------------------------------------------------------------------------------------------------------


def batch_mean(x: Tensor) -> Tensor:
    """The mean over dimension 0: `(N, …)` → `(1, …)`. An aggregate over samples is that already, and stays."""
    return x.mean(0, keepdim=True)


def channel_mean(x: Tensor, dim: int = 1) -> Tensor:
    """The mean magnitude of each channel: `(N, C, …)` → `(1, C, 1, …)`; masks are then of whole channels.

    Args:
        x: The aggregate.
        dim: The dimension that runs over channels.
    """
    others = [other for other in range(x.dim()) if other != dim % x.dim()]
    return x.abs().mean(others, keepdim=True)


# -- masks -------------------------------------------------------------------------------------------------------------


def magnitude(x: Tensor, threshold: float) -> Tensor:
    """What is larger in magnitude than a threshold passes: bool, of the shape of `x`.

    Raises:
        ConfigurationError: A threshold that is no number from 0 on.
    """
    check_options(threshold=threshold)
    return x.abs() > threshold


def top_fraction(x: Tensor, fraction: float, dim: int | None = None) -> Tensor:
    """The largest in magnitude pass, exactly `⌊fraction · size⌋`; of equal ones those that come first.

    Args:
        x: What was reduced.
        fraction: How many, in (0, 1].
        dim: The dimension of channels, each of which has so many then; `None` for so many in all.

    Returns:
        bool, of the shape of `x`.

    Raises:
        ConfigurationError: A fraction out of range, or so small that nothing passes.
    """
    check_options(fraction=fraction)
    rows = _rows(x.abs(), dim)
    size = rows.shape[1]
    count = floor(fraction * size + 1e-9)
    if not count:
        raise ConfigurationError(f"fraction={fraction:g} of {size} lets none pass; give at least {1 / size:.4g}")
    return _unrows(largest_along(rows, count, 1), x, dim)


def quantile(x: Tensor, q: float, dim: int | None = None) -> Tensor:
    """What is at least as large in magnitude as a quantile of the magnitudes passes, and all that is equal to it.

    Args:
        x: What was reduced.
        q: The quantile, in [0, 1]: about this fraction is masked.
        dim: The dimension of channels, each of which has a quantile of its own then; `None` for one of all.

    Returns:
        bool, of the shape of `x`.

    Raises:
        ConfigurationError: A quantile out of range.
    """
    check_options(q=q)
    rows = _rows(x.abs(), dim)
    return _unrows(rows >= _quantile(rows, q, 1), x, dim)


def check_options(**options: Any) -> None:
    """Raise a ConfigurationError unless options of the ready-made masks are in their ranges."""
    for name, value in options.items():
        if name in _LARGEST:
            check_number(name, value, 0, _LARGEST[name])


_LARGEST = {"threshold": inf, "fraction": 1, "q": 1}


def _rows(x: Tensor, dim: int | None) -> Tensor:
    """One row of all elements, or one for each index along a dimension."""
    if dim is None:
        return x.reshape(1, -1)
    if not -x.dim() <= dim < x.dim():
        raise ConfigurationError(f"dim={dim}: what was reduced has shape {tuple(x.shape)}")
    return x.movedim(dim, 0).flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def _unrows(rows: Tensor, x: Tensor, dim: int | None) -> Tensor:
    """The opposite of `_rows`, for rows made of `x`."""
    return rows.view(x.shape) if dim is None else rows.view(x.movedim(dim, 0).shape).movedim(0, dim)


def _quantile(x: Tensor, q: float, dim: int) -> Tensor:
    """As `torch.quantile` along a dimension that is kept, which takes neither half precision nor 2²⁴ elements."""
    ordered = (x if x.dtype == torch.float64 else x.float()).sort(dim).values
    place = q * (x.shape[dim] - 1)
    low = floor(place)
    first, last = ordered.narrow(dim, low, 1), ordered.narrow(dim, -1, 1)
    between = first if low == place else torch.lerp(first, ordered.narrow(dim, low + 1, 1), place - low)
    return torch.where(last.isnan(), last, between)  # which NaN is sorted to


# -- names -------------------------------------------------------------------------------------------------------------

FUNCTIONS: Mapping[str, Mapping[str, Any]] = {
    "aggregate_fn": {"mean": Mean(), "running_mean": Mean(decay=0.9), "max": Max(), "quantile": Quantile()},
    "reduce_fn": {"batch_mean": batch_mean, "channel_mean": channel_mean},
    "mask_fn": {"magnitude": magnitude, "top_fraction": top_fraction, "quantile": quantile},
}
"""The ready-made functions by name, for each argument of an `ActivationSparsifier`."""


def by_name(argument: str, given: object) -> Any:
    """A function by its name; one that is given is returned as it is.

    Raises:
        ConfigurationError: An unknown name, or no function.
    """
    if callable(given) or (argument == "aggregate_fn" and isinstance(given, Aggregate)):
        return given
    known = FUNCTIONS[argument]
    if isinstance(given, str) and given in known:
        return known[given]
    raise ConfigurationError(
        f"{argument} is {given!r}; give a function or one of {', '.join(map(repr, known))}, here or as a default"
        + closest(str(given), known)
    )


def kind(function: Any) -> str:
    """A function's name, with its arguments where it is a ready-made aggregate; the same in every process."""
    if isinstance(function, _OfSamples):
        return repr(function)
    function = function.function if isinstance(function, RowByRow) else function
    return str(getattr(function, "__qualname__", type(function).__qualname__))
