"""Notices optimizers that would train masked weights without their masks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn, optim
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gossamer import optimizers
from gossamer.errors import OrderError
from gossamer.masks import MaskedTensor

ORDER = (
    "the order is: attach(model, methods) -> wrap (torch.compile, DDP, fully_shard) -> make the optimizer -> "
    "sparsity.follow(optimizer) -> make the scheduler -> load state"
)


class FollowedDefaults(dict[str, Any]):
    """What `optimizer.defaults` is while masks follow an optimizer: its copies and pickles keep it, and lose the hooks.

    Its items are those it had, so that nothing of ours gets into parameter groups or another optimizer's arguments.
    """


class Keeper(Protocol):
    """What keeps masks in force: the tensors it masks and the optimizers it follows."""

    optimizers: list[optim.Optimizer]

    def tensors(self) -> Sequence[MaskedTensor]:
        """The masked tensors."""
        ...


_live: weakref.WeakSet[Keeper] = weakref.WeakSet()
_passed: weakref.WeakKeyDictionary[optim.Optimizer, int] = weakref.WeakKeyDictionary()
_generation = 0  # moves on with every change of `_live`, so that an optimizer is looked at once and not at every step


def watch(keeper: Keeper) -> None:
    """Begin to watch over a keeper's tensors, or take note that its optimizers changed."""
    global _generation
    _generation += 1
    _live.add(keeper)


def release(keeper: Keeper) -> None:
    """Stop watching over a keeper's tensors."""
    global _generation
    _generation += 1
    _live.discard(keeper)


def check_unclaimed(parameters: Iterable[nn.Parameter]) -> None:
    """Raise an OrderError where one of these parameters already has a mask."""
    wanted = {id(parameter) for parameter in parameters}
    if found := _masked(wanted, list(_live)):
        raise OrderError(
            f"{found}: already has a mask from an earlier attach; call finalize() or detach() on that handle first"
        )


def _masked(parameters: set[int], keepers: Sequence[Keeper]) -> str | None:
    return next((t.name for keeper in keepers for t in keeper.tensors() if id(t.parameter) in parameters), None)


def _refuse_unfollowed(optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if _passed.get(optimizer) == _generation:
        return
    following = [keeper for keeper in _live if any(optimizer is each for each in keeper.optimizers)]
    held: set[int] = {id(each) for each in optimizers.parameters(optimizer) if isinstance(each, Tensor)}
    if found := _masked(held, [keeper for keeper in _live if keeper not in following]):
        raise OrderError(f"{found}: has a mask, but no sparsity.follow(optimizer) was called; {ORDER}")
    if isinstance(optimizer.defaults, FollowedDefaults) and not following:
        raise OrderError(
            "this optimizer is a copy of one that kept masks in force, made without the Sparsity handle, and would "
            "train pruned weights; copy or pickle (model, optimizer, sparsity) together, or call "
            "sparsity.follow(optimizer)"
        )
    _passed[optimizer] = _generation


register_optimizer_step_pre_hook(_refuse_unfollowed)
