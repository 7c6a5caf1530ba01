"""Dynamic sparse reparameterization: prune by a global threshold, reallocate what was freed across tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from gossamer.checks import check_integer, check_number, closest
from gossamer.distribution import Distribution, allocate, apportion_groups
from gossamer.errors import ConfigurationError, StateError
from gossamer.groups import changes
from gossamer.masks import count_over_shards, is_packed, unpack_like
from gossamer.method import Proposal, StateOf
from gossamer.schedule import Schedule, as_schedule
from gossamer.scores import magnitude
from gossamer.weights.masked import MaskMethod
from gossamer.weights.ranking import drop, grow, scores_of_active

_THRESHOLDS = (1e-30, 1e30)
"""The threshold stays within: beyond any weight that trains it would take long to come back, or never."""

HEURISTICS: dict[str, Callable[[int, int, int], int]] = {
    "paper": lambda total, before, left: left,
    "within": lambda total, before, left: before - left,
    "anti-paper": lambda total, before, left: total - left,
}
"""A tensor's share of what was freed: proportional to a function of its groups in all, before and after pruning."""


def check_heuristic(heuristic: object) -> None:
    """Raise a ConfigurationError unless this is a name of `HEURISTICS`."""
    if not isinstance(heuristic, str) or heuristic not in HEURISTICS:
        raise ConfigurationError(
            f"heuristic: got {heuristic!r}; allowed are {', '.join(map(repr, HEURISTICS))}"
            + closest(str(heuristic), HEURISTICS)
        )


@dataclass(eq=False)
class DSR(MaskMethod):
    """Dynamic sparse reparameterization (Mostafa & Wang, 2019, Algorithm 1).

    An update prunes the active groups whose norm is below a threshold `H`, at least one is left in every tensor;
    grows exactly as many at random, none of those just pruned, `G_l ∝ R_l` in a tensor with `R_l` survivors; and
    adapts the threshold: `H ← H/gain` where more than `(1 + tolerance)` of the intended number were pruned,
    `H ← H·gain` where fewer than `(1 − tolerance)`. The budget is exact after every update: what a full tensor
    cannot take goes to the others, and groups just pruned return only where there is no other room.

    The three steps are also phases of their own, `Sparsity.update("prune")`, `"reallocate"`, `"adjust_threshold"`.

    Args:
        every: Steps between updates, or a schedule such as `EpochPeriods`.
        until: Last step at which masks change.
        prune_fraction: Intended number of weights to prune at an update, as a fraction in (0, 1) of the weights
            that `over` names; at most half of the active ones.
        prune_count: The same as a number, instead of the fraction (the paper: 20,000 for WRN-28-2).
        threshold: First threshold `H`, of the Lp-norm of a group.
        tolerance: Tolerated relative deviation from the intended number, in [0, 1).
        gain: Factor by which the threshold is adapted, above 1.
        heuristic: Shares of the tensors in what was freed: `"paper"` (in proportion to survivors), `"within"`
            (each tensor gets back what it lost), `"anti-paper"` (in proportion to what is not surviving).

    See `MaskMethod` for the other arguments.
    """

    _: KW_ONLY
    distribution: Distribution = "uniform"
    every: int | Schedule = 100
    until: int | None = None
    prune_fraction: float = 0.01
    prune_count: int | None = None
    threshold: float = 1e-3
    tolerance: float = 0.1
    gain: float = 2.0
    heuristic: str = "paper"

    name = "dsr"

    def _check(self) -> None:
        super()._check()
        self._schedule = as_schedule(self.every, until=self.until)
        check_number("prune_fraction", self.prune_fraction, 0, 1, open_high=True)
        if self.prune_fraction == 0:
            raise ConfigurationError("prune_fraction: expected a number above 0, got 0; for masks that stay use Static")
        if self.prune_count is not None:
            check_integer("prune_count", self.prune_count, at_least=1)
        for field in ("threshold", "gain"):
            check_number(field, getattr(self, field), 0, float("inf"), open_high=True)
        check_number("tolerance", self.tolerance, 0, 1, open_high=True)
        if self.threshold == 0 or self.gain <= 1:
            raise ConfigurationError(
                f"threshold={self.threshold}, gain={self.gain}: the threshold must be above 0 and the gain "
                "above 1, or the threshold could never adapt"
            )
        check_heuristic(self.heuristic)

    def _start(self, given: list[tuple[Tensor, int]] | None) -> list[tuple[Tensor, int]]:
        masks = super()._start(given)
        active = self._weights([count for _, count in masks])
        most = active - sum(groups.size for groups in self.groups)
        if self.prune_count is not None and self.prune_count > most:
            raise ConfigurationError(
                f"prune_count: got {self.prune_count}, but only {most} of {active} active weights can go (one group a "
                "tensor stays); choose a tenth of them"
            )
        self.intended = self._aim(active)
        self._pruned: list[Tensor] | None = None
        self._before = [active for _, active in masks]
        self._last_pruned: int | None = 0
        return masks

    def _aim(self, active: int) -> float:
        """The number of weights that an update is to prune, of so many active ones."""
        most = active - sum(groups.size for groups in self.groups)  # the threshold would grow without end above
        if self.prune_count is not None:
            return min(self.prune_count, most)
        whole = self._weights([groups.total for groups in self.groups])
        weights = self.all_parameters if self.over == "all" else whole
        return min(self.prune_fraction * weights, active / 2, most)  # above a half little of the network is left

    def due(self, step: int) -> bool:
        """See `Method.due`."""
        return self._schedule.due(step)

    def phases(self) -> dict[str, Callable[[int, StateOf], Proposal]]:
        """See `Method.phases`."""
        return {
            "prune": self._prune_alone,
            "reallocate": self._reallocate_alone,
            "adjust_threshold": self._adjust_alone,
        }

    def update(self, step: int, state: StateOf) -> Proposal:
        """See `Method.update`."""
        alive = self._alive()
        active = self._prune(alive, self._active(alive), state)
        active = self._reallocate(alive, active)
        self._adjust()
        return self._proposal(alive, active)

    def _prune_alone(self, step: int, state: StateOf) -> Proposal:
        alive = self._alive()
        return self._proposal(alive, self._prune(alive, self._active(alive), state))

    def _reallocate_alone(self, step: int, state: StateOf) -> Proposal:
        alive = self._alive()
        return self._proposal(alive, self._reallocate(alive, self._active(alive)))

    def _adjust_alone(self, step: int, state: StateOf) -> Proposal:
        self._adjust()
        return Proposal([], {"threshold": self.threshold})

    def _proposal(self, alive: list[Tensor], active: list[int]) -> Proposal:
        return Proposal(self._changes(alive), {"threshold": self.threshold})

    def _prune(self, alive: list[Tensor], active: list[int], state: StateOf) -> list[int]:
        index, norms = scores_of_active(self.groups, alive, magnitude, state, self.p)
        below = count_over_shards(self.groups, [(norm < self.threshold).sum() for norm in norms])
        trained = self._trained()
        # The largest survives even where all are below the threshold: an empty tensor cuts the network in two.
        counts = [min(low, now - 1) if each else 0 for low, now, each in zip(below, active, trained, strict=True)]
        pruned = drop(self.groups, alive, index, norms, counts)
        if self._pruned is None:
            self._pruned, self._before = pruned, active
        else:  # pruned twice before it is reallocated
            self._pruned = [torch.cat(parts) for parts in zip(self._pruned, pruned, strict=True)]
        # Where layers are frozen, what the others pruned is held against their part of the intended number.
        part = self._weights([now * each for now, each in zip(active, trained, strict=True)])
        gone = self._weights(counts)
        self._last_pruned = gone * self._weights(active) // part if part > self._weights(trained) else None
        return [now - count for now, count in zip(active, counts, strict=True)]

    def _reallocate(self, alive: list[Tensor], active: list[int]) -> list[int]:
        pruned = self._pruned or [mask.new_empty(0, dtype=torch.int64) for mask in alive]
        self._pruned = None
        lost = count_over_shards(self.groups, [torch.tensor(len(gone), device=gone.device) for gone in pruned])
        trained = self._trained()  # layers frozen since they were pruned keep their masks all the same
        rooms = [
            each.total - now - gone if open_ else 0
            for each, now, gone, open_ in zip(self.groups, active, lost, trained, strict=True)
        ]
        lost = [gone if open_ else 0 for gone, open_ in zip(lost, trained, strict=True)]
        free = [(mask == 0).index_fill_(0, gone, False) for mask, gone in zip(alive, pruned, strict=True)]
        if self.groups[0].cell is not None:  # every cell, and so every tensor, gets back what it lost
            if groups := list(compress(self.groups, trained)):
                masks, places = list(compress(alive, trained)), list(compress(free, trained))
                grow(groups, masks, places, rooms, lost, self.generator)
            whole = allocate("uniform", self.groups, self.budget)
            return [count if open_ else now for count, now, open_ in zip(whole, active, trained, strict=True)]
        freed = self.budget - self._weights(active)
        counts = self._apportion(freed, active, rooms)
        grow(self.groups, alive, free, rooms, counts, self.generator)
        if back := freed - self._weights(counts):  # no other room, or none that a group of its size fits in
            again = self._apportion(back, active, lost)
            free = [
                torch.zeros_like(mask, dtype=torch.bool).index_fill_(0, gone, True)
                for mask, gone in zip(alive, pruned, strict=True)
            ]
            grow(self.groups, alive, free, lost, again, self.generator)
            counts = [first + second for first, second in zip(counts, again, strict=True)]
        return [now + more for now, more in zip(active, counts, strict=True)]

    def _apportion(self, weights: int, active: list[int], rooms: list[int]) -> list[int]:
        share = HEURISTICS[self.heuristic]
        wanted = [
            share(groups.total, was, now) * groups.size
            for groups, was, now in zip(self.groups, self._before, active, strict=True)
        ]
        return apportion_groups(weights, wanted, rooms, [groups.size for groups in self.groups])

    def _adjust(self) -> None:
        pruned = self._last_pruned
        if pruned is None:  # nothing could go, so its number says nothing about the threshold
            return
        if pruned > (1 + self.tolerance) * self.intended:
            self.threshold = max(self.threshold / self.gain, min(self.threshold, _THRESHOLDS[0]))
        elif pruned < (1 - self.tolerance) * self.intended:
            self.threshold = min(self.threshold * self.gain, max(self.threshold, _THRESHOLDS[1]))

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`; the threshold has adapted since, and is in the state."""
        return {name: value for name, value in super().settings().items() if name != "threshold"}

    def state_dict(self) -> dict[str, Any]:
        """See `Method.state_dict`."""
        return super().state_dict() | {
            "threshold": self.threshold,
            "before": list(self._before),
            "last_pruned": self._last_pruned,
            "spared": None if self._pruned is None else self._pack_spared(self._pruned),
        }

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """See `Method.check_state`."""
        super().check_state(state, masks)
        threshold = state.get("threshold")
        if not isinstance(threshold, float | int) or type(threshold) is bool or not 0 < threshold < float("inf"):
            raise StateError(
                f"{self.name}: the saved threshold is {threshold!r}, expected a number above 0; the file is damaged"
            )
        before = state.get("before")
        last = state.get("last_pruned", -1)
        counts = [*(before if isinstance(before, list) else [None]), 0 if last is None else last]
        if len(counts) != len(self.groups) + 1 or any(type(count) is not int or count < 0 for count in counts):
            raise StateError(
                f"{self.name}: the saved counts of the last update are {before!r:.100}; the file is damaged"
            )
        spared = state.get("spared")
        if spared is None:
            return
        fits = isinstance(spared, Mapping) and all(is_packed(spared.get(t.name), t.shape) for t in self.tensors)
        if not fits:
            raise StateError(f"{self.name}: the saved masks of what was just pruned do not fit; the file is damaged")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`."""
        super().load_state_dict(state)
        self.intended = self._aim(self.budget)
        self.threshold = state["threshold"]
        self._before = list(state["before"])
        self._last_pruned = state["last_pruned"]
        self._pruned = None
        if (spared := state.get("spared")) is not None:
            masks = {tensor.name: unpack_like(spared[tensor.name], tensor) for tensor in self.tensors}
            self._pruned = [(groups.collapse(masks) == 0).nonzero().view(-1) for groups in self.groups]

    def _pack_spared(self, pruned: list[Tensor]) -> dict[str, Tensor]:
        """What was not just pruned, as masks of weights: indices are of one rank, masks can be sharded anew."""
        alive = [torch.full_like(groups.alive(), -1) for groups in self.groups]
        for mask, gone in zip(alive, pruned, strict=True):
            mask.index_fill_(0, gone, 0)
        return {each.tensor.name: each.tensor.pack(each.mask) for each in changes(self.groups, alive)}

    def _admits(self, active: int, budget: int) -> bool:
        return active <= budget  # fewer between the phases "prune" and "reallocate"
