"""Which ReLU and threshold can become one operation, since nothing else sees what lies between them."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

MOST = 4
"""How many arguments with defaults a forward pass may have: it is traced with every choice of them."""

_FRESH = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
"""Modules whose output is a tensor of its own, which an in-place ReLU may change where it is its only user."""


def foldable_relus(
    model: nn.Module, sites: Sequence[nn.Module], ours: Callable[[Any], bool]
) -> dict[nn.Module, nn.ReLU]:
    """For every site that has one, the `torch.nn.ReLU` that alone takes its output, or that it is itself.

    A ReLU that is a site is its own, if the model calls it. Another one is found where it follows a site in an
    `nn.Sequential`, both are there once and nowhere else, and no forward pass is seen to use what lies between them.
    What passes do is read off the graphs that `torch.fx` finds in copies of the model, in training and in evaluation,
    with every choice of the arguments of `forward` that have defaults, and with what stands for tensors looking like
    some and not; nothing is found where one cannot be traced, keeps what it computed, or has more than `MOST` such
    arguments. An in-place ReLU that is a site has to follow, in the same way, a module whose output is a new tensor.
    What other callers of the modules do is not seen.

    Args:
        model: The model.
        sites: Modules within it.
        ours: Whether a forward hook is one that the fold replaces; a module with other hooks is left.
    """
    after = _neighbours(model)
    before = {second: first for first, second in after.items()}
    graphs = _graphs(model)
    named = dict(model.named_modules())
    calls = [Counter(named[str(node.target)] for node in graph.nodes if node.op == "call_module") for graph in graphs]
    alone = [_used_by_the_next_alone(graph, named) for graph in graphs]

    def meets(first: nn.Module | None) -> bool:
        return first is not None and bool(alone) and all(first in each for each in alone)

    found: dict[nn.Module, nn.ReLU] = {}
    for site in sites:
        if type(site) is nn.ReLU:
            fresh = isinstance(before.get(site), _FRESH) and meets(before.get(site))
            called = bool(calls) and all(each[site] for each in calls)
            if called and (fresh or not site.inplace) and _is_plain(site, ours):
                found[site] = site
            continue
        relu = after.get(site)
        alone_with = meets(site) and not _is_watched(site, ours)
        if isinstance(relu, nn.ReLU) and type(relu) is nn.ReLU and alone_with and _is_plain(relu, lambda hook: False):
            found[site] = relu
    return found


def _neighbours(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Modules within plain `nn.Sequential`s, each with the one that follows; only those that are in one place."""
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    rows = [
        list(module.children())
        for module in model.modules()
        if type(module).forward is nn.Sequential.forward and "forward" not in vars(module)
    ]
    return {a: b for row in rows for a, b in itertools.pairwise(row) if places[a] == places[b] == 1}


def _graphs(model: nn.Module) -> list[fx.Graph]:
    """The graphs of all forward passes that are looked at; none where one of them is not to be had."""
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    if len(defaults) > MOST:
        return []
    graphs = []
    for training, tensors in itertools.product((True, False), repeat=2):
        for left_out in itertools.product((True, False), repeat=len(defaults)):
            given = dict(itertools.compress(defaults.items(), left_out))
            try:
                graphs.append(_trace(model, training, given, _TensorTracer() if tensors else _Tracer()))
            except Exception:  # a forward pass that cannot be traced may raise anything
                return []
    return graphs


def _used_by_the_next_alone(graph: fx.Graph, named: dict[str, nn.Module]) -> set[nn.Module]:
    """Modules that are called once, and whose output goes to another module that is called once, and nowhere else."""
    called = {node: named[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    calls = Counter(called.values())
    return {
        module
        for node, module in called.items()
        if calls[module] == 1 and len(node.users) == 1 and calls[called.get(next(iter(node.users)))] == 1  # type: ignore[index]
    }


def turn_into(module: nn.Module, other: nn.Module) -> None:
    """Make a module what another is, so that whoever refers to it finds it changed."""
    training = module.training
    module.__class__ = type(other)
    vars(module).update(vars(other))
    module.train(training)


class _Tracer(fx.Tracer):
    """Goes into no module with hooks, which would be called with what stands for tensors, nor into gossamer's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See `torch.fx.Tracer`."""
        hooked = bool(m._forward_hooks or m._forward_pre_hooks)
        own = type(m).__module__.startswith("gossamer.nn.")
        return hooked or own or bool(super().is_leaf_module(m, module_qualified_name))


class _TensorProxy(fx.Proxy):
    """Is taken for a tensor by code that asks for its type."""

    @property  # type: ignore[misc]
    def __class__(self) -> type[Tensor]:  # type: ignore[override]
        return Tensor


class _TensorTracer(_Tracer):
    """A tracer for which every value is such a one."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """See `torch.fx.Tracer`."""
        return _TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """See `torch.fx.Tracer`, which would take it for a constant."""
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)


def _trace(model: nn.Module, training: bool, given: dict[str, Any], tracer: fx.Tracer) -> fx.Graph:
    """The graph of a copy of the model; an error where the copy kept something of it."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    traced = copy.deepcopy(model, dict(shared)).train(training)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        graph = tracer.trace(traced, concrete_args=given or None)
    for module in traced.modules():
        if any(issubclass(type(each), fx.Proxy) for value in vars(module).values() for each in _within(value)):
            raise ValueError("keeps what it computed")
    return graph


def _within(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple | set):
        for each in value:
            yield from _within(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _within(each)
    else:
        yield value


def _is_plain(module: nn.Module, ours: Callable[[Any], bool]) -> bool:
    """Whether a module does what its class does, and nothing besides."""
    return (
        "forward" not in vars(module) and not module._modules.keys() - {"sparsifier"} and not _is_watched(module, ours)
    )


def _is_watched(module: nn.Module, ours: Callable[[Any], bool]) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(not ours(hook) for each in hooks for hook in each.values())
