"""What forward passes leave behind for the loss."""

from __future__ import annotations

from typing import Any

import torch


class Collected(list[Any]):
    """A list that copies and pickles leave behind: it holds tensors of a graph."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Collected:
        return Collected()

    def __reduce__(self) -> tuple[type[Collected], tuple[()]]:
        return Collected, ()


def recomputing() -> bool:
    """Whether this forward pass repeats an earlier one for activation checkpointing, within the backward pass.

    What counts calls, or draws anew with each, must leave such a pass out. A compiled part is never one.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
