"""Learned lossy thresholds under the names of the lossy sparsifier's notebook, for training loops written for it.

The modules, the sites and the penalties are gossamer's own; `gossamer.LossyThreshold` does the same behind `attach`. As
in the notebook thresholds are put into a model by hand, the outputs of the last forward pass are read from a list, and
the penalty is a function of these.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from gossamer import guard
from gossamer.activations.lossy import CHILD, SiteSparsifier, check_free
from gossamer.checks import check_number
from gossamer.errors import ConfigurationError
from gossamer.nn import LossyHardSparsifier, LossySparsifier
from gossamer.penalties import L0, L1, L2
from gossamer.sites import SiteSelection, see_hooks, select_sites
from gossamer.targets import plain_name

__all__ = [
    "L0_penalty",
    "L1_penalty",
    "L2_penalty",
    "LossyHardSparsifier",
    "LossySparsifier",
    "SparseLoss",
    "addHardSparsifierLayers",
    "addSparsifierLayers",
    "hardSparsify",
    "normalized_L0_penalty",
    "normalized_L1_penalty",
    "normalized_L2_penalty",
    "registerHooks",
    "sparse_layer_outputs",
    "sparse_layer_params",
    "sparsify",
    "updateSigmoidParam",
]

MAX_SHARPNESS = 2.0**16
"""Where `updateSigmoidParam` stops: thresholds as sharp as this are hard, and no activation gives them a gradient."""

Sites = Mapping[str, "Sites"]
"""Sites by the names of modules within modules; that of a site itself is empty."""


# -- loss --------------------------------------------------------------------------------------------------------------


class SparseLoss(nn.Module):
    """A loss with a penalty on activations: `lossObj(out, target) + memRegParam·Σ P(x)/Σ numel(x)`."""

    def forward(
        self,
        out: Any,
        target: Any,
        list_: Iterable[Tensor],
        memRegParam: float,
        lossObj: Callable[[Any, Any], Tensor],
        normPenalty: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The loss of one forward pass.

        Args:
            out: What `lossObj` takes first.
            target: What it takes second.
            list_: The activations, as in `sparse_layer_outputs`.
            memRegParam: The penalty's factor, at least 0.
            lossObj: The loss without penalty.
            normPenalty: The penalty on one tensor. That of a `normalized_…_penalty` is divided by the number of
                elements there, and the sum not again.

        Returns:
            The loss, 0-dim.

        Raises:
            ConfigurationError: No activations, or a factor out of range.
        """
        outputs = list(list_)
        if not outputs:
            raise ConfigurationError(
                "list_: is empty, so there is nothing to penalise; run the model that sparsify was given, as a whole, "
                "before the loss, and empty sparse_layer_outputs with clear(), not by a new list"
            )
        check_number("memRegParam", memRegParam, 0, float("inf"), open_high=True)
        penalty = torch.stack([normPenalty(x) for x in outputs]).sum()
        if not _is_normalized(normPenalty):
            penalty = penalty / max(1, sum(x.numel() for x in outputs))
        return lossObj(out, target) + memRegParam * penalty


def L1_penalty(x: Tensor) -> Tensor:
    """`Σ |x|`."""
    return L1()(x)


def L2_penalty(x: Tensor) -> Tensor:
    """`√(Σ x²)`."""
    return L2()(x)


def L0_penalty(x: Tensor, b: float = 0.1) -> Tensor:
    """`Σ x²/(x² + b)`; the smaller `b`, the closer to the number of elements that are not zero."""
    return L0(b)(x)


def normalized_L1_penalty(x: Tensor) -> Tensor:
    """`L1_penalty`, divided by the number of elements."""
    return L1_penalty(x) / max(1, x.numel())


def normalized_L2_penalty(x: Tensor) -> Tensor:
    """`L2_penalty`, divided by the number of elements."""
    return L2_penalty(x) / max(1, x.numel())


def normalized_L0_penalty(x: Tensor, b: float = 0.1) -> Tensor:
    """`L0_penalty`, divided by the number of elements."""
    return L0_penalty(x, b) / max(1, x.numel())


def _is_normalized(penalty: Callable[..., Tensor]) -> bool:
    while isinstance(penalty, partial):  # which is how to give another b
        penalty = penalty.func
    return penalty in (normalized_L0_penalty, normalized_L1_penalty, normalized_L2_penalty)


# -- sites -------------------------------------------------------------------------------------------------------------


def sparsify(
    model: nn.Module, eps_start: float | None, *, sites: SiteSelection = None, logits: bool = False
) -> OrderedDict[str, Any]:
    """Put a threshold after every convolution, linear, bilinear and identity module, and collect what passes them.

    Each gets a child `sparsifier`; no other key of the `state_dict` changes. A state saved by the notebook loads, where
    the same modules have thresholds. Optimizers do not decay the thresholds, whatever their `weight_decay`.

    Args:
        model: The model, before it is compiled or wrapped.
        eps_start: First threshold, `None` for 0.1.
        sites: Which modules, instead; see `gossamer.sites.select_sites`.
        logits: Whether the last of them too, which makes the logits of a classifier.

    Returns:
        The sites, by the names of modules within modules; that of a site itself is empty.

    Raises:
        ConfigurationError: A selection or threshold that cannot work.
        OrderError: A site has a threshold already, or the model is wrapped.
    """
    dict_ = addSparsifierLayers(model, eps_start, sites=sites, logits=logits)
    registerHooks(model, dict_)
    return dict_


def addSparsifierLayers(
    model: nn.Module, eps_start: float | None, *, sites: SiteSelection = None, logits: bool = False
) -> OrderedDict[str, Any]:
    """Put thresholds into a model, as `sparsify` does; what passes them is not collected."""
    guard.check_unwrapped(model)
    chosen = select_sites(model, sites, logits=logits)
    names = {site.name for site in chosen}
    # A module within a site is a part of that site, as nothing is below a site in what is returned.
    chosen = [site for site in chosen if not any(site.name.startswith(f"{name}.") for name in names)]
    for site in chosen:
        check_free(site)
    sparsifiers = [_Undecayed(eps_start) for _ in chosen]
    found: OrderedDict[str, Any] = OrderedDict()
    for site, sparsifier in zip(chosen, sparsifiers, strict=True):
        sparsifier.join(site, model)
        site.module.register_load_state_dict_pre_hook(_from_the_notebook)  # type: ignore[no-untyped-call]
        inner = found
        for part in site.name.split("."):
            inner = inner.setdefault(part, OrderedDict())
    return found


def updateSigmoidParam(model: nn.Module, dict_: Sites) -> None:
    """Double the sharpness of every threshold, up to `MAX_SHARPNESS`.

    Raises:
        ConfigurationError: `dict_` is not of this model, or its thresholds are hard already.
    """
    for threshold in [_soft(site, module) for site, module in _sites(model, dict_)]:
        threshold.a.copy_(torch.maximum(threshold.a, (2 * threshold.a).clamp(max=MAX_SHARPNESS)))


def hardSparsify(model: nn.Module, sparse_layers: Sites) -> None:
    """Put hard thresholds in the place of the smoothed ones, for good.

    Raises:
        ConfigurationError: `sparse_layers` is not of this model, or its thresholds are hard already.
    """
    for threshold, module in [(_soft(site, module), module) for site, module in _sites(model, sparse_layers)]:
        module._modules[CHILD] = threshold.hard()


addHardSparsifierLayers = hardSparsify


def _sites(model: nn.Module, dict_: Sites) -> list[tuple[str, nn.Module]]:
    """The modules that a dict of sites names, with their names."""
    modules = {plain_name(name): module for name, module in model.named_modules()}
    found = []
    for name in _names(dict_):
        if name not in modules or CHILD not in modules[name]._modules:
            raise ConfigurationError(
                f"{name}: {type(model).__name__} has no threshold there; give the sites that sparsify returned for it"
            )
        found.append((name, modules[name]))
    return found


def _names(dict_: Sites, prefix: str = "") -> Iterator[str]:
    for name, inner in dict_.items():
        if inner:
            yield from _names(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def _soft(site: str, module: nn.Module) -> LossySparsifier:
    threshold = module._modules[CHILD]
    if not isinstance(threshold, LossySparsifier):
        raise ConfigurationError(f"{site}: its threshold is hard already; go on with a copy made before hardSparsify")
    return threshold


def _from_the_notebook(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: object) -> None:
    """Entries of a Sequential of the module, `0`, and its threshold, `sparse`, get the names they have here."""
    if f"{prefix}sparse.eps" not in state_dict:
        return
    for old, new in ((f"{prefix}0.", prefix), (f"{prefix}sparse.", f"{prefix}{CHILD}.")):
        for key in [key for key in state_dict if key.startswith(old)]:
            state_dict[new + key.removeprefix(old)] = state_dict.pop(key)


# -- what passes the thresholds ----------------------------------------------------------------------------------------


class _Pass:
    """What the sites of a model gave in its last forward pass. Copies and pickles of the model begin with none."""

    def __init__(self) -> None:
        self.running = False
        self.outputs: list[Tensor] = []
        self.thresholds: list[Tensor] = []
        _passes[self] = None

    def __reduce__(self) -> tuple[type[_Pass], tuple[()]]:
        return _Pass, ()


_passes: WeakKeyDictionary[_Pass, None] = WeakKeyDictionary()  # in the order in which they began


class LastPass(Sequence[Tensor]):
    """A list of what the sites of a model gave in its last forward pass; of several models one after the other.

    It is bound to the models, and each pass of a model takes the place of the one before, so that nothing piles up.
    Where several models live, `clear` it before each pass, as the notebook does.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def _now(self) -> list[Tensor]:
        return [tensor for each in _passes for tensor in getattr(each, self._kind)]

    def __getitem__(self, index: Any) -> Any:
        return self._now()[index]

    def __len__(self) -> int:
        return len(self._now())

    def __repr__(self) -> str:
        return repr(self._now())

    def clear(self) -> None:
        """Forget them now."""
        for each in _passes:
            getattr(each, self._kind).clear()


sparse_layer_outputs = LastPass("outputs")
"""The outputs of the sites, in the order in which they ran; with their graph where there is one."""

sparse_layer_params = LastPass("thresholds")
"""Their thresholds, likewise, each `(1,)`."""


def registerHooks(model: nn.Module, dict_: Sites) -> None:
    """Collect what passes the thresholds in forward passes of `model`, in `sparse_layer_outputs` and `…_params`.

    Where sites collect already, they go on as they do.

    Raises:
        ConfigurationError: `dict_` is not of this model.
    """
    found = [module for _, module in _sites(model, dict_) if not hasattr(module, "_last_pass")]
    if not found:
        return
    last = _Pass()
    see_hooks()
    model.register_forward_pre_hook(partial(_begin, last))
    model.register_forward_hook(partial(_end, last), always_call=True)
    for module in found:
        module._last_pass = last  # type: ignore[assignment]
        module.register_forward_hook(_collect)


def _begin(last: _Pass, module: nn.Module, inputs: object) -> None:
    last.outputs.clear()
    last.thresholds.clear()
    last.running = True
    _passes.pop(last)
    _passes[last] = None


def _end(last: _Pass, module: nn.Module, inputs: object, output: object) -> None:
    last.running = False


def _collect(module: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
    last = cast(_Pass, module._last_pass)
    if not last.running:  # computed again for the backward pass
        return None
    last.outputs.append(output)
    last.thresholds.append(cast(LossySparsifier, module._modules[CHILD]).eps)
    return output.clone()  # for the network, which may change it in place


# -- no weight decay ---------------------------------------------------------------------------------------------------


class _Undecayed(SiteSparsifier):
    """A threshold that is not decayed, though `model.parameters()` gives it to a group with weight decay."""

    def __init__(self, eps: float | None) -> None:
        super().__init__(eps)
        self._watch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._watch()  # copies as well

    def _watch(self) -> None:
        if not _hooks:  # who does not call `sparsify` is left alone
            _hooks.append(register_optimizer_step_pre_hook(torch.compiler.disable(_set_apart)))  # type: ignore[no-untyped-call]
            _hooks.append(register_optimizer_step_post_hook(torch.compiler.disable(_put_back)))  # type: ignore[no-untyped-call]
        _undecayed.add(self)


_undecayed: WeakSet[_Undecayed] = WeakSet()
_hooks: list[RemovableHandle] = []
_divided: WeakKeyDictionary[optim.Optimizer, list[tuple[dict[str, Any], list[Tensor], dict[str, Any]]]] = (
    WeakKeyDictionary()
)  # groups, what was in them, and those that the thresholds are in for the time of a step


def _set_apart(optimizer: optim.Optimizer, *_: object) -> None:
    """Before a step: thresholds get groups without decay until it is done, as schedulers know the groups that are."""
    mine = {id(each.eps) for each in _undecayed}
    for group in list(optimizer.param_groups):
        params = group["params"]
        apart = [each for each in params if id(each) in mine] if group.get("weight_decay") else []
        if apart:
            own = group | {"params": apart, "weight_decay": 0.0}
            group["params"] = [each for each in params if id(each) not in mine]
            optimizer.param_groups.append(own)
            _divided.setdefault(optimizer, []).append((group, params, own))


def _put_back(optimizer: optim.Optimizer, *_: object) -> None:
    """After a step: the groups as they were."""
    for group, params, own in _divided.pop(optimizer, ()):
        group["params"] = params
        optimizer.param_groups[:] = [each for each in optimizer.param_groups if each is not own]
