"""Groups of weights: `reduce`, `expand` and `collapse` against loops over single weights, for generated shapes."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import ConfigurationError
from gossamer.structure import NM, Block, Element, as_structure


@st.composite
def divided(draw, structures=("element", "nm", "block")):
    """A structure, a shape it divides (linear, convolution, transposed) and the input dimension."""
    kind = draw(st.sampled_from(structures))
    input_dim = draw(st.integers(0, 1))
    kernel = draw(st.lists(st.integers(1, 3), max_size=3))
    outputs, inputs = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if kind == "element":
        structure = Element()
    elif kind == "nm":
        m = draw(st.integers(2, 4))
        structure = NM(draw(st.integers(1, m - 1)), m)
        inputs *= m
    else:
        structure = Block(draw(st.integers(1, 4)), draw(st.integers(1, 4)))
        outputs, inputs = outputs * structure.rows, inputs * structure.columns
    sides = (inputs, outputs) if input_dim == 0 else (outputs, inputs)
    return structure, (*sides, *kernel), input_dim


def positions(shape):
    return itertools.product(*map(range, shape))


def group_key(structure, position, input_dim):
    """What the weights of one group have in common, by the definition of the structure."""
    if not isinstance(structure, Block):
        return position
    output, source = position[1 - input_dim], position[input_dim]
    return (output // structure.rows, source // structure.columns, *position[2:])


def scores_of(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_another_layout(x):
    """The same values with the strides of dimensions reversed."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


@given(divided())
def test_expand_gives_every_weight_the_value_of_its_group(case):
    structure, shape, input_dim = case
    groups = math.prod(shape) // structure.size(shape, input_dim)
    ids = structure.expand(torch.arange(groups), shape, input_dim)
    assert ids.shape == shape
    members = {}
    for position in positions(shape):
        members.setdefault(ids[position].item(), set()).add(group_key(structure, position, input_dim))
    assert sorted(members) == list(range(groups))
    assert all(len(keys) == 1 for keys in members.values())
    assert len({key for keys in members.values() for key in keys}) == groups


@given(divided(), st.sampled_from([0.5, 1.0, 2.0, 3.0, math.inf, None]), st.integers(0, 1000))
def test_reduce_is_the_norm_or_the_sum_over_each_group(case, p, seed):
    structure, shape, input_dim = case
    scores = scores_of(shape, seed)
    ids = structure.expand(torch.arange(math.prod(shape) // structure.size(shape, input_dim)), shape, input_dim)
    collected = {}
    for position in positions(shape):
        collected.setdefault(ids[position].item(), []).append(scores[position].item())
    if structure.size(shape, input_dim) == 1 and not isinstance(structure, Block):
        expected = [collected[i][0] for i in range(len(collected))]  # a single weight keeps its sign
    elif p is None:
        expected = [sum(collected[i]) for i in range(len(collected))]
    elif p == math.inf:
        expected = [max(map(abs, collected[i])) for i in range(len(collected))]
    else:
        expected = [sum(abs(s) ** p for s in collected[i]) ** (1 / p) for i in range(len(collected))]
    reduced = structure.reduce(scores, input_dim, p)
    torch.testing.assert_close(reduced, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(structure.reduce(in_another_layout(scores), input_dim, p), reduced)


@given(divided(), st.integers(0, 1000))
def test_collapse_undoes_expand_and_finds_any_active_weight(case, seed):
    structure, shape, input_dim = case
    groups = math.prod(shape) // structure.size(shape, input_dim)
    generator = torch.Generator().manual_seed(seed)
    alive = torch.randint(2, (groups,), generator=generator, dtype=torch.int8).neg_()
    whole = structure.expand(alive, shape, input_dim)
    for mask in (whole, in_another_layout(whole)):
        back = structure.collapse(mask, input_dim)
        assert back.equal(alive)
        assert back.dtype == torch.int8
    thinned = whole * torch.randint(2, shape, generator=generator, dtype=torch.int8)
    ids = structure.expand(torch.arange(groups), shape, input_dim)
    expected = [-int(bool((thinned[ids == i] != 0).any())) for i in range(groups)]
    assert structure.collapse(thinned, input_dim).tolist() == expected


@given(divided())
def test_collapse_returns_a_copy(case):
    structure, shape, input_dim = case
    mask = torch.full(shape, -1, dtype=torch.int8)
    structure.collapse(mask, input_dim).zero_()
    structure.collapse(mask[:0], input_dim)
    assert mask.eq(-1).all()


@given(divided(), st.data())
def test_a_part_of_the_rows_has_a_contiguous_range_of_groups(case, data):
    structure, shape, input_dim = case
    multiple = structure.row_multiple(shape, input_dim)
    parts = shape[0] // multiple
    first, last = sorted((data.draw(st.integers(0, parts)), data.draw(st.integers(0, parts))))
    rows = slice(first * multiple, last * multiple)
    a_row = math.prod(shape) // structure.size(shape, input_dim) / shape[0]
    groups = slice(round(rows.start * a_row), round(rows.stop * a_row))
    scores = scores_of(shape, 0)
    whole = structure.reduce(scores, input_dim)
    torch.testing.assert_close(structure.reduce(scores[rows], input_dim), whole[groups])
    part = (rows.stop - rows.start, *shape[1:])
    assert structure.expand(whole[groups], part, input_dim).equal(structure.expand(whole, shape, input_dim)[rows])
    mask = (scores > 0).to(torch.int8).neg_()
    assert structure.collapse(mask[rows], input_dim).equal(structure.collapse(mask, input_dim)[groups])


@given(divided(structures=("nm",)))
def test_cells_of_n_to_m_run_over_consecutive_inputs(case):
    structure, shape, input_dim = case
    flat = torch.arange(math.prod(shape)).view(shape)
    where = {flat[position].item(): position for position in positions(shape)}
    cells = structure.reduce(flat, input_dim).view(-1, structure.m).tolist()
    for cell in cells:
        first = list(where[cell[0]])
        assert first[input_dim] % structure.m == 0
        for step, weight in enumerate(cell):
            assert list(where[weight]) == [n + step * (dim == input_dim) for dim, n in enumerate(first)]


@given(divided())
def test_structure_validates_what_it_divides(case):
    structure, shape, input_dim = case
    structure.validate("layer.weight", shape, input_dim)


@pytest.mark.parametrize(
    ("structure", "shape", "input_dim", "message"),
    [
        (
            NM(2, 4),
            (8, 6),
            1,
            r"a.weight: 2:4 needs a number of inputs that 4 divides.*\(8, 6\) has 6 along dimension 1",
        ),
        (
            NM(2, 4),
            (6, 8, 3, 3),
            0,
            r"a.weight: 2:4 .*\(6, 8, 3, 3\) has 6 along dimension 0; .*targets=\['!a.weight'\]",
        ),
        (
            Block(4, 1),
            (6, 8),
            1,
            r"a.weight: block:4x1 needs outputs that 4 and inputs that 1 divides.*6 outputs and 8 i",
        ),
        (Block(1, 4), (8, 6), 1, r"a.weight: block:1x4 .* 8 outputs and 6 inputs; .*targets=\['!a.weight'\]"),
        (Block(4, 1), (8, 6, 2), 0, r"a.weight: block:4x1 .* 6 outputs and 8 inputs"),
    ],
)
def test_shape_that_does_not_divide_is_refused(structure, shape, input_dim, message):
    with pytest.raises(ConfigurationError, match=message):
        structure.validate("a.weight", shape, input_dim)


@given(st.integers(1, 40), st.integers(1, 40))
def test_text_and_structure_are_one(first, second):
    block = Block(first, second)
    assert as_structure(str(block)) == block
    assert as_structure(block) is block
    if first < second:
        assert as_structure(f"{first}:{second}") == NM(first, second)
        assert NM(first, second).cell == (first, second)
    else:
        with pytest.raises(ConfigurationError, match=f"structure {first}:{second}: expected N:M with 0 < N < M"):
            as_structure(f"{first}:{second}")


def test_element_is_read_and_written():
    assert as_structure("element") == Element()
    assert str(Element()) == "element"
    assert (Element().size((4, 4), 1), Element().cell, Element().row_multiple((4, 4), 0)) == (1, None, 1)


@pytest.mark.parametrize(
    "text", ["", "elements", "2:4:8", "2:4 ", "-2:4", "block:4", "block:4x", "block4x1", "4x1", 4, None]
)
def test_unknown_structure_lists_what_is_allowed(text):
    with pytest.raises(ConfigurationError, match=r"structure: got .*allowed are 'element', 'N:M' .* and 'block:RxC'"):
        as_structure(text)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0"])
def test_n_to_m_out_of_range_is_refused(text):
    with pytest.raises(ConfigurationError, match=f"structure {text}: expected N:M with 0 < N < M"):
        as_structure(text)


@pytest.mark.parametrize("text", ["block:0x1", "block:1x0"])
def test_empty_block_is_refused(text):
    with pytest.raises(ConfigurationError, match=f"structure {text}: expected at least one row and one column"):
        as_structure(text)
