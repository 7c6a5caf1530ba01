"""Weights computed from a bank of fewer numbers by hashing (HashedNets: Chen et al., 2015)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.checks import MAX_SEED, check_boolean, check_integer
from gossamer.errors import ConfigurationError, StateError
from gossamer.splitmix import splitmix
from gossamer.targets import FLOATS, ComputedWeight


class HashedWeight(ComputedWeight):
    """`V[i] = ξ(i) · bank[h(i)]` for the flat position `i` of a weight (Chen et al., 2015, equations 3 and 7).

    `h` is uniform over the bank and `ξ` is −1 or 1. Both come from a hash of the position and the seed alone, so they
    are not saved and are the same everywhere. The gradient of a number in the bank is the sum over its weights.

    Four bytes a weight hold what the hashes are: what is small is the bank, which is trained, saved and sent.

    Args:
        shape: The weight's.
        size: Numbers in the bank, at least 1.
        seed: Seed of the hashes.

    Raises:
        ConfigurationError: A size or seed out of range.
    """

    def __init__(self, shape: Sequence[int], size: int, seed: int = 0) -> None:
        super().__init__(shape)
        check_integer("size", size, at_least=1, at_most=1 << 30)
        check_integer("seed", seed, at_least=0, at_most=MAX_SEED)
        self.size = size
        self.seed = seed
        # One look-up gives the sign too: the bank is followed by its negative. No buffer, as the mask is none.
        self.index = _places(prod(self.shape), size, seed)

    def compute(self, numbers: Tensor) -> Tensor:
        """The weight: `(size,)` → `shape`."""
        if self.index.is_meta and not numbers.is_meta:  # loaded by `load_state_dict(assign=True)`
            self.index = _places(prod(self.shape), self.size, self.seed).to(numbers.device)
        return torch.cat([numbers, -numbers]).index_select(0, self.index).view(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The bank whose weight is nearest to this one (least squares): `shape` → `(size,)`."""
        bank, count = self._collect(weight)
        return bank / count.clamp(min=1)

    def fresh(self, weight: Tensor) -> Tensor:
        """A bank with the variance of a weight of independent random numbers: `shape` → `(size,)`."""
        bank, count = self._collect(weight)
        return bank / count.clamp(min=1).sqrt()

    def _collect(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of every number in the bank, the sum of its signed weights and how many they are."""
        signs = torch.where(self.index < self.size, 1, -1).to(weight.dtype)
        place = self.index % self.size
        sums = weight.new_zeros(self.size).index_add_(0, place, weight.reshape(-1) * signs)
        return sums, torch.bincount(place, minlength=self.size).to(weight.dtype)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> HashedWeight:
        place = fn(self.index[:0]).device
        if self.index.device.type == "meta":
            self.index = _places(prod(self.shape), self.size, self.seed)
        self.index = self.index.to(place)
        super()._apply(fn, recurse)
        return self

    def get_extra_state(self) -> Tensor:
        """Seed, size and shape, by which a bank is read: int64."""
        return torch.tensor([self.seed, self.size, *self.shape])

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a bank which is being loaded belongs to these hashes.

        Raises:
            StateError: It belongs to others.
        """
        here = self.get_extra_state().tolist()
        saved = state.tolist() if isinstance(state, Tensor) else state
        if saved != here:
            raise StateError(
                f"hashed weight of shape {self.shape}: saved with the seed, size and shape {saved} of its hashes, this "
                f"one has {here}; hash it as it was when it was saved"
            )


def hash_weight(module: nn.Module, name: str, size: int, seed: int = 0, *, fit: bool = False) -> nn.Parameter:
    """Let a bank of `size` numbers compute a weight of a module, in place; the weight keeps its name.

    Before an optimizer is made and a method attached: what is trained from now on is the bank. Methods of gossamer mask
    the weight that is computed; `Sparsity.finalize` makes it a plain parameter. A module that was tied to this weight
    keeps it as it was.

    Args:
        module: The module that has the parameter.
        name: The parameter's name there, such as `"weight"`.
        size: Numbers in the bank, from 1 to the number of weights; an eighth of them compresses eightfold.
        seed: Seed of the hashes; give every weight another.
        fit: Whether the bank is fitted to the weights, which are trained ones; else it gets their variance.

    Returns:
        The bank, `(size,)`.

    Raises:
        ConfigurationError: No such parameter, one that cannot be computed, or a size out of range.
    """
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    kind = type(module).__name__
    if isinstance(name, str) and parametrize.is_parametrized(module, name):
        found = ", ".join(type(each).__name__ for each in module.parametrizations[name])  # type: ignore[index]
        raise ConfigurationError(
            f"{kind}.{name}: is computed by {found} already; take that off first "
            f"(torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}))"
        )
    parameter = module._parameters.get(name) if isinstance(name, str) else None
    if parameter is None:
        raise ConfigurationError(f"{kind} has no parameter {name!r}; it has {', '.join(module._parameters) or 'none'}")
    if isinstance(module, nn.RNNBase):
        raise ConfigurationError(
            f"{kind}.{name}: its kernels read parameters themselves; take {kind}Cell, whose weights can be computed"
        )
    if isinstance(parameter, nn.UninitializedParameter) or parameter.device.type == "meta":
        raise ConfigurationError(f"{kind}.{name}: has no values yet; initialise it first")
    if parameter.dtype not in FLOATS:
        raise ConfigurationError(f"{kind}.{name}: has dtype {parameter.dtype}; expected floating-point numbers")
    check_integer("size", size, at_least=1, at_most=parameter.numel())
    check_boolean("fit", fit)
    weight = parameter.detach().clone()
    hashed = HashedWeight(parameter.shape, size, seed).to(parameter.device)
    # torch makes the bank out of the parameter itself, which another module may hold.
    module._parameters[name] = nn.Parameter(weight.clone(), requires_grad=parameter.requires_grad)
    parametrize.register_parametrization(module, name, hashed)
    bank: nn.Parameter = module.parametrizations[name].original  # type: ignore[union-attr, index]
    if not fit:
        with torch.no_grad():
            bank.copy_(hashed.fresh(weight))
    return bank


def _places(count: int, size: int, seed: int) -> Tensor:
    """Positions in a bank followed by its negative, int32 `(count,)`."""
    return (splitmix(torch.arange(count), seed) % (2 * size)).to(torch.int32)
