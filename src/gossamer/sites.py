"""Where activations are worked on: after or before modules, chosen by globs over module names, types or predicates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch._dynamo
from torch import nn

from gossamer.checks import closest
from gossamer.errors import ConfigurationError
from gossamer.nn.masked import SparseBatchNorm, SparseSyncBatchNorm
from gossamer.targets import matches, plain_name

ModulePredicate = Callable[[str, nn.Module], bool]
"""Takes a module's name and the module; returns whether it is a site."""

SiteSelection = None | str | type[nn.Module] | ModulePredicate | Sequence["str | type[nn.Module] | ModulePredicate"]


@dataclass(frozen=True)
class Kind:
    """The modules that are sites without being named, and that globs choose among.

    Attributes:
        types: Their types.
        words: What they are, for messages.
    """

    types: tuple[type[nn.Module], ...]
    words: str


DEFAULT = Kind(
    (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Identity),  # `_ConvNd` is every convolution, transposed too
    "convolution, linear, bilinear or identity module",
)

_READERS = (nn.MultiheadAttention, SparseBatchNorm, SparseSyncBatchNorm)


@dataclass(frozen=True, eq=False)
class Site:
    """A module whose output or input is worked on.

    Attributes:
        name: Its name in the model, without the parts that wrappers add.
        module: The module. One that the model calls several times is one site.
    """

    name: str
    module: nn.Module


def called_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules within `model` that it may call, by name, in the order of `model.named_modules()`.

    Modules within a `torch.nn.MultiheadAttention` or a batch norm of kept positions, which read them and do not call
    them, and those that compute a parameter are left out.
    """
    found = {plain: module for name, module in model.named_modules() if (plain := plain_name(name))}
    silent = [name for name, module in found.items() if isinstance(module, _READERS)]
    return {
        name: module
        for name, module in found.items()
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
        and not any(name.startswith(f"{each}.") for each in silent)
        and "parametrizations" not in name.split(".")
    }


def see_hooks() -> None:
    """Have compiled models run hooks that are put on modules from now on.

    By default `torch.compile` does not look whether a module has other hooks than one of the same class that it
    compiled before, or than itself then, and runs the code without them.
    """
    if getattr(torch._dynamo.config, "skip_nnmodule_hook_guards", False):
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch.compiler.reset()


def select_sites(
    model: nn.Module,
    selection: SiteSelection = None,
    *,
    logits: bool = False,
    default: Kind = DEFAULT,
) -> list[Site]:
    """Resolve a selection to modules of `model`, in the order of `model.named_modules()`.

    Args:
        model: The model, before any wrapper.
        selection: `None` for the default (`DEFAULT`); a glob over module names (`"layer1.*"`; one that starts with `!`
            excludes); a module type; a predicate; or a sequence of these. A glob chooses among the default modules, and
            where it matches none of them (`"*relu*"`) among all that contain no others; an exact name or a predicate
            any module that is called, a type those of that type. See `called_modules`.
        logits: Whether globs, types and the default may choose the last of the default modules too, in the order in
            which the model has them, and identities after it. It makes the logits of a classifier, which are no
            activations. Exclude those of other heads by name.
        default: The default modules.

    Raises:
        ConfigurationError: A part that matches nothing, or nothing is left.
    """
    called = called_modules(model)
    if not called:
        raise ConfigurationError(
            f"sites: {type(model).__name__} has no modules within it that could be sites; put it into a "
            "torch.nn.Sequential and attach to that"
        )
    usual = [name for name, module in called.items() if isinstance(module, default.types)]
    last = [] if logits else _makes_logits(called, usual)
    eligible = [name for name in usual if name not in last]
    chosen = set(eligible) if selection is None else _choose(called, eligible, last, default, selection)
    if not chosen:
        raise ConfigurationError(
            f"sites: none in {type(model).__name__} with sites={selection!r}; the default takes every {default.words}"
            f"{'' if logits else ' but the last, which makes the logits'}; name others exactly, or give a type or a "
            "predicate"
        )
    return [Site(name, module) for name, module in called.items() if name in chosen]


def _makes_logits(called: dict[str, nn.Module], usual: Sequence[str]) -> list[str]:
    """The last of these modules that is no identity, and the identities after it."""
    others = [place for place, name in enumerate(usual) if not isinstance(called[name], nn.Identity)]
    return list(usual[others[-1] :] if others else usual[-1:])


def _choose(
    called: dict[str, nn.Module],
    eligible: Sequence[str],
    last: Sequence[str],
    default: Kind,
    selection: SiteSelection,
) -> set[str]:
    parts = list(selection) if isinstance(selection, Sequence) and not isinstance(selection, str) else [selection]
    chosen: set[str] = set()
    excluded: set[str] = set()
    only_exclusions = bool(parts)
    leaves = [name for name, module in called.items() if name not in last and not any(module.children())]
    for part in parts:
        excludes = isinstance(part, str) and part.startswith("!")
        if isinstance(part, str):
            pattern = part.removeprefix("!")
            hits = {pattern} if pattern in called else {name for name in eligible if matches(name, pattern)}
            hits = hits or {name for name in leaves if matches(name, pattern)}
            if not hits:
                raise ConfigurationError(f"sites: {part!r} matches no module{_hint(pattern, called, eligible, last)}")
        elif isinstance(part, type) and issubclass(part, nn.Module):
            kind: type[nn.Module] = part
            hits = {name for name, module in called.items() if isinstance(module, kind) and name not in last}
            if not hits:
                before = " before its logits" if last else ""
                raise ConfigurationError(f"sites: the model calls no {part.__name__}{before}")
        elif callable(part) and not isinstance(part, nn.Module | type):
            hits = {name for name, module in called.items() if part(name, module)}
            if not hits:
                raise ConfigurationError(f"sites: the predicate {part!r} holds for no module of the model")
        else:
            raise ConfigurationError(
                f"sites: expected globs, module types or predicates, got {part!r} ({type(part).__name__})"
            )
        if excludes:
            excluded |= hits
        else:
            chosen |= hits
            only_exclusions = False
    return (set(eligible) if only_exclusions else chosen) - excluded


def _hint(pattern: str, called: Collection[str], eligible: Sequence[str], last: Sequence[str]) -> str:
    """What to write instead of a glob that matches nothing."""
    if any(matches(name, pattern) for name in last):
        return f" but {last[0]}, which makes the logits; name it exactly to take it"
    if within := [name for name in eligible if matches(name, f"{pattern}.*")]:
        return f" that contains no others; within it are {', '.join(within[:3])}{', ...' * (len(within) > 3)}"
    return closest(pattern, called)
