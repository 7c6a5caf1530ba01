"""Which ReLU takes the output of a module and nothing else does, so that the two can become one."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx, nn


def following_relus(model: nn.Module, modules: Sequence[nn.Module]) -> dict[nn.Module, nn.ReLU]:
    """The `torch.nn.ReLU` that alone takes a module's output, of each module that has one.

    Both are called once in a forward pass, and the same in training as in evaluation. It is read off the graph that
    `torch.fx` finds in a copy of the model; nothing is found where a forward pass depends on the values of tensors.
    """
    shared = {id(parameter): parameter for parameter in model.parameters()}
    found: list[dict[nn.Module, nn.ReLU]] = []
    for training in (True, False):
        try:
            traced = copy.deepcopy(model, dict(shared)).train(training)
            graph = _Tracer().trace(traced)
        except Exception:  # a forward pass that cannot be traced may raise anything
            return {}
        found.append(_pairs(graph, model, modules))
    return {module: relu for module, relu in found[0].items() if found[1].get(module) is relu}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever that is in the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def is_plain_relu(module: nn.Module) -> bool:
    """Whether a module is a `torch.nn.ReLU` that nobody watches."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is nn.ReLU and not any(hooks)


class _Tracer(fx.Tracer):
    """Goes into no module with hooks: they would be called with what stands for tensors."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See `torch.fx.Tracer`."""
        hooked = bool(m._forward_hooks or m._forward_pre_hooks)
        return hooked or bool(super().is_leaf_module(m, module_qualified_name))


def _pairs(graph: fx.Graph, model: nn.Module, modules: Sequence[nn.Module]) -> dict[nn.Module, nn.ReLU]:
    wanted = set(modules)
    called = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    calls: Counter[Any] = Counter(called.values())
    pairs = {}
    for node, module in called.items():
        if module not in wanted or len(node.users) != 1:
            continue
        user = next(iter(node.users))
        relu = called.get(user)
        if isinstance(relu, nn.ReLU) and is_plain_relu(relu) and calls[module] == calls[relu] == 1:
            pairs[module] = relu
    return pairs
