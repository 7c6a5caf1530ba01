"""Enforcement to the bit, changes of masks, counts and packing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.groups import Groups, changes
from gossamer.masks import Change, MaskedTensor, count_active, count_over_shards, enforce, pack, unpack
from gossamer.structure import NM, Block, Element, Layout
from gossamer.targets import Target

INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
DTYPES = st.sampled_from(list(INTEGERS))
SPECIAL = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1.0, -1.0, 1e-7, -1e-7, 65504.0]


def masked(shape, input_dim=1, dtype=torch.float32, name="layer.weight"):
    """A weight under a full mask."""
    owner = nn.Module()
    owner.weight = nn.Parameter(torch.ones(shape, dtype=dtype))
    return MaskedTensor(Target(name, ((owner, "weight"),), input_dim))


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
    tensor = masked((4, 6, 2), input_dim)
    groups = Groups(tensor, structure)
    first = torch.zeros(groups.total, dtype=torch.int8)
    first[: groups.total // 2] = -1
    grown, begun = tensor.apply(*changes([groups], [first]))
    count_active([tensor])
    assert not grown.any()
    assert not begun.any()
    assert tensor.active == tensor.weights // 2
    assert tensor.parameter.count_nonzero() == tensor.active
    with torch.no_grad():
        tensor.parameter.fill_(math.nan)  # what an optimizer may leave in pruned weights
    second = first.bitwise_not()
    grown, begun = tensor.apply(*changes([groups], [second]))
    expected = structure.expand(second, 4, Layout((4, 6, 2), input_dim))
    assert grown.equal(expected)
    assert begun.equal(expected)
    assert tensor.mask.equal(expected)
    assert tensor.parameter.eq(0).all()  # newly active weights start at zero too
    assert groups.alive().equal(second)


def test_mask_takes_the_layout_of_the_weight():
    owner = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    tensor = MaskedTensor(Target("weight", ((owner, "weight"),), 1))
    assert tensor.mask.stride() == owner.weight.stride()
    groups = Groups(tensor, Element())
    alive = torch.randint(2, (groups.total,), generator=torch.Generator().manual_seed(0), dtype=torch.int8).neg_()
    tensor.apply(*changes([groups], [alive]))
    assert tensor.mask.stride() == owner.weight.stride()
    assert (owner.weight != 0).reshape(-1).equal(alive != 0)
    assert groups.alive().equal(alive)


def test_newly_active_and_renewed_weights_start_at_the_given_values_and_others_stay():
    tensor = masked((1, 6))
    tensor.apply(Change(tensor, torch.tensor([[-1, -1, -1, 0, 0, 0]], dtype=torch.int8)))
    values = torch.tensor([[2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    mask = torch.tensor([[-1, -1, 0, -1, 0, 0]], dtype=torch.int8)
    renewed = torch.tensor([[0, -1, -1, 0, -1, 0]], dtype=torch.int8)  # of pruned weights it has no meaning
    grown, begun = tensor.apply(Change(tensor, mask, renewed, values))
    assert tensor.parameter.tolist() == [[1.0, 3.0, 0.0, 5.0, 0.0, 0.0]]
    assert grown.tolist() == [[0, 0, 0, -1, 0, 0]]
    assert begun.tolist() == [[0, -1, 0, -1, 0, 0]]


def test_renewed_weights_without_values_start_at_zero():
    tensor = masked((1, 3))
    renewed = torch.tensor([[0, -1, 0]], dtype=torch.int8)
    tensor.apply(Change(tensor, tensor.mask.clone(), renewed))
    assert tensor.parameter.tolist() == [[1.0, 0.0, 1.0]]


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
