"""What all methods of learned weight masks share: gates in the forward pass, and plain weights in the end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import reduce
from operator import mul
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from gossamer.checks import check_number
from gossamer.divide import divide
from gossamer.errors import ConfigurationError
from gossamer.groups import Groups, Spread
from gossamer.masks import MaskedTensor, count_active, rows_like
from gossamer.method import Masks, Method
from gossamer.nn.gates import Gates
from gossamer.structure import Element, Structure, as_structure
from gossamer.targets import Selection, Target, local, select, unshare_class, whole


@dataclass(eq=False)
class Scored:
    """The scores of one division into groups.

    Attributes:
        name: What is divided, for messages.
        size: Weights in a whole group.
        total: Number of groups.
        cell: N and M, where N of M consecutive groups are to live.
        spreads: How values of the groups act on each weight, by its name.
        elementwise: Whether every element is a group; then scores have the weight's shape.
        places: Targets whose gates hold the scores, and which of each's scores they are; known when gates are placed.
    """

    name: str
    size: int
    total: int
    cell: tuple[int, int] | None
    spreads: dict[str, Spread]
    elementwise: bool
    places: list[tuple[Target, int]] = field(default_factory=list)

    @property
    def scores(self) -> nn.Parameter:
        """The scores as they are in the model now; of sharded ones the shard."""
        target, index = self.places[0]
        found = gates_of(target).scores[index]
        assert isinstance(found, nn.Parameter)
        return found


def gates_of(target: Target) -> Gates:
    """The gates of a target."""
    owner, attribute = target.places[0]
    gates = owner.parametrizations[attribute][0]  # type: ignore[index]
    assert isinstance(gates, Gates)
    return gates


@dataclass(eq=False)
class LearnedMethod(Method):
    """A method that learns gates of weights: `torch.nn.utils.parametrize` puts them into the forward pass.

    Args:
        targets: Which weights; see `gossamer.targets.select`.
        structure: Which weights live or die together, and so share a score; see `gossamer.structure.as_structure`.
        lr: Learning rate of the scores; `None` for the optimizer's.

    Raises:
        ConfigurationError: A value out of range, when the method is made.
    """

    _: KW_ONLY
    targets: Selection = None
    structure: str | Structure | Mapping[str, str | Structure] = "element"
    lr: float | None = None
    tensors: list[MaskedTensor] = field(default_factory=list, init=False, repr=False)

    learns = True

    def __post_init__(self) -> None:
        with self._naming_itself():
            self._check()

    def _check(self) -> None:
        as_structure(self.structure)
        if self.lr is not None:
            check_number("lr", self.lr, 0, float("inf"), open_high=True)

    # -- life cycle --------------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module, masks: Masks) -> None:
        """See `Method.bind`."""
        with self._naming_itself():
            self._claimed = select(model, self.targets)
            names = {target.name for target in self._claimed}
            if masks == "zeros" or (isinstance(masks, Mapping) and names & set(masks)):
                raise ConfigurationError(
                    "masks: they are learned here, and begin with every weight; leave them out, or use a method of "
                    "hard masks for these weights"
                )
            if computed := next((target.name for target in self._claimed if target.computed is not None), None):
                raise ConfigurationError(
                    f"{computed}: is computed from other numbers, and gates are for weights that are trained "
                    f"themselves; leave it out with targets=['!{computed}'], or use a method of hard masks"
                )
            groups = divide(self._claimed, as_structure(self.structure))
            self.scored = self._divide(groups)
            self._bind(model, groups)
        self._model = model
        self._order = [(owner, list(owner._parameters)) for target in self._claimed for owner, _ in target.places]

    def _divide(self, groups: Sequence[Groups]) -> list[Scored]:
        """What has a score: by default every group."""
        return [
            Scored(each.name, each.size, each.total, each.cell, each.spreads(), isinstance(each.structure, Element))
            for each in groups
        ]

    def _bind(self, model: nn.Module, groups: Sequence[Groups]) -> None:
        """Check what depends on the weights; `groups` are gone afterwards, with their masks."""

    def claims(self) -> list[Target]:
        """See `Method.claims`."""
        return self._claimed

    def install(self) -> None:
        """See `Method.install`."""
        of_target: dict[str, list[tuple[Scored, nn.Parameter]]] = {target.name: [] for target in self._claimed}
        for scored in self.scored:
            first = next(target for target in self._claimed if target.name in scored.spreads)
            parameter = nn.Parameter(self._first_scores(scored, local(first.parameter)))
            for target in self._claimed:
                if target.name in scored.spreads:
                    scored.places.append((target, len(of_target[target.name])))
                    of_target[target.name].append((scored, parameter))
        for target in self._claimed:
            parts = of_target[target.name]
            gates = self._gates(
                [parameter for _, parameter in parts],
                [scored.spreads[target.name] for scored, _ in parts],
                [scored.cell for scored, _ in parts],
            )
            gates.train(target.places[0][0].training)
            for owner, attribute in target.places:
                parametrize.register_parametrization(owner, attribute, gates)
        recurrent = {owner: None for target in self._claimed for owner, _ in target.places if _keeps_weights(owner)}
        self._handles: list[RemovableHandle] = [
            owner.register_forward_hook(_forget_weights, always_call=True) for owner in recurrent
        ]

    @abstractmethod
    def _first_score(self) -> float:
        """What scores start from."""

    def _first_scores(self, scored: Scored, weight: Tensor) -> Tensor:
        """First scores, of the weight's type: FSDP2 shards parameters of one type together."""
        if scored.elementwise:
            return torch.full_like(weight, self._first_score())
        return weight.new_full((scored.total,), self._first_score())

    @abstractmethod
    def _gates(
        self,
        scores: Sequence[nn.Parameter],
        spreads: Sequence[Spread],
        cells: Sequence[tuple[int, int] | None],
    ) -> Gates:
        """Make the gates of one weight."""

    def param_groups(self) -> list[dict[str, Any]]:
        """See `Method.param_groups`."""
        if not self._placed():
            return []
        group: dict[str, Any] = {"params": [each.scores for each in self.scored], "weight_decay": 0.0}
        return [group if self.lr is None else group | {"lr": self.lr}]

    def detach(self) -> None:
        """See `Method.detach`: weights are what they were under their gates, which are taken off."""
        self._write_weights()
        self._take_off()

    def finalize(self) -> None:
        """See `Method.finalize`: weights are what they were under their gates, with exact zeros."""
        self._last = self.learned()
        self.detach()

    # -- what it tells -----------------------------------------------------------------------------------------------

    def learned(self) -> list[dict[str, Any]]:
        """See `Method.learned`; after the end what was learned then."""
        return self._learned() if self._placed() else getattr(self, "_last", [])

    @abstractmethod
    def _learned(self) -> list[dict[str, Any]]:
        """What there is to tell of the scores."""

    def config(self) -> dict[str, Any]:
        """See `Method.config`."""
        return {
            "structure": str(as_structure(self.structure)),
            "targets": [target.name for target in self.claims()],
        }

    # -- parts -------------------------------------------------------------------------------------------------------

    def _placed(self) -> bool:
        """Whether the gates are in the model."""
        owner, attribute = self._claimed[0].places[0]
        return parametrize.is_parametrized(owner, attribute)

    def _weights(self, counts: Sequence[float]) -> float:
        """The weights in so many groups of each division."""
        return sum(n * each.size for n, each in zip(counts, self.scored, strict=True))

    def _sum(self, function: Callable[..., Tensor], *beside: Sequence[Tensor]) -> Tensor:
        """A function of the scores, summed over the weights of whole groups, and over all ranks; see `whole_sums`."""
        sizes = [each.size for each in self.scored]
        return whole_sums([each.scores for each in self.scored], function, *beside, sizes=sizes).sum()

    def _total(self) -> int:
        return sum(each.total * each.size for each in self.scored)

    def _under_masks(self) -> list[MaskedTensor]:
        return [MaskedTensor(target, str(as_structure(self.structure))) for target in self._claimed]

    def _put_under_masks(self, masks: Sequence[Tensor]) -> None:
        """Make these the hard masks, each this rank's part of a target's, int8."""
        self.tensors = self._under_masks()
        for tensor, mask in zip(self.tensors, masks, strict=True):
            tensor.mask.copy_(mask)
        count_active(self.tensors)

    def _spread(self, target: Target, values: Sequence[Tensor]) -> Tensor:
        """Values of the groups of every division, as a product over a whole weight."""
        pairs = zip(self.scored, values, strict=True)
        return reduce(mul, [each.spreads[target.name](value) for each, value in pairs if target.name in each.spreads])

    def _gated(self, target: Target) -> Tensor:
        """A whole weight under its gates, as they are in evaluation."""
        gates = gates_of(target)
        own = {name: whole(tensor) for name, tensor in [*gates.named_parameters(), *gates.named_buffers()]}
        training = gates.training
        gates.train(False)
        try:
            with torch.no_grad():
                found = functional_call(gates, own, (whole(target.parameter),))
        finally:
            gates.train(training)
        assert isinstance(found, Tensor)
        return found

    def _write_weights(self) -> None:
        for target in self._claimed:
            local(target.parameter).copy_(rows_like(self._gated(target), target.parameter))

    def _take_off(self) -> None:
        for target in self._claimed:
            for owner, attribute in target.places:
                _remove_gates(owner, attribute)
        for owner, order in self._order:  # torch puts the weight behind the bias
            found = owner._parameters
            owner._parameters.update([(name, found.pop(name)) for name in [*order, *found] if name in found])
        for handle in self._handles:
            handle.remove()
        for target in self._claimed:
            for owner, _ in target.places:
                if _keeps_weights(owner):
                    owner._init_flat_weights()  # type: ignore[operator]


def whole_sums(
    scores: Sequence[Tensor],
    function: Callable[..., Tensor],
    *beside: Sequence[Tensor],
    sizes: Sequence[int] | None = None,
) -> Tensor:
    """The sum of a function of every number of each tensor, over all ranks where it is sharded; differentiable.

    At most one collective. A gradient stays on the rank that holds the number. Half precision is summed in single.

    Args:
        scores: The tensors.
        function: Applied to each, element by element.
        beside: Further tensors for each, sharded as it is: the function's other arguments.
        sizes: What the sums are multiplied by.

    Returns:
        `(tensors,)`.
    """
    sharded = [each for each in scores if isinstance(each, DTensor)]
    parts = [
        [each.to_local() if isinstance(each, DTensor) else each for each in row]
        for row in zip(scores, *beside, strict=True)
    ]
    wide = [[part.float() if part.element_size() < 4 else part for part in row] for row in parts]
    # Numbers, and not a tensor of them, whose copy to a device would be waited for.
    sums = torch.stack([n * function(*row).sum() for n, row in zip(sizes or [1] * len(wide), wide, strict=True)])
    if not sharded:
        return sums
    held = torch.tensor([isinstance(each, DTensor) for each in scores], device=sums.device)
    totals = torch.where(held, sums.detach(), 0)
    mesh, placements = sharded[0].device_mesh, sharded[0].placements
    dim = next((dim for dim, placement in enumerate(placements) if placement.is_shard()), None)
    if dim is None:
        return sums
    dist.all_reduce(totals, group=mesh.get_group(dim))
    return sums + torch.where(held, totals - sums.detach(), 0)


def _remove_gates(module: nn.Module, name: str) -> None:
    """Put the parameter back in its place, as it is."""
    lists: Any = module.parametrizations
    place = lists[name]
    found = next(each for each in type(module).__mro__ if name in vars(each))
    if found is type(module):
        unshare_class(module)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    else:  # FSDP2 has made a class over the one that torch made for the parametrization, which is shared by nobody else
        original = place.original
        delattr(found, name)
        del lists[name]
        if not lists:
            del module.parametrizations
        module.register_parameter(name, original)
    if isinstance(module._parameters[name], DTensor):
        # FSDP2 goes on to put the parameter, whole or sharded, where it first found it.
        place.__class__ = _Elsewhere
        place.__dict__["owner"] = module, name


class _Elsewhere(parametrize.ParametrizationList):
    """What was the place of a parameter: one that is put there goes to its owner."""

    def __setattr__(self, name: str, value: Any) -> None:
        owner, attribute = self.__dict__["owner"]
        owner._parameters[attribute] = value


def _keeps_weights(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase)


def _forget_weights(module: nn.Module, inputs: Any, output: Any) -> None:
    """Recurrent modules keep the weights that they computed with, which are no leaves and could not be copied."""
    owner: Any = module
    owner._flat_weights = [_leaf(owner, name) for name in owner._flat_weights_names]


def _leaf(owner: Any, name: str) -> Any:
    found = owner._parameters.get(name)
    return (
        owner.parametrizations[name].original if found is None and parametrize.is_parametrized(owner, name) else found
    )
