"""Groups of weights: `reduce`, `expand` and `collapse` against loops over single weights, for generated shapes."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import ConfigurationError
from gossamer.structure import ISS, NM, Block, Both, Element, Layout, as_structure


@st.composite
def divided(draw, kinds=("element", "nm", "block")):
    """A structure and the layout of a weight it divides: linear, convolution, transposed, in groups, padded."""
    kind = draw(st.sampled_from(kinds))
    input_dim = draw(st.integers(0, 1))
    kernel = draw(st.lists(st.integers(1, 3), max_size=3))
    parts = draw(st.integers(1, 2)) if kernel else 1
    outputs, inputs = draw(st.integers(1, 4)), draw(st.integers(1, 4))  # of a convolution group
    if kind == "element":
        structure = Element()
    elif kind == "nm":
        m = draw(st.integers(2, 4))
        structure = NM(draw(st.integers(1, m - 1)), m)
        inputs *= m
    else:
        side = st.none() | st.integers(1, 4)
        structure = Block(draw(side), draw(side), kernel=draw(st.booleans()), pad=draw(st.booleans()))
        if not structure.pad or (parts > 1 and input_dim == 0):
            outputs, inputs = outputs * (structure.rows or 1), inputs * (structure.columns or 1)
    sides = (inputs * parts, outputs) if input_dim == 0 else (outputs * parts, inputs)
    return structure, Layout((*sides, *kernel), input_dim, parts)


def positions(shape):
    return itertools.product(*map(range, shape))


def group_key(structure, position, layout):
    """What the weights of one group have in common, by the definition of the structure."""
    if not isinstance(structure, Block):
        return position
    output, source = position[1 - layout.input_dim], position[layout.input_dim]
    # Which group of the convolution: along dimension 0 the inputs of a transposed one, the outputs of an ordinary one.
    part = position[0] // (layout.shape[0] // layout.convolution_groups)
    row = (part if layout.input_dim == 1 else None) if structure.rows is None else output // structure.rows
    column = (part if layout.input_dim == 0 else None) if structure.columns is None else source // structure.columns
    return (row, column, None if structure.kernel else position[2:])


def scores_of(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_another_layout(x):
    """The same values with the strides of dimensions reversed."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


@given(divided())
def test_expand_gives_every_weight_the_value_of_its_group(case):
    structure, layout = case
    ids = structure.expand(torch.arange(structure.count(layout)), layout.shape[0], layout)
    assert ids.shape == layout.shape
    members = {}
    for position in positions(layout.shape):
        members.setdefault(ids[position].item(), []).append(group_key(structure, position, layout))
    assert sorted(members) == list(range(structure.count(layout)))
    assert all(len(set(keys)) == 1 for keys in members.values())
    assert len({key for keys in members.values() for key in keys}) == structure.count(layout)
    sizes = [len(keys) for keys in members.values()]
    if getattr(structure, "pad", False):
        assert max(sizes) <= structure.size(layout)
    else:
        assert set(sizes) == {structure.size(layout)}


@given(divided(), st.sampled_from([0.5, 1.0, 2.0, 3.0, math.inf, None]), st.integers(0, 1000))
def test_reduce_is_the_norm_or_the_sum_over_each_group(case, p, seed):
    structure, layout = case
    scores = scores_of(layout.shape, seed)
    ids = structure.expand(torch.arange(structure.count(layout)), layout.shape[0], layout)
    collected = {}
    for position in positions(layout.shape):
        collected.setdefault(ids[position].item(), []).append(scores[position].item())
    if not isinstance(structure, Block):
        expected = [collected[i][0] for i in range(len(collected))]  # a single weight keeps its sign
    elif p is None:
        expected = [sum(collected[i]) for i in range(len(collected))]
    elif p == math.inf:
        expected = [max(map(abs, collected[i])) for i in range(len(collected))]
    else:
        expected = [sum(abs(s) ** p for s in collected[i]) ** (1 / p) for i in range(len(collected))]
    reduced = structure.reduce(scores, layout, p)
    torch.testing.assert_close(reduced, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(structure.reduce(in_another_layout(scores), layout, p), reduced)


@given(divided(), st.integers(0, 1000))
def test_collapse_undoes_expand_and_finds_any_active_weight(case, seed):
    structure, layout = case
    groups, rows = structure.count(layout), layout.shape[0]
    generator = torch.Generator().manual_seed(seed)
    alive = torch.randint(2, (groups,), generator=generator, dtype=torch.int8).neg_()
    whole = structure.expand(alive, rows, layout)
    for mask in (whole, in_another_layout(whole)):
        back = structure.collapse(mask, layout)
        assert back.equal(alive)
        assert back.dtype == torch.int8
    thinned = whole * torch.randint(2, layout.shape, generator=generator, dtype=torch.int8)
    ids = structure.expand(torch.arange(groups), rows, layout)
    expected = [-int(bool((thinned[ids == i] != 0).any())) for i in range(groups)]
    assert structure.collapse(thinned, layout).tolist() == expected


@given(divided())
def test_collapse_returns_a_copy(case):
    structure, layout = case
    mask = torch.full(layout.shape, -1, dtype=torch.int8)
    structure.collapse(mask, layout).zero_()
    structure.collapse(mask[:0], layout)
    assert mask.eq(-1).all()


@given(divided(), st.data())
def test_a_part_of_the_rows_has_a_contiguous_range_of_groups(case, data):
    structure, layout = case
    multiple = structure.row_multiple(layout)
    bands = -(-layout.shape[0] // multiple)
    first, last = sorted((data.draw(st.integers(0, bands)), data.draw(st.integers(0, bands))))
    rows = slice(first * multiple, min(last * multiple, layout.shape[0]))
    count = max(0, rows.stop - rows.start)
    a_band = structure.count(layout) // bands
    groups = slice(first * a_band, last * a_band)
    scores = scores_of(layout.shape, 0)
    whole = structure.reduce(scores, layout)
    torch.testing.assert_close(structure.reduce(scores[rows], layout), whole[groups])
    expanded = structure.expand(whole, layout.shape[0], layout)
    assert structure.expand(whole[groups], count, layout).equal(expanded[rows])
    mask = (scores > 0).to(torch.int8).neg_()
    assert structure.collapse(mask[rows], layout).equal(structure.collapse(mask, layout)[groups])


@given(divided(kinds=("nm",)))
def test_cells_of_n_to_m_run_over_consecutive_inputs(case):
    structure, layout = case
    flat = torch.arange(math.prod(layout.shape)).view(layout.shape)
    where = {flat[position].item(): position for position in positions(layout.shape)}
    cells = structure.reduce(flat, layout).view(-1, structure.m).tolist()
    for cell in cells:
        first = list(where[cell[0]])
        assert first[layout.input_dim] % structure.m == 0
        for step, weight in enumerate(cell):
            assert list(where[weight]) == [n + step * (dim == layout.input_dim) for dim, n in enumerate(first)]


@given(divided())
def test_structure_validates_what_it_divides(case):
    structure, layout = case
    structure.validate("layer.weight", layout)


@pytest.mark.parametrize(
    ("name", "linear", "convolution", "transposed"),
    [
        ("row", (8, 6), (8, 54), (6, 72)),  # (groups, weights in each)
        ("filter", (8, 6), (8, 54), (6, 72)),
        ("column", (6, 8), (6, 72), (8, 54)),
        ("channel", (6, 8), (6, 72), (8, 54)),
        ("kernel", (48, 1), (48, 9), (48, 9)),
        ("block:4x3", (4, 12), (36, 12), None),
        ("block:4x3:kernel", (4, 12), (4, 108), None),
        ("block:5x4:pad", (4, 20), (36, 20), (36, 20)),
    ],
)
def test_named_structures_have_these_groups(name, linear, convolution, transposed):
    structure = as_structure(name)
    layouts = [Layout((8, 6)), Layout((8, 6, 3, 3)), Layout((8, 6, 3, 3), input_dim=0)]
    for layout, expected in zip(layouts, (linear, convolution, transposed), strict=True):
        if expected is not None:
            assert (structure.count(layout), structure.size(layout)) == expected


@pytest.mark.parametrize(
    ("name", "layout", "groups"),
    [
        ("filter", Layout((8, 3, 3, 3), 1, 2), 8),  # 6 inputs in 2 groups of 3, 8 outputs in 2 groups of 4
        ("channel", Layout((8, 3, 3, 3), 1, 2), 6),
        ("filter", Layout((6, 4, 3, 3), 0, 2), 8),  # the same transposed
        ("channel", Layout((6, 4, 3, 3), 0, 2), 6),
    ],
)
def test_filters_and_channels_of_a_convolution_in_groups_are_its_outputs_and_inputs(name, layout, groups):
    structure = as_structure(name)
    assert structure.count(layout) == groups
    assert structure.count(layout) * structure.size(layout) == math.prod(layout.shape)


# -- sums and products ----------------------------------------------------------------------------------------------

SIDES = st.none() | st.integers(1, 3).map(lambda n: 2**n)
BLOCKS = st.builds(Block, SIDES, SIDES, kernel=st.booleans(), pad=st.just(True))


@given(BLOCKS, BLOCKS, st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 2)), st.integers(0, 1))
def test_product_keeps_together_what_both_keep_together(first, second, shape, input_dim):
    layout = Layout(shape, input_dim)
    ids = [each.expand(torch.arange(each.count(layout)), shape[0], layout) for each in (first, second, first * second)]
    pairs = {}
    for position in positions(shape):
        pairs.setdefault(ids[2][position].item(), set()).add((ids[0][position].item(), ids[1][position].item()))
    assert all(len(found) == 1 for found in pairs.values())
    assert len({pair for found in pairs.values() for pair in found}) == len(pairs)


def test_products_of_names():
    assert as_structure("row*column") == as_structure("kernel")
    assert as_structure("row*block:4x8:kernel") == Block(1, 8, kernel=True)
    assert as_structure("element*row") == as_structure("block:2x2*element") == Element()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block:4x4*block:6x1", r"structure block:4x4\*block:6x1: blocks of 4 and of 6 overlap"),
        ("2:4*row", r"structure 2:4\*row: a product is of elements, rows, columns or blocks"),
        ("row*iss", r"structure row\*iss: a product is of"),
        ("row+row", r"structure row\+row: a sum is of groups of whole outputs and groups of whole inputs"),
        ("row+kernel", r"structure row\+kernel: a sum is of"),
        ("element+row", r"structure element\+row: a sum is of"),
        ("row+column+row", r"structure row\+column\+row: a sum is of"),
    ],
)
def test_sums_and_products_without_a_meaning_are_refused(text, message):
    with pytest.raises(ConfigurationError, match=message):
        as_structure(text)


def test_sum_is_read_and_written():
    both = as_structure("row+column")
    assert both == Both(as_structure("row"), as_structure("column"))
    assert str(both) == "row+column"
    assert both.overlapping
    assert not as_structure("row").overlapping


# -- refusals -------------------------------------------------------------------------------------------------------


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
        structure.validate("a.weight", Layout(shape, input_dim))


@given(st.integers(1, 40), st.integers(1, 40))
def test_text_and_structure_are_one(first, second):
    for block in (Block(first, second), Block(None, second, pad=True), Block(first, None, kernel=True)):
        assert as_structure(str(block)) == block
    block = Block(first, second)
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
    layout = Layout((4, 4), 0)
    assert (Element().size(layout), Element().cell, Element().row_multiple(layout)) == (1, None, 1)
    assert str(as_structure("iss")) == "iss"
    assert as_structure("iss") == ISS()
    both = ISS({"rnn.0": ["rnn.1.weight_ih"], "rnn.1": ["a.weight", "b.weight"]})
    assert str(both) == "iss:rnn.0>rnn.1.weight_ih;rnn.1>a.weight,b.weight"
    assert as_structure(str(both)) == both
    assert as_structure("iss:rnn>a.weight;rnn>b.weight") == ISS({"rnn": ["a.weight", "b.weight"]})
    assert str(ISS({"rnn": []})) == "iss"


@pytest.mark.parametrize(
    "text",
    [
        "iss:",
        "iss:rnn",
        "iss:rnn>",
        "iss:>a.weight",
        "iss:rnn>a>b",
        "iss: rnn > a",
        "iss:rnn>a,,b",
        "",
        "elements",
        "2:4:8",
        "2:4 ",
        "-2:4",
        "block:4",
        "block:4x",
        "block4x1",
        "4x1",
        4,
        None,
    ],
)
def test_unknown_structure_lists_what_is_allowed(text):
    with pytest.raises(ConfigurationError, match=r"structure: got .*allowed are 'element', 'N:M' .*'block:RxC'.*'iss'"):
        as_structure(text)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0"])
def test_n_to_m_out_of_range_is_refused(text):
    with pytest.raises(ConfigurationError, match=f"structure {text}: expected N:M with 0 < N < M"):
        as_structure(text)


@pytest.mark.parametrize("text", ["block:0x1", "block:1x0"])
def test_empty_block_is_refused(text):
    with pytest.raises(ConfigurationError, match=f"structure {text}: expected at least one row and one column"):
        as_structure(text)
