"""Learned thresholds on activations: a smoothed hard threshold that is trained, and the hard one it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from math import log, prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from gossamer.checks import check_integer, check_not_nested, check_number
from gossamer.errors import ConfigurationError
from gossamer.penalties import TERMS
from gossamer.targets import whole

_CHUNK = 1 << 16
"""Elements that are worked on at a time on the CPU: few enough to stay in the cache between the steps of a formula."""

_LARGEST = 1e38
"""What is larger is taken for this, so that its product with a number that underflows is 0 and not NaN."""


def lossy_threshold(
    x: Tensor,
    eps: Tensor,
    a: Tensor | float,
    dim: int = 1,
    *,
    hard: bool = False,
    terms: Sequence[str] = (),
    b: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`y = x·(σ(a(x − e)) + σ(−a(x + e)))` with `e = |eps|`: close to 0 below the threshold, to `x` above it.

    Only `x` is saved for the backward pass. Half precision is computed in single. Far below a threshold, where
    `a(e − |x|)` is above 43 (353 in double precision), `y` may be 0: what the formula gives there is so small that its
    products with weights and gradients leave the range of normal numbers, and CPUs are slow beyond it.

    Args:
        x: Activations, of any shape.
        eps: The threshold, `()` or `(1,)`; or one for each channel, `(C,)`.
        a: Sharpness, above 0: a number, or a tensor of one.
        dim: Dimension of `x` that runs over channels, where there is a threshold for each.
        hard: Whether `y` is that of the hard threshold, `x` where `|x| > e` and else 0, with the gradient of the
            smoothed one.
        terms: What is summed over the elements of `y`, for penalties: names of `gossamer.penalties.TERMS`.
        b: Their smoothing.

    Returns:
        `y`, a new tensor of the shape and type of `x`; and the sums, `(terms,)`. Both have gradients, and `y` may be
        changed in place.

    Raises:
        ConfigurationError: `x` is not floating point, or has not as many channels as there are thresholds; or a number
            `a` is not above 0.
    """
    _check(x, eps, dim)
    if isinstance(a, Tensor):
        sharpness = a
    else:
        _check_sharpness(a)
        sharpness = torch.tensor(float(a), device=x.device)
    if torch.compiler.is_compiling():
        y = _expression(x, eps, sharpness, dim, hard)
        wide = y if y.dtype == torch.float64 else y.float()
        sums = [TERMS[term][0](wide, b).sum() for term in terms]
        # The sums keep `y` for their gradients, and a ReLU behind may change what it is given in place.
        return (y.clone() if sums else y), torch.stack(sums) if sums else wide.new_empty(0)
    return _Threshold.apply(x, eps, sharpness, dim, hard, tuple(terms), b)  # type: ignore[no-untyped-call, no-any-return]


@fx.wrap
def hard_threshold(x: Tensor, eps: Tensor, dim: int = 1) -> Tensor:
    """`x` where `|x| > |eps|`, else 0; a new tensor, NaN stays. Arguments and errors as of `lossy_threshold`."""
    _check(x, eps, dim)
    wide = torch.promote_types(x.dtype, torch.float32)  # where the smoothed one is computed, so that the two agree
    return torch.where(x.abs().to(wide) <= _along(eps.abs().to(wide), x.dim(), dim), torch.zeros_like(x), x)


@fx.wrap
def threshold_relu(x: Tensor, eps: Tensor, dim: int = 1) -> Tensor:
    """`x` where `x > |eps|`, else 0; otherwise as `hard_threshold`."""
    _check(x, eps, dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.where(x.to(wide) <= _along(eps.abs().to(wide), x.dim(), dim), torch.zeros_like(x), x)


def _check(x: Tensor, eps: Tensor, dim: int) -> None:
    check_not_nested("lossy threshold", x)
    if not x.is_floating_point():
        raise ConfigurationError(f"lossy threshold: got activations of dtype {x.dtype}; expected floating point")
    if eps.numel() > 1 and (x.dim() <= max(dim, -dim - 1) or x.shape[dim] != eps.numel()):
        raise ConfigurationError(
            f"lossy threshold: has {eps.numel()} thresholds for channels along dimension {dim}, and activations of "
            f"shape {tuple(x.shape)}"
        )


def _check_sharpness(a: float) -> None:
    check_number("a", a, 0, 1e30)
    if a == 0:
        raise ConfigurationError("a: the sharpness must be above 0, got 0")


def _expression(x: Tensor, eps: Tensor, a: Tensor, dim: int, hard: bool) -> Tensor:
    """The formula in plain operations, which a compiler fuses."""
    wide = x if x.dtype == torch.float64 else x.float()
    e = _along(eps.abs().to(wide.dtype), x.dim(), dim)
    gate = torch.sigmoid(a * (wide - e)) + torch.sigmoid(-a * (wide + e))
    soft = wide * F.threshold(gate, _least_gate(wide.dtype), 0.0)
    if hard:
        soft = soft + (torch.where(wide.abs() <= e, torch.zeros_like(wide), wide) - soft).detach()
    return soft.to(x.dtype)


def _least_gate(dtype: torch.dtype) -> float:
    """What is smaller than this is 0, see `lossy_threshold`: the square root of the smallest normal number."""
    return float(torch.finfo(dtype).tiny ** 0.5)


def _along(values: Tensor, dims: int, dim: int) -> Tensor:
    """Values of channels, or one of all, so that they broadcast over a tensor with so many dimensions."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * dims
    shape[dim] = -1
    return values.view(shape)


class _Threshold(torch.autograd.Function):
    """With `q = exp(a(e − |x|))` and `w = q·exp(−2ae)` the gates are `1/(1 + q)` and `w/(1 + w)`: one exponential."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, eps: Tensor, a: Tensor, dim: int, hard: bool, terms: tuple[str, ...], b: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, eps, a)
        ctx.options = dim, hard, terms, b
        ctx.set_materialize_grads(False)
        work = _Work(x, eps, a, dim)
        y = torch.empty_like(work.x)
        sums = [y.new_zeros(len(terms), dtype=work.a.dtype)]
        for odds, part, out in zip(work.odds(), work.parts(x), work.parts(y), strict=False):
            value = work.hard(part, odds) if hard else work.soft(part, odds)
            out.copy_(value)
            if terms:
                sums.append(torch.stack([TERMS[term][0](value, b).sum() for term in terms]))
        return y, torch.stack(sums).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, sum_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, eps, a = ctx.saved_tensors
        dim, hard, terms, b = ctx.options
        wants_x, wants_eps = ctx.needs_input_grad[:2]
        work = _Work(x, eps, a, dim)
        dx = torch.empty_like(work.x)
        outer_parts = repeat(None) if grad is None else work.parts(grad)
        sums = []
        for odds, part, outer, out in zip(work.odds(), work.parts(x), outer_parts, work.parts(dx), strict=False):
            first, second = work.gates(part, odds)
            gate = first + second
            if sum_grads is not None and terms:
                value = work.hard(part, odds) if hard else gate * part
                outer = torch.zeros_like(gate) if outer is None else outer.to(gate.dtype, copy=True)
                for factor, term in zip(sum_grads, terms, strict=True):
                    outer.addcmul_(TERMS[term][1](value, b), factor)
            elif outer is None:
                outer = torch.zeros_like(gate)
            first.addcmul_(first, first, value=-1)  # σ' = σ(1 − σ)
            second.addcmul_(second, second, value=-1)
            finite = part.to(gate.dtype).clamp(-_LARGEST, _LARGEST)
            if wants_x:
                slope = (first - second).mul_(finite.abs()).mul_(work.a)
                out.copy_(gate.add_(slope).mul_(outer))
            if wants_eps:
                sums.append(work.sum_up(first.add_(second).mul_(finite).mul_(outer)))
        de = (work.total(sums) * -work.a * eps.detach().sign().reshape(-1)).view(eps.shape) if wants_eps else None
        return dx if wants_x else None, None if de is None else de.to(eps.dtype), None, None, None, None, None


class _Work:
    """Activations in rows, in the order in which they lie in memory, and a part of the rows at a time."""

    def __init__(self, x: Tensor, eps: Tensor, a: Tensor, dim: int) -> None:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.a = a.detach().to(wide).reshape(())
        e = eps.detach().abs().to(wide).reshape(-1)
        self.channels = len(e)
        order = sorted(range(x.dim()), key=lambda i: -x.stride()[i])
        self.order = order if x.permute(order).is_contiguous() else list(range(x.dim()))
        self.x = x if x.permute(self.order).is_contiguous() else x.contiguous()
        self.by_row = False  # whether a row is of one channel, else each has all of them
        if self.channels == 1:
            self.shape = [x.numel()]
            e = e.reshape(())
        else:
            place = self.order.index(dim % x.dim())
            sizes = [x.shape[i] for i in self.order]
            before, after = prod(sizes[:place]), prod(sizes[place + 1 :])
            self.by_row = after != 1
            self.shape = [before * self.channels, after] if self.by_row else [before, self.channels]
            e = e.repeat(before).unsqueeze(1) if self.by_row else e
        exponents = self.a * e
        self._least = _least_gate(wide)
        self._most = log(4 / self._least)  # beyond it the gates are 0 or 1, and exponentials are slow to compute
        squares = F.threshold(torch.exp(-2 * exponents), torch.finfo(wide).tiny, 0.0)
        self._odds = exponents, squares, e
        # Asked on the CPU only: others would have to be waited for, and are not slow beyond the normal numbers.
        self._cuts = x.device.type == "cpu" and bool((exponents > -log(self._least)).any())
        length = prod(self.shape[1:])
        self._rows = max(1, _CHUNK // max(1, length)) if x.device.type == "cpu" else max(1, self.shape[0])

    def parts(self, tensor: Tensor) -> Sequence[Tensor]:
        """A tensor of the activations' shape, as views where it lies as they do."""
        parts: Sequence[Tensor] = torch.split(tensor.permute(self.order).contiguous().view(self.shape), self._rows)
        return parts

    def odds(self) -> Iterator[tuple[Tensor, ...]]:
        """`ae`, `exp(−2ae)` and `e` for the rows of each part."""
        if not self.by_row:
            return repeat(self._odds)
        return zip(*(torch.split(each, self._rows) for each in self._odds), strict=True)

    def gates(self, part: Tensor, odds: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """`σ(a(|x| − e))` and `σ(−a(|x| + e))`, new tensors."""
        exponents, squares, _ = odds
        q = part.to(self.a.dtype).abs().mul_(-self.a).add_(exponents).clamp_(-self._most, self._most).exp_()
        torch.threshold_(q, self._least / 2, 0.0)
        w = q * squares
        gates = q.add_(1).reciprocal_(), w.div_(w + 1)
        for gate in gates if self._cuts else ():
            torch.threshold_(gate, self._least, 0.0)
        return gates

    def soft(self, part: Tensor, odds: tuple[Tensor, ...]) -> Tensor:
        """The smoothed threshold, a new tensor."""
        first, second = self.gates(part, odds)
        return first.add_(second).mul_(part)

    def hard(self, part: Tensor, odds: tuple[Tensor, ...]) -> Tensor:
        """The hard threshold, a new tensor; NaN stays."""
        wide = part.to(self.a.dtype)
        return torch.where(wide.abs() <= odds[2], torch.zeros_like(wide), wide)

    def sum_up(self, part: Tensor) -> Tensor:
        """The sum over a part: of all, of each channel, or of each row."""
        if self.channels == 1:
            return part.sum()
        return part.sum(1) if self.by_row else part.sum(0)

    def total(self, sums: list[Tensor]) -> Tensor:
        """The sum over all parts, `(channels,)`."""
        if self.by_row:
            return torch.cat(sums).view(-1, self.channels).sum(0)
        return torch.stack(sums).sum(0).reshape(-1)


class LossySparsifier(nn.Module):
    """A learned, smoothed hard threshold on activations: `x·(σ(a(x − |eps|)) + σ(−a(x + |eps|)))`.

    Args:
        eps: The first threshold: a number, a tensor `()`, `(1,)` or `(channels,)` that is copied, or `None` for 0.1.
        a: Sharpness, above 0; the larger, the closer to a hard threshold.
        channels: Number of channels, each of which then has a threshold of its own; `None` for one in all.
        dim: The dimension that runs over channels.

    Attributes:
        eps: The threshold, `(1,)` or `(channels,)`; its absolute value counts. A saved one of shape `()` is loaded too.
        a: The sharpness, a buffer of shape `()`; a number may be assigned.

    Raises:
        ConfigurationError: An argument out of range.
    """

    a: Tensor

    not_rewound = ("a",)  # it follows the steps of the run

    def __init__(
        self, eps: float | Tensor | None = None, a: float = 1.0, *, channels: int | None = None, dim: int = 1
    ) -> None:
        super().__init__()
        _check_sharpness(a)
        self.eps = nn.Parameter(_first(eps, channels))
        self.dim = dim
        self.register_buffer("a", torch.tensor(float(a)))

    def forward(self, x: Tensor) -> Tensor:
        """See `lossy_threshold`."""
        return lossy_threshold(x, self.eps, self.a, self.dim)[0]

    def hard(self) -> LossyHardSparsifier:
        """The hard threshold that this one approaches, with a copy of its values."""
        return LossyHardSparsifier(whole(self.eps), dim=self.dim).train(self.training)

    def relu(self) -> FATReLU:
        """The hard threshold with a ReLU after it, as one."""
        return FATReLU(whole(self.eps), dim=self.dim).train(self.training)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        before = self.a
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _keep_sharpness(self, before)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _read_scalar(state_dict, prefix, self.a)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "a" and isinstance(value, float | int) and "a" in self._buffers:
            _check_sharpness(value)
            self.a.fill_(value)  # in place, so that a compiled forward need not be compiled again
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"thresholds={len(self.eps)}, a={float(self.a):g}"


class LossyHardSparsifier(nn.Module):
    """A hard threshold on activations: `x` where `|x| > |eps|`, else 0; its input is not changed.

    Args:
        eps: As of `LossySparsifier`.
        a: Sharpness of the smoothed threshold whose gradients stand in for those of the hard one, which has none, so
            that it can be trained from the start (a straight-through estimator); `None` for a threshold that stays.
        channels: Number of channels, each of which then has a threshold of its own; `None` for one in all.
        dim: The dimension that runs over channels.

    Attributes:
        eps: As of `LossySparsifier`; without `a` a buffer, and not trained.

    Raises:
        ConfigurationError: An argument out of range.
    """

    a: Tensor | None
    eps: Tensor

    def __init__(
        self, eps: float | Tensor | None = None, a: float | None = None, *, channels: int | None = None, dim: int = 1
    ) -> None:
        super().__init__()
        if a is not None:
            _check_sharpness(a)
        first = _first(eps, channels)
        if a is None:
            self.register_buffer("eps", first)
        else:
            self.eps = nn.Parameter(first)
        self.dim = dim
        self.register_buffer("a", None if a is None else torch.tensor(float(a)))

    def forward(self, x: Tensor) -> Tensor:
        """The threshold of `x`, of its shape and type; NaN stays."""
        if self.a is not None:
            return lossy_threshold(x, self.eps, self.a, self.dim, hard=True)[0]
        return hard_threshold(x, self.eps, self.dim)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        before = self.a
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        _keep_sharpness(self, before)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _read_scalar(state_dict, prefix, self.a)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"thresholds={len(self.eps)}"


class FATReLU(nn.Module):
    """`x` where `x > |eps|`, else 0: a ReLU with a threshold (FATReLU: Kurtz et al., 2020), as one operation.

    It is what `LossyHardSparsifier` and a ReLU after it compute together.

    Args:
        eps: The threshold; else as of `LossySparsifier`.
        channels: Number of channels, each of which then has a threshold of its own; `None` for one in all.
        dim: The dimension that runs over channels.

    Attributes:
        eps: The threshold, `(1,)` or `(channels,)`, a buffer; its absolute value counts.

    Raises:
        ConfigurationError: An argument out of range.
    """

    eps: Tensor

    def __init__(self, eps: float | Tensor = 0.0, *, channels: int | None = None, dim: int = 1) -> None:
        super().__init__()
        self.register_buffer("eps", _first(eps, channels))
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        """The activations of a tensor, of its shape and type, a new tensor; NaN stays."""
        return threshold_relu(input, self.eps, self.dim)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"thresholds={len(self.eps)}"


def _keep_sharpness(module: nn.Module, before: Tensor | None) -> None:
    """A sharpness stays in single precision, whatever the module becomes: half has no numbers as large."""
    after = module._buffers["a"]
    if before is not None and after is not None and not (before.is_meta or after.is_meta):
        module._buffers["a"] = before.to(after.device)


def _first(eps: float | Tensor | None, channels: int | None) -> Tensor:
    """The first threshold, or thresholds, as a new tensor of one dimension."""
    if channels is not None:
        check_integer("channels", channels, at_least=1)
    if isinstance(eps, Tensor):
        if not eps.is_floating_point() or eps.dim() > 1 or eps.numel() not in (1, channels or max(1, eps.numel())):
            wanted = "(), (1,) or " + ("(channels,)" if channels is None else f"({channels},)")
            raise ConfigurationError(
                f"eps: expected a number, or floating-point numbers of shape {wanted}, got {tuple(eps.shape)}, "
                f"{eps.dtype}"
            )
        if not eps.is_meta and not eps.isfinite().all():
            raise ConfigurationError("eps: expected finite numbers, got a tensor with others")
        return eps.detach().reshape(-1).expand(channels or eps.numel()).clone()
    value = 0.1 if eps is None else eps
    check_number("eps", value, -_LARGEST, _LARGEST)
    return torch.full((channels or 1,), float(value))


def _read_scalar(state_dict: dict[str, Any], prefix: str, a: Tensor | None) -> None:
    """A threshold that was saved as a scalar becomes one of one channel; such files had no sharpness, which stays."""
    saved = state_dict.get(f"{prefix}eps")
    if isinstance(saved, Tensor) and saved.dim() == 0:
        state_dict[f"{prefix}eps"] = saved.reshape(1)
        if a is not None:
            state_dict.setdefault(f"{prefix}a", a)
