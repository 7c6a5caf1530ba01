"""Dynamic sparse training under the names of the `dst` pack: models and modules with dynamic sparse weights.

Everything here is `gossamer.DSR` (Mostafa & Wang, 2019) under other names. As in the pack a sparsity is a fraction of
*all* parameters of the model, and nothing happens on a schedule: `reparameterize` and its steps are called by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.attach import attach
from gossamer.distribution import Distribution, active_weights, apportion_groups
from gossamer.divide import divide
from gossamer.errors import ConfigurationError, StateError
from gossamer.groups import Groups
from gossamer.masks import MaskedTensor
from gossamer.method import Masks, Proposal, StateOf
from gossamer.nn import hash_weight
from gossamer.scores import magnitude
from gossamer.structure import ByName, Element, Structure, as_structure
from gossamer.targets import FLOATS, Selection, named_weights, parameter_count, select
from gossamer.weights.dsr import DSR, HEURISTICS, check_heuristic
from gossamer.weights.ranking import grow, prune_to

NEVER = 1 << 62  # a period in steps that no training reaches

_ARGUMENTS = {
    "sparsity": "target_sparsity",
    "prune_fraction": "target_fraction_to_prune",
    "threshold": "pruning_threshold",
}
"""What the arguments of `gossamer.DSR` are called here."""


class ReallocationHeuristics(StrEnum):
    """A tensor's share of the weights that were freed, as a function of its groups in all, before and after pruning."""

    PAPER = "paper"
    WITHIN_TENSOR = "within"
    ANTI_PAPER = "anti-paper"
    paper = PAPER
    within_param = WITHIN_TENSOR
    anti_paper = ANTI_PAPER

    def __call__(self, total: int, before: int, left: int) -> int:
        """The share, unnormalised, of a tensor of `total` groups, `before` of them active before and `left` after."""
        return HEURISTICS[self.value](total, before, left)


@dataclass(eq=False)
class Reparameterization(DSR):
    """`gossamer.DSR` with the pack's further steps as phases: `"resize"`, `"thin"` and `"shuffle"`."""

    name = "dst"

    def bind(self, model: nn.Module, masks: Masks) -> None:
        """See `Method.bind`."""
        super().bind(model, masks)
        self._asked = self.budget  # what the arguments ask for; phases may change the budget

    def phases(self) -> dict[str, Callable[..., Proposal]]:
        """See `Method.phases`."""
        return super().phases() | {
            "reallocate": self._reallocate_by,
            "resize": self._resize,
            "thin": self._thin,
            "shuffle": self._shuffle,
        }

    def _reallocate_by(self, step: int, state: StateOf, heuristic: str | None = None) -> Proposal:
        usual = self.heuristic
        if heuristic is not None:
            check_heuristic(heuristic)
            self.heuristic = heuristic
        try:
            return self._reallocate_alone(step, state)
        finally:
            self.heuristic = usual

    def _resize(self, step: int, state: StateOf, sparsity: float | None) -> Proposal:
        self._refuse_cells()
        if isinstance(self.distribution, Mapping):
            raise ConfigurationError("sparsity: the distribution says how many weights live; make another DSModel")
        sparsity = self.sparsity if sparsity is None else sparsity
        if sparsity is None:
            raise ConfigurationError("sparsity: this DSModel was made without a target_sparsity; give one")
        alive, trained = self._alive(), self._trained()
        active = self._active(alive)
        wanted = [0 if each else now for now, each in zip(active, trained, strict=True)]
        parts = [i for i, each in enumerate(trained) if each]
        sizes = [self.groups[i].size for i in parts]
        left = self._active_weights(sparsity) - self._weights(wanted)
        if left < sum(sizes):
            raise ConfigurationError(
                f"sparsity={sparsity} leaves {max(0, left)} active weights for {len(parts)} tensors, which take "
                f"{sum(sizes)} for a group each; choose a lower sparsity"
                + ("" if all(trained) else ", or train the layers that are frozen and keep their masks")
            )
        most = [self.groups[i].total for i in parts]
        shares = [active[i] * size for i, size in zip(parts, sizes, strict=True)]
        for i, count in zip(parts, apportion_groups(left, shares, most, sizes, least=1), strict=True):
            wanted[i] = count
        prune_to(self.groups, alive, wanted, magnitude, state, self.p)
        proposal = self._refill(alive, wanted)
        self.sparsity = sparsity
        self.intended = self._aim(self.budget)
        return proposal

    def _thin(self, step: int, state: StateOf, sparsity: float) -> Proposal:
        self._refuse_cells()
        before = self._alive()
        kept = [
            max(1, active_weights(sparsity, groups.total)) if trained else groups.total
            for groups, trained in zip(self.groups, self._trained(), strict=True)
        ]
        active = self._active(before)
        counts = [min(now, most) for now, most in zip(active, kept, strict=True)]
        budget = self.budget - self._weights(active) + self._weights(counts)
        proposal = self._refill(self._frozen(before), counts, eligible=before)
        self.budget = budget  # what was pruned and not yet reallocated is still to grow
        self.intended = self._aim(budget)
        return proposal

    def _shuffle(self, step: int, state: StateOf) -> Proposal:
        before, budget = self._alive(), self.budget
        proposal = self._refill(self._frozen(before), self._active(before))
        self.budget = budget  # what was pruned and not yet reallocated is still to grow
        return proposal

    def _frozen(self, alive: list[Tensor]) -> list[Tensor]:
        """Masks of groups that live in layers that are not trained, which keep theirs."""
        return [torch.zeros_like(mask) if each else mask for mask, each in zip(alive, self._trained(), strict=True)]

    def _refuse_cells(self) -> None:
        if self.groups[0].cell is not None:
            raise ConfigurationError(
                f"sparsity: structure {self.groups[0].structure} says how many weights live; make another DSModel"
            )

    def _refill(self, alive: list[Tensor], wanted: list[int], eligible: list[Tensor] | None = None) -> Proposal:
        """Grow at random, among the eligible groups, until so many are active; they are the budget from now on."""
        active = self._active(alive)
        free = [mask == 0 for mask in alive]
        if eligible is not None:
            free = [each & (mask != 0) for each, mask in zip(free, eligible, strict=True)]
        rooms = [int(count) for count in self._active([each.to(torch.int8) for each in free])]
        grow(self.groups, alive, free, rooms, [n - now for n, now in zip(wanted, active, strict=True)], self.generator)
        self.budget = self._weights(wanted)
        self._pruned = None
        return self._proposal(alive, wanted)

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`; the sparsity may have been changed since, and is in the state."""
        return {name: value for name, value in super().settings().items() if name != "sparsity"}

    def state_dict(self) -> dict[str, Any]:
        """See `Method.state_dict`."""
        return super().state_dict() | {"asked": self._asked, "sparsity": self.sparsity}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """See `Method.check_state`."""
        super().check_state(state, masks)
        sparsity = state.get("sparsity", "nothing")
        if sparsity is not None and (not isinstance(sparsity, float | int) or not 0 <= sparsity < 1):
            raise StateError(f"{self.name}: the saved sparsity is {sparsity!r:.40}; the file is damaged")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        super().load_state_dict(state)
        self.sparsity = state["sparsity"]

    def _asked_for(self, budget: int, state: Mapping[str, Any]) -> tuple[Any, int]:
        return state.get("asked"), self._asked


class DSModel(nn.Module):
    """A model whose weights are sparse and are reallocated by hand while it trains (Mostafa & Wang, 2019).

    Weights stay exactly sparse through the steps of the first optimizer that trains them. `state_dict` has the model's
    own entries under `model.`, and masks, threshold and random state as extra state.

    Args:
        model: The model. Its sparse weights are those of `DSLinear`, `DSConv2d` … and every `StructuredSparseParameter`
            where it has such modules; else those
            that its `SPARSE_TARGETS` choose, as the networks of `gossamer.zoo` have; else gossamer's default targets.
        target_sparsity: Fraction of zeros, in [0, 1); `None` where an N:M structure or the distribution says it.
        target_fraction_to_prune: Fraction of all parameters intended to be pruned at a reparameterization, in (0, 1).
        pruning_threshold: First threshold on the norm of a group, above 0.
        heuristic: Shares of the tensors in what was freed.
        targets: Which weights are sparse, instead; see `gossamer.targets.select`.
        structure: Which weights live or die together, instead of what the modules say; others than those of this file
            say single weights.
        distribution: How the budget is split at the start; see `gossamer.distribution.allocate`.
        over: What sparsities are fractions of: `"all"` parameters, as in the pack, or those of the sparse `"targets"`.
        tolerance: Tolerated relative deviation from the number intended to be pruned, in [0, 1).
        gain: Factor by which the threshold is adapted, above 1.
        p: Order of the norm of a group.
        seed: Seed of the random choices.

    Attributes:
        model: The model.
        handle: The `gossamer.Sparsity` behind it; `handle.follow` takes several optimizers.

    Raises:
        ConfigurationError: A value out of range, or no weight to make sparse.
    """

    def __init__(
        self,
        model: nn.Module,
        target_sparsity: float | None,
        target_fraction_to_prune: float = 1e-2,
        pruning_threshold: float = 1e-3,
        heuristic: str | ReallocationHeuristics = ReallocationHeuristics.PAPER,
        *,
        targets: Selection = None,
        structure: str | Structure | Mapping[str, str | Structure] | None = None,
        distribution: Distribution = "uniform",
        over: str = "all",
        tolerance: float = 0.1,
        gain: float = 2.0,
        p: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        marked = _marked(model)
        if targets is None:
            targets = list(marked) or list(getattr(model, "SPARSE_TARGETS", ())) or None
        try:
            if structure is None:
                structure = _together({each.name: marked.get(each.name, Element()) for each in select(model, targets)})
            method = Reparameterization(
                target_sparsity,
                targets=targets,
                structure=structure,
                distribution=distribution,
                over=over,
                every=NEVER,
                prune_fraction=target_fraction_to_prune,
                threshold=pruning_threshold,
                tolerance=tolerance,
                gain=gain,
                heuristic=str(heuristic),
                p=p,
                seed=seed,
            )
            self.handle = attach(model, method, "auto")
        except ConfigurationError as error:
            name, rest = re.fullmatch(r"(?:Reparameterization: )?(\w*)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]
            argument = name if rest.startswith(".") else _ARGUMENTS.get(name, name)  # a layer may have such a name
            raise ConfigurationError(f"DSModel: {argument}{rest}") from None
        self.model = model
        found = {id(tensor.parameter): tensor for tensor in self._method.tensors}
        for module in model.modules():
            if isinstance(module, StructuredSparseParameter):
                module.tensor = found.get(id(module.dense.parameter))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model(*args, **kwargs)

    # -- steps -------------------------------------------------------------------------------------------------------

    def reparameterize(self, heuristic: str | ReallocationHeuristics | None = None) -> None:
        """Prune by the threshold, adapt it, and reallocate what was freed; the budget is exact afterwards.

        Args:
            heuristic: As for `reallocate_free_parameters`.
        """
        if heuristic is not None:
            check_heuristic(heuristic)
        self.prune_by_threshold()
        self.adjust_pruning_threshold()
        self.reallocate_free_parameters(heuristic)

    def prune_by_threshold(self) -> None:
        """Prune the groups whose norm is below the threshold; the largest of each tensor stays."""
        self.handle.update("prune")

    def adjust_pruning_threshold(self) -> None:
        """Divide the threshold by the gain where too many weights were pruned, multiply it where too few."""
        self.handle.update("adjust_threshold")

    def reallocate_free_parameters(self, heuristic: str | ReallocationHeuristics | None = None) -> None:
        """Grow as many as are missing from the budget at random, shared by the heuristic.

        Args:
            heuristic: Shares of the tensors this once; `None` for the model's own.
        """
        self.handle.update("reallocate", heuristic=None if heuristic is None else str(heuristic))

    def prune_or_grow_to_sparsity(self, sparsity: float | None = None) -> None:
        """Prune the smallest weights, or grow random ones, to a sparsity; it is the target from then on.

        Tensors keep their proportions.

        Args:
            sparsity: Fraction of zeros, as `target_sparsity`; `None` for that.
        """
        self.handle.update("resize", sparsity=sparsity)

    def randomly_thin_to_group_sparsity(self, sparsity: float) -> None:
        """Prune random groups of every tensor until this fraction of them is zero; sparser tensors stay as they are.

        Args:
            sparsity: Fraction of each tensor's groups that is zero, in [0, 1).
        """
        self.handle.update("thin", sparsity=sparsity)

    def shuffle_structure(self) -> None:
        """Choose as many groups as now of every tensor at random; those that were not active begin at zero."""
        self.handle.update("shuffle")

    # -- statistics --------------------------------------------------------------------------------------------------

    @property
    def target_sparsity(self) -> float | None:
        """The fraction of zeros that was asked for last; `None` where the structure or the distribution says it."""
        return self._method.sparsity

    @property
    def pruning_threshold(self) -> float:
        """The threshold as it has adapted."""
        return self._method.threshold

    def update_stats(self) -> list[dict[str, Any]]:
        """For every sparse tensor its `name`, and how many of its weights there are: `total`, `nonzero`, `sparsity`."""
        return [
            {
                "name": f"model.{row['name']}",
                "total": row["total"],
                "nonzero": row["active"],
                "sparsity": row["sparsity"],
            }
            for row in self.handle.summary().rows
        ]

    @property
    def np_total(self) -> int:
        """Number of parameters; a hashed one counts as the weight that it computes."""
        return parameter_count(self.model)

    @property
    def np_sparse(self) -> int:
        """Number of parameters in sparse tensors."""
        return sum(tensor.weights for tensor in self._method.tensors)

    @property
    def np_dense(self) -> int:
        """Number of parameters in other tensors."""
        return self.np_total - self.np_sparse

    @property
    def np_nonzero(self) -> int:
        """Number of active parameters in sparse tensors."""
        return sum(tensor.active for tensor in self._method.tensors)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among all parameters."""
        return 1 - (self.np_dense + self.np_nonzero) / self.np_total

    @property
    def sum_table(self) -> Table:
        """The model's counts, as a table."""
        return _table(
            [
                "# total parameters",
                "# sparse parameters",
                "# dense parameters",
                "# nonzero parameters in sparse",
                "sparsity",
            ],
            [[self.np_total, self.np_sparse, self.np_dense, self.np_nonzero, f"{self.sparsity:.4f}"]],
        )

    @property
    def stats_table(self) -> Table:
        """The counts of every sparse tensor, as a table."""
        return _table(
            ["Parameter tensor", "# total", "# nonzero", "sparsity"],
            [[row["name"], row["total"], row["nonzero"], f"{row['sparsity']:.4f}"] for row in self.update_stats()],
        )

    def sparse_parameters(self) -> Iterator[nn.Parameter]:
        """The sparse tensors; of a hashed one its bank."""
        return (parameter for _, parameter in self.named_sparse_parameters())

    def named_sparse_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The sparse tensors with their names."""
        return ((f"model.{tensor.name}", tensor.parameter) for tensor in self._method.tensors)

    # -- copies and state --------------------------------------------------------------------------------------------

    def project(self, copy: nn.Module) -> None:
        """Write the present masks into a copy such as an EMA or SWA average: of this object, or of its model.

        Args:
            copy: The copy, or a module around it; a copy of this object then has its masks, threshold and random state.

        Raises:
            ConfigurationError: It is none, or holds several.
        """
        copies = [each for each in copy.modules() if isinstance(each, DSModel)] if isinstance(copy, nn.Module) else []
        if len(copies) > 1:
            raise ConfigurationError(
                f"project: the copy holds {len(copies)} DSModels; give the one that is meant, such as copy.module.first"
            )
        if copies:
            try:
                copies[0].handle.load_state_dict(self.handle.state_dict())
            except StateError as error:
                raise ConfigurationError(f"project: the copy is not one of this DSModel: {error}") from None
            return
        found = self.handle._project(copy)
        for module in copy.modules():
            if isinstance(module, StructuredSparseParameter) and module.tensor is not None:
                own = found.get(id(module.dense.parameter), module.tensor)
                module.tensor.mask = own.mask.to(module.tensor.mask.device, copy=own is not module.tensor)
                module.tensor.active = own.active

    def get_extra_state(self) -> dict[str, Any]:
        """Masks, threshold and random state, as tensors and JSON values."""
        return self.handle.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` gave."""
        self.handle.load_state_dict(state)

    @property
    def _method(self) -> Reparameterization:
        (method,) = self.handle.methods
        assert isinstance(method, Reparameterization)
        return method


class StructuredDenseParameter(nn.Module):
    """A weight that a `StructuredSparseParameter` makes sparse; calling it gives the weight.

    Args:
        weight: First values, of two or more dimensions: outputs, inputs, and further ones of a kernel. They are copied.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        plain = isinstance(weight, Tensor) and weight.layout is torch.strided and weight.device.type != "meta"
        if not plain or weight.dim() < 2 or not weight.numel() or weight.dtype not in FLOATS:
            found = type(weight).__name__
            if isinstance(weight, Tensor):
                found = f"{tuple(weight.shape)}, {weight.dtype}, {weight.layout}, {weight.device}"
            raise ConfigurationError(
                f"weight: got {found}; expected a dense tensor of floating-point numbers of two or more dimensions"
            )
        self.weight = nn.Parameter(weight.detach().clone())

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's."""
        return tuple(self.weight.shape)

    @property
    def parameter(self) -> nn.Parameter:
        """What is trained: the weight itself, or the bank that it is computed from."""
        return next(self.parameters())

    def forward(self) -> Tensor:
        """The weight."""
        return self.weight


class HashedParameter(StructuredDenseParameter):
    """A weight computed from a bank of `size` numbers by hashing (HashedNets: Chen et al., 2015).

    Args:
        weight: First values; the bank gets their variance, or with `fit` is fitted to them.
        size: Numbers in the bank, from 1 to the number of weights.
        seed: Seed of the hashes; give every weight another.
        fit: Whether the first values are trained ones.

    See `gossamer.nn.hash_weight`, which does the same to the weight of any module.
    """

    def __init__(self, weight: Tensor, size: int, seed: int = 0, *, fit: bool = False) -> None:
        super().__init__(weight)
        hash_weight(self, "weight", size, seed, fit=fit)


class StructuredSparseParameter(nn.Module):
    """A weight whose groups live or die together in a `DSModel`, for modules of one's own; calling it gives the weight.

    Args:
        dense: The weight, plain or hashed; or a tensor, for a plain one.
        structure: How it is grouped; see `gossamer.structure.as_structure`.

    Attributes:
        dense: The weight.
        structure: Its grouping.
        tensor: Its mask, once a `DSModel` has the module: a `gossamer.masks.MaskedTensor`.

    Raises:
        ConfigurationError: No weight, or a structure that does not divide it.
    """

    tensor: MaskedTensor | None

    def __init__(self, dense: StructuredDenseParameter | Tensor, structure: str | Structure = "element") -> None:
        super().__init__()
        self.dense = dense if isinstance(dense, StructuredDenseParameter) else StructuredDenseParameter(dense)
        self.structure = _structure_of_one(self, structure)
        self.tensor = None
        self.groups()

    def forward(self) -> Tensor:
        """The weight, +0.0 where it is pruned."""
        return self.dense()  # type: ignore[no-any-return]

    def groups(self) -> list[Groups]:
        """The groups: one object with `total` and `size` for each part of the structure (a sum has two)."""
        (target,) = (target for target, _ in named_weights(self))
        return divide([target], self.structure)

    def norms(self, p: float = 2.0) -> Tensor:
        """The Lp-norms of the groups, those of a second part after those of the first: `(groups,)`."""
        return torch.cat([each.scores(magnitude, lambda _: {}, p) for each in self.groups()])

    @property
    def mask(self) -> Tensor:
        """bool, in the weight's shape, True where active."""
        if self.tensor is None:
            return torch.ones(self.dense.shape, dtype=torch.bool, device=self.dense.parameter.device)
        return self.tensor.mask != 0

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights."""
        return 0.0 if self.tensor is None else 1 - self.tensor.active / self.tensor.weights


class _Sparse:
    """What the modules below share: which of their weights a `DSModel` makes sparse, and by which structure."""

    sparse: tuple[str, ...] = ("weight",)
    structure: Structure

    def __init__(self, *args: Any, structure: str | Structure = "element", **kwargs: Any) -> None:
        self.__dict__["structure"] = _structure_of_one(self, structure)
        super().__init__(*args, **kwargs)


class DSLinear(_Sparse, nn.Linear):
    """`torch.nn.Linear` whose weight a `DSModel` makes sparse, by a `structure` of its own."""


class DSConv2d(_Sparse, nn.Conv2d):
    """`torch.nn.Conv2d` whose weight a `DSModel` makes sparse, by a `structure` of its own."""


class DSConvTranspose2d(_Sparse, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` whose weight a `DSModel` makes sparse, by a `structure` of its own."""


class DSRNNCell(_Sparse, nn.RNNCell):
    """`torch.nn.RNNCell` whose weights a `DSModel` makes sparse, by a `structure` of its own."""

    sparse = ("weight_ih", "weight_hh")


class DSLSTMCell(_Sparse, nn.LSTMCell):
    """`torch.nn.LSTMCell` whose weights a `DSModel` makes sparse, by a `structure` of its own."""

    sparse = ("weight_ih", "weight_hh")


class DSGRUCell(_Sparse, nn.GRUCell):
    """`torch.nn.GRUCell` whose weights a `DSModel` makes sparse, by a `structure` of its own."""

    sparse = ("weight_ih", "weight_hh")


def _structure_of_one(module: object, structure: str | Structure) -> Structure:
    if isinstance(structure, Mapping | ByName):
        raise ConfigurationError(
            f"structure: got a mapping for one {type(module).__name__}; give one structure, or the mapping to DSModel"
        )
    return as_structure(structure)


def _marked(model: nn.Module) -> dict[str, Structure]:
    """The sparse weights of the modules of this file, and their structures."""
    wrapped = [module for module in model.modules() if isinstance(module, StructuredSparseParameter)]
    marked: dict[str, Structure] = {}
    for target, _ in named_weights(model):
        found = [owner.structure for owner, key in target.places if isinstance(owner, _Sparse) and key in owner.sparse]
        found += [each.structure for each in wrapped for owner, _ in target.places if owner is each.dense]
        if any(each != found[0] for each in found):
            raise ConfigurationError(
                f"{target.name}: is tied, with structure {' in one module and '.join(map(str, found))} in another; "
                "give all one structure"
            )
        if found:
            marked[target.name] = found[0]
    return marked


def _together(marked: Mapping[str, Structure]) -> Structure | Mapping[str, str | Structure]:
    """One structure for all where it is one, since N:M is not for some weights only; else by name."""
    first, *others = marked.values()
    if all(each == first for each in others):
        return first
    if celled := next((name for name, each in marked.items() if each.cell is not None), None):
        raise ConfigurationError(
            f"{celled}: has structure {marked[celled]}, and other weights of the model another; N:M, whose number of "
            "active weights is no choice, is for all weights of a DSModel or for none"
        )
    return {escape(name): each for name, each in marked.items()}


class Table(str):
    """A table in plain characters."""

    __slots__ = ()

    def get_string(self) -> str:
        """Itself; the pack's tables were asked so."""
        return str(self)


def _table(head: list[str], rows: list[list[Any]]) -> Table:
    """A table of plain characters, everything to the right."""
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    line = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    texts = [
        "|" + "|".join(f" {cell:>{width}} " for cell, width in zip(row, widths, strict=True)) + "|" for row in cells
    ]
    return Table("\n".join([line, texts[0], line, *texts[1:], line]))
