import math
import os
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gossamer import checkpoint
from gossamer.checkpoint import load_tree, save_tree
from gossamer.errors import ConfigurationError, StateError

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    if dtype is torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size))).bool().reshape(shape)
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    return torch.frombuffer(raw, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
trees = st.recursive(
    plain | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.sampled_from(["$tensor", "a/b"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def bits(tree: object) -> object:
    """A form in which equality means the same types and the same bits."""
    if isinstance(tree, torch.Tensor):
        return ("tensor", tree.dtype, tuple(tree.shape), tree.contiguous().view(-1).view(torch.uint8).tolist())
    if isinstance(tree, dict):
        return ("dict", [(type(key), key, bits(value)) for key, value in tree.items()])
    if isinstance(tree, list | tuple):
        return (type(tree), [bits(value) for value in tree])
    return (type(tree), struct.pack("d", tree) if isinstance(tree, float) and tree == tree else str(tree))


@given(trees)
def test_a_tree_comes_back_with_the_same_structure_types_and_bits(
    tmp_path_factory: pytest.TempPathFactory, tree: object
):
    file = tmp_path_factory.mktemp("tree") / "state.safetensors"
    save_tree(file, tree)
    assert bits(load_tree(file)) == bits(tree)


def test_the_state_of_an_optimizer_loads_back(tmp_path):
    def steps(optimizer: torch.optim.Optimizer, weight: torch.Tensor, count: int) -> None:
        for i in range(count):
            weight.grad = torch.full_like(weight, 0.1 * (i + 1))
            optimizer.step()

    weight = torch.nn.Parameter(torch.linspace(-1, 1, 6))
    optimizer = torch.optim.AdamW([weight], lr=0.1, amsgrad=True)
    steps(optimizer, weight, 3)
    save_tree(tmp_path / "s", {"weight": weight, "optimizer": optimizer.state_dict()})
    steps(optimizer, weight, 2)

    state = load_tree(tmp_path / "s")
    other = torch.nn.Parameter(state["weight"])
    again = torch.optim.AdamW([other], lr=0.5)
    again.load_state_dict(state["optimizer"])
    steps(again, other, 2)
    assert torch.equal(weight, other)


@pytest.mark.parametrize(
    ("shape", "layout"), [((2, 3, 4, 5), torch.channels_last), ((2, 3, 4, 5, 2), torch.channels_last_3d)]
)
def test_a_channels_last_tensor_keeps_its_layout(tmp_path, shape, layout):
    tensor = torch.rand(shape).contiguous(memory_format=layout)
    save_tree(tmp_path / "s", [tensor])
    (loaded,) = load_tree(tmp_path / "s")
    assert loaded.stride() == tensor.stride()
    assert torch.equal(loaded, tensor)


def test_views_of_one_storage_are_saved_apart(tmp_path):
    base = torch.arange(12.0)
    save_tree(tmp_path / "s", {"all": base, "part": base[3:6], "turned": base.view(3, 4).t(), "same": base})
    loaded = load_tree(tmp_path / "s")
    assert torch.equal(loaded["part"], base[3:6])
    assert torch.equal(loaded["turned"], base.view(3, 4).t())


def test_tensors_have_their_path_as_name_for_any_safetensors_reader(tmp_path):
    save_tree(tmp_path / "s", {"model": {"layer.weight": torch.ones(2)}, "state": [torch.zeros(1)]})
    assert sorted(load_file(tmp_path / "s")) == ["model/layer.weight", "state/0"]


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"a": [0, {1, 2}]}, "a/1: cannot save a set"),
        ({"a": {(1, 2): 3}}, "a: keys must be"),
        (object(), "tree: cannot save a object"),
    ],
)
def test_a_value_that_is_not_plain_is_refused_by_its_path(tmp_path, tree, named):
    with pytest.raises(ConfigurationError, match=named):
        save_tree(tmp_path / "s", tree)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_tree(tmp_path / "s", {"epoch": 1})

    def full_disk(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_tree(tmp_path / "s", {"epoch": 2})
    assert load_tree(tmp_path / "s") == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_a_file_has_the_rights_that_new_files_have(tmp_path):
    before = os.umask(0o027)
    try:
        save_tree(tmp_path / "s", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("length", [0, 4, 60, -1])
def test_a_cut_file_is_named(tmp_path, length):
    save_tree(tmp_path / "s", {"a": torch.ones(100)})
    content = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(content[:length])
    with pytest.raises(StateError, match=r"/s: missing, incomplete or damaged"):
        load_tree(tmp_path / "s")


@pytest.mark.parametrize("place", [-1, -401, -395])
def test_a_file_in_which_one_bit_changed_is_named(tmp_path, place):
    save_tree(tmp_path / "s", {"a": torch.ones(100), "b": 0.5})
    content = bytearray((tmp_path / "s").read_bytes())
    content[place] ^= 1
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(StateError, match=r"/s: .*damaged"):
        load_tree(tmp_path / "s")


def test_a_plain_value_that_changed_is_found_too(tmp_path):
    save_tree(tmp_path / "s", {"a": torch.ones(100), "epoch": 12})
    content = (tmp_path / "s").read_bytes()
    assert content.count(b": 12") == 1
    (tmp_path / "s").write_bytes(content.replace(b": 12", b": 13"))
    with pytest.raises(StateError, match=r"/s: damaged, its checksum does not fit"):
        load_tree(tmp_path / "s")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StateError, match=r"/none: missing"):
        load_tree(tmp_path / "none")


def test_another_safetensors_file_is_not_taken_for_a_state(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "s")
    with pytest.raises(StateError, match="not a saved state"):
        load_tree(tmp_path / "s")
