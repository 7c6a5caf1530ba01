"""Models and state dicts in files: every bit comes back, files are small, and what does not fit changes nothing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gossamer as gs
from gossamer import container, encodings, files
from gossamer.container import DTYPES
from gossamer.encodings import Cells, Dense
from gossamer.errors import ConfigurationError, StateError
from gossamer.files import File
from slow_decoding import slow_decode


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    plain = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), plain.view(torch.uint8).numpy().tobytes()


def all_bits(state: dict[str, Tensor]) -> list[object]:
    return [(name, bits(tensor)) for name, tensor in state.items()]


@st.composite
def sparse_tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of every type with zeros, −0.0 and NaN of any payload, some of them views."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 7, 16, 64]), max_size=4))
    shape = shape if math.prod(shape) < 20_000 else [16, 64]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    if dtype is torch.bool:
        raw &= 1
    else:
        special = torch.rand(raw.shape[:-1]) < 0.2
        raw[special] = torch.tensor([0] * (dtype.itemsize - 1) + [0x80], dtype=torch.uint8)  # −0.0 of floats
    by_row = draw(st.booleans()) and len(shape) > 1
    zero = torch.rand(shape[:1] if by_row else shape) < draw(st.sampled_from([0, 0.3, 0.9, 0.97, 1]))
    raw[zero] = 0
    tensor = raw.view(dtype).squeeze(-1) if shape else raw.view(dtype).reshape(())
    if draw(st.booleans()) and len(shape) > 1:
        tensor = tensor.transpose(0, 1)
    if draw(st.booleans()) and len(shape) == 4:
        tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), sparse_tensors(), max_size=4))
def test_every_bit_comes_back_and_names_keep_their_order(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("s") / "f"
    gs.save(state, path)
    assert all_bits(gs.load(path)) == all_bits(state)
    with File(path) as file:
        assert list(file) == list(state)
        assert all(bits(file[name]) == bits(state[name]) for name in state)
    load_file(path)  # an ordinary safetensors file


def test_a_file_is_what_its_page_says(tmp_path):
    torch.manual_seed(0)
    zero = {"a": torch.rand(40, 60) < 0.95, "b": torch.rand(40, 1) < 0.5, "c": torch.rand(40, 60) < 0.5}
    state = {name: torch.randn(40, 60).masked_fill(each, 0) for name, each in zero.items()} | {"d": torch.ones(2)}
    gs.save(state | {"e": state["d"]}, tmp_path / "f")
    stored = load_file(tmp_path / "f")
    with safe_open(tmp_path / "f", "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "gossamer", "gossamer_sha256"}
    assert hashlib.sha256(metadata["gossamer"].encode()).hexdigest() == metadata["gossamer_sha256"]
    about = json.loads(metadata["gossamer"])
    assert (about["version"], about["separator"], about["metadata"]) == (1, "/", {})
    described = about["tensors"]
    assert described.pop("e") == {"tied": "d"}
    assert [entry["encoding"] for entry in described.values()] == ["positions", "bitmask", "bitmask", "dense"]
    for name, entry in described.items():
        shape = tuple(entry["shape"])
        fields = {key: value for key, value in entry.items() if key not in ("dtype", "shape", "sha256")}
        encoding = encodings.parse(fields, shape, 4)
        names = {"values": name} if encoding == Dense() else {part: f"{name}/{part}" for part in encoding.parts}
        parts = {part: stored.pop(each) for part, each in names.items()}
        numbers = {"values": parts.pop("values").view(torch.int32).numpy().view("u4").ravel()}
        numbers |= {part: each.numpy() for part, each in parts.items()}
        dense = np.array(slow_decode(encoding, numbers, shape), "<u4").tobytes()
        assert dense == bits(state[name])[2]
        text = json.dumps([name, entry["dtype"], entry["shape"]]).encode()
        assert hashlib.sha256(text + dense).hexdigest()[:32] == entry["sha256"]
    assert not stored


def unstructured(sparsity: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {f"layer{i}.weight": torch.randn(512, 256) for i in range(3)}
    for weight in state.values():
        weight[torch.rand(weight.shape) < sparsity] = 0
    return {name: weight.to(dtype) for name, weight in state.items()}


@pytest.mark.parametrize(
    ("sparsity", "dtype", "most"),
    [
        (0.5, torch.float32, 0.54),
        (0.8, torch.float32, 0.24),
        (0.9, torch.float32, 0.135),
        (0.95, torch.float32, 0.085),
        (0.9, torch.bfloat16, 0.15),
        (0.9, torch.float16, 0.15),
        (0.9, torch.int8, 0.18),
    ],
)
def test_files_are_as_small_as_promised(tmp_path, sparsity, dtype, most):
    state = unstructured(sparsity, dtype) if dtype is not torch.int8 else unstructured(sparsity)
    if dtype is torch.int8:
        state = {name: (40 * weight).ceil().to(dtype) for name, weight in state.items()}
    gs.save(state, tmp_path / "sparse")
    save_file(state, tmp_path / "dense")
    assert os.path.getsize(tmp_path / "sparse") <= most * os.path.getsize(tmp_path / "dense")


def test_a_model_pruned_two_of_four_is_written_in_cells(tmp_path):
    model = nn.Linear(64, 32)
    gs.prune(model, 0.5, structure="2:4")
    gs.save(model, tmp_path / "f")
    with File(tmp_path / "f") as file:
        assert file.encoding("weight") == Cells(2, 4, 1)
        assert file.encoding("bias") == Dense()
        assert bits(file["weight"]) == bits(model.weight)


def test_small_tensors_are_not_encoded_at_a_loss(tmp_path):
    gs.save({"a": torch.tensor([0.0, 1.0, 0.0])}, tmp_path / "f")
    with File(tmp_path / "f") as file:
        assert file.encoding("a") == Dense()


class Net(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.hidden = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 50, bias=False)
        if tie:
            self.head.weight = self.embedding.weight
        self.register_buffer("scratch", torch.ones(3), persistent=False)


def net(tie: bool = True, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net(tie)
    gs.prune(model, 0.9, targets="hidden.weight")
    model.norm(torch.randn(8, 16))
    return model


def test_a_model_comes_back_with_tied_weights_and_buffers(tmp_path):
    model, other = net(), net(seed=1)
    gs.save(model, tmp_path / "f")
    weight = other.hidden.weight
    assert gs.load(tmp_path / "f", other) is other
    assert all_bits(other.state_dict()) == all_bits(model.state_dict())
    assert other.head.weight is other.embedding.weight
    assert other.hidden.weight is weight
    assert int(other.norm.num_batches_tracked) == 1
    with File(tmp_path / "f") as file:
        assert file.tied == {"head.weight": "embedding.weight"}
        assert "scratch" not in file
    loaded = gs.load(tmp_path / "f")
    assert list(loaded) == list(model.state_dict())
    assert loaded["head.weight"] is loaded["embedding.weight"]


def test_tied_weights_are_written_once(tmp_path):
    gs.save({"a": (same := torch.randn(1000)), "b": same, "part": same[10:], "as": same.view(10, 100)}, tmp_path / "f")
    gs.save({"a": same}, tmp_path / "one")
    with File(tmp_path / "f") as file:
        assert file.tied == {"b": "a"}
    loaded = gs.load(tmp_path / "f")
    assert torch.equal(loaded["part"], same[10:])
    assert torch.equal(loaded["as"], same.view(10, 100))


def test_a_model_that_ties_loads_a_file_that_holds_one_of_the_names(tmp_path):
    model, other = net(), net(seed=1)
    save_file({name: value for name, value in model.state_dict().items() if name != "head.weight"}, tmp_path / "f")
    gs.load(tmp_path / "f", other)
    assert all_bits(other.state_dict()) == all_bits(model.state_dict())


def test_an_untied_model_loads_tied_names(tmp_path):
    model, other = net(), net(tie=False)
    gs.save(model, tmp_path / "f")
    gs.load(tmp_path / "f", other)
    assert torch.equal(other.head.weight, model.head.weight)


def test_a_conjugate_view_is_not_taken_for_the_tensor_itself(tmp_path):
    value = torch.randn(5, dtype=torch.complex64)
    gs.save({"a": value, "b": value.conj(), "c": value.imag, "d": value.conj().imag}, tmp_path / "f")
    loaded = gs.load(tmp_path / "f")
    assert torch.equal(loaded["b"], value.conj().resolve_conj())
    assert torch.equal(loaded["c"], -loaded["d"])


def test_names_go_without_wrappers(tmp_path):
    model = net()
    wrapped = torch.compile(model, backend="eager")
    wrapped.hidden = torch.compile(model.hidden, backend="eager")
    gs.save(wrapped, tmp_path / "f")
    assert list(gs.load(tmp_path / "f")) == list(net().state_dict())
    other = torch.compile(net(seed=1), backend="eager")
    assert gs.load(tmp_path / "f", other) is other
    assert torch.equal(other.hidden.weight, model.hidden.weight)
    gs.save(nn.DataParallel(net()), tmp_path / "f")
    gs.load(tmp_path / "f", nn.DataParallel(other))
    gs.save(torch.compile(nn.DataParallel(torch.compile(model, backend="eager")), backend="eager"), tmp_path / "f")
    assert list(gs.load(tmp_path / "f")) == list(net().state_dict())


def test_names_that_look_like_parts_stay_apart(tmp_path):
    sparse = torch.zeros(1000)
    sparse[::50] = 1
    state = {"a": sparse, "a/values": torch.ones(3), "a//mask": torch.ones(2), "a//values": torch.ones(1)}
    gs.save(state, tmp_path / "f")
    assert all_bits(gs.load(tmp_path / "f")) == all_bits(state)


def test_another_safetensors_file_loads_too(tmp_path):
    state = unstructured(0.5)
    save_file(state, tmp_path / "f", {"format": "pt"})
    assert dict(all_bits(gs.load(tmp_path / "f"))) == dict(all_bits(state))


def test_tensors_are_read_one_at_a_time(tmp_path):
    state = {f"{i}": torch.randn(250_000) for i in range(20)}
    gs.save(state, tmp_path / "f")
    tracemalloc.start()
    with File(tmp_path / "f") as file:
        opened = tracemalloc.get_traced_memory()[1]
        for name in file:
            file[name]
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < 100_000
    assert peak < 5_000_000


def test_saving_needs_the_memory_of_about_one_tensor(tmp_path):
    state = {f"{i}": unstructured(0.5)["layer0.weight"].repeat(2, 1) for i in range(20)}
    tracemalloc.start()
    gs.save(state, tmp_path / "f")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * state["0"].nbytes


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({1: torch.ones(1)}, "1: tensors have texts as names"),
        ({"\ud800": torch.ones(1)}, "have texts as names"),
        ({"__metadata__": torch.ones(1)}, "__metadata__"),
        ({"a": torch.ones(1), "b": {"c": torch.ones(1)}}, "b: is a dict, and files hold tensors"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a: is a Tensor of layout torch.sparse_coo"),
        ({"a": torch.ones(1, device="meta")}, r'a: has no memory \(device "meta"\)'),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "a: has type torch.complex128, and files hold F64"),
        ({"a": torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged)}, "a: is a "),
    ],
)
def test_what_a_file_cannot_hold_is_named_and_nothing_is_written(tmp_path, state, said):
    with pytest.raises(ConfigurationError, match=said):
        gs.save(state, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_a_lazy_module_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"weight: has no shape yet; run a batch"):
        gs.save(nn.LazyLinear(3), tmp_path / "f")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden.weight": torch.ones(16, 15)}, r"hidden.weight has type torch.float32 and shape \(16, 15\)"),
        ({"hidden.weight": torch.ones(16, 16).double()}, "hidden.weight has type torch.float64"),
        ({"hiden.weight": torch.ones(16, 16)}, "has 'hiden.weight', which the model has not.*mean 'hidden.weight'"),
        ({"head.weight": torch.ones(50, 16)}, "embedding.weight and head.weight differ"),
    ],
)
def test_a_file_that_does_not_fit_the_model_changes_nothing(tmp_path, change, said):
    gs.save(net().state_dict() | change, tmp_path / "f")
    other = net(seed=1)
    before = all_bits(other.state_dict())
    with pytest.raises(StateError, match=said):
        gs.load(tmp_path / "f", other)
    assert all_bits(other.state_dict()) == before


def test_a_name_that_is_missing_is_told_with_the_nearest(tmp_path):
    state = net().state_dict()
    state["hidden.wight"] = state.pop("hidden.weight")
    gs.save(state, tmp_path / "f")
    with pytest.raises(StateError, match=r"f: has no 'hidden.weight', which the model has.*mean 'hidden.wight'"):
        gs.load(tmp_path / "f", net())


def test_a_model_without_memory_is_refused(tmp_path):
    gs.save(net(), tmp_path / "f")
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ConfigurationError, match="to_empty"):
        gs.load(tmp_path / "f", empty)


def test_a_damaged_tensor_changes_nothing_in_the_model(tmp_path):
    model = net()
    gs.save(model, tmp_path / "f")
    content = bytearray((tmp_path / "f").read_bytes())
    content[-500] ^= 4
    (tmp_path / "f").write_bytes(content)
    other = net(seed=1)
    before = all_bits(other.state_dict())
    with pytest.raises(StateError, match=r"f: '.*' is damaged \(its numbers do not fit their checksum\)"):
        gs.load(tmp_path / "f", other)
    assert all_bits(other.state_dict()) == before


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    gs.save({"a": torch.ones(3)}, tmp_path / "f")
    digest = files.bits_of
    calls = []

    def interrupted(tensor: Tensor) -> object:
        calls.append(tensor)
        if len(calls) == 4:  # the second tensor, when it is written
            raise KeyboardInterrupt
        return digest(tensor)

    monkeypatch.setattr(files, "bits_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gs.save({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "f")
    assert torch.equal(gs.load(tmp_path / "f")["a"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    gs.save({"a": torch.ones(3)}, tmp_path / "f")
    script = (
        "import os, signal, torch, gossamer as gs; from gossamer import files; whole = files.bits_of; n = [0]\n"
        "def bits_of(tensor):\n"
        "    n[0] += 1\n"
        "    if n[0] == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return whole(tensor)\n"
        "files.bits_of = bits_of\n"
        "gs.save({'a': torch.zeros(3), 'b': torch.zeros(3)}, 'f')"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert torch.equal(gs.load(tmp_path / "f")["a"], torch.ones(3))


def rewritten(path, change) -> None:
    """Change the table of contents of a file, with checksum and header corrected."""
    state = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["gossamer"])
    text = change(about)
    metadata["gossamer"] = text if isinstance(text, str) else json.dumps(about)
    metadata["gossamer_sha256"] = files._sha256(metadata["gossamer"].encode())
    save_file(state, path, metadata)


def sparse_file(tmp_path) -> str:
    gs.save(unstructured(0.9) | {"b": torch.ones(4)}, tmp_path / "f")
    return str(tmp_path / "f")


def put(*keys_and_value):
    """What sets an entry deep in the table of contents."""
    *keys, last, value = keys_and_value

    def change(about):
        for key in keys:
            about = about[key]
        about[last] = value

    return change


W = ("tensors", "layer1.weight")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("version", 2), "is of version 2, this gossamer reads 1; install the gossamer"),
        (put("version", "1"), "is of version '1'"),
        (put("version", True), "is of version True"),
        (put("separator", 1), "no tensors"),
        (put("separator", ""), "expected"),
        (put("tensors", []), "no tensors"),
        (put("metadata", {"a": 1}), "not texts"),
        (put(*W, 3), "'layer1.weight': is not described"),
        (put(*W, {"tied": "layer1.weight"}), "is tied to 'layer1.weight', which is no tensor"),
        (put(*W, {"tied": {}}), "is tied to {}, which is no tensor"),
        (put(*W, {"tied": "b"}), "expected None, found Form"),
        (put(*W, "dtype", "F64"), "expected|marks|fit"),
        (put(*W, "shape", [256, 512]), r"layer1.weight' is damaged \(its numbers do not fit their checksum"),
        (put(*W, "shape", [512, 2**55]), "larger than any memory"),
        (put(*W, "shape", [512, 2**40]), "more than 1024 times the bytes|expected Form"),
        (put(*W, "shape", [512, 256.0]), "shape"),
        (put(*W, "shape", [512, -256]), "shape"),
        (put(*W, "kept", 10), "expected Form"),
        (put(*W, "kept", -10), "-10 tiles"),
        (put(*W, "low_bits", 60), "expected Form"),
        (put(*W, "encoding", "dense"), "encoding dense with"),
        (put(*W, "sha256", None), "has no checksum"),
        (put(*W, "sha256", "0" * 32), "do not fit their checksum"),
        (put("tensors", "b", "encoding", "cells"), "encoding cells"),
        (lambda about: '{"version":1,"version":1}', "comes twice"),
        (lambda about: "[" * 100_000, "is no JSON"),
        (lambda about: "[]", "is of version None"),
        (lambda about: '{"version":1}', "has no tensors"),
        (lambda about: json.dumps(about).replace('"kept"', '"kept": NaN, "kep"', 1), "is no JSON"),
    ],
)
def test_contents_that_lie_are_refused_with_file_and_tensor(tmp_path, change, said):
    path = sparse_file(tmp_path)
    rewritten(path, change)
    with pytest.raises(StateError, match=f"(?s)/f: .*({said})"):
        gs.load(path)


@pytest.mark.parametrize("key", ["format", "gossamer", "gossamer_sha256"])
def test_metadata_of_which_a_part_is_gone_are_damage_and_no_other_kind_of_file(tmp_path, key):
    path = sparse_file(tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    del metadata[key]
    save_file(load_file(path), path, metadata)
    with pytest.raises(StateError, match="is damaged: its metadata are"):
        gs.load(path)


def test_a_table_of_contents_that_changed_is_found(tmp_path):
    path = sparse_file(tmp_path)
    content = Path(path).read_bytes()
    Path(path).write_bytes(content.replace(b'\\"b\\":', b'\\"c\\":'))
    with pytest.raises(StateError, match="table of contents does not fit its checksum"):
        gs.load(path)


def test_parts_that_are_swapped_are_found(tmp_path):
    path = sparse_file(tmp_path)
    weights = {name: tensor[:400] for name, tensor in unstructured(0.9).items()}
    rows = torch.arange(512 * 256).view(512, 256) % 10 == 0
    gs.save({"a": torch.randn(512, 256) * rows + 0.0, "b": torch.randn(512, 256) * rows + 0.0, **weights}, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    state["a/values"], state["b/values"] = state["b/values"], state["a/values"]
    save_file(state, path, metadata)
    with pytest.raises(StateError, match="'a' is damaged"):
        gs.load(path)


def test_a_bool_that_is_neither_is_refused(tmp_path):
    container.write_container(
        tmp_path / "f",
        {},
        {"a": container.Form("BOOL", (2,))},
        [("a", torch.tensor([2, 1], dtype=torch.uint8).numpy())],
    )
    with pytest.raises(StateError, match=r"'a' is damaged \(a bool that is neither 0 nor 1"):
        gs.load(tmp_path / "f")
