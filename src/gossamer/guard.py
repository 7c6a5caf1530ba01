"""Notices optimizers that would train masked weights without their masks, or a model without what it learns beside."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from gossamer import optimizers
from gossamer.errors import ConfigurationError, OrderError
from gossamer.masks import MaskedTensor
from gossamer.method import Method
from gossamer.targets import Target

ORDER = (
    "the order is: attach(model, methods) -> wrap (torch.compile, DDP, fully_shard) -> make the optimizer -> "
    "sparsity.follow(optimizer) -> make the scheduler -> load state"
)


class FollowedDefaults(dict[str, Any]):
    """What `optimizer.defaults` is while masks follow an optimizer: its copies and pickles keep it, and lose the hooks.

    Its items are those it had, so that nothing of ours gets into parameter groups or another optimizer's arguments.
    """


class Keeper(Protocol):
    """What keeps masks in force: the weights it claims and the optimizers it follows."""

    optimizers: list[optim.Optimizer]
    adopt: Callable[[optim.Optimizer], None] | None

    def claims(self) -> Sequence[Target | MaskedTensor]:
        """The weights claimed, whether their masks are hard already or not."""
        ...

    def trained_with(self) -> dict[int, str]:
        """Where parameters were added to the model: the names of all of its parameters, by id; else nothing."""
        ...

    def learned_in(self, parameters: Sequence[Tensor]) -> str | None:
        """The name of one of these parameters that was added to the model; None where there is none."""
        ...


_live: weakref.WeakSet[Keeper] = weakref.WeakSet()
_names: MutableMapping[Tensor, str] = (
    WeakIdKeyDictionary()
)  # name of every masked Parameter, also after the handle was dropped
_passed: weakref.WeakKeyDictionary[optim.Optimizer, tuple[int, int]] = weakref.WeakKeyDictionary()
_looking: list[RemovableHandle] = []  # the hook of all optimizers, from the first mask on
_generation = 0  # moves on with every change of `_live`, so that an optimizer is looked at once and not at every step


def watch(keeper: Keeper) -> None:
    """Begin to watch over a keeper's weights, or take note that its optimizers changed."""
    global _generation
    _generation += 1
    if not _looking:  # who imports gossamer and attaches nothing is left alone
        _looking.append(register_optimizer_step_pre_hook(torch.compiler.disable(_refuse_unfollowed)))  # type: ignore[no-untyped-call]
    _live.add(keeper)
    for each in keeper.claims():
        _names[each.parameter] = each.name


def release(keeper: Keeper) -> None:
    """Stop watching over a keeper's weights."""
    global _generation
    _generation += 1
    _live.discard(keeper)
    for each in keeper.claims():
        _names.pop(each.parameter, None)


def check_unclaimed(parameters: Iterable[nn.Parameter]) -> None:
    """Raise an OrderError where one of these parameters already has a mask that a handle keeps."""
    wanted = {id(parameter) for parameter in parameters}
    for name in (t.name for keeper in _live for t in keeper.claims() if id(t.parameter) in wanted):
        raise OrderError(
            f"{name}: already has a mask from an earlier attach; call finalize() or detach() on that handle first"
        )


def check_unfollowed(keeper: Keeper | None, found: Sequence[optim.Optimizer]) -> None:
    """Raise an OrderError where one of these optimizers keeps the masks of another handle."""
    for other in _live:
        if other is not keeper and any(each is mine for each in other.optimizers for mine in found):
            raise OrderError(
                "optimizer: already keeps the masks of another handle; attach all methods at once, as a list, or "
                "finalize() or detach() the other handle first"
            )


def check_unwrapped(model: nn.Module) -> None:
    """Raise unless this is a plain module: neither compiled, nor in DDP, nor sharded."""
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise OrderError(f"model: is already wrapped ({type(model).__name__}); {ORDER}")
    if (compiled := next((n for n, m in model.named_modules() if m._compiled_call_impl is not None), None)) is not None:
        raise OrderError(f"{compiled or 'model'}: is already compiled, by its method `compile`; {ORDER}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise OrderError(f"{name}: is already sharded; {ORDER}")


def check_claims(methods: Sequence[Method]) -> None:
    """Raise where a weight is claimed twice, or cannot be trained, or a method cannot share the model."""
    owner: dict[str, Method] = {}
    for method in methods:
        for name in method.occupies():
            if name in owner:
                raise ConfigurationError(
                    f"{name}: is a site of both {_kind(owner[name])} and {_kind(method)}; give them `sites` that do "
                    "not overlap"
                )
            owner[name] = method
        if method.over_all and len(methods) > 1:
            raise ConfigurationError(
                f"{_kind(method)}: over='all' counts every other weight as dense, and another method is attached "
                "beside it; give each its sparsity over='targets'"
            )
        for target in method.claims():
            if target.name in owner:
                raise ConfigurationError(
                    f"{target.name}: belongs to both {_kind(owner[target.name])} and {_kind(method)}; give them "
                    "`targets` that do not overlap"
                )
            owner[target.name] = method
            if not target.parameter.requires_grad:
                raise ConfigurationError(
                    f"{target.name}: is frozen (requires_grad=False) and would not be trained; leave it out with "
                    f"targets=['!{target.name}'], or prune it with gossamer.prune"
                )
    check_unclaimed(target.parameter for method in methods for target in method.claims())


def _kind(method: Method) -> str:
    return type(method).__name__


def check_room(model: nn.Module, found: Sequence[optim.Optimizer], learned: Collection[nn.Parameter] = ()) -> None:
    """Raise where optimizers cannot take what is learned beside a model: `learned`, where that exists already."""
    held = {id(parameter) for each in found for parameter in optimizers.parameters(each)}
    if not any(id(parameter) in held for parameter in model.parameters()):
        raise OrderError(f"optimizer: has no parameter of the model (wrapping a model may replace them); {ORDER}")
    if optimizers.have_own_groups(learned, found):
        return
    if all(isinstance(each, optim.Muon) for each in found):
        raise ConfigurationError(
            "optimizer: Muon is for matrices, and what is learned beside the weights is none of its; give a list of it "
            "and another optimizer"
        )
    if any("initial_lr" in group for each in found for group in each.param_groups):
        raise OrderError(f"a scheduler was made before learned parameters got groups of their own; {ORDER}")


def check_follow(methods: Sequence[Method], optimizer: object) -> list[optim.Optimizer]:
    """Unwrap optimizers and check that every masked weight is in exactly one of them."""
    given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    found = [optimizers.unwrap(each) for each in given]
    holders: dict[int, int] = {}
    for each in found:
        for parameter in optimizers.parameters(each):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for method in methods:
        for each in found:
            method.check_optimizer(each)
        for held in method.holdings():
            count = holders.get(id(held.parameter), 0)
            if count != 1:
                raise OrderError(
                    f"{held.name}: is in {count} of the {len(found)} optimizers given, must be in one (wrapping a "
                    f"model may replace its parameters); {ORDER}"
                )
    return found


def _refuse_unfollowed(optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    held = list(optimizers.parameters(optimizer))
    state = (_generation, len(held))
    if _passed.get(optimizer) == state:
        return
    following = [keeper for keeper in _live if any(optimizer is each for each in keeper.optimizers)]
    for other in _live:
        if other.optimizers and other not in following and (learned := other.learned_in(held)) is not None:
            raise OrderError(
                f"{learned}: is learned beside the model, and sparsity.follow was called with another optimizer than "
                f"the {type(optimizer).__name__} that steps now; leave it out of this one, or follow a list of both"
            )
    kept = {id(each.parameter): each.name for keeper in following for each in keeper.claims()}
    masked = {id(each.parameter): each.name for keeper in _live for each in keeper.claims()}
    for parameter in held:
        name = masked.get(id(parameter))
        if name is None and (earlier := _names.get(parameter)) not in kept.values():
            name = earlier  # of a dropped handle; one that a living handle lost is named better by its hook
        if name is not None and id(parameter) not in kept:
            trained = {id(each) for each in held}
            keepers = [keeper for keeper in _live if any(id(each.parameter) in trained for each in keeper.claims())]
            mine = (keeper for keeper in keepers if any(each.parameter is parameter for each in keeper.claims()))
            if (keeper := next(mine, None)) is not None and keeper.adopt is not None and not keeper.optimizers:
                if len(keepers) > 1:
                    raise OrderError(
                        f"{name}: this optimizer trains weights of {len(keepers)} handles, and one keeps the masks of "
                        "an optimizer; attach all methods at once, as a list, or give each model an optimizer"
                    )
                keeper.adopt(optimizer)
                return
            if keeper is not None and keeper.optimizers:
                followed = ", ".join(type(each).__name__ for each in keeper.optimizers)
                raise OrderError(
                    f"{name}: has a mask, and sparsity.follow was called with {followed}, not with the "
                    f"{type(optimizer).__name__} that steps now; call sparsity.follow (of a DSModel: "
                    "model.handle.follow) with that one instead, or with a list of both (an optimizer that wraps "
                    "another cannot be followed)"
                )
            raise OrderError(f"{name}: has a mask, but no sparsity.follow(optimizer) was called; {ORDER}")
    for keeper in [] if following else _live:
        trained_with = {} if keeper.optimizers else keeper.trained_with()
        if (name := next((trained_with[id(each)] for each in held if id(each) in trained_with), None)) is not None:
            if keeper.adopt is not None:
                keeper.adopt(optimizer)
                return
            raise OrderError(
                f"{name}: is of a model that learns parameters of its own beside it, but no sparsity.follow(optimizer) "
                f"was called; {ORDER}"
            )
    if isinstance(optimizer.defaults, FollowedDefaults) and not following:
        raise OrderError(
            "this optimizer is a copy of one that kept masks in force, made without the Sparsity handle, and would "
            "train pruned weights; copy or pickle (model, optimizer, sparsity) together, or call "
            "sparsity.follow(optimizer)"
        )
    _passed[optimizer] = state
