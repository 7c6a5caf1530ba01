"""The safetensors container: files of the library and of gossamer are each other's, and what is not one is refused."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from gossamer.container import DTYPES, Container, Form, parse_json, write_container
from gossamer.errors import ConfigurationError, StateError

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=4).filter(lambda name: name != "__metadata__")
forms = st.builds(Form, st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=4).map(tuple))


@given(st.dictionaries(names, forms, max_size=5), st.dictionaries(names, st.text(max_size=4), max_size=2), st.data())
def test_the_library_reads_what_is_written_and_is_read(tmp_path_factory, held, metadata, data):
    folder = tmp_path_factory.mktemp("c")
    metadata = {key: text.encode(errors="replace").decode() for key, text in metadata.items()}
    content = {name: np.frombuffer(data.draw(st.binary(min_size=f.nbytes, max_size=f.nbytes)), np.uint8) & 1
               for name, f in held.items()}  # fmt: skip
    write_container(folder / "a", metadata, held, content.items())
    with safe_open(folder / "a", "pt") as file:
        assert (file.metadata() or {}) == metadata
        tensors = {name: file.get_tensor(name) for name in held}
        assert set(file.keys()) == set(held)
    for name, tensor in tensors.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[held[name].dtype], held[name].shape)
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == content[name].tobytes()
    save_file(tensors, folder / "b", metadata or None)
    for path in ("a", "b"):
        container = Container(folder / path)
        assert (container.forms, container.metadata) == (held, metadata)
        assert all(container.read(name).tobytes() == content[name].tobytes() for name in held)
        container.close()


def test_wide_numbers_lie_at_multiples_of_their_width(tmp_path):
    held = {"a": Form("U8", (3,)), "b": Form("F64", (1,)), "c": Form("BF16", (1,)), "d": Form("F32", (3,))}
    write_container(tmp_path / "f", {}, held, [(name, np.zeros(form.nbytes, np.uint8)) for name, form in held.items()])
    header = json.loads((tmp_path / "f").read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert [header[name]["data_offsets"][0] % held[name].itemsize for name in "abcd"] == [0] * 4
    assert int.from_bytes((tmp_path / "f").read_bytes()[:8], "little") % 8 == 0


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets, **more})


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("[]", "no JSON object"),
        ("{", "JSONDecodeError"),
        ("\xff", "UnicodeDecodeError"),
        ('{"a":' * 100_000, "RecursionError"),
        ('{"a":1e999}', "expected type, shape and offsets"),
        ('{"a":NaN}', "NaN is no number"),
        (f'{{"a":{"9" * 5000}}}', "ValueError"),
        (f'{{"a":{entry()},"a":{entry()}}}', "comes twice"),
        (f'{{"a":{entry()},"__metadata__":{{"x":"1","x":"1"}}}}', "comes twice"),
        (f'{{"a":{entry()},"__metadata__":{{"x":1}}}}', "metadata are not texts"),
        (f'{{"a":{entry()},"__metadata__":"x"}}', "metadata are not texts"),
        (f'{{"\\ud800":{entry()}}}', "UnicodeEncodeError"),
        (f'{{"a":{entry(more=1)}}}', "expected type, shape and offsets"),
        (f'{{"a":{entry("F31")}}}', "type 'F31', known are"),
        (f'{{"a":{entry(["F32"])}}}', "type"),
        (f'{{"a":{entry(shape=2)}}}', "shape 2"),
        (f'{{"a":{entry(shape=[2.0])}}}', "shape"),
        (f'{{"a":{entry(shape=[True, 2])}}}', "shape"),
        (f'{{"a":{entry(shape=[-1, -2])}}}', "shape"),
        (f'{{"a":{entry(shape=[3])}}}', "does not fit its offsets"),
        (f'{{"a":{entry(shape=[1 << 62, 4])}}}', "larger than any memory"),
        (f'{{"a":{entry(shape=[0, 1 << 62], offsets=[0, 0])}}}', "larger than any memory"),
        (f'{{"a":{entry(offsets=[8, 0])}}}', "does not fit its offsets"),
        (f'{{"a":{entry(offsets=[-4, 4])}}}', "does not fit its offsets"),
        (f'{{"a":{entry(offsets=[0.0, 8])}}}', "does not fit its offsets"),
        (f'{{"a":{entry(offsets=[0, 8, 8])}}}', "does not fit its offsets"),
        (f'{{"a":{entry(shape=[1], offsets=[4, 8])}}}', "begins at 4, where 0 is expected"),
        (f'{{"a":{entry()},"b":{entry(shape=[1], offsets=[4, 8])}}}', "begins at 4, where 8 is expected"),
        (f'{{"a":{entry(shape=[1], offsets=[0, 4])}}}', "has .* bytes, its header tells of"),
        (f'{{"a":{entry(shape=[3], offsets=[0, 12])}}}', "has .* bytes, its header tells of"),
        ("{}", "has .* bytes, its header tells of"),
    ],
)
def test_a_header_that_is_none_is_refused_by_what_is_wrong(tmp_path, header, said):
    text = header.encode("latin1")
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(StateError, match=f"(?s)/f: incomplete, damaged, or no safetensors file .*({said})"):
        Container(tmp_path / "f")


@pytest.mark.parametrize("content", [b"", b"\1\0\0\0\0\0\0", (3).to_bytes(8, "little") + b"{}", b"\xff" * 8 + b"{}"])
def test_a_header_longer_than_the_file_is_refused(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(StateError, match="not the length of a header"):
        Container(tmp_path / "f")


def test_what_cannot_be_opened_is_named(tmp_path):
    for path, said in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(StateError, match=said):
            Container(path)


def test_a_file_that_shrinks_while_it_is_open_is_an_error(tmp_path):
    save_file({"a": torch.ones(10_000), "b": torch.ones(10_000)}, tmp_path / "f")
    container = Container(tmp_path / "f")
    with open(tmp_path / "f", "r+b") as file:
        file.truncate(50_000)
    container.read("a")
    with pytest.raises(StateError, match="has become shorter"):
        container.read("b")
    container.close()


def test_a_reserved_name_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(ConfigurationError, match="__metadata__"):
        write_container(tmp_path / "f", {}, {"__metadata__": Form("U8", (0,))}, [])
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_changed_its_length_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(StateError, match="a: changed while it was saved"):
        write_container(tmp_path / "f", {}, {"a": Form("U8", (2,))}, [("a", np.zeros(3, np.uint8))])
    assert list(tmp_path.iterdir()) == []


def test_json_is_taken_as_it_is_written():
    assert parse_json(b'{"a": [1, 2.5, "\xc3\xa9", null, true]}') == {"a": [1, 2.5, "é", None, True]}
