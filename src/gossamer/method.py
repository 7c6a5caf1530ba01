"""What the engine asks of a method.

The engine (`gossamer.attach`) knows when an optimizer steps; a method knows what to do about it. A method of hard
masks lists its tensors and proposes new masks when an update is due; a method that learns masks or thresholds adds
parameters and a penalty. Each overrides what it needs; nothing else depends on which method it is.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn, optim

from gossamer.errors import ConfigurationError
from gossamer.masks import Change, MaskedTensor
from gossamer.scores import StateOf
from gossamer.targets import Target

__all__ = ["Change", "MaskUpdate", "MaskedTensor", "Masks", "Method", "Proposal", "StateOf"]

Masks = None | Literal["zeros"] | Mapping[str, Tensor]
"""Where masks come from at the start: the method, the zeros of the weights, or tensors by parameter name."""


@dataclass
class Proposal:
    """New masks, not yet in force.

    Attributes:
        changes: The new mask of each tensor that changes, at most one a tensor.
        extras: Numbers worth recording, such as a threshold.
        skip_step: Whether the step of all optimizers is left out after this update.
        restarted: Parameters, masked or not, that begin anew as a whole: their optimizer state is dropped.
        write: Writes what else changes, such as weights that are rewound; called before masks are put in force.
    """

    changes: list[Change]
    extras: dict[str, float] = field(default_factory=dict)
    skip_step: bool = False
    restarted: Sequence[nn.Parameter] = ()
    write: Callable[[], object] | None = None


@dataclass(frozen=True)
class MaskUpdate:
    """What one mask update did.

    Attributes:
        step: The optimizer step it belongs to.
        method: Name of the method.
        rows: For each tensor `name`, `pruned` and `grown` (weights that changed), `active` and `total`.
        extras: Further numbers, such as the threshold of DSR.
    """

    step: int
    method: str
    rows: list[dict[str, Any]]
    extras: dict[str, float] = field(default_factory=dict)


class Method(ABC):
    """A way to make a model sparse; see the module's text.

    Attributes:
        name: The name in recipes, tables and saved states.
        tensors: The weights whose hard masks the engine enforces after every step; may be empty, and may change when
            masks become hard in the course of training.
        masks_from_weights: Whether the first masks depend on the weights, which ranks could have made differently.
        over_all: Whether its budget is a fraction of all parameters of the model, so that no other method fits beside.
        hardens: Whether `finalize` would change outputs now, since something smooth becomes hard.
        penalized: Whether its term of the loss is needed now, without which nothing drives what it learns.
        learns: Whether it adds parameters to the model, which `param_groups` lists.
        steps: Names of the arguments that count optimizer steps: a recipe may give them as parts of training.
    """

    name: ClassVar[str]
    tensors: Sequence[MaskedTensor] = ()
    masks_from_weights: bool = False
    over_all: bool = False
    hardens: bool = False
    penalized: bool = False
    learns: ClassVar[bool] = False
    steps: ClassVar[tuple[str, ...]] = ("begin", "end", "every", "until")

    @contextmanager
    def _naming_itself(self) -> Iterator[None]:
        """Errors say which method they are about."""
        try:
            yield
        except ConfigurationError as error:
            raise ConfigurationError(f"{type(self).__name__}: {error}") from None

    def bind(self, model: nn.Module, masks: Masks) -> None:
        """Choose and check everything this method will touch, raising ConfigurationError; change nothing."""

    def claims(self) -> list[Target]:
        """The weights that belong to this method alone: no other may choose them, and every optimizer must be known.

        The same from `bind` to the end, whether their masks are hard already or not.
        """
        return [tensor.target for tensor in self.tensors]

    def holdings(self) -> list[Target | MaskedTensor]:
        """The claims, each as its masked tensor where its mask is hard: then the parameter is the present one."""
        hard = {tensor.name: tensor for tensor in self.tensors}
        return [hard.get(target.name, target) for target in self.claims()]

    def occupies(self) -> list[str]:
        """Names of what no other method may work on either, beside weights, such as the sites of thresholds."""
        return []

    def install(self) -> None:
        """Change the model: first masks, hooks, parametrizations. Called once, after every method was bound."""

    def check_optimizer(self, optimizer: optim.Optimizer) -> None:
        """Raise ConfigurationError where this one cannot train what the method adds to the model."""

    def followed(self) -> None:
        """Called when optimizers are followed: the model is as it will be trained, wrapped and on its device."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the parameters, of at least one dimension, that this method added to the model.

        Each sets `weight_decay` to 0, and may set a learning rate or momentum of its own.
        """
        return []

    def loss_term(self) -> Tensor | None:
        """This method's term of the loss of the present step."""
        return None

    def due(self, step: int) -> bool:
        """Whether masks change with this optimizer step (the first is 1)."""
        return False

    def hardened(self) -> AbstractContextManager[None]:
        """Within this, outputs are those that `finalize` would leave now."""
        return nullcontext()

    def check_run(self, steps: int) -> None:
        """Raise ConfigurationError where a run of so many optimizer steps cannot do what was asked for."""

    def metrics(self) -> dict[str, float]:
        """Numbers worth recording at the end of an epoch, such as a temperature."""
        return {}

    def phases(self) -> dict[str, Callable[..., Proposal]]:
        """What can be run by hand besides `update`, by name: called as it, and with the arguments that are given."""
        return {}

    def update(self, step: int, state: StateOf) -> Proposal:
        """Propose new masks; gradients of the step are present. Runs before the optimizer's step.

        It changes nothing but the method itself: where another method fails, its state is put back and masks stay.
        """
        return Proposal([])

    def after_step(self, step: int) -> None:
        """Advance what changes with every step, such as a temperature.

        Called once for each completed step, after all optimizers; `step` counts those completed. It may write weights.
        """

    def detach(self) -> None:
        """Take hooks off the model and leave it as it is."""

    def finalize(self) -> None:
        """Remove from the model whatever `install` put there, keeping the zeros.

        Instead of `detach`; zeros are enforced afterwards, by the masks of `tensors` as it leaves them.
        """

    def learned(self) -> list[dict[str, Any]]:
        """What was learned beside masks, such as thresholds: for `Sparsity.summary`, a row of plain values each.

        Asked after `finalize` as well.
        """
        return []

    def config(self) -> dict[str, Any]:
        """What a saved state must agree on with this method beside its name, as JSON values."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Further arguments, as JSON values. Where a saved state has others, loading warns and goes on with these."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State beyond masks: thresholds, counters, random state; tensors and JSON values."""
        return {}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """Raise StateError where `load_state_dict` could not take this state; change nothing.

        Args:
            state: What `state_dict` gave.
            masks: This rank's part of the saved masks, by the names of this method's claims; those that were hard.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; afterwards `tensors` are those that were hard when it was saved."""
