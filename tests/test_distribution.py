"""How a budget is split: exact totals, and each split against an independent float computation."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from gossamer.distribution import NAMES, active_weights, allocate, apportion, apportion_groups, budget
from gossamer.errors import ConfigurationError
from gossamer.groups import Groups
from gossamer.masks import MaskedTensor
from gossamer.structure import NM, Block, Element
from gossamer.targets import Target

DECIMALS = st.integers(0, 9999).map(lambda n: n / 10000)
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995]), DECIMALS)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.tuples(st.integers(1, 32), st.integers(1, 32), st.integers(1, 5), st.integers(1, 5)),
)


def share(name, shape, structure=None):
    """The groups of a weight without storage."""
    owner = nn.Module()
    owner.weight = nn.Parameter(torch.empty(shape, device="meta"))
    return Groups(MaskedTensor(Target(name, ((owner, "weight"),), 1)), structure or Element())


def shares_of(shapes, structure=None):
    return [share(f"layers.{i}.weight", shape, structure) for i, shape in enumerate(shapes)]


# -- budgets --------------------------------------------------------------------------------------------------------


@given(SPARSITIES, st.integers(1, 10**8))
def test_active_weights_are_the_most_that_the_decimal_sparsity_allows(sparsity, total):
    active = active_weights(sparsity, total)
    zeros = Decimal(str(sparsity)) * total
    assert total - active >= zeros
    assert total - active - 1 < zeros


@pytest.mark.parametrize(
    ("sparsity", "total", "active"),
    [(0.9, 10, 1), (0.95, 100, 5), (0.98, 50, 1), (0.7, 10, 3), (1 - 2 / 9, 9, 2), (1 - 3 / 7, 7, 3), (0.7779, 9, 1)],
)
def test_sparsity_is_the_decimal_that_was_written(sparsity, total, active):
    assert active_weights(sparsity, total) == active  # (1 - 0.9) · 10 is 0.99999… in floating point


@pytest.mark.parametrize(("over", "active"), [("targets", 145_152), ("all", 130_671)])
def test_two_definitions_of_sparsity_differ_by_what_stays_dense(over, active):
    # WRN-28-2 at 0.9: 1,467,610 parameters, 1,451,520 of them in sparse tensors.
    assert budget(0.9, shares_of([(1_451_520, 1)]), 16_090, over) == active


@given(SPARSITIES, st.lists(SHAPES, min_size=1, max_size=5), st.integers(0, 500))
def test_budget_over_all_leaves_room_for_dense_parameters(sparsity, shapes, dense):
    shares = shares_of(shapes)
    total = sum(share.total * share.size for share in shares)
    assert budget(sparsity, shares, dense, "targets") == active_weights(sparsity, total)
    left = math.floor((total + dense) * (1 - Decimal(str(sparsity)))) - dense
    if left < len(shares):
        with pytest.raises(
            ConfigurationError, match=rf"over all {total + dense} parameters leaves {left} active weights"
        ):
            budget(sparsity, shares, dense, "all")
    else:
        assert budget(sparsity, shares, dense, "all") == left


@pytest.mark.parametrize("sparsity", [1.0, 1, 1.5, -0.1, math.nan, math.inf, "0.9", None, True])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ConfigurationError, match=r"sparsity: expected a number in \[0, 1\), got "):
        active_weights(sparsity, 10)


def test_unknown_definition_is_refused():
    with pytest.raises(ConfigurationError, match="over: got 'target'; allowed are 'targets' and 'all'; did you mean"):
        budget(0.5, shares_of([(4, 4)]), 0, "target")


# -- named distributions --------------------------------------------------------------------------------------------


def float_split(distribution, shapes, active):
    """Quotas of active weights, by repeatedly making full tensors dense (Evci et al., 2020, section 3)."""
    sizes = [math.prod(shape) for shape in shapes]
    if distribution == "uniform":
        raw = [1.0] * len(shapes)
    else:
        sides = [shape if distribution == "erk" else shape[:2] for shape in shapes]
        raw = [sum(side) / math.prod(side) for side in sides]
    dense = set()
    while True:
        left = active - sum(sizes[i] for i in dense)
        open_ = [i for i in range(len(shapes)) if i not in dense]
        epsilon = left / sum(raw[i] * sizes[i] for i in open_) if open_ else 0.0
        full = {i for i in open_ if epsilon * raw[i] > 1.0 + 1e-12}
        if not full:
            return [float(sizes[i]) if i in dense else epsilon * raw[i] * sizes[i] for i in range(len(shapes))]
        dense |= full


@given(st.sampled_from(["uniform", "er", "erk"]), st.lists(SHAPES, min_size=1, max_size=6), SPARSITIES)
def test_split_agrees_with_a_float_computation_within_one_weight(distribution, shapes, sparsity):
    shares = shares_of(shapes)
    active = active_weights(sparsity, sum(share.total * share.size for share in shares))
    quotas = float_split(distribution, shapes, active)
    assume(min(quotas) >= 1)  # smaller ones are raised to one weight, which takes from the others
    counts = allocate(distribution, shares, active)
    assert sum(counts) == active
    for count, quota, share in zip(counts, quotas, shares, strict=True):
        assert abs(count - quota) < 1 + 1e-6
        assert count <= share.total * share.size


def test_erk_densities_of_a_small_network_are_as_computed_by_hand():
    # Sides sum to 3+64+3+3 = 73 and 64+10 = 74; weights 1728 and 640; 10 % of 2368 is 236.
    # ε = 236 / (73 + 74), so 117.2 and 118.8 are active; the larger remainder is rounded up.
    shares = shares_of([(64, 3, 3, 3), (10, 64)])
    assert allocate("erk", shares, 236) == [117, 119]
    # Without the kernel the density of the convolution is in proportion to (64+3)/(64·3): 9·67 against 74.
    assert allocate("er", shares, 236) == [210, 26]


def test_tensor_that_erk_would_fill_is_dense_and_the_rest_is_split_again():
    shares = shares_of([(4, 2), (100, 100), (50, 100)])
    active = 1000
    dense, *others = allocate("erk", shares, active)
    assert dense == 8
    assert others == [round(992 * 200 / 350), round(992 * 150 / 350)]


@given(
    st.sampled_from(["uniform", "er", "erk"]),
    st.lists(SHAPES, min_size=1, max_size=6),
    st.sampled_from([(2, 2), (4, 1), (1, 3)]),
    SPARSITIES,
)
def test_split_into_blocks_is_the_largest_number_of_whole_groups(distribution, shapes, block, sparsity):
    structure = Block(*block)
    shapes = [(shape[0] * block[0], shape[1] * block[1], *shape[2:]) for shape in shapes]
    shares = shares_of(shapes, structure)
    active = active_weights(sparsity, sum(share.total * share.size for share in shares))
    size = block[0] * block[1]
    if active // size < len(shares):
        with pytest.raises(ConfigurationError, match=rf"{active} active weights are fewer than one group for each"):
            allocate(distribution, shares, active)
        return
    counts = allocate(distribution, shares, active)
    assert sum(counts) == active // size
    assert all(1 <= count <= share.total for count, share in zip(counts, shares, strict=True))


@given(st.sampled_from(["uniform", "er", "erk"]), st.lists(SHAPES, min_size=1, max_size=6))
def test_no_tensor_is_emptied_while_there_is_one_weight_for_each(distribution, shapes):
    shares = shares_of(shapes)
    assert allocate(distribution, shares, len(shares)) == [1] * len(shares)
    with pytest.raises(ConfigurationError, match=r"fewer than one group for each of the .* tensors"):
        allocate(distribution, shares, len(shares) - 1)


@given(st.sampled_from(["uniform", "er", "erk"]), st.integers(1, 3), st.integers(4, 6))
def test_n_to_m_fixes_the_count_of_every_tensor(distribution, n, m):
    shares = shares_of([(3, m), (5, 2 * m, 3, 3)], NM(n, m))
    assert allocate(distribution, shares, 10**6) == [3 * n, 5 * 2 * n * 9]


def test_global_has_no_split_of_its_own():
    with pytest.raises(ConfigurationError, match=r"'global' needs scores .*choose 'uniform', 'er', 'erk'"):
        allocate("global", shares_of([(4, 4)]), 8)


def test_unknown_distribution_lists_the_known():
    with pytest.raises(
        ConfigurationError, match=r"got 'erk2'; allowed are 'uniform', 'er', 'erk', 'global'.*did you mean 'erk'"
    ):
        allocate("erk2", shares_of([(4, 4)]), 8)
    assert NAMES == ("uniform", "er", "erk", "global")


# -- explicit -------------------------------------------------------------------------------------------------------


def test_explicit_sparsities_count_by_the_first_glob_that_matches():
    shares = shares_of([(10, 10), (10, 20), (5, 5)])
    assert allocate({"layers.1*": 0.9, "*": 0.5}, shares, 0) == [50, 20, 12]


def test_explicit_sparsity_gives_whole_groups():
    shares = shares_of([(8, 10)], Block(4, 1))
    assert allocate({"*": 0.77}, shares, 0) == [4]  # 18.4 weights are four blocks of four


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"layers.0*": 0.5}, r"no glob of \['layers.0\*'\] gives layers.1.weight a sparsity; add one \('\*' matches"),
        ({"*": 0.5, "layers.0*": 0.9}, r"'layers.0\*' matches none of the sparse tensors \(or an earlier glob takes"),
        ({"*": 0.5, "layer.0.weight": 0.9}, "'layer.0.weight' matches none .*did you mean 'layers.0.weight'"),
        ({"*": 1.0}, r"distribution\['\*'\]: expected a number in \[0, 1\), got 1.0"),
        ({"*": "dense"}, r"distribution\['\*'\]: expected a number in \[0, 1\), got 'dense'"),
        ({"*": 0.999}, r"distribution\['\*'\]=0.999 leaves no active group in layers.0.weight \(16 groups\)"),
        ({}, r"no glob of \[\] gives layers.0.weight a sparsity"),
    ],
)
def test_explicit_mapping_that_cannot_work_names_the_tensor(mapping, message):
    with pytest.raises(ConfigurationError, match=message):
        allocate(mapping, shares_of([(4, 4), (4, 4)]), 0)


def test_explicit_sparsity_that_contradicts_n_to_m_is_refused():
    shares = shares_of([(4, 8)], NM(2, 4))
    assert allocate({"*": 0.5}, shares, 0) == [16]
    with pytest.raises(ConfigurationError, match=r"distribution\['\*'\]=0.75 disagrees with layers.0.weight.* 2:4 has"):
        allocate({"*": 0.75}, shares, 0)


# -- apportion ------------------------------------------------------------------------------------------------------


@st.composite
def divisions(draw):
    count = draw(st.integers(1, 6))
    capacities = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    weights = draw(st.lists(st.integers(0, 20), min_size=count, max_size=count))
    least = draw(st.integers(0, 3))
    total = draw(st.integers(sum(min(least, capacity) for capacity in capacities), sum(capacities)))
    return total, weights, capacities, least


def clamped(total, weights, capacities, least):
    """Real quotas `min(cap, max(least, s·w))` of that sum, found by bisection over `s`; no zero weights."""
    low, high = 0.0, 1e6
    for _ in range(200):
        scale = (low + high) / 2
        quotas = [min(c, max(min(least, c), scale * w)) for w, c in zip(weights, capacities, strict=True)]
        low, high = (scale, high) if sum(quotas) < total else (low, scale)
    return quotas


@given(divisions())
def test_apportion_is_exact_within_capacity_and_minimum(division):
    total, weights, capacities, least = division
    parts = apportion(total, weights, capacities, least)
    assert sum(parts) == total
    assert all(min(least, capacity) <= part <= capacity for part, capacity in zip(parts, capacities, strict=True))
    assert all(isinstance(part, int) for part in parts)


@given(divisions())
def test_apportion_is_proportional_within_one(division):
    total, weights, capacities, least = division
    weights = [weight + 1 for weight in weights]
    parts = apportion(total, weights, capacities, least)
    for part, quota in zip(parts, clamped(total, weights, capacities, least), strict=True):
        assert abs(part - quota) < 1 + 1e-6


@given(divisions())
def test_apportion_gives_nothing_to_zero_weights_while_others_have_room(division):
    total, weights, capacities, _ = division
    parts = apportion(total, weights, capacities)
    room = sum(capacity for weight, capacity in zip(weights, capacities, strict=True) if weight)
    to_zeros = sum(part for weight, part in zip(weights, parts, strict=True) if not weight)
    assert to_zeros == max(0, total - room)


def test_apportion_gives_equal_remainders_to_the_first():
    assert apportion(4, [1, 1, 1], [9, 9, 9]) == [2, 1, 1]
    assert apportion(5, [1, 1, 1], [9, 9, 9]) == [2, 2, 1]


def test_apportion_passes_on_what_a_full_one_cannot_take():
    assert apportion(30, [10, 1, 1], [8, 99, 99]) == [8, 11, 11]


def test_apportion_takes_fractions_exactly():
    assert apportion(10**18 + 1, [Fraction(1, 3), Fraction(2, 3)], [10**19] * 2) == [
        333333333333333334,
        666666666666666667,
    ]


@pytest.mark.parametrize(("total", "least"), [(11, 0), (1, 1), (-1, 0)])
def test_apportion_refuses_what_does_not_fit(total, least):
    with pytest.raises(ValueError, match=rf"cannot split {total}: between {2 * least} and 10 fit"):
        apportion(total, [1, 1], [5, 5], least)


@given(st.data())
def test_split_into_groups_of_different_sizes_leaves_no_group_that_would_fit(data):
    count = data.draw(st.integers(2, 6))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    capacities = data.draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    weights = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    total = data.draw(st.integers(sum(sizes), sum(s * c for s, c in zip(sizes, capacities, strict=True))))
    groups = apportion_groups(total, weights, capacities, sizes, least=1)
    left = total - sum(g * s for g, s in zip(groups, sizes, strict=True))
    assert left >= 0
    assert all(1 <= g <= c for g, c in zip(groups, capacities, strict=True))
    assert all(g == c or s > left for g, c, s in zip(groups, capacities, sizes, strict=True))
