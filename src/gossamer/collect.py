"""What forward passes leave behind for the loss of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Collected(list[Any]):
    """A list that copies and pickles leave behind: it holds tensors of a graph."""

    def take(self) -> list[Any]:
        """What was collected, which is then forgotten."""
        taken = list(self)
        self.clear()
        return taken

    def until_backward(self, value: Tensor, y: Tensor) -> Tensor:
        """Collect a token and a value, until the backward pass of the loss comes by if nobody takes them before.

        A step whose loss leaves the value out would else keep its graph for ever. A compiled part does not look.

        Args:
            value: What is computed from `y`.
            y: An activation.

        Returns:
            A copy of `y` for the rest of the network, which may change it in place.
        """
        token: list[None] = []  # known by its identity: the hook must not hold the value, whose graph would hold it
        self.append((token, value))
        handed_on = y.clone()
        if handed_on.requires_grad and not torch.compiler.is_compiling():
            handed_on.register_hook(lambda grad: self._drop(token))  # type: ignore[no-untyped-call]
        return handed_on

    def _drop(self, token: object) -> None:
        self[:] = [each for each in self if each[0] is not token]

    def __deepcopy__(self, memo: dict[int, Any]) -> Collected:
        return Collected()

    def __reduce__(self) -> tuple[type[Collected], tuple[()]]:
        return Collected, ()


def recomputing() -> bool:
    """Whether this forward pass repeats an earlier one for activation checkpointing, within the backward pass.

    What counts calls, or draws anew with each, must leave such a pass out. A compiled part is never one.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
