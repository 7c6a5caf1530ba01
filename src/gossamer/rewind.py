"""Rounds of training, and the point in the first of them to which a model is rewound (Frankle et al., 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gossamer.checks import check_integer
from gossamer.errors import ConfigurationError, OrderError, StateError
from gossamer.masks import rows_like
from gossamer.nn.gates import Gates
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

    def check_run(self, steps: int, remedy: str = "") -> None:
        """Raise a ConfigurationError where a run of so many steps is over before the last round."""
        if steps < self.rounds * self.length:
            raise ConfigurationError(
                f"length: {self.rounds} rounds of {self.length} steps are {self.rounds * self.length}, and the run has "
                f"{steps}; make it longer, or the rounds shorter or fewer{remedy}"
            )

    def ended(self, step: int) -> bool:
        """Whether a round has ended before this step, the first of the next one, and nobody took note so far."""
        return self.done < self.rounds and step > self.began + self.length

    def end(self) -> None:
        """Take note that the present round is over."""
        self.done += 1
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

    def keep(self, model: nn.Module) -> None:
        """Make what the model is now the rewind point."""
        self.kept = {name: tensor.detach().clone() for name, tensor in everything(model)}

    def restore(self, model: nn.Module) -> None:
        """Write back what was kept, to the bit.

        Raises:
            OrderError: Nothing was kept so far.
        """
        kept = self._kept()
        for name, tensor in everything(model):
            local(tensor).copy_(rows_like(kept[name], tensor))

    def check_restore(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that `restore` will write.

        Raises:
            OrderError: Nothing was kept so far.
            StateError: What was kept is of another model.
        """
        kept = self._kept()
        present = dict(everything(model))
        for name, tensor in present.items():
            if name not in kept or kept[name].shape != tensor.shape:
                there = tuple(kept[name].shape) if name in kept else "nothing"
                raise StateError(
                    f"{name}: has shape {tuple(tensor.shape)}, and at the rewind point there was {there}; rewind the "
                    "model that was trained, unchanged"
                )
        return [tensor for tensor in present.values() if isinstance(tensor, nn.Parameter)]

    def _kept(self) -> dict[str, Tensor]:
        if self.kept is None:
            raise OrderError(
                "rewind: the rewind point has not been reached, "
                + ("and none was asked for" if self.rewind is None else f"it is after step {self.rewind}")
                + "; train up to it, or keep the present state with sparsity.update('checkpoint')"
            )
        return self.kept

    def state_dict(self) -> dict[str, Any]:
        """Which round it is, and what was kept."""
        return {"rounds": [self.done, self.began, self.step], "kept": self.kept}

    def check_state(self, name: str, state: Mapping[str, Any]) -> None:
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
        if kept is not None and not (
            isinstance(kept, Mapping) and all(isinstance(each, Tensor) for each in kept.values())
        ):
            raise StateError(f"{name}: the saved rewind point is {kept!r:.40}, expected tensors; the file is damaged")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.done, self.began, self.step = state["rounds"]
        self.kept = None if state["kept"] is None else dict(state["kept"])


def everything(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a model, by plain name, without those of learned gates."""
    gates = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Gates))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith(gates):
            yield plain_name(name), tensor
