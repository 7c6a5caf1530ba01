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

    It is read off the graphs that `torch.fx` finds in copies of the model: in training and in evaluation, with every
    choice of the arguments of `forward` that have defaults, and with what stands for tensors looking like some and not.
    All must agree; nothing is found where a forward pass cannot be traced, or keeps what it computed, or has more than
    `MOST` such arguments. What other callers of the modules do is not seen.

    Args:
        model: The model.
        sites: Modules within it.
        ours: Whether a forward hook is one that the fold replaces; a module with other hooks is left.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    if len(defaults) > MOST:
        return {}
    graphs = []
    for training, tensors in itertools.product((True, False), repeat=2):
        for left_out in itertools.product((True, False), repeat=len(defaults)):
            given = dict(itertools.compress(defaults.items(), left_out))
            try:
                graphs.append(_trace(model, training, given, _TensorTracer() if tensors else _Tracer()))
            except Exception:  # a forward pass that cannot be traced may raise anything
                return {}
    named = dict(model.named_modules())
    found = [dict(_pairs(graph, named, set(sites), ours)) for graph in graphs]
    return {site: relu for site, relu in found[0].items() if all(each.get(site) is relu for each in found)}


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


def _pairs(
    graph: fx.Graph, named: dict[str, nn.Module], sites: set[nn.Module], ours: Callable[[Any], bool]
) -> Iterator[tuple[nn.Module, nn.ReLU]]:
    called = {node: named[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    calls: Counter[Any] = Counter(called.values())
    for site in sites & set(calls):
        nodes = [node for node, module in called.items() if module is site]
        if type(site) is nn.ReLU:
            inputs = [node.all_input_nodes[0] for node in nodes]
            fresh = all(isinstance(called.get(each), _FRESH) and len(each.users) == 1 for each in inputs)
            if _is_plain(site, ours) and (fresh or not site.inplace):
                yield site, site
        elif calls[site] == 1 and len(nodes[0].users) == 1 and not _is_watched(site, ours):
            relu = called.get(next(iter(nodes[0].users)))
            if type(relu) is nn.ReLU and calls[relu] == 1 and _is_plain(relu, lambda hook: False):
                yield site, relu


def _is_plain(module: nn.Module, ours: Callable[[Any], bool]) -> bool:
    """Whether a module does what its class does, and nothing besides."""
    return (
        "forward" not in vars(module) and not module._modules.keys() - {"sparsifier"} and not _is_watched(module, ours)
    )


def _is_watched(module: nn.Module, ours: Callable[[Any], bool]) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(not ours(hook) for each in hooks for hook in each.values())
