"""Which weights a method works on: globs, module types or predicates over *parameter names*.

A target is a weight of two or more dimensions. Without a selection these are the weights of every linear layer,
convolution (also transposed), recurrent layer or cell and multi-head attention; never a bias, a normalisation
weight or an embedding, nor a weight tied to an embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from gossamer.checks import closest
from gossamer.errors import ConfigurationError
from gossamer.nn.gates import Gates

Predicate = Callable[[str, nn.Module, nn.Parameter], bool]
"""Takes the parameter's name, the module that owns it and the parameter; returns whether it is a target."""

Selection = None | str | type[nn.Module] | Predicate | Sequence["str | type[nn.Module] | Predicate"]

WEIGHTED = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
"""The module types whose weights are targets without being named."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types of weights that can be masked: those that torch can add and rank."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""The name parts that `torch.compile`, FSDP and activation checkpointing put into parameter names."""


class ComputedWeight(nn.Module):
    """A parametrization that computes a weight from other numbers, which are trained instead of it.

    A mask cannot be kept in such numbers, which may serve several weights: it acts in the forward pass. It is no
    buffer, since averages of models take means of those; it moves with the module all the same.

    Args:
        shape: The weight's.

    Attributes:
        mask: int8, in the weight's shape, −1 active and 0 pruned; `None` where every weight is active.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.mask: torch.Tensor | None = None

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> ComputedWeight:
        if self.mask is not None and (place := fn(self.mask[:0]).device).type != "meta":  # where it would be lost
            self.mask = self.mask.to(place)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def compute(self, numbers: torch.Tensor) -> torch.Tensor:
        """The weight, without its mask."""
        raise NotImplementedError

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """The weight, exactly +0.0 where it is pruned."""
        weight = self.compute(numbers)
        return (
            weight
            if self.mask is None or weight.is_meta
            else torch.where(self.mask != 0, weight, torch.zeros_like(weight))
        )


@dataclass(eq=False)
class Target:
    """One selected weight.

    Attributes:
        name: Parameter name in the model, without the parts that wrappers add.
        places: The modules that hold it, each with the parameter's name there; several where it is tied. Asking a
            module always finds the present Parameter, also after a wrapper or `load_state_dict(assign=True)` has
            replaced it.
        input_dim: The dimension that runs over inputs (0 for transposed convolutions, else 1).
        sharded: The shard that the optimizer holds, where the weight is sharded: after a forward without a backward
            FSDP2 leaves whole weights in the model.
    """

    name: str
    places: tuple[tuple[nn.Module, str], ...]
    input_dim: int
    sharded: nn.Parameter | None = field(default=None, init=False, repr=False)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is in the model now; of a sharded weight always the shard."""
        owner, attribute = self.places[0]
        found = owner._parameters.get(attribute)
        if found is None:  # a method that learns masks has put a parametrization around it
            found = getattr(owner.parametrizations, attribute).original
        assert isinstance(found, nn.Parameter)
        return found if self.sharded is None or isinstance(found, DTensor) else self.sharded

    @property
    def computed(self) -> ComputedWeight | None:
        """What computes the weight from `parameter`; `None` where it is the parameter itself."""
        owner, attribute = self.places[0]
        parametrizations = getattr(owner, "parametrizations", None)
        if not isinstance(parametrizations, nn.ModuleDict) or attribute not in parametrizations:
            return None
        return _computes(parametrizations[attribute])

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's global shape."""
        computed = self.computed
        return tuple(self.parameter.shape) if computed is None else computed.shape

    def remember_shard(self) -> None:
        """Keep hold of the parameter as it is now, if it is a shard."""
        found = self.parameter
        self.sharded = found if isinstance(found, DTensor) else None


def unshare_class(module: nn.Module) -> None:
    """Give a module that has parametrizations a class of its own: copies share it, and lose it with the first."""
    shared = type(module)
    members = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, members)


def plain_name(name: str) -> str:
    """Return a parameter's or module's name without what wrappers (see `WRAPPERS`) and parametrizations add."""
    plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return re.sub(r"\bparametrizations\.(\w+)\.original$", r"\1", plain)


def named_weights(model: nn.Module) -> Iterator[tuple[Target, list[nn.Module]]]:
    """Yield every parameter once, under its first name, with all modules that hold it (several where it is tied)."""
    owners: dict[int, list[nn.Module]] = {}
    names: dict[int, str] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for prefix, module in modules.items():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            names.setdefault(id(parameter), plain_name(f"{prefix}.{attribute}" if prefix else attribute))
            holders = owners.setdefault(id(parameter), [])
            holders.append(module)
            place = (module, attribute)
            if isinstance(module, parametrize.ParametrizationList):
                path, _, computed = f".{prefix}".rpartition(".parametrizations.")
                holders.append(modules[path[1:]])
                if _computes(module) is not None:
                    place = (modules[path[1:]], computed)
            held = places.setdefault(id(parameter), [])
            if not any(each is place[0] and name == place[1] for each, name in held):
                held.append(place)
    for key, name in names.items():
        transposed = any(isinstance(owner, nn.modules.conv._ConvTransposeNd) for owner in owners[key])
        yield Target(name, tuple(places[key]), 0 if transposed else 1), owners[key]


def select(model: nn.Module, selection: Selection) -> list[Target]:
    """Resolve a selection to the weights of `model`, in the order of `model.named_parameters()`.

    Args:
        model: The model, before any wrapper.
        selection: `None` for the default (see the module's text); a glob over parameter names (`"layer*"`;
            one that starts with `!` excludes); a module type; a predicate; or a sequence of these. Globs choose
            among the default weights, a type among the weights of its modules, without those tied to an embedding
            (unless it is one); an exact name or a predicate reaches any parameter.

    Raises:
        ConfigurationError: A glob or type matches nothing, nothing is left, or a chosen tensor cannot be masked
            (fewer than two dimensions, not floating point, lazy, or computed by a parametrization).
    """
    found = list(named_weights(model))
    eligible = {
        target.name
        for target, owners in found
        if any(isinstance(owner, WEIGHTED) for owner in owners) and _is_weight(target) and not _is_embedding(owners)
    }
    chosen = eligible if selection is None else _choose(found, eligible, selection)
    targets = [target for target, _ in found if target.name in chosen]
    if not targets:
        raise ConfigurationError(
            f"no weight to make sparse in {type(model).__name__} with targets={selection!r}: the default takes "
            "weights of two or more dimensions of linear, convolutional, recurrent and attention layers; "
            "name other parameters exactly, or give a predicate"
        )
    for target in targets:
        _check(target)
    return targets


def matches(name: str, pattern: str) -> bool:
    """Whether a name matches a glob, case-sensitively; `*` also matches dots."""
    return fnmatchcase(name, pattern)


def _is_weight(target: Target) -> bool:
    if isinstance(target.parameter, nn.UninitializedParameter):
        return target.places[0][1] != "bias"  # `_check` refuses it: left out silently, it would stay dense
    # Attention adds its biases to keys and values as further tokens, (1, 1, features).
    owner, attribute = target.places[0]
    is_bias = isinstance(owner, nn.MultiheadAttention) and attribute in ("bias_k", "bias_v")
    return len(target.shape) >= 2 and not is_bias


def _is_embedding(owners: Sequence[nn.Module]) -> bool:
    return any(isinstance(owner, nn.Embedding | nn.EmbeddingBag) for owner in owners)


def _choose(found: list[tuple[Target, list[nn.Module]]], eligible: set[str], selection: Selection) -> set[str]:
    parts = [selection] if isinstance(selection, str) or not isinstance(selection, Sequence) else list(selection)
    names = {target.name for target, _ in found}
    chosen: set[str] = set()
    excluded: set[str] = set()
    only_exclusions = bool(parts)  # an empty sequence chooses nothing, rather than everything
    for part in parts:
        if isinstance(part, str):
            pattern = plain_name(part.removeprefix("!"))
            hits = {pattern} if pattern in names else {n for n in eligible if matches(n, pattern)}
            if not hits:
                others = sorted(n for n in names if matches(n, pattern))
                raise ConfigurationError(
                    f"targets: {part!r} matches no weight of two or more dimensions of a linear, convolutional, "
                    "recurrent or attention layer"
                    + (f"; it does match {_some(others)}: name such a parameter exactly" if others else "")
                    + (closest(pattern, eligible) if not others else "")
                    + f"; eligible are {_some(sorted(eligible))}"
                )
            if part.startswith("!"):
                excluded |= hits
            else:
                chosen |= hits
                only_exclusions = False
        elif isinstance(part, type) and issubclass(part, nn.Module):
            kind: type[nn.Module] = part
            of_embeddings = issubclass(kind, nn.Embedding | nn.EmbeddingBag)
            hits = {
                target.name
                for target, owners in found
                if any(isinstance(owner, kind) for owner in owners)
                and _is_weight(target)
                and (of_embeddings or not _is_embedding(owners))
            }
            if not hits:
                raise ConfigurationError(
                    f"targets: the model has no {part.__name__} with a weight of two or more dimensions; "
                    f"it has {_some(sorted({type(t.places[0][0]).__name__ for t, _ in found}))}"
                )
            chosen |= hits
            only_exclusions = False
        elif callable(part) and not isinstance(part, nn.Module | type):
            try:
                hits = {t.name for t, _ in found if part(t.name, t.places[0][0], _weight(t))}
            except TypeError as error:
                raise ConfigurationError(
                    f"targets: the predicate {part!r} failed ({error}); it takes a name, a module and a parameter"
                ) from error
            if not hits:
                raise ConfigurationError(f"targets: the predicate {part!r} holds for no parameter of the model")
            chosen |= hits
            only_exclusions = False
        else:
            raise ConfigurationError(
                f"targets: expected globs, module types or predicates, got {part!r} ({type(part).__name__})"
            )
    return (eligible if only_exclusions else chosen) - excluded


def _check(target: Target) -> None:
    parameter = target.parameter
    if isinstance(parameter, nn.UninitializedParameter):
        raise ConfigurationError(f"{target.name}: the layer is lazy and has no weight yet; run one forward first")
    if len(target.shape) < 2:
        raise ConfigurationError(
            f"{target.name}: has shape {target.shape}; masks are for weights of two or more dimensions"
        )
    if parameter.numel() == 0:
        raise ConfigurationError(f"{target.name}: has shape {tuple(parameter.shape)} and no weight to mask; exclude it")
    if parameter.dtype not in FLOATS:
        raise ConfigurationError(
            f"{target.name}: has dtype {parameter.dtype}; only real floating-point weights of 16, 32 or "
            f"64 bits can be masked, "
            f"exclude it with targets=['!{target.name}']"
        )
    if parameter.device.type == "meta":
        raise ConfigurationError(
            f"{target.name}: is on the meta device and has no values; give the model memory "
            "(`model.to_empty(device=...)`) and initialise it first"
        )
    if target.computed is not None:
        owner, attribute = target.places[0]
        if len(owner.parametrizations[attribute]) > 1 or len(target.places) > 1:  # type: ignore[index]
            raise ConfigurationError(
                f"{target.name}: is computed from numbers that other weights share or other parametrizations change; "
                "masks are for weights computed by one parametrization, from numbers of their own"
            )
    for owner, attribute in target.places:
        base = attribute.removesuffix("_orig")
        weight_norm = base[-2:] in ("_g", "_v") and {f"{base[:-2]}_g", f"{base[:-2]}_v"} <= owner._parameters.keys()
        parametrized = isinstance(owner, parametrize.ParametrizationList)
        if parametrized and isinstance(owner[0], Gates):  # type: ignore[index]
            raise ConfigurationError(
                f"{target.name}: has learned masks of an attached method already; finalize or detach that first, or "
                "choose other targets"
            )
        if parametrized or weight_norm or hasattr(owner, f"{base}_mask"):
            raise ConfigurationError(
                f"{target.name}: this weight is computed from others by a parametrization or by torch.nn.utils.prune; "
                "remove that first (`parametrize.remove_parametrizations`, `gossamer.import_torch_masks`)"
            )


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" … ({len(names)} in all)" if len(names) > most else "") or "none"


def parameter_count(model: nn.Module) -> int:
    """Number of parameters of a model, tied ones once; a `ComputedWeight` counts as the weight that it computes."""
    lazy = nn.UninitializedParameter
    return sum(prod(t.shape) for t, _ in named_weights(model) if not isinstance(t.parameter, lazy))


def _weight(target: Target) -> nn.Parameter:
    """What a predicate is shown of a weight."""
    if (computed := target.computed) is None:
        return target.parameter
    with torch.no_grad():
        return nn.Parameter(computed(target.parameter), requires_grad=target.parameter.requires_grad)


def _computes(parametrizations: nn.Module | None) -> ComputedWeight | None:
    first = parametrizations[0] if isinstance(parametrizations, nn.ModuleList) and len(parametrizations) else None
    return first if isinstance(first, ComputedWeight) else None


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor (DTensor), or the tensor itself; shares memory with its argument."""
    detached = tensor.detach()
    return detached.to_local() if hasattr(detached, "to_local") else detached


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a sharded tensor (DTensor), a collective call; or the tensor itself."""
    detached = tensor.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached
