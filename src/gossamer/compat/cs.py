"""Continuous sparsification under the names of its authors' package: soft-masked modules and their networks.

`gossamer.ContinuousSparsification` (Savarese et al., 2020) does the same to any model behind `attach`. As in the
package modules have masks of their own here, and a script raises the temperature, prunes, and rewinds by hand.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.checks import check_boolean, check_number
from gossamer.errors import ConfigurationError, OrderError, StateError
from gossamer.nn.gates import code_scale, soft_mask, suppress
from gossamer.rewind import everything

__all__ = ["MaskedNet", "SoftMasked", "SoftMaskedConv2d", "SoftMaskedLinear"]


class SoftMasked(nn.Module):
    """A module whose weight is under a mask that is learned with it: what the ones below share.

    For others derive from it and from a module with a `weight`, as in `class Own(SoftMasked, nn.Conv1d)`; `forward`
    takes `masked_weight(temp, ticket)`.

    Attributes:
        mask_weight: The scores `s` of the mask, a parameter of the weight's shape.
        init_weight: The weight at the last `checkpoint`, 0 before; a parameter that is saved and not trained.
        mask_initial_value: The first score `s₀`.

    Raises:
        ConfigurationError: A `mask_initial_value` outside [-50, 50].
    """

    weight: Tensor

    def __init__(self, *args: Any, mask_initial_value: float = 0.0, **options: Any) -> None:
        check_number("mask_initial_value", mask_initial_value, -50, 50)
        super().__init__(*args, **options)
        self.mask_initial_value = mask_initial_value
        self.init_weight = nn.Parameter(torch.zeros_like(self.weight), requires_grad=False)
        self.mask_weight = nn.Parameter(torch.empty_like(self.weight))
        self._last: tuple[float | Tensor, bool] = 1, False
        self.init_mask()

    def reset_parameters(self) -> None:
        """Draw the weight (Glorot & Bengio, 2010, normal), and set a bias to 0."""
        nn.init.xavier_normal_(self.weight)
        if isinstance(self.bias, Tensor):
            nn.init.zeros_(self.bias)

    def init_mask(self) -> None:
        """Set every score to `mask_initial_value`."""
        nn.init.constant_(self.mask_weight, self.mask_initial_value)

    def compute_mask(self, temp: float | Tensor, ticket: bool) -> Tensor:
        """`σ(β·s)/σ(s₀)`, or of the ticket `1[s > 0]/σ(s₀)`, in the weight's shape.

        Args:
            temp: The temperature `β`, above 0. One that changes is best a tensor, which does not compile anew.
            ticket: Whether the mask is hard.

        Raises:
            ConfigurationError: `temp` is a number out of range.
        """
        if not isinstance(temp, Tensor):  # to look into a tensor would wait for the device
            _check_temperature(temp)
        if not torch.compiler.is_exporting():
            # The buffer of a `MaskedNet` itself; nothing with a graph stays here, as it could not be copied.
            self._last = (temp.detach() if isinstance(temp, Tensor) and temp.requires_grad else temp), ticket
        scores = self.mask_weight
        mask = (scores > 0).to(scores.dtype) if ticket else soft_mask(scores, temp)
        return mask * code_scale(self.mask_initial_value)

    @property
    def mask(self) -> Tensor:
        """What `compute_mask` gave last, computed anew, with its gradient."""
        return self.compute_mask(*self._last)

    @mask.setter
    def mask(self, computed: Tensor) -> None:
        """For a `forward` written for the package, which assigns `compute_mask(…)`; nothing else may be."""

    def masked_weight(self, temp: float | Tensor, ticket: bool) -> Tensor:
        """The weight under its mask, which is `mask` from then on; see `compute_mask`."""
        return self.weight * self.compute_mask(temp, ticket)

    @torch.no_grad()
    def prune(self, temp: float | Tensor) -> None:
        """Between rounds: scores above 0 become `min(β·s, s₀)`, all others are suppressed and never come back.

        Raises:
            ConfigurationError: `temp` is out of range.
        """
        _check_temperature(temp)
        self.mask_weight.copy_(suppress(self.mask_weight, temp, self.mask_initial_value))

    @torch.no_grad()
    def checkpoint(self) -> None:
        """Keep the weight as it is, in `init_weight`."""
        self.init_weight.copy_(self.weight)

    @torch.no_grad()
    def rewind_weights(self) -> None:
        """Put the weight back to what `checkpoint` kept, to the bit.

        Raises:
            OrderError: Nothing was kept.
        """
        if not self.init_weight.any():
            raise OrderError(
                f"rewind_weights: {self} has no weight to go back to, its init_weight is 0; call checkpoint() at the "
                "rewind point first"
            )
        self.weight.copy_(self.init_weight)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{super().extra_repr()}, mask_initial_value={self.mask_initial_value:g}"


class SoftMaskedConv2d(SoftMasked, nn.Conv2d):
    """`torch.nn.Conv2d` with a soft-masked weight; arguments are in the order of the earlier package.

    Args:
        in_channels: See `torch.nn.Conv2d`, as for those that are not listed.
        out_channels: See there.
        kernel_size: See there.
        padding: See there; 1 unless given, whatever the kernel.
        stride: See there.
        mask_initial_value: First score of every weight, in [-50, 50].
        bias: Whether there is a bias, which begins at 0 and has no mask.
        options: `dilation`, `groups`, `padding_mode`, `device` and `dtype`.

    See `SoftMasked` for attributes and errors.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        padding: int | tuple[int, int] | str = 1,
        stride: int | tuple[int, int] = 1,
        mask_initial_value: float = 0.0,
        *,
        bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            bias=bias,
            mask_initial_value=mask_initial_value,
            **options,
        )

    def forward(self, input: Tensor, temp: float | Tensor = 1, ticket: bool = False) -> Tensor:
        """Convolve, (N, in_channels, H, W), with the weight under its mask; see `compute_mask`."""
        out: Tensor = self._conv_forward(input, self.masked_weight(temp, ticket), self.bias)
        return out


class SoftMaskedLinear(SoftMasked, nn.Linear):
    """`torch.nn.Linear` with a soft-masked weight.

    Args:
        in_features: See `torch.nn.Linear`.
        out_features: See there.
        bias: Whether there is a bias, which begins at 0 and has no mask.
        mask_initial_value: First score of every weight, in [-50, 50].
        options: `device` and `dtype`.

    See `SoftMasked` for attributes and errors.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, mask_initial_value: float = 0.0, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, mask_initial_value=mask_initial_value, **options)

    def forward(self, input: Tensor, temp: float | Tensor = 1, ticket: bool = False) -> Tensor:
        """Map (..., in_features) to (..., out_features) with the weight under its mask; see `compute_mask`."""
        return F.linear(input, self.masked_weight(temp, ticket), self.bias)


class MaskedNet(nn.Module):
    """Base class of networks with soft-masked modules; their `forward` gives these `self.temp` and `self.ticket`.

    Between rounds `prune()`, then set `temp` to 1. Temperature, ticket and rewind point are in the `state_dict`; those
    saved by the earlier package are loaded too, and leave these as they are.

    Attributes:
        temp: The temperature `β`, a buffer of shape `()`; a number may be assigned.
        ticket: Whether masks are hard.

    Raises:
        ConfigurationError: A `temp` or `ticket` that cannot be one is assigned.
    """

    temp: Tensor
    ticket: bool

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("temp", torch.ones(()))
        self.ticket = False
        self._chosen: Sequence[SoftMasked] | None = None
        self._kept: dict[str, Tensor] | None = None

    @property
    def mask_modules(self) -> Sequence[SoftMasked]:
        """The soft-masked modules; all there are, unless a list was assigned."""
        if self._chosen is not None:
            return self._chosen
        return [module for module in self.modules() if isinstance(module, SoftMasked)]

    @mask_modules.setter
    def mask_modules(self, modules: Sequence[SoftMasked]) -> None:
        here = set(self.modules())
        if strange := [each for each in modules if each not in here or not isinstance(each, SoftMasked)]:
            raise ConfigurationError(
                f"mask_modules: got {strange[0]!r:.80}; expected soft-masked modules of this network: own ones derive "
                "from gossamer.compat.cs.SoftMasked and a module with a weight"
            )
        self._chosen = list(modules)

    def prune(self) -> None:
        """Begin a round: see `SoftMasked.prune`.

        Warns:
            UserWarning: Nothing of a module is left.
        """
        names = {module: name for name, module in self.named_modules()}
        for module in self.mask_modules:
            empty = not (module.mask_weight > 0).any()
            module.prune(self.temp)
            if empty:
                warnings.warn(
                    f"{names[module]}: no score is above 0, so that no weight is left and nothing passes this layer; "
                    "prune() once a round, and lower the penalty or raise mask_initial_value "
                    f"({module.mask_initial_value:g})",
                    stacklevel=2,
                )

    def checkpoint(self) -> None:
        """Make what the network is now the rewind point: weights, buffers and all else but masks."""
        for module in self.mask_modules:
            module.checkpoint()
        self._kept = {name: tensor.detach().clone() for name, tensor in self._rest().items()}

    @torch.no_grad()
    def rewind_weights(self) -> None:
        """Put the network back to the rewind point, to the bit; masks stay. Optimizers are to be made anew.

        Raises:
            OrderError: Nothing was kept.
            StateError: What was kept is of another network.
        """
        if self._kept is None:
            raise OrderError(
                "rewind_weights: there is no rewind point; call checkpoint() at the rewind epoch of the first round, "
                "or load a state that was saved after it"
            )
        rest = self._rest()
        for name in rest | self._kept:
            here, there = (tuple(each[name].shape) if name in each else "nothing there" for each in (rest, self._kept))
            if here != there:
                raise StateError(
                    f"{name}: has shape {here}, at the rewind point {there}; rewind the network that was trained"
                )
        for module in self.mask_modules:
            module.rewind_weights()
        for name, tensor in rest.items():
            tensor.copy_(self._kept[name])

    def _rest(self) -> dict[str, Tensor]:
        """What soft-masked modules do not keep themselves, by name: all but their weights and masks, and `temp`."""
        own = {id(each) for module in self.mask_modules for name, each in module.named_parameters() if name != "bias"}
        return {name: each for name, each in everything(self) if id(each) not in own and each is not self.temp}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "ticket":
            check_boolean(name, value)
        elif name == "temp":
            _check_temperature(value)
            if not isinstance(value, Tensor):
                self.temp.fill_(value)  # in place, so that a compiled forward need not be compiled again
                return
        super().__setattr__(name, value)

    def get_extra_state(self) -> dict[str, Any]:
        """The ticket flag, and what of the rewind point is not in `init_weight`."""
        return {"ticket": self.ticket, "kept": self._kept}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_extra_state` gave.

        Raises:
            StateError: It is something else.
        """
        ticket, kept = (state.get("ticket"), state.get("kept")) if isinstance(state, Mapping) else (state, None)
        tensors = isinstance(kept, Mapping) and all(isinstance(each, Tensor) for each in kept.values())
        if not isinstance(ticket, bool) or not (kept is None or tensors):
            raise StateError(
                f"MaskedNet: the saved ticket is {ticket!r:.40} and the rewind point {kept!r:.40}, expected True or "
                "False, and tensors by name; the file is damaged, use an earlier one"
            )
        self.ticket = ticket
        self._kept = None if kept is None else dict(kept)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}temp", self.temp)
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _check_temperature(temp: float | Tensor) -> None:
    value = temp
    if isinstance(temp, Tensor) and temp.dim() == 0 and temp.is_floating_point():
        value = temp.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigurationError(
            f"temp: expected a finite number above 0, or such a tensor of shape (), got {temp!r}; it begins at 1 and "
            "rises in every round"
        )
