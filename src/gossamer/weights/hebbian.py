"""Hebbian sparsity: connections whose two ends are active together stay, the others make room for new ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial, reduce
from itertools import compress, zip_longest
from math import prod
from operator import or_
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.checks import check_boolean, check_integer, check_number
from gossamer.choice import largest_in_slices, refuse_nan
from gossamer.connections import Connections, Statistic
from gossamer.distribution import Distribution, active_weights, apportion_groups
from gossamer.errors import ConfigurationError, OrderError, StateError
from gossamer.groups import Groups, changes, layout_of
from gossamer.masks import Change, MaskedTensor, count_over_shards, rows_like
from gossamer.method import Masks, Proposal, StateOf
from gossamer.scores import Score, View, as_score, magnitude
from gossamer.sites import see_hooks
from gossamer.strengths import LAYERS, check_activity, coactivation, correlation
from gossamer.structure import Element, as_structure
from gossamer.targets import local
from gossamer.weights.drop_grow import DropGrow, portion
from gossamer.weights.ranking import prune_to, random_scores

STATISTICS = ("coactivation", "correlation", "absolute_correlation")
SCOPES = ("slice", "tensor", "model")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
}


@dataclass(eq=False)
class Hebbian(DropGrow):
    """Keep the connections whose input and output are active together, in the manner of Hebb (1949).

    The strength of a connection is how often its input and its output were both active, as a fraction of the times
    they could have been, or their correlation (see `gossamer.scores.coactivation` and `correlation`). It is known of
    pruned connections too; those of equal strength are ranked at random. Every so often the weakest active ones of a
    tensor are dropped, and as many grow, which begin anew. Strengths are measured in training, in every forward pass of
    every `count_every`-th step (and of those before it that were skipped for gradients that are not finite), over all
    ranks. A layer that was not measured since the last update, while others were, keeps its mask.

    Args:
        drop_score: `"strength"`; `"strength_or_magnitude"`: only what both would drop goes, magnitudes of positive and
            negative weights being ranked apart but in slices; `"weighted_magnitude"`, strength times magnitude; or any
            other score.
        grow_score: `"random"`, `"strength"`, `"gradient"` or any other score. At random, what was just dropped does not
            grow; else it may, and begins anew too.
        scope: What is ranked against each other: `"tensor"`, all weights of each; `"model"`, the weights of all
            tensors, which may then get more or fewer of them, one at least, coactivations in units of their mean over
            the tensor; `"slice"`, those of each slice of a weight
            along `prune_dims`, which all have the same number of active ones.
        prune_dims: Dimensions of a weight that slices are taken along; what is ranked are the others. `None` for (0, 1)
            of a convolution, so that a slice is a kernel, and (0,) of a linear layer, all inputs of an output.
        statistic: `"coactivation"`, `"correlation"` or `"absolute_correlation"`.
        threshold: What is active, for coactivation; see there.
        sigmoid: Likewise.
        deviations: Likewise.
        activation: Applied to the layer's output before it is measured: `"relu"`, `"sigmoid"`, `"tanh"`, `"gelu"`,
            `"silu"`, or a function of a tensor, which gets a copy; `None` for the output as it is.
        count_every: Steps of which one is measured, up to `until`; at most those between two updates.
        decay: Of a moving average over the steps measured, in [0, 1), which updates leave alone; `None` for the sum
            since the last update.
        reinitialize: Whether weights that grow start from `U(-b, b)` with `b = √(6/n)`, n being the inputs of an output
            in the dense layer (He et al., 2015); else from 0.

    The distribution is `"uniform"` unless another is given. See `DropGrow` and `MaskMethod` for the other arguments.

    Raises:
        ConfigurationError: A value out of range, when the method is made.
    """

    _: KW_ONLY
    distribution: Distribution = "uniform"
    drop_score: str | Score = "strength"
    grow_score: str | Score = "random"
    scope: str = "tensor"
    prune_dims: Sequence[int] | None = None
    statistic: str = "coactivation"
    threshold: float = 0.0
    sigmoid: bool = False
    deviations: float | None = None
    activation: str | Callable[[Tensor], Tensor] | None = None
    count_every: int = 20
    decay: float | None = None
    reinitialize: bool = True

    name = "hebbian"
    steps = (*DropGrow.steps, "count_every")

    def _check(self) -> None:
        super()._check()
        for name, value, allowed in (("scope", self.scope, SCOPES), ("statistic", self.statistic, STATISTICS)):
            if value not in allowed:
                raise ConfigurationError(f"{name}: got {value!r}; allowed are {', '.join(map(repr, allowed))}")
        check_boolean("reinitialize", self.reinitialize)
        check_activity(self.threshold, self.sigmoid, self.deviations)
        if self.statistic != "coactivation" and (self.threshold or self.sigmoid or self.deviations is not None):
            raise ConfigurationError(
                f"threshold, sigmoid and deviations say what is active, and statistic={self.statistic!r} does not ask; "
                "leave them out, or take 'coactivation'"
            )
        named = isinstance(self.activation, str) and self.activation in ACTIVATIONS
        if not (self.activation is None or callable(self.activation) or named):
            raise ConfigurationError(
                f"activation: got {self.activation!r}; allowed are {', '.join(map(repr, ACTIVATIONS))}, or a function"
            )
        if self.decay is not None:
            check_number("decay", self.decay, 0, 1, open_high=True)
        check_integer("count_every", self.count_every, at_least=1)
        if self._schedule.shortest is not None and self.count_every > self._schedule.shortest:
            raise ConfigurationError(
                f"count_every={self.count_every}: nothing would be measured between updates that are "
                f"{self._schedule.shortest} steps apart; measure more often"
            )
        self._check_scope()

    def _check_scope(self) -> None:
        structure = as_structure(self.structure)
        if self.prune_dims is not None:
            if self.scope != "slice":
                raise ConfigurationError(f"prune_dims={self.prune_dims!r} is for scope='slice', got {self.scope!r}")
            listed = self.prune_dims if isinstance(self.prune_dims, list | tuple) else ()
            for dim in listed:
                check_integer("prune_dims", dim, at_least=0)
            if listed is not self.prune_dims or len(set(listed)) < len(listed):
                raise ConfigurationError(f"prune_dims: expected a list of different numbers, got {self.prune_dims!r}")
        if self.scope != "tensor" and not isinstance(structure, Element):
            raise ConfigurationError(f"scope={self.scope!r} ranks single weights; structure {structure} needs 'tensor'")
        if self.scope == "slice" and self.over != "targets":
            raise ConfigurationError("scope='slice' has as many active weights in every slice; use over='targets'")
        if self.scope == "slice" and self.distribution != "uniform":
            raise ConfigurationError(
                f"distribution={self.distribution!r}: slices of all weights are equally sparse; use 'uniform', and "
                "several methods with targets for several sparsities"
            )

    # -- scores ------------------------------------------------------------------------------------------------------

    def _own_scores(self) -> dict[str, Score]:
        def strength(view: View) -> Tensor:
            return self._untied(view, 1.0)

        def weighted_magnitude(view: View) -> Tensor:
            return self._untied(view, view.weight.abs())

        strength.signed = weighted_magnitude.signed = self.statistic == "correlation"  # type: ignore[attr-defined]
        return {"strength": strength, "strength_or_magnitude": strength, "weighted_magnitude": weighted_magnitude}

    def _untied(self, view: View, factor: Tensor | float) -> Tensor:
        """The strengths of a view's connections times a factor, float64; equal ones in random order."""
        tensor = self._by_name[view.name]
        device = tensor.mask.device
        whole = self._connections[view.name].strength().to(device)
        if self.scope == "model" and self.statistic == "coactivation":
            # Layers differ in how often anything is active at all, which says nothing of single connections.
            whole = whole / whole.mean().clamp(min=torch.finfo(whole.dtype).tiny)
        # Two numbers of the generator each, since one each may be those that the weights were drawn from.
        chance = torch.rand(tensor.shape, generator=self.generator, dtype=torch.float64).to(device)
        whole, chance = (view.take(rows_like(each.double(), tensor.parameter)) for each in (whole, chance))
        # Whole layers may tie: counts, where inputs are always active, or never. By their index the first would stay.
        # The factor is too near 1 to change the order of different strengths, which are of single precision.
        return whole * factor * (1 + 2**-26 * chance) + 1e-30 * chance

    def _drop_by(self) -> Score:
        """See `DropGrow._drop_by`; for "strength_or_magnitude" the strength."""
        return as_score(self.drop_score, "drop_score", self._own_scores())

    def _grow_by(self) -> Score | None:
        """See `DropGrow._grow_by`."""
        if self.grow_score == "random":
            return None
        return as_score(self.grow_score, "grow_score", {"strength": self._own_scores()["strength"]})

    # -- life cycle --------------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module, masks: Masks) -> None:
        """See `Method.bind`."""
        super().bind(model, masks)
        statistic: Statistic = partial(correlation, absolute=self.statistic == "absolute_correlation")
        if counts := self.statistic == "coactivation":
            options = {name: getattr(self, name) for name in ("threshold", "sigmoid", "deviations")}
            statistic = partial(coactivation, **options)
        activation = ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
        self._connections = {
            tensor.name: Connections(tensor.name, tensor.shape, statistic, not counts, activation, self.decay)
            for tensor in self.tensors
        }
        self._steps = 0

    def install(self) -> None:
        """See `Method.install`."""
        super().install()
        see_hooks()
        for tensor in self.tensors:
            for owner, _ in tensor.target.places:
                owner.register_forward_hook(self._connections[tensor.name], with_kwargs=True)
        self._open()

    def after_step(self, step: int) -> None:
        """See `Method.after_step`: takes what this step has measured into the strengths, over all ranks."""
        if self._measures():
            self._collect()
        self._steps = step
        self._open()

    def detach(self) -> None:
        """See `Method.detach`."""
        self._take_off()

    def finalize(self) -> None:
        """See `Method.finalize`."""
        self._take_off()

    def _take_off(self) -> None:
        for tensor in self.tensors:
            for owner, _ in tensor.target.places:
                for key, hook in list(owner._forward_hooks.items()):
                    if hook is self._connections[tensor.name]:
                        del owner._forward_hooks[key]
                        del owner._forward_hooks_with_kwargs[key]

    def _measures(self) -> bool:
        """Whether the passes of the coming step are measured."""
        end = self._schedule.end
        return self._steps % self.count_every == 0 and (end is None or self._steps < end)

    def _open(self) -> None:
        measured = self._measures()
        for tensor in self.tensors:
            self._connections[tensor.name].open(measured, local(tensor.parameter).device)

    def _collect(self) -> None:
        """Take what was measured into the strengths; one collective where processes work together."""
        found = list(self._connections.values())
        parts = [part for each in found for part in each.close()]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            together = torch.cat([part.reshape(-1) for part in parts])
            dist.all_reduce(together)
            for part, summed in zip(parts, torch.split(together, [part.numel() for part in parts]), strict=True):
                part.copy_(summed.view_as(part))
        for each in found:
            each.collect()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if hasattr(self, "_connections"):
            self._open()

    # -- what it tells -----------------------------------------------------------------------------------------------

    def strengths(self) -> dict[str, Tensor]:
        """The strengths of all connections by the weight's name, float32 in its global shape.

        Between an update and the next step that is measured they are those by which the update ranked. Zeros where
        nothing was measured yet.
        """
        return {name: each.strength() for name, each in self._connections.items()}

    def learned(self) -> list[dict[str, Any]]:
        """See `Method.learned`: of every weight the mean strength of active and of pruned connections."""
        rows = []
        for tensor in self.tensors:
            whole = self._connections[tensor.name].strength().to(tensor.mask.device)
            strength = rows_like(whole, tensor.parameter)
            sums = torch.stack([(strength * kept).sum() for kept in (tensor.mask != 0, tensor.mask == 0)])
            if tensor.process_group is not None:
                dist.all_reduce(sums, group=tensor.process_group)
            counts = (tensor.active, tensor.weights - tensor.active)
            active, pruned = (each / max(1, count) for each, count in zip(sums.tolist(), counts, strict=True))
            rows.append({"name": tensor.name, "strength_active": active, "strength_pruned": pruned})
        return rows

    def config(self) -> dict[str, Any]:
        """See `Method.config`; also what the saved sums mean."""
        activation = self.activation
        if callable(activation):
            activation = getattr(activation, "__qualname__", type(activation).__qualname__)
        return super().config() | {
            "statistic": self.statistic,
            "threshold": float(self.threshold),
            "sigmoid": self.sigmoid,
            "deviations": None if self.deviations is None else float(self.deviations),
            "activation": activation,
            "decay": None if self.decay is None else "a moving average",
        }

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        elsewhere = self.config().keys() - {"decay"}  # whose value may change
        found = {name: value for name, value in super().settings().items() if name not in elsewhere}
        return found | {"prune_dims": None if self.prune_dims is None else list(self.prune_dims)}

    def state_dict(self) -> dict[str, Any]:
        """See `Method.state_dict`."""
        measured = [each.state_dict() for each in self._connections.values()]
        return super().state_dict() | {"measured": measured, "steps": self._steps}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """See `Method.check_state`."""
        super().check_state(state, masks)
        measured, steps = state.get("measured"), state.get("steps")
        if type(steps) is not int or steps < 0:
            raise StateError(f"{self.name}: the saved number of steps is {steps!r:.40}; the file is damaged")
        listed = measured if isinstance(measured, list) and len(measured) == len(self._connections) else []
        for (name, each), saved in zip_longest(self._connections.items(), listed):
            if not each.fits(saved):
                raise StateError(
                    f"{self.name}: {name}: what was saved of its strengths is not a finite number for each of its "
                    f"{tuple(each.shape)} connections, or a count below 0; the file is damaged, use an earlier one"
                )
        alive = [groups.collapse(masks) for groups in self.groups] if self.scope == "slice" else []
        for name, uneven in self._uneven(alive):
            if uneven:
                raise StateError(
                    f"{self.name}: {name}: {uneven} slices of the saved mask have more or fewer active weights than "
                    "the others; attach with the scope and the prune_dims it was saved with"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        super().load_state_dict(state)
        for each, saved in zip(self._connections.values(), state["measured"], strict=True):
            each.load_state_dict(saved)
        self._steps = state["steps"]
        self._open()

    # -- slices ------------------------------------------------------------------------------------------------------

    def _start(self, given: list[tuple[Tensor, int]] | None) -> list[tuple[Tensor, int]]:
        self._by_name = {tensor.name: tensor for tensor in self.tensors}
        for tensor in self.tensors:
            self._check_tensor(tensor)
        first = super()._start(given)
        if self.scope == "slice":
            self._check_slices(first)
        return first

    def _check_slices(self, first: list[tuple[Tensor, int]]) -> None:
        for name, uneven in self._uneven([alive for alive, _ in first]):
            if uneven:
                raise ConfigurationError(
                    f"{name}: {uneven} slices of the given mask have more or fewer active weights than the others, and "
                    "scope='slice' keeps as many in each; give other masks, or use scope='tensor'"
                )
        for groups, (_, active) in zip(self.groups, first, strict=True):
            count = active * self._slice_size(groups.tensors[0]) // groups.total
            if self.drop_fraction and not portion(self.drop_fraction, count):
                raise ConfigurationError(
                    f"{groups.name}: of {count} active weights in a slice drop_fraction={self.drop_fraction:g} drops "
                    "none, so that its mask would never change; "
                    + (f"give at least {math.ceil(1e4 / count) / 1e4:g}, or " if count > 1 else "")
                    + "use scope='tensor'"
                )

    def _uneven(self, alive: list[Tensor]) -> list[tuple[str, int]]:
        """Of each of these masks of weights how many slices have more or fewer active weights than the mean."""
        if not alive:
            return []
        means = [
            active * self._slice_size(groups.tensors[0]) / groups.total
            for groups, active in zip(self.groups, self._active(alive), strict=True)
        ]
        found = [
            (self._count(groups, mask) != mean).count_nonzero()
            for groups, mask, mean in zip(self.groups, alive, means, strict=True)
        ]
        return list(zip([groups.name for groups in self.groups], count_over_shards(self.groups, found), strict=True))

    def _check_tensor(self, tensor: MaskedTensor) -> None:
        for owner, attribute in tensor.target.places:
            if not isinstance(owner, LAYERS) or attribute != "weight":
                raise ConfigurationError(
                    f"{tensor.name}: belongs to a {type(owner).__name__}, whose connections cannot be measured; "
                    f"those of linear layers and convolutions can: leave it out with targets=['!{tensor.name}']"
                )
        if self.scope == "slice":
            dims = self._dims(tensor)
            if max(dims, default=0) >= len(tensor.shape) or self._slice_size(tensor) == 1:
                raise ConfigurationError(
                    f"{tensor.name}: slices of shape {tensor.shape} along dimensions {list(dims)} have a single "
                    "weight, or do not exist; give other prune_dims, use scope='tensor', or leave it out with "
                    f"targets=['!{tensor.name}']"
                )

    def _dims(self, tensor: MaskedTensor) -> Sequence[int]:
        if self.prune_dims is None:
            return (0,) if len(tensor.shape) == 2 else (0, 1)
        return self.prune_dims

    def _slice_size(self, tensor: MaskedTensor) -> int:
        return prod(side for dim, side in enumerate(tensor.shape) if dim not in self._dims(tensor))

    def _split(self) -> list[int]:
        """Active groups of each tensor; as many in each slice, where slices are ranked."""
        if self.scope != "slice":
            return super()._split()
        if self.sparsity is None:
            raise ConfigurationError("no sparsity; scope='slice' needs one, in [0, 1), or masks given to `attach`")
        counts = []
        for groups in self.groups:
            size = self._slice_size(groups.tensors[0])
            count = active_weights(self.sparsity, size)
            if not count:
                most = math.floor(1e4 * (1 - 1 / size)) / 1e4
                raise ConfigurationError(
                    f"{groups.name}: slices of {size} weights cannot be sparser than {most:g}, and "
                    f"sparsity={self.sparsity} was asked for; use scope='tensor', or leave it out with "
                    f"targets=['!{groups.name}']"
                )
            counts.append(groups.total // size * count)
        return counts

    def _random_masks(self, counts: list[int]) -> list[tuple[Tensor, int]]:
        if self.scope != "slice":
            return super()._random_masks(counts)
        found = []
        for groups, count in zip(self.groups, counts, strict=True):
            scores = random_scores(groups, groups.total, self.generator)
            each = torch.tensor([count * self._slice_size(groups.tensors[0]) // groups.total], device=scores.device)
            found.append((self._choose(groups, scores, each).to(torch.int8).neg_(), count))
        return found

    def _whole_slices(self, groups: Groups, values: Tensor) -> Tensor:
        """Values of all weights on this rank in the weight's shape, of which each slice is on one rank."""
        tensor = groups.tensors[0]
        if tensor.process_group is not None and 0 not in self._dims(tensor):
            raise ConfigurationError(
                f"{tensor.name}: is sharded along dimension 0, which slices must not be cut by; have 0 among prune_dims"
            )
        return values.view(tensor.mask.shape)

    def _count(self, groups: Groups, mask: Tensor) -> Tensor:
        """How many of each slice are not 0, int64 `(slices,)`."""
        others = [dim for dim in range(len(groups.shape)) if dim not in self._dims(groups.tensors[0])]
        return (self._whole_slices(groups, mask) != 0).sum(others).reshape(-1)

    def _choose(self, groups: Groups, scores: Tensor, counts: Tensor) -> Tensor:
        """The highest of each slice, so many of each, bool in the shape of the scores."""
        dims = self._dims(groups.tensors[0])
        return largest_in_slices(self._whole_slices(groups, scores), counts, dims).reshape(-1)

    # -- updates -----------------------------------------------------------------------------------------------------

    def update(self, step: int, state: StateOf) -> Proposal:
        """See `Method.update`.

        Raises:
            OrderError: No layer was measured yet.
            ConfigurationError: No connection of a layer that was measured has a strength.
        """
        if self._measures():  # the passes of this step count too
            self._collect()
            self._open()
        return super().update(step, state)

    def _moving(self) -> list[bool]:
        """See `DropGrow._moving`; a layer that was not measured since the last update keeps its mask."""
        moving, own = super()._moving(), self._own_scores()
        asked = [score for score in (self.drop_score, self.grow_score) if isinstance(score, str)]
        if not any(moving) or not any(score in own for score in asked):
            return moving

        def among(names: dict[str, bool]) -> list[bool]:
            whole = [all(names[tensor.name] for tensor in groups.tensors) for groups in self.groups]
            return [moves and has for moves, has in zip(moving, whole, strict=True)]

        parts = [(each.fresh(), each.samples > 0, each.total.any()) for each in self._connections.values()]
        told = torch.stack([torch.stack(each) for each in parts]).t().tolist()
        fresh, known, reached = (dict(zip(self._connections, each, strict=True)) for each in told)
        measured, ever = among(fresh), among(known)
        if not any(ever):
            raise OrderError(
                f"{next(compress(self.groups, moving)).tensors[0].name}: no forward pass in training was measured, of "
                "this or any other trained layer, so that connections have no strengths; train some steps first"
            )
        if not any(measured):  # soon after another update: strengths are what they were
            measured = ever
        for groups, moves, has in zip(self.groups, moving, ever, strict=True):
            if moves and not has:
                warnings.warn(
                    f"{groups.name}: no forward pass went through its layer so far, so that its mask stays; where its "
                    "weight is used by other means it cannot be measured, and is best left out with "
                    f"targets=['!{groups.name}']",
                    stacklevel=2,
                )
        for groups in compress(self.groups, measured):
            for tensor in groups.tensors:
                if not reached[tensor.name]:
                    raise ConfigurationError(f"{tensor.name}: {self._nothing(self._connections[tensor.name])}")
        return measured

    def _nothing(self, connections: Connections) -> str:
        """Why all strengths of a layer that was measured are 0, and what helps."""
        at = f"at {float(connections.samples):.0f} occasions no connection had"
        if self.statistic != "coactivation":
            return (
                f"{at} an input and an output that vary over a batch, so that none can be ranked; train with batches "
                "of several samples, or see whether the layer is dead"
            )
        limit = f"{self.threshold:g}" if self.deviations is None else f"mean + {self.deviations:g} deviations"
        return (
            f"{at} its input and its output above {limit}, so that none can be ranked; lower that, or see whether the "
            "layer is dead"
        )

    def _drop(self, groups: list[Groups], alive: list[Tensor], fraction: float, state: StateOf) -> list[Tensor]:
        """See `DropGrow._drop`."""
        stay = super()._drop(groups, alive, fraction, state)
        if self.drop_score != "strength_or_magnitude":
            return stay
        parts = [alive]
        if self.scope != "slice" and isinstance(as_structure(self.structure), Element):  # of few, a part of none goes
            below = [each.scores(_weight, state) < 0 for each in groups]
            parts = [[mask * part for mask, part in zip(alive, below, strict=True)]]
            parts.append([mask * ~part for mask, part in zip(alive, below, strict=True)])
        large = [self._without(fraction, magnitude, groups, part, state) for part in parts]
        return [reduce(or_, masks) for masks in zip(stay, *large, strict=True)]

    def _without(
        self, fraction: float, score: Score, groups: list[Groups], alive: list[Tensor], state: StateOf
    ) -> list[Tensor]:
        """See `DropGrow._without`; such a fraction of each slice, or of all together."""
        if self.scope == "tensor":
            return super()._without(fraction, score, groups, alive, state)
        kept = [mask.clone() for mask in alive]
        if self.scope == "slice":
            for each, mask in zip(groups, kept, strict=True):
                scores = each.scores(score, state)
                refuse_nan([each], [scores])
                counts = self._count(each, mask)
                drops = portion(fraction, counts)
                if self._grow_by() is None:  # what was just dropped does not grow
                    drops = torch.minimum(drops, self._slice_size(each.tensors[0]) - counts)
                counts -= drops
                mask.copy_(self._choose(each, scores.masked_fill_(mask == 0, -torch.inf), counts)).neg_()
        else:
            active = self._counts(groups, alive)
            room = sum(self._rooms(groups, active))
            prune_to(groups, kept, [sum(active) - min(portion(fraction, sum(active)), room)], score, state, self.p)
        return kept

    def _grow(self, groups: list[Groups], alive: list[Tensor], kept: list[Tensor], state: StateOf) -> None:
        """See `DropGrow._grow`; as many in each slice."""
        if self.scope != "slice":
            super()._grow(groups, alive, kept, state)
            return
        score = self._grow_by()
        for each, mask, stays in zip(groups, alive, kept, strict=True):
            free = (mask if score is None else stays) == 0
            scores = random_scores(each, len(mask), self.generator) if score is None else each.scores(score, state)
            refuse_nan([each], [scores])
            missing = self._count(each, mask) - self._count(each, stays)
            scores.masked_fill_(~free, torch.finfo(scores.dtype).min).masked_fill_(stays != 0, -torch.inf)
            mask.copy_(stays).sub_(self._choose(each, scores, missing).to(torch.int8))

    def _wanted(self, was: list[int], now: list[int], rooms: list[int]) -> list[int] | int:
        """See `DropGrow._wanted`."""
        if self.scope != "model":
            return super()._wanted(was, now, rooms)
        lost = sum(was) - sum(now)
        return lost if self._grow_by() is not None else apportion_groups(lost, now, rooms, [1] * len(was))

    def _renew(self, kept: list[Tensor], alive: list[Tensor]) -> list[Change]:
        """See `DropGrow._renew`; what was not kept begins anew, and so do the sums."""
        for each in self._connections.values():
            each.begin_anew()
        stays = {change.tensor.name: change.mask for change in changes(self.groups, kept)}
        found = self._changes(alive)
        for change in found:
            tensor = change.tensor
            change.renewed = change.mask & ~stays[tensor.name]
            if self.reinitialize and tensor.computed is None:
                layout = layout_of(tensor.target)
                bound = math.sqrt(6 / (layout.inputs * layout.kernel))
                first = torch.rand(tensor.shape, generator=self.generator).mul_(2 * bound).sub_(bound)
                change.values = rows_like(first, tensor.parameter).to(tensor.mask.device, tensor.parameter.dtype)
        return found


def _weight(view: View) -> Tensor:
    return view.weight
