"""Rounds of training, and the point in the first of them to which a model is rewound (Frankle et al., 2020)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gossamer.checks import check_integer
from gossamer.errors import ConfigurationError, OrderError, StateError
from gossamer.masks import rows_like
from gossamer.method import Proposal
from gossamer.state import saved_name
from gossamer.targets import local, plain_name


class Rounds:
    """Which round of training a step is in, and what the model was at the rewind point.

    Args:
        length: Optimizer steps of a round, at least 1.
        rounds: How many rounds there are, at least 1.
        rewind: Completed steps of the first round after which everything is kept, from 0 (before training) to
            `length`; `None` to keep nothing.

    Attributes:
        done: Rounds that have ended.
        step: Steps that are complete.
        began: Steps that were complete when the present round began.
        kept: Parameters and buffers at the rewind point, by name; `None` before it.

    Raises:
        ConfigurationError: A value out of range.
    """

    def __init__(self, length: int, rounds: int, rewind: int | None) -> None:
        check_integer("rounds", rounds, at_least=1)
        check_integer("length", length, at_least=1)
        if rewind is not None:
            check_integer("rewind", rewind, at_least=0)
            if rewind > length:
                raise ConfigurationError(
                    f"rewind: got step {rewind}, which is never reached in the first round of {length} steps; give "
                    f"at most length={length}"
                )
        self.length = length
        self.rounds = rounds
        self.rewind = rewind
        self.done = self.step = self.began = 0
        self.kept: dict[str, Tensor] | None = None
        self._from_the_start = True  # else a state was loaded, and what it kept is right whatever the model is yet

    def check_run(self, steps: int, more: int = 0) -> None:
        """Raise a ConfigurationError where a run of so many steps is over before the last round, and `more` steps."""
        if steps < (needed := self.rounds * self.length) + more:
            raise ConfigurationError(
                f"length: {self.rounds} rounds of {self.length} steps are {needed}"
                + (f", which end with step {needed + more}" if more else "")
                + f", and the run has {steps}; make it longer, or the rounds shorter or fewer"
            )

    def over(self, step: int) -> bool:
        """Whether the present round has had its steps before this one, the first of the next."""
        return step > self.began + self.length

    def end(self, last: bool = False) -> None:
        """Take note that the present round is over, and whether it was the last, whatever was planned.

        Raises:
            OrderError: A rewind was asked for, and its point is still to come.
        """
        if self.rewind is not None:
            self._require_kept()
        self.done = self.rounds if last else min(self.done + 1, self.rounds)
        self.began = self.step

    @property
    def into(self) -> int:
        """Steps of the present round that are complete; at most its length."""
        return min(self.step - self.began, self.length)

    def reach(self, step: int, model: nn.Module) -> None:
        """Note that so many steps are complete, and keep what the model is where that is the rewind point."""
        self.step = step
        if step == self.rewind and self.done == 0:
            self.keep(model)

    def followed(self, model: nn.Module) -> None:
        """Note that the model is now what it is trained from: loaded, wrapped, alike on all ranks."""
        if self._from_the_start:
            self.reach(self.step, model)

    def keep(self, model: nn.Module) -> None:
        """Make what the model is now the rewind point."""
        self.kept = {name: tensor.detach().clone() for name, tensor in everything(model)}

    def back(self, model: nn.Module) -> Proposal:
        """Propose to write back what was kept, to the bit, and that optimizers begin anew.

        Parameters that are frozen now stay as they are: nothing would train them again from where they were.

        Raises:
            OrderError: Nothing was kept so far.
            StateError: What was kept is of another model.
        """
        kept = _fitting(self._require_kept(), model)
        pairs = [
            (tensor, kept[name])
            for name, tensor in everything(model)
            if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
        ]

        def write() -> None:
            for tensor, value in pairs:
                local(tensor).copy_(rows_like(value, tensor))

        return Proposal([], restarted=[each for each, _ in pairs if isinstance(each, nn.Parameter)], write=write)

    def _require_kept(self) -> dict[str, Tensor]:
        if self.kept is None:
            raise OrderError(
                "rewind: the rewind point has not been reached, "
                + ("and none was asked for" if self.rewind is None else f"it is after step {self.rewind}")
                + "; train up to it, or keep the present state with sparsity.update('checkpoint')"
            )
        return self.kept

    def phases(self, model: nn.Module) -> dict[str, Callable[..., Proposal]]:
        """What can be done with the rewind point by hand; see `Method.phases`."""
        return {
            "checkpoint": lambda step, state: Proposal([], write=lambda: self.keep(model)),
            "rewind": lambda step, state: self.back(model),
        }

    def state_dict(self) -> dict[str, Any]:
        """Which round it is, and what was kept."""
        return {"rounds": [self.done, self.began, self.step], "kept": self.kept}

    def check_state(self, name: str, state: Mapping[str, Any], model: nn.Module) -> None:
        """Raise a StateError where `load_state_dict` could not take this; `name` is the method's."""
        rounds, kept = state.get("rounds"), state.get("kept")
        listed = rounds if isinstance(rounds, list) and len(rounds) == 3 else [-1] * 3
        if any(type(each) is not int for each in listed) or not (
            0 <= listed[0] <= self.rounds and 0 <= listed[1] <= listed[2]
        ):
            raise StateError(
                f"{name}: the saved rounds are {rounds!r:.60}, expected how many are over, at most {self.rounds}, and "
                "the steps when the last began and now; attach with the rounds it was saved with"
            )
        reached = self.rewind is not None and (listed[0] > 0 or listed[2] >= self.rewind)
        if "kept" not in state or (kept is None and reached):
            raise StateError(
                f"{name}: the rewind point after step {self.rewind} is not in the saved state, which is of step "
                f"{listed[2]}; the file is damaged, or was saved with another rewind"
            )
        if kept is None:
            return
        if not isinstance(kept, Mapping) or not all(isinstance(each, str) for each in kept):
            raise StateError(
                f"{name}: the saved rewind point is {kept!r:.40}, expected tensors by name; the file is damaged"
            )
        _fitting(kept, model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        kept, now = state["kept"], self.kept
        undone = kept is not None and now is not None and all(kept.get(name) is each for name, each in now.items())
        self._from_the_start = self._from_the_start and undone  # what an update that failed has left
        self.done, self.began, self.step = state["rounds"]
        self.kept = None if state["kept"] is None else dict(state["kept"])


def everything(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a model that a state of it has, by plain name.

    Without what a module says is `not_rewound`, such as scores of gates, which go on with the run.
    """
    apart = {
        f"{name}.{each}".lstrip(".")
        for name, module in model.named_modules()
        for each in (*getattr(module, "not_rewound", ()), *module._non_persistent_buffers_set)
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if apart.isdisjoint((name, name.rpartition(".")[0])):
            yield plain_name(name), tensor


def _fitting(kept: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """What was kept of each parameter and buffer of a model, which may be wrapped where the other was not.

    Raises:
        StateError: There is none of its shape.
    """
    by_saved_name = {saved_name(name): value for name, value in kept.items()}
    found = {}
    for name, tensor in everything(model):
        value = kept[name] if name in kept else by_saved_name.get(saved_name(name))
        if (
            not isinstance(value, Tensor)
            or value.is_meta
            or value.shape != tensor.shape
            or value.is_floating_point() != tensor.is_floating_point()
        ):
            there = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.40}"
            raise StateError(
                f"{name}: is {tensor.dtype} {tuple(tensor.shape)}, and at the rewind point it was {there}; go on with "
                "the model that was trained, unchanged; or keep the present one with sparsity.update('checkpoint') "
                "(of a file: it is damaged)"
            )
        found[name] = value
    return found
