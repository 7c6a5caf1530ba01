"""Penalties on activations: what each adds to the loss, from sums over their elements.

A penalty is a function of a few sums over all elements of a tensor, so that it can be computed, and its gradient taken,
while the tensor is being made, a part at a time. `TERMS` says what is summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.checks import check_number, closest
from gossamer.errors import ConfigurationError

Term = Callable[[Tensor, float], Tensor]

TERMS: dict[str, tuple[Term, Term]] = {
    "near_one": (lambda y, b: (square := y * y).div_(square + b), lambda y, b: (2 * b * y).div_((y * y + b).square_())),
    "absolute": (lambda y, b: y.abs(), lambda y, b: y.sign()),
    "square": (lambda y, b: y * y, lambda y, b: 2 * y),
    "power": (lambda y, b: y.abs().pow(b), lambda y, b: y.abs().pow_(b - 1).mul_(b).mul_(y.sign())),
}
"""Functions of an element that penalties sum, and their derivatives; new tensors.

`b` is the number that a penalty gives them: the smoothing of L0, the exponent of Lp.
"""


@dataclass(frozen=True)
class Penalty:
    """A penalty on a tensor; calling it gives its value, 0-dim, with gradients.

    Attributes:
        terms: The sums it needs, names of `TERMS`.
        b: What their functions take besides the element.
    """

    terms: ClassVar[tuple[str, ...]]
    b: ClassVar[float] = 1.0

    def value(self, *sums: Tensor) -> Tensor:
        """The penalty, from the sums of its terms."""
        return sums[0]

    def __call__(self, y: Tensor) -> Tensor:
        """The penalty on a tensor; half precision is summed in single."""
        wide = y if y.dtype == torch.float64 else y.float()
        return self.value(*(TERMS[term][0](wide, self.b).sum() for term in self.terms))


@dataclass(frozen=True)
class L0(Penalty):
    """`Σ y²/(y² + b)`, the number of elements that are not zero, smoothed; in single precision `b` is at least 1e-30.

    Attributes:
        b: Above 0; the smaller, the closer to the number.
    """

    b: float = 0.1  # type: ignore[misc]  # a field here, and constant elsewhere
    terms = ("near_one",)

    def __post_init__(self) -> None:
        check_number("b", self.b, 1e-30, float("inf"), open_high=True)


@dataclass(frozen=True)
class L1(Penalty):
    """`Σ |y|`."""

    terms = ("absolute",)


@dataclass(frozen=True)
class L2(Penalty):
    """`√(Σ y²)`, not squared; its gradient at 0 is 0."""

    terms = ("square",)

    def value(self, *sums: Tensor) -> Tensor:
        """See `Penalty.value`."""
        return _root(sums[0], 2)


@dataclass(frozen=True)
class Lp(Penalty):
    """`(Σ |y|ᵖ)^(1/p)`; its gradient at 0 is 0.

    Attributes:
        p: From 1 on; for 1 and 2 `L1` and `L2` do the same in less time.
    """

    p: float
    terms = ("power",)

    def __post_init__(self) -> None:
        check_number("p", self.p, 1, float("inf"), open_high=True)

    @property
    def b(self) -> float:  # type: ignore[override]  # what it is made from, and constant elsewhere
        """The exponent."""
        return self.p

    def value(self, *sums: Tensor) -> Tensor:
        """See `Penalty.value`."""
        return _root(sums[0], self.p)


@dataclass(frozen=True)
class Hoyer(Penalty):
    """`(Σ |y|)² / Σ y²` (Hoyer, 2004, squared): from 1 for a single element to their number for equal ones."""

    terms = ("absolute", "square")

    def value(self, *sums: Tensor) -> Tensor:
        """See `Penalty.value`; 0 where every element is 0."""
        zero = sums[1] == 0
        return torch.where(zero, 0, sums[0].square() / torch.where(zero, 1, sums[1]))


def _root(total: Tensor, p: float) -> Tensor:
    zero = total == 0
    return torch.where(zero, 0, torch.where(zero, 1, total).pow(1 / p))


PENALTIES: dict[str, Callable[[], Penalty]] = {"l0": L0, "l1": L1, "l2": L2, "hoyer": Hoyer}


def as_penalty(penalty: str | Penalty, name: str = "penalty") -> Penalty:
    """Look up a penalty by name, `"l0:0.05"` for L0 with `b = 0.05`; one that is given is returned as it is.

    `name` is what the argument is called.

    Raises:
        ConfigurationError: An unknown name, or a `b` out of range.
    """
    if isinstance(penalty, Penalty):
        return penalty
    if isinstance(penalty, str) and penalty.startswith("l0:"):
        try:
            return L0(float(penalty.removeprefix("l0:")))
        except (ConfigurationError, ValueError) as error:
            raise ConfigurationError(f"{name}: got {penalty!r}; after 'l0:' comes its b ({error})") from None
    if not isinstance(penalty, str) or penalty not in PENALTIES:
        raise ConfigurationError(
            f"{name}: got {penalty!r}; allowed are {', '.join(map(repr, PENALTIES))}, 'l0:B' with its b, or a "
            "gossamer.penalties.Penalty" + closest(str(penalty), PENALTIES)
        )
    return PENALTIES[penalty]()
