"""What all methods of hard weight masks share: the selection of tensors, the budget, the first masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.checks import MAX_SEED, check_boolean, check_integer, check_number
from gossamer.distribution import Distribution, allocate, budget
from gossamer.divide import divide
from gossamer.errors import ConfigurationError, StateError
from gossamer.groups import Groups, changes
from gossamer.masks import Change, MaskedTensor, count_active, count_over_shards
from gossamer.method import Masks, Method
from gossamer.scores import Score
from gossamer.state import check_random
from gossamer.structure import Structure, as_structure
from gossamer.targets import Selection, parameter_count, select
from gossamer.weights.ranking import grow


@dataclass(eq=False)
class MaskMethod(Method):
    """A method of hard masks over a set of weights under one budget.

    Args:
        sparsity: Fraction of zeros, in [0, 1). `None` where an explicit distribution, an N:M structure or given
            masks say it.
        targets: Which weights; see `gossamer.targets.select`.
        structure: Which weights live or die together; see `gossamer.structure.as_structure`.
        distribution: How the budget is split over tensors; see `gossamer.distribution.allocate`.
        over: `"targets"` or `"all"`: what the sparsity is a fraction of; see `gossamer.distribution.budget`.
        p: Order of the Lp-norm that scores a group of weights.
        seed: Seed of the method's own random generator; the same on all ranks.
        rescale: Whether the first weights of each output are multiplied by `√(inputs / active inputs)`, so that
            signals keep the variance they have in the dense network (Evci et al., 2022, sparse initialization). For
            weights that are yet to be trained, above all under static masks: grown weights begin at zero and compete
            with larger ones. Masks given to `attach` never rescale.

    Raises:
        ConfigurationError: A value out of range, when the method is made.
    """

    sparsity: float | None = None
    _: KW_ONLY
    targets: Selection = None
    structure: str | Structure | Mapping[str, str | Structure] = "element"
    distribution: Distribution = "erk"
    over: str = "targets"
    p: float = 2.0
    seed: int = 0
    rescale: bool = False
    tensors: list[MaskedTensor] = field(default_factory=list, init=False, repr=False)

    _frozen_too: ClassVar[bool] = False  # whether weights that are not trained get new masks as well

    def __post_init__(self) -> None:
        with self._naming_itself():
            self._check()

    def _check(self) -> None:
        if self.sparsity is not None:
            check_number("sparsity", self.sparsity, 0, 1, open_high=True)
        check_number("p", self.p, 0, float("inf"))
        if self.p == 0:
            raise ConfigurationError("p: the order of a norm must be positive, got 0")
        check_integer("seed", self.seed, at_least=0, at_most=MAX_SEED)
        if self.over not in ("targets", "all"):
            raise ConfigurationError(f"over: got {self.over!r}; allowed are 'targets' and 'all'")
        check_boolean("rescale", self.rescale)
        as_structure(self.structure)

    def bind(self, model: nn.Module, masks: Masks) -> None:
        """See `Method.bind`."""
        with self._naming_itself():
            structure = as_structure(self.structure)
            if structure.overlapping and self.over == "all":
                raise ConfigurationError(
                    f"over='all' counts weights, and structure {structure} has them in several groups, of which a "
                    "sparsity is a fraction; use over='targets'"
                )
            self.groups = divide(select(model, self.targets), structure)
            self.tensors = list({tensor.name: tensor for each in self.groups for tensor in each.tensors}.values())
            self._check_computed()
            self.generator = torch.Generator().manual_seed(self.seed)
            self.all_parameters = parameter_count(model)
            self.masks_from_weights = isinstance(masks, str)
            self._rescales = self.rescale and masks is None
            self.over_all = self.over == "all"
            given = None if masks is None else self._given(masks)
            self._first = self._start(given)
            self.budget = self._budget_of([active for _, active in self._first])
            # Without a number from the arguments, the masks given say the budget, and a saved state may have another:
            # weights that were active and zero when the run stopped look pruned when it resumes.
            said = self.sparsity is not None or isinstance(self.distribution, Mapping) or structure.cell is not None
            self._budget_is_fixed = said

    def install(self) -> None:
        """See `Method.install`."""
        for change in changes(self.groups, [alive for alive, _ in self._first]):
            change.tensor.apply(change)
            if self._rescales:
                _rescale(change.tensor)
        count_active(self.tensors)
        del self._first

    def config(self) -> dict[str, Any]:
        """See `Method.config`."""
        return {
            "structure": str(as_structure(self.structure)),
            "targets": [target.name for target in self.claims()],
        }

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        elsewhere = ("targets", "structure", "seed", "rescale")  # in `config`, in the random state, or done with
        names = [field.name for field in fields(self) if field.init and field.name not in elsewhere]
        return {name: _plain(getattr(self, name)) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """See `Method.state_dict`."""
        active = [tensor.active for tensor in self.tensors]
        return {"generator": self.generator.get_state(), "budget": self.budget, "active": active}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """See `Method.check_state`."""
        for tensor in self.tensors:
            if tensor.name not in masks:
                raise StateError(f"sparsity state: no mask of {tensor.name}; the file is damaged, use an earlier one")
        check_random(self.name, state.get("generator"), self.generator)
        budget = state.get("budget")
        if type(budget) is not int or not 0 < budget <= self._weights([groups.total for groups in self.groups]):
            raise StateError(f"{self.name}: the saved budget is {budget!r:.40} active weights; the file is damaged")
        there, here = self._asked_for(budget, state)
        if self._budget_is_fixed and there != here:
            raise StateError(
                f"{self.name}: the saved budget is {there} active weights, the attached one {here}; attach "
                "with the sparsity the state was saved with"
            )
        alive = [groups.collapse(masks) for groups in self.groups]
        counts = self._active(alive)
        active = self._weights(counts)
        for groups, count in zip(self.groups, counts, strict=True):
            if not count:
                raise StateError(f"{groups.name}: the saved mask has no active weight; the file is damaged")
        for name, count in self._torn(masks, alive).items():
            if count:
                raise StateError(
                    f"{name}: the saved mask has {count} pruned weights in active groups; the file is damaged"
                )
        for groups, count in self._overfull(alive) if active <= budget else ():
            if count:
                raise StateError(
                    f"{groups.name}: the saved mask has {count} cells with more active weights than "
                    f"{groups.structure} allows; the file is damaged"
                )
        if not self._admits(active, budget):
            raise StateError(
                f"{self.name}: the saved masks have {active} active weights, their budget is {budget}; the file is "
                "damaged, use an earlier one"
            )
        found = count_over_shards(self.tensors, [masks[tensor.name].count_nonzero() for tensor in self.tensors])
        noted = state.get("active")
        if not isinstance(noted, list) or any(type(count) is not int for count in noted) or noted != found:
            raise StateError(
                f"{self.name}: the saved masks have {found} active weights, and when they were saved {noted!r:.200}; "
                "the file is damaged, use an earlier one"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        self.generator.set_state(state["generator"].cpu())
        self.budget = state["budget"]

    def _budget_of(self, active: list[int]) -> int:
        """The budget in weights, given the active groups of each tensor at the start."""
        return self._weights(active)

    def _asked_for(self, budget: int, state: Mapping[str, Any]) -> tuple[Any, int]:
        """The budgets that the arguments asked for when a state was saved, and ask for now."""
        return budget, self.budget

    def _admits(self, active: int, budget: int) -> bool:
        """Whether so many weights can be active under a budget."""
        return active == budget

    def _weights(self, counts: Sequence[int]) -> int:
        """The weights in so many groups of each tensor."""
        return sum(count * groups.size for count, groups in zip(counts, self.groups, strict=True))

    def _scores(self) -> list[Score]:
        """The scores by which groups are ranked."""
        return []

    def _check_computed(self) -> None:
        if (name := next((each.name for each in self.tensors if each.computed is not None), None)) is None:
            return
        if self.rescale:
            raise ConfigurationError(
                f"{name}: is computed from other numbers and cannot be rescaled; use rescale=False"
            )
        for score in self._scores():
            if getattr(score, "needs_gradient", False):
                raise ConfigurationError(
                    f"{name}: is computed from other numbers, and no gradient of its own is kept, by which "
                    f"{getattr(score, '__name__', score)!r} ranks; score by 'magnitude' and grow at random (SET, DSR), "
                    "or leave it out of targets"
                )

    def _start(self, given: list[tuple[Tensor, int]] | None) -> list[tuple[Tensor, int]]:
        """The first masks of groups with their active counts: those given, or random ones within the budget."""
        if given is None:
            return self._random_masks(self._split())
        if self.sparsity is not None:
            asked, found = self._weights(self._split()), self._weights([active for _, active in given])
            if asked != found:
                raise ConfigurationError(
                    f"sparsity={self.sparsity} asks for {asked} active weights, but the given masks have {found}; "
                    "leave sparsity out to keep the masks' own"
                )
        return given

    def _split(self) -> list[int]:
        """Active groups of each tensor."""
        return allocate(self.distribution, self.groups, self._active_weights(self.sparsity))

    def _active_weights(self, sparsity: float | None) -> int:
        """Active weights in all."""
        cell = self.groups[0].cell
        total = sum(groups.total * groups.size for groups in self.groups)
        if cell is not None:
            implied = 1 - cell[0] / cell[1]
            if sparsity is not None and abs(sparsity - implied) > 1e-9:
                raise ConfigurationError(
                    f"sparsity={sparsity} disagrees with structure {cell[0]}:{cell[1]}, which has "
                    f"sparsity {implied:g}; leave sparsity out"
                )
            return total * cell[0] // cell[1]
        if isinstance(self.distribution, Mapping):
            if sparsity is not None:
                raise ConfigurationError(f"sparsity={sparsity} beside an explicit distribution; give one of the two")
            return total
        if sparsity is None:
            raise ConfigurationError(
                "no sparsity; give it (in [0, 1)), or an explicit distribution, an N:M structure, or masks to `attach`"
            )
        dense = self.all_parameters - sum(tensor.weights for tensor in self.tensors)
        return budget(sparsity, self.groups, dense, self.over)

    def _random_masks(self, counts: list[int]) -> list[tuple[Tensor, int]]:
        alive = [torch.zeros(each.total, dtype=torch.int8, device=each.device) for each in self.groups]
        grow(
            self.groups,
            alive,
            [mask == 0 for mask in alive],
            [each.total for each in self.groups],
            counts,
            self.generator,
        )
        return list(zip(alive, counts, strict=True))

    def _given(self, masks: str | Mapping[str, Tensor]) -> list[tuple[Tensor, int]]:
        """Read the given masks, as masks of groups."""
        kept = {tensor.name: self._given_mask(tensor, masks) for tensor in self.tensors}
        first = [groups.collapse(kept) for groups in self.groups]
        for groups, alive in zip(self.groups, first, strict=True):
            if not alive.any():
                raise ConfigurationError(
                    f"{groups.name}: its mask has no active weight; give it one, or exclude it from targets"
                )
            if groups.cell is not None:
                n, m = groups.cell
                wrong = int((alive.view(-1, m).sum(1) != -n).sum())
                if wrong:
                    raise ConfigurationError(
                        f"{groups.name}: {wrong} of {groups.total // m} cells of {m} weights do not have exactly {n} "
                        f"active, as structure {groups.structure} asks; prune with this structure first "
                        "(gossamer.prune)"
                    )
        # A single zero in a living group is a value, but in a mask it is a wish.
        for name, wrong in {} if isinstance(masks, str) else self._torn(kept, first).items():
            if wrong:
                raise ConfigurationError(
                    f"{name}: its mask has {wrong} pruned weights in active groups of {self.groups[0].structure}; "
                    "prune with this structure first (gossamer.prune), or use structure='element'"
                )
        return [(alive, int((alive != 0).sum())) for alive in first]

    def _given_mask(self, tensor: MaskedTensor, masks: str | Mapping[str, Tensor]) -> Tensor:
        """Read one tensor's given mask, as an int8 mask of weights."""
        if isinstance(masks, str):
            if masks != "zeros":
                raise ConfigurationError(f"masks: got {masks!r}; allowed are 'zeros' or a mapping name → mask")
            return (tensor.values() != 0).to(torch.int8).neg_()
        if tensor.name not in masks:
            raise ConfigurationError(
                f"masks: none for {tensor.name}; there are {sorted(masks)}; give it one, or choose only weights that "
                "have masks, with targets=list(masks)"
            )
        kept = masks[tensor.name].to(tensor.mask.device) != 0
        if tuple(kept.shape) != tensor.shape:
            raise ConfigurationError(f"masks: {tensor.name} has shape {tensor.shape}, its mask {tuple(kept.shape)}")
        return kept.to(torch.int8).neg_()

    def _torn(self, masks: Mapping[str, Tensor], alive: Sequence[Tensor]) -> dict[str, int]:
        """How many weights of each tensor are pruned in a mask though all their groups are active."""
        whole = changes(self.groups, alive)
        torn = [(change.mask != masks[change.tensor.name]).count_nonzero() for change in whole]
        tensors = [change.tensor for change in whole]
        return dict(zip([tensor.name for tensor in tensors], count_over_shards(tensors, torn), strict=True))

    def _overfull(self, alive: Sequence[Tensor]) -> list[tuple[Groups, int]]:
        """How many cells of N:M have more than N active."""
        celled = [(each, mask, *each.cell) for each, mask in zip(self.groups, alive, strict=True) if each.cell]
        found = [(mask.view(-1, m).sum(1) < -n).count_nonzero() for _, mask, n, m in celled]
        groups = [each for each, *_ in celled]
        return list(zip(groups, count_over_shards(groups, found), strict=True))

    def _trained(self) -> list[bool]:
        """Whether the weights of each division are trained now; those that were frozen since keep their masks."""
        return [self._frozen_too or all(t.parameter.requires_grad for t in each.tensors) for each in self.groups]

    def _alive(self) -> list[Tensor]:
        return [groups.alive() for groups in self.groups]

    def _active(self, alive: Sequence[Tensor]) -> list[int]:
        """Number of active groups of each global weight under these masks."""
        return count_over_shards(self.groups, [mask.count_nonzero() for mask in alive])

    def _changes(self, alive: Sequence[Tensor]) -> list[Change]:
        return changes(self.groups, alive, self.generator)


def _rescale(tensor: MaskedTensor) -> None:
    weight, mask = tensor.parameter.detach(), tensor.mask != 0
    groups = 1
    if tensor.input_dim == 0:  # the inputs of a transposed convolution's groups follow each other
        groups = getattr(tensor.target.places[0][0], "groups", 1)
    divided = (groups, len(weight) // groups, *weight.shape[1:])
    weight, mask = weight.view(divided), mask.view(divided)
    outputs = (0, 2) if tensor.input_dim == 0 else (0, 1)
    others = [dim for dim in range(mask.dim()) if dim not in outputs]
    inputs = prod(mask.shape[dim] for dim in others)
    weight.mul_((inputs / mask.sum(others, keepdim=True).clamp(min=1)).sqrt().to(weight.dtype))


def _plain(value: Any) -> Any:
    """An argument as a JSON value; NumPy's numbers, which are Python's too, as plain ones."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return getattr(value, "__qualname__", None) or repr(value)
