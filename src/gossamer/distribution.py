"""How a budget of active weights is split over tensors.

A budget is a number of active weights. It comes from a sparsity by one of two definitions: the fraction of zeros
among the weights of the chosen tensors (`over="targets"`), or among all parameters of the model (`over="all"`, where
biases, norms and every other dense parameter use up part of the budget). The two differ: WRN-28-2 at 0.9 keeps
145,152 of its sparse weights by the first and 130,671 by the second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import floor, prod
from typing import Protocol

from gossamer.checks import check_number, closest
from gossamer.errors import ConfigurationError
from gossamer.targets import matches

NAMES = ("uniform", "er", "erk", "global")
"""The distributions with a name; a mapping of globs to sparsities is an explicit one."""

Distribution = str | Mapping[str, float]


class Share(Protocol):
    """What the split needs to know of one tensor; a `gossamer.groups.Groups` is one."""

    @property
    def name(self) -> str:
        """The parameter's name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its global shape."""
        ...

    @property
    def total(self) -> int:
        """Number of its groups."""
        ...

    @property
    def size(self) -> int:
        """Number of weights in a whole group."""
        ...

    @property
    def cell(self) -> tuple[int, int] | None:
        """(N, M) where N of every M consecutive groups live, else `None`."""
        ...


def active_weights(sparsity: float, total: int) -> int:
    """The largest number of active weights whose sparsity among `total` is not below `sparsity`.

    The sparsity is taken as the decimal number that was written, so that 0.9 of 10 leaves 1; a billionth of a weight is
    forgiven, so that `1 - 2/9` of 9, which is a little more in floating point, leaves 2.

    Raises:
        ConfigurationError: A sparsity outside [0, 1).
    """
    check_number("sparsity", sparsity, 0, 1, open_high=True)
    return floor((1 - Fraction(str(sparsity))) * total + Fraction(1, 10**9))


def budget(sparsity: float, shares: Sequence[Share], dense: int, over: str) -> int:
    """Number of active weights that `sparsity` allows in the tensors of `shares`.

    Where groups at the edges of a weight are smaller than others, they count as whole ones here.

    Args:
        sparsity: Fraction of zeros, in [0, 1).
        shares: The tensors that become sparse.
        dense: Number of parameters of the model that stay dense.
        over: `"targets"` or `"all"`: what the fraction is taken of.

    Raises:
        ConfigurationError: An unknown `over`, or dense parameters that alone exceed the budget.
    """
    total = sum(share.total * share.size for share in shares)
    if over == "targets":
        return active_weights(sparsity, total)
    if over != "all":
        raise ConfigurationError(
            f"over: got {over!r}; allowed are 'targets' and 'all'" + closest(str(over), ("targets", "all"))
        )
    left = active_weights(sparsity, dense + total) - dense
    if left < len(shares):
        raise ConfigurationError(
            f"sparsity={sparsity} over all {dense + total} parameters leaves {left} active weights for "
            f"{len(shares)} sparse tensors, since {dense} parameters stay dense; choose a lower sparsity or "
            "over='targets'"
        )
    return left


def allocate(distribution: Distribution, shares: Sequence[Share], active: int) -> list[int]:
    """Split a budget over tensors; the numbers add up exactly.

    `uniform`: the same density everywhere. `er`: densities in proportion to `(n_in + n_out) / (n_in · n_out)`
    (Mocanu et al., 2018); `erk`: to `(n_in + n_out + k_h + k_w) / (n_in · n_out · k_h · k_w)` (Evci et al., 2020);
    tensors that this would fill are dense and the rest is split again. A mapping of globs gives each tensor its own
    sparsity and ignores `active`. `global` has no split of its own: the ranking of all weights together decides.

    Args:
        distribution: A name or a mapping glob → sparsity; the first glob that matches counts.
        shares: The tensors.
        active: Number of active weights to split.

    Returns:
        Active *groups* for each tensor, at least one each; whole groups, so in all the largest number of weights
        not above `active`.

    Raises:
        ConfigurationError: An unknown name, a tensor without an explicit sparsity, or fewer groups than tensors.
    """
    if isinstance(distribution, Mapping):
        return _explicit(distribution, shares)
    if distribution == "global":
        raise ConfigurationError(
            "distribution='global' needs scores that rank all weights together (gradual pruning, gossamer.prune); "
            "a random mask has none: choose 'uniform', 'er', 'erk' or an explicit mapping"
        )
    if distribution not in NAMES:
        raise ConfigurationError(
            f"distribution: got {distribution!r}; allowed are {', '.join(map(repr, NAMES))}, or a mapping of globs to "
            "sparsities" + closest(str(distribution), NAMES)
        )
    cells = [share.cell for share in shares]
    if any(cells):
        return [share.total * cell[0] // cell[1] for share, cell in zip(shares, cells, strict=True) if cell]
    if distribution == "uniform":
        weights = [Fraction(share.total * share.size) for share in shares]
    else:
        weights = [
            _erdos_renyi(share.shape, kernel=distribution == "erk") * share.total * share.size for share in shares
        ]
    sizes = [share.size for share in shares]
    if active < sum(sizes):
        raise ConfigurationError(
            f"{active} active weights are fewer than one group for each of the {len(shares)} tensors "
            f"({shares[0].name}, …), which take {sum(sizes)}; choose a lower sparsity or fewer targets"
        )
    return apportion_groups(active, weights, [share.total for share in shares], sizes, least=1)


def apportion_groups(
    total: int, weights: Sequence[Fraction | int], capacities: Sequence[int], sizes: Sequence[int], least: int = 0
) -> list[int]:
    """Split `total` weights over tensors in proportion to `weights`, in whole groups; see `apportion`.

    Exact where groups have one size: the largest number of groups not above `total`. Where sizes differ, what is left
    goes to the tensors furthest below their share, until no open tensor has a group that fits.

    Args:
        total: Weights to split; at least `least` groups of each fit into it.
        weights: Non-negative proportions.
        capacities: The most groups each may get.
        sizes: Weights in a group of each.
        least: The least groups each gets (where its capacity allows).

    Returns:
        Groups for each tensor.
    """
    if len(set(sizes)) == 1:
        return apportion(min(total // sizes[0], sum(capacities)), weights, capacities, least)
    rooms = [capacity * size for capacity, size in zip(capacities, sizes, strict=True)]
    shares = apportion(min(total, sum(rooms)), weights, rooms)
    groups = [max(min(least, most), share // size) for share, most, size in zip(shares, capacities, sizes, strict=True)]

    def lack(i: int) -> Fraction:
        return Fraction(shares[i], sizes[i]) - groups[i]

    while (left := total - sum(map(int.__mul__, groups, sizes))) < 0:
        groups[min((i for i in range(len(groups)) if groups[i] > least), key=lack)] -= 1
    while fitting := [i for i, most in enumerate(capacities) if groups[i] < most and sizes[i] <= left]:
        i = max(fitting, key=lack)
        groups[i] += 1
        left -= sizes[i]
    return groups


def apportion(total: int, weights: Sequence[Fraction | int], capacities: Sequence[int], least: int = 0) -> list[int]:
    """Split `total` in proportion to `weights`, none above its capacity, exactly (largest remainder).

    What a full tensor cannot take goes to the others in proportion. Where all weights of those with room are zero,
    the room itself is the weight. Equal remainders go to the first.

    Args:
        total: What to split; at most the sum of the capacities.
        weights: Non-negative proportions.
        capacities: The most each may get.
        least: The least each gets (where its capacity allows).
    """
    floors = [min(least, capacity) for capacity in capacities]
    if not sum(floors) <= total <= sum(capacities):
        raise ValueError(f"cannot split {total}: between {sum(floors)} and {sum(capacities)} fit")
    fixed: dict[int, int] = {}
    while True:
        open_ = [i for i in range(len(capacities)) if i not in fixed]
        left = total - sum(fixed.values())
        shares = {i: Fraction(weights[i]) for i in open_}
        if not sum(shares.values()):
            shares = {i: Fraction(capacities[i]) for i in open_}
        scale = left / (sum(shares.values()) or Fraction(1))
        quotas = {i: share * scale for i, share in shares.items()}
        # Pinning both sides at once could overshoot, so the side that is further out is pinned first.
        above = {i: capacities[i] for i in open_ if quotas[i] > capacities[i]}
        below = {i: floors[i] for i in open_ if quotas[i] < floors[i]}
        excess = sum((quotas[i] - limit for i, limit in above.items()), Fraction(0))
        lack = sum((limit - quotas[i] for i, limit in below.items()), Fraction(0))
        if not above and not below:
            break
        fixed |= above if excess >= lack else below
    result = [fixed.get(i, 0) for i in range(len(capacities))]
    for i, quota in quotas.items():
        result[i] = floor(quota)
    by_remainder = sorted(quotas, key=lambda i: (result[i] - quotas[i], i))
    for i in by_remainder[: total - sum(result)]:
        result[i] += 1
    return result


def _erdos_renyi(shape: Sequence[int], kernel: bool) -> Fraction:
    sides = shape if kernel else shape[:2]
    return Fraction(sum(sides), prod(sides))


def _explicit(distribution: Mapping[str, float], shares: Sequence[Share]) -> list[int]:
    if wrong := [key for key in distribution if not isinstance(key, str)]:
        raise ConfigurationError(f"distribution: expected globs over parameter names, got {wrong[0]!r}")
    counts = []
    used = set()
    for share in shares:
        pattern = next((glob for glob in distribution if matches(share.name, glob)), None)
        if pattern is None:
            raise ConfigurationError(
                f"distribution: no glob of {list(distribution)} gives {share.name} a sparsity; add one "
                "('*' matches the rest)"
            )
        used.add(pattern)
        check_number(f"distribution[{pattern!r}]", distribution[pattern], 0, 1, open_high=True)
        groups = active_weights(distribution[pattern], share.total * share.size) // share.size
        if groups < 1:
            raise ConfigurationError(
                f"distribution[{pattern!r}]={distribution[pattern]} leaves no active group in {share.name} "
                f"({share.total} groups); choose a lower sparsity"
            )
        cell = share.cell
        if cell is not None and groups * cell[1] != share.total * cell[0]:
            raise ConfigurationError(
                f"distribution[{pattern!r}]={distribution[pattern]} disagrees with {share.name}, whose structure "
                f"{cell[0]}:{cell[1]} has sparsity {1 - cell[0] / cell[1]:g}; give that, or another distribution"
            )
        counts.append(groups)
    if unused := [glob for glob in distribution if glob not in used]:
        raise ConfigurationError(
            f"distribution: {unused[0]!r} matches none of the sparse tensors (or an earlier glob takes them all)"
            + closest(unused[0], [share.name for share in shares])
        )
    return counts
