"""Enforcement to the bit, and choices of exactly k groups against a sort, for generated values with many ties."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.errors import NonFiniteError
from gossamer.masks import (
    MaskedTensor,
    count_over_shards,
    enforce,
    largest,
    largest_in_cells,
    pack,
    sample,
    smallest,
    unpack,
)
from gossamer.structure import NM, Block, Element
from gossamer.targets import Target

INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
DTYPES = st.sampled_from(list(INTEGERS))
SPECIAL = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0, -1.0, 1e-7, -1e-7, 65504.0]


def masked(shape, structure=None, input_dim=1, dtype=torch.float32, name="layer.weight"):
    """A weight under a full mask."""
    owner = nn.Module()
    owner.weight = nn.Parameter(torch.ones(shape, dtype=dtype))
    return MaskedTensor(Target(name, owner, "weight", input_dim), structure or Element())


def vectors(*sizes):
    return [masked((size, 1), name=f"layer.{i}.weight") for i, size in enumerate(sizes)]


# -- enforce --------------------------------------------------------------------------------------------------------


def contiguous(x):
    return x


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def transposed(x):
    return x.transpose(0, 1)


def strided(x):
    return torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize("layout", [contiguous, channels_last, transposed, strided])
@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
def test_pruned_weights_are_positive_zero_and_others_keep_their_bits(dtype, layout):
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(len(SPECIAL), (6, 4, 3, 3), generator=generator)]
    weight = layout(values)
    mask = torch.randint(2, weight.shape, generator=generator, dtype=torch.int8).neg_()
    before = weight.clone()
    enforce(weight, mask)
    bits, old = weight.contiguous().view(INTEGERS[dtype]), before.contiguous().view(INTEGERS[dtype])
    assert bits[mask == 0].eq(0).all()
    assert bits[mask != 0].equal(old[mask != 0])
    assert weight.stride() == layout(values).stride()


def test_mask_may_have_another_layout_than_the_weight():
    weight = channels_last(torch.full((4, 4, 3, 3), math.nan))
    mask = torch.zeros(4, 4, 3, 3, dtype=torch.int8)
    mask[1:] = -1
    enforce(weight, mask)
    assert weight[0].eq(0).all()
    assert weight[1:].isnan().all()


@pytest.mark.parametrize("shape", [(3, 700_000), (700_000, 3), (1, 1_200_000), (1030, 64, 3, 3)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, strided], ids=["contiguous", "strided"])
def test_large_tensors_are_enforced_to_the_last_element(shape, layout):
    generator = torch.Generator().manual_seed(1)
    weight = layout(torch.full(shape, -0.0, dtype=torch.bfloat16))
    mask = torch.randint(2, shape, generator=generator, dtype=torch.int8).neg_()
    enforce(weight, mask)
    assert torch.signbit(weight).equal(mask != 0)


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 3, 3)])
def test_an_empty_shard_is_enforced(shape):
    enforce(torch.empty(shape), torch.empty(shape, dtype=torch.int8))


# -- MaskedTensor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("structure", "input_dim"), [(Element(), 1), (NM(1, 3), 1), (NM(2, 4), 0), (Block(2, 3), 1)])
def test_new_mask_prunes_at_once_and_reports_what_is_newly_active(structure, input_dim):
    tensor = masked((4, 6, 2), structure, input_dim)
    first = torch.zeros(tensor.groups, dtype=torch.int8)
    first[: tensor.groups // 2] = -1
    assert not tensor.set_alive(first, tensor.groups // 2).any()
    assert tensor.active == tensor.weights // 2
    assert tensor.parameter.count_nonzero() == tensor.active
    with torch.no_grad():
        tensor.parameter.fill_(math.nan)  # what an optimizer may leave in pruned weights
    second = first.bitwise_not()
    grown = tensor.set_alive(second, tensor.groups - tensor.groups // 2)
    expected = structure.expand(second, (4, 6, 2), input_dim)
    assert grown.equal(expected)
    assert tensor.mask.equal(expected)
    assert tensor.parameter.eq(0).all()  # newly active weights start at zero too
    assert tensor.alive().equal(second)


def test_mask_takes_the_layout_of_the_weight():
    owner = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    tensor = MaskedTensor(Target("weight", owner, "weight", 1), Element())
    assert tensor.mask.stride() == owner.weight.stride()
    alive = torch.randint(2, (tensor.groups,), generator=torch.Generator().manual_seed(0), dtype=torch.int8).neg_()
    tensor.set_alive(alive, int((alive != 0).sum()))
    assert (owner.weight != 0).reshape(-1).equal(alive != 0)
    assert tensor.alive().equal(alive)


# -- largest and smallest -------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, math.inf, -math.inf, 0.5, 6.0e-8, -6.0e-8]),
    st.floats(-100, 100, width=16),
)


@st.composite
def rankings(draw):
    """Scores of several tensors, of one or several dtypes, and the dtype's rounding applied."""
    tensors = draw(st.lists(st.lists(VALUES, max_size=30), min_size=1, max_size=4))
    dtypes = draw(st.one_of(DTYPES.map(lambda one: [one] * len(tensors)), st.lists(DTYPES, min_size=4, max_size=4)))
    return [torch.tensor(values, dtype=dtype) for values, dtype in zip(tensors, dtypes, strict=False)]


def by_sorting(scores, count, descending=True):
    """Global indices of the `count` best by a stable sort: equal scores from the lowest index."""
    flat = torch.cat([score.double() for score in scores]).numpy()
    return set(np.argsort(-flat if descending else flat, kind="stable")[:count].tolist())


def chosen_globally(scores, chosen):
    offsets = itertools.accumulate([0, *(len(score) for score in scores)])
    listed = [first + i for first, index in zip(offsets, chosen, strict=False) for i in index.tolist()]
    assert len(listed) == len(set(listed))
    return set(listed)


@given(rankings(), st.data(), st.booleans())
def test_choice_over_all_tensors_is_that_of_a_stable_sort(scores, data, descending):
    tensors = vectors(*map(len, scores))
    count = data.draw(st.integers(0, sum(map(len, scores))))
    chosen = (largest if descending else smallest)(tensors, [score.clone() for score in scores], count)
    assert chosen_globally(scores, chosen) == by_sorting(scores, count, descending)


@given(rankings(), st.data(), st.booleans())
def test_choice_within_each_tensor_is_that_of_a_stable_sort(scores, data, descending):
    tensors = vectors(*map(len, scores))
    counts = [data.draw(st.integers(0, len(score))) for score in scores]
    chosen = (largest if descending else smallest)(tensors, [score.clone() for score in scores], counts)
    for score, index, count in zip(scores, chosen, counts, strict=True):
        assert set(index.tolist()) == by_sorting([score], count, descending)
        assert len(index) == count


@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
@pytest.mark.parametrize("count", [0, 1, 499, 20_000, 39_999, 40_000])
def test_many_distinct_scores_are_chosen_as_a_sort_does(dtype, count):
    generator = torch.Generator().manual_seed(count)
    scores = [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in (25_000, 0, 15_000)]
    chosen = largest(vectors(25_000, 0, 15_000), [score.clone() for score in scores], count)
    assert chosen_globally(scores, chosen) == by_sorting(scores, count)


@pytest.mark.parametrize("dtype", list(INTEGERS), ids=str)
def test_neighbouring_numbers_are_told_apart(dtype):
    # One unit in the last place, around zero (subnormals), around a power of two and at the largest number.
    ends = torch.tensor([0.0, 1.0, 2.0, torch.finfo(dtype).max, -1.0, -torch.finfo(dtype).max], dtype=dtype)
    up, down = (torch.nextafter(ends, torch.tensor(sign * math.inf, dtype=dtype)) for sign in (1, -1))
    scores = torch.cat([ends, up, down]).unique()
    assert len(scores) == 18
    shuffled = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    for count in range(19):
        (chosen,) = largest(vectors(18), [scores[shuffled].clone()], [count])
        assert sorted(shuffled[chosen].tolist()) == list(range(18 - count, 18))


def test_scores_of_several_types_are_ranked_without_rounding():
    tiny = 2.0**-40
    scores = [torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1 - tiny, 1.0, 1 + tiny], dtype=torch.float64)]
    for count in range(5):
        chosen = largest(vectors(1, 3), [score.clone() for score in scores], count)
        assert chosen_globally(scores, chosen) == set([3, 0, 2, 1][:count])


def test_all_scores_equal_are_taken_from_the_first_tensor_on():
    chosen = largest(vectors(3, 4, 5), [torch.zeros(3), -torch.zeros(4), torch.zeros(5)], 5)
    assert [sorted(index.tolist()) for index in chosen] == [[0, 1, 2], [0, 1], []]
    chosen = smallest(vectors(3, 4, 5), [torch.zeros(3), -torch.zeros(4), torch.zeros(5)], [1, 2, 3])
    assert [sorted(index.tolist()) for index in chosen] == [[0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize("count", [0, 3, [1, 2]])
def test_nan_score_stops_the_choice_and_names_the_layer(count):
    scores = [torch.ones(4), torch.tensor([1.0, math.nan, 2.0])]
    with pytest.raises(NonFiniteError, match=r"layer.1.weight: its scores contain NaN"):
        largest(vectors(4, 3), scores, count)


def test_negative_nan_is_found_too():
    negative = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)  # sign bit set: sorts below everything
    assert negative.isnan().all()
    with pytest.raises(NonFiniteError, match=r"layer.0.weight"):
        smallest(vectors(1), [negative], [1])


# -- sample ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(0, 1000), st.data())
def test_sample_takes_exactly_so_many_eligible_groups(size, seed, data):
    generator = torch.Generator().manual_seed(seed)
    eligible = torch.rand(size, generator=generator) < data.draw(st.sampled_from([0.02, 0.3, 0.9, 1.1]))
    available = int(eligible.sum())
    count = data.draw(st.integers(0, available))
    (tensor,) = vectors(size)
    (index,) = sample([tensor], [eligible.clone()], [available], [count], generator)
    assert index.dtype == torch.int64
    assert len(index.unique()) == len(index) == count
    assert eligible[index].all()


def test_sample_is_determined_by_the_generator_and_advances_it():
    tensors = vectors(500, 300)

    def draw(generator):
        eligible = [torch.ones(500, dtype=torch.bool), torch.ones(300, dtype=torch.bool)]
        return [index.sort().values.tolist() for index in sample(tensors, eligible, [500, 300], [50, 200], generator)]

    first, second = (torch.Generator().manual_seed(7) for _ in range(2))
    assert draw(first) == draw(second)
    assert draw(first) != draw(torch.Generator().manual_seed(7))
    assert draw(first) != draw(torch.Generator().manual_seed(8))


@pytest.mark.parametrize(("count", "size"), [(2, 5), (3, 5), (2, 400), (3, 400)])
def test_every_choice_is_equally_likely(count, size):
    # Five groups are eligible, so there are ten choices of two and of three; a rare group takes several draws.
    places = torch.linspace(0, size - 1, 5).long()
    generator = torch.Generator().manual_seed(size + count)
    (tensor,) = vectors(size)
    trials = 4000
    seen = dict.fromkeys(itertools.combinations(places.tolist(), count), 0)
    for _ in range(trials):
        eligible = torch.zeros(size, dtype=torch.bool).index_fill_(0, places, True)
        (index,) = sample([tensor], [eligible], [5], [count], generator)
        seen[tuple(sorted(index.tolist()))] += 1
    expected = trials / len(seen)
    chi_square = sum((n - expected) ** 2 / expected for n in seen.values())
    assert len(seen) == 10
    assert chi_square < 27.88  # the 0.999 quantile for nine degrees of freedom


def test_sample_refuses_more_than_there_is():
    with pytest.raises(ValueError, match=r"layer.0.weight: cannot choose 4 of 3 groups"):
        sample(vectors(5), [torch.ones(5, dtype=torch.bool)], [3], [4], torch.Generator())


# -- cells ----------------------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.lists(VALUES, max_size=64), st.booleans(), DTYPES, st.data())
def test_largest_in_cells_is_a_stable_sort_of_each(size, values, one_count, dtype, data):
    values = values[: len(values) // size * size]
    scores = torch.tensor(values, dtype=dtype)
    cells = len(values) // size
    counts = data.draw(
        st.lists(st.integers(0, size), min_size=1 if one_count else cells, max_size=1 if one_count else cells)
    )
    found = largest_in_cells(scores, torch.tensor(counts, dtype=torch.int64), size).view(-1, size).tolist()
    for cell, (row, chosen) in enumerate(zip(scores.view(-1, size).tolist(), found, strict=True)):
        order = sorted(range(size), key=lambda i: (-row[i], i))
        assert {i for i, taken in enumerate(chosen) if taken} == set(order[: counts[0 if one_count else cell]])


# -- counting and packing -------------------------------------------------------------------------------------------


def test_counts_of_whole_tensors_are_their_own():
    assert count_over_shards(vectors(3, 4), [torch.tensor(2), torch.tensor(5)]) == [2, 5]
    assert count_over_shards([], []) == []


SHAPES = st.lists(st.integers(1, 6), min_size=2, max_size=5)


def random_mask(shape, seed):
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8).neg_()


@given(SHAPES, st.integers(0, 1000))
def test_packing_is_that_of_numpy_row_by_row_and_is_undone(shape, seed):
    mask = random_mask(shape, seed)
    packed = pack(mask)
    rows = (mask != 0).numpy().reshape(shape[0], -1)
    assert packed.dtype == torch.uint8
    assert packed.numpy().tolist() == np.packbits(rows, axis=1, bitorder="little").tolist()
    assert unpack(packed, shape).equal(mask)
    assert unpack(packed, shape).dtype == torch.int8
    assert pack(mask != 0).equal(packed)


@given(SHAPES, st.integers(0, 1000), st.data())
def test_rows_of_a_packed_mask_are_the_packed_rows(shape, seed, data):
    mask = random_mask(shape, seed)
    first, last = sorted((data.draw(st.integers(0, shape[0])), data.draw(st.integers(0, shape[0]))))
    part = pack(mask)[first:last]
    assert part.equal(pack(mask[first:last]))
    assert unpack(part, (last - first, *shape[1:])).equal(mask[first:last])


def test_packing_reads_a_mask_of_any_layout():
    mask = random_mask((4, 5, 3, 3), 0)
    assert pack(channels_last(mask)).equal(pack(mask))
    assert pack(mask.transpose(0, 1)).equal(pack(mask.transpose(0, 1).contiguous()))
