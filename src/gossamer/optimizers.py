"""What the engine knows about `torch.optim`: what it refuses, whose updates are element-wise, what fresh state is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, optim

from gossamer.errors import ConfigurationError
from gossamer.masks import MaskedTensor, enforce
from gossamer.targets import local

REFUSED: dict[type[optim.Optimizer], str] = {
    optim.LBFGS: "it combines past steps of all weights in flat vectors, which masks cannot reach",
    optim.SparseAdam: "it is for sparse gradients of embeddings, and masked weights have dense ones",
}

ELEMENTWISE: frozenset[type[optim.Optimizer]] = frozenset(
    {
        optim.SGD,
        optim.Adam,
        optim.AdamW,
        optim.Adamax,
        optim.NAdam,
        optim.RAdam,
        optim.Adagrad,
        optim.Adadelta,
        optim.RMSprop,
        optim.Rprop,
        optim.ASGD,
    }
)
"""Optimizers in which a weight's step depends on that weight, its gradient and its state alone.

For any other class, subclasses of these included, gradients of pruned weights are set to zero before the step.
"""

FRESH: dict[str, str] = {"step_size": "lr", "sum": "initial_accumulator_value"}
"""State that does not begin at zero (Rprop, Adagrad), and the option of the parameter group it begins at."""

FACTORED = ("row_var", "col_var")
"""State of Adafactor that may happen to have the weight's shape without being weight by weight."""

SECOND_MOMENTS = ("zero", "mean")


def unwrap(optimizer: object) -> optim.Optimizer:
    """Return the `torch.optim.Optimizer` within Accelerate's wrapper, a scheduler or another wrapper.

    Raises:
        ConfigurationError: There is none, or it is one that masks cannot work with.
    """
    inner = optimizer if isinstance(optimizer, optim.Optimizer) else getattr(optimizer, "scheduler", optimizer)
    while isinstance(getattr(inner, "optimizer", None), optim.Optimizer):
        inner = inner.optimizer  # type: ignore[attr-defined]
    if not isinstance(inner, optim.Optimizer):
        raise ConfigurationError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    for refused, why in REFUSED.items():
        if isinstance(inner, refused):
            raise ConfigurationError(
                f"optimizer: {type(inner).__name__} cannot train masked weights, since {why}; "
                "use another first-order optimizer"
            )
    return inner


def parameters(optimizer: optim.Optimizer) -> Iterable[Tensor]:
    """All parameters of an optimizer."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def is_elementwise(optimizer: optim.Optimizer) -> bool:
    """Whether gradients of pruned weights cannot reach active ones through this optimizer."""
    return type(optimizer) in ELEMENTWISE


def refresh(
    tensor: MaskedTensor,
    begun: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Any],
    mixes: bool,
    second_moment: str,
) -> None:
    """Give weights that begin anew the optimizer state of a fresh parameter.

    Every state tensor of the weight's shape is set to what it starts from: 0, or the value of `FRESH`. Factored and
    flat state is left alone.

    Args:
        tensor: The weight, its mask already new.
        begun: int8 mask of this rank's weights, −1 where one is newly active or renewed.
        group: The parameter group.
        state: The optimizer's state of the parameter.
        mixes: Whether the optimizer mixes weights: then state of pruned weights is zeroed too, or their momentum would
            go on to move active ones.
        second_moment: `"zero"`, or `"mean"`: Adam's second moment starts at the mean over the weights that were
            active before, since an old step count makes a start at zero several learning rates long.
    """
    if mixes:
        forget_pruned(tensor, state)
    kept = begun.bitwise_not()
    for key, part in _weightwise(tensor, state):
        if key == "exp_avg_sq" and second_moment == "mean":
            part.copy_(torch.where(begun != 0, _active_mean(tensor, part, kept), part))
        elif FRESH.get(key) in group:
            part.masked_fill_(begun != 0, group[FRESH[key]])
        else:
            enforce(part, kept)


def restart(optimizer: optim.Optimizer, restarted: Iterable[Tensor]) -> None:
    """Drop an optimizer's state of parameters, so that they begin anew."""
    dropped = {parameter: state for parameter in restarted if (state := optimizer.state.pop(parameter, None))}
    if not dropped or not isinstance(optimizer, optim.SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            # Where parameters have no momentum, fused SGD fails if others have some, and leaves it uninitialised if
            # the gradients overflow. With zeros their first step is that of a new optimizer, but for dampening.
            if parameter in dropped and isinstance(momentum := dropped[parameter].get("momentum_buffer"), Tensor):
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(momentum)}


def forget_pruned(tensor: MaskedTensor, state: Mapping[str, Any]) -> None:
    """Zero the state of pruned weights, for optimizers where it would move active ones."""
    for _, part in _weightwise(tensor, state):
        enforce(part, tensor.mask)


def _weightwise(tensor: MaskedTensor, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The state tensors that hold one number a weight, as far as they are on this rank."""
    for key, value in state.items() if tensor.computed is None else ():
        if (
            key not in FACTORED
            and isinstance(value, Tensor)
            and value.shape == tensor.parameter.shape
            and value.is_floating_point()
        ):
            yield key, local(value)


def _active_mean(tensor: MaskedTensor, values: Tensor, kept: Tensor) -> Tensor:
    old = (tensor.mask & kept) != 0
    sums = torch.stack([torch.where(old, values, 0).sum(dtype=torch.float64), old.sum().double()])
    if tensor.process_group is not None:
        dist.all_reduce(sums, group=tensor.process_group)
    return (sums[0] / sums[1].clamp(min=1)).to(values.dtype)


def move_to_own_groups(groups: Sequence[dict[str, Any]], found: Sequence[optim.Optimizer]) -> None:
    """Give learned parameters optimizer groups of their own, out of groups whose weight decay is not for them."""
    if not groups:
        return
    learned = {id(parameter) for group in groups for parameter in group["params"]}
    # Muon takes matrices only, so of several optimizers the last other one.
    home = next((each for each in reversed(found) if not isinstance(each, optim.Muon)), found[-1])
    for optimizer in found:
        drop_parameters(optimizer, learned)
    for group in groups:
        home.add_param_group(dict(group))


def have_own_groups(learned: Collection[Tensor], found: Sequence[optim.Optimizer]) -> bool:
    """Whether these parameters, of which there are some, are in groups of their own that have no weight decay."""
    ids = {id(parameter) for parameter in learned}
    own = set()
    for group in (group for each in found for group in each.param_groups):
        here = {id(parameter) for parameter in group["params"]}
        if here <= ids and not group.get("weight_decay"):
            own |= here
    return bool(ids) and own == ids


def drop_parameters(optimizer: optim.Optimizer, gone: set[int]) -> None:
    """Take parameters, by identity, out of an optimizer with their state and the groups that they leave empty."""
    emptied = []
    for group in optimizer.param_groups:
        left = [parameter for parameter in group["params"] if id(parameter) not in gone]
        for parameter in group["params"]:
            if id(parameter) in gone:
                optimizer.state.pop(parameter, None)
        if group["params"] and not left:  # a group that the user left empty is not ours to remove
            emptied.append(id(group))
        group["params"] = left
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if id(group) not in emptied]
