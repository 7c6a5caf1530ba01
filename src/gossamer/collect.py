"""What forward passes leave behind for the loss of a step, and which of them may be computed again."""

from __future__ import annotations

import warnings
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import OrderError


class _Entry:
    """A value, and the entry before it: a compiled part that adds one looks at no other, however many there are."""

    def __init__(self, value: Any, previous: _Entry | None) -> None:
        self.value = value
        self.previous = previous
        self.spent = False


class Collected:
    """What the forward passes of a layer in training left for the loss, which may be asked for more than once.

    A pass after it was asked for begins anew. Passes without gradients, and those that are computed again for a
    backward pass, leave nothing. Copies and pickles leave all of it behind: it holds tensors of a graph.

    Attributes:
        missed: Whether the last pass had no gradients.
    """

    def __init__(self) -> None:
        self.missed = False
        self.forget()

    def forget(self) -> None:
        """Begin anew, after a step."""
        self._last = self._asked_at = _Entry(None, None)
        self._asked: list[Any] = []
        self.missed = False

    def add(self, value: Any) -> _Entry | None:
        """Collect what a pass leaves; returns the entry, if it is one."""
        if recomputing():
            return None
        if not torch.compiler.is_compiling():
            if self._last is self._asked_at:
                self.forget()
            while self._last.spent and self._last.previous is not None:
                self._last = self._last.previous
        self.missed = not torch.is_grad_enabled()
        if self.missed:
            return None
        self._last = _Entry(value, self._last)
        return self._last

    def until_backward(self, value: Tensor, y: Tensor) -> Tensor:
        """Collect a value; where its backward pass comes by before it was asked for, the next pass drops it.

        A step whose loss leaves the value out would else keep its graph for ever. A compiled part does not look.

        Args:
            value: What is computed from `y`.
            y: An activation.

        Returns:
            A copy of `y` for the rest of the network, which may change it in place.
        """
        entry = self.add(value)
        handed_on = y.clone()
        if entry is not None and handed_on.requires_grad and not torch.compiler.is_compiling():
            # The graph must not hold the value, which holds the graph.
            handed_on.register_hook(partial(_spend, weakref.ref(entry)))  # type: ignore[no-untyped-call]
        return handed_on

    def values(self) -> list[Any]:
        """What was collected since the values were asked for before; the same where no pass came since."""
        if self._last is not self._asked_at:
            found, entry = [], self._last
            while entry is not self._asked_at and entry.previous is not None:
                found.append(entry.value)
                entry = entry.previous
            self._asked, self._asked_at = found[::-1], self._last
            self._last.previous = None  # the older ones are gone
        return self._asked

    def __deepcopy__(self, memo: dict[int, Any]) -> Collected:
        return Collected()

    def __reduce__(self) -> tuple[type[Collected], tuple[()]]:
        return Collected, ()


def _spend(reference: weakref.ref[_Entry], grad: Tensor) -> None:
    entry = reference()
    if entry is not None:
        entry.value, entry.spent = entry.value.detach(), True


def warn_missed(names: list[str]) -> None:
    """Warn that layers ran in training without gradients alone, so that their penalty has none."""
    others = f" (and {len(names) - 1} others)" if names[1:] else ""
    warnings.warn(
        f"{names[0]}{others}: ran in training without gradients alone, so that the penalty leaves it out; for "
        "activation checkpointing, use checkpoint(..., use_reentrant=False)",
        stacklevel=2,
    )


class _Call:
    """Lives as long as the graph of a call."""


class Calls:
    """Whether the last training pass of a layer that draws or learns is the only one that may be computed again.

    A pass that is computed again must have the state of the one it repeats, and nothing says which one that is. The
    layer has the state of the last.
    """

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[_Call] = weakref.WeakSet()
        self._last: weakref.ref[_Call] | None = None  # None where it has no graph, as in reentrant checkpointing
        self._blind = 0  # calls without a graph

    def add(self, y: Tensor) -> None:
        """Remember a training pass by its output, unless it is computed again."""
        if torch.compiler.is_compiling() or recomputing():
            return
        if not y.requires_grad:
            self._last = None
            self._blind += 1
            return
        call = _Call()
        self._last = weakref.ref(call)
        self._alive.add(call)
        y.register_hook(partial(_hold, call))  # type: ignore[no-untyped-call]

    def check(self, name: str) -> None:
        """See that a pass that is computed again, now, repeats the last.

        Raises:
            OrderError: It may be another.
        """
        node = torch._C._current_autograd_node()
        reentrant = node is not None and node.name() == "CheckpointFunctionBackward"
        if self._last is None:
            known = self._blind <= 1 and (reentrant or not self._alive)
        else:
            known = not reentrant and all(call is self._last() for call in self._alive)
        if not known:
            raise OrderError(
                f"{name}: is computed again for a backward pass (activation checkpointing), and was called more than "
                "once in training since; which call is repeated is not known, and each had a state of its own. Call "
                "backward after each forward pass, with use_reentrant=False, and keep no losses with their graphs; or "
                "leave this layer out of the checkpoint"
            )
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            if self._last is None:
                self._blind = 0
            else:
                self._alive.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        return Calls()

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()


def _hold(call: _Call, grad: Tensor) -> None:
    """A hook that does nothing but to keep a call alive."""


def recomputing() -> bool:
    """Whether this forward pass repeats an earlier one for activation checkpointing, within the backward pass.

    What counts calls, or draws anew with each, must leave such a pass out. A compiled part cannot look: its passes all
    seem to be first ones.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
