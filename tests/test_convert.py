"""Files and folders of other libraries become smaller and come back bit for bit; the commands that do it."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import gossamer as gs
from gossamer.cli import app
from gossamer.convert import compress, expand
from gossamer.errors import StateError
from gossamer.inspection import inspect
from gossamer.zoo._vision import import_torchvision


def sparse(*shape: int, sparsity: float = 0.9) -> Tensor:
    tensor = torch.randn(shape)
    tensor[torch.rand(shape) < sparsity] = 0
    return tensor


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def content(folder) -> dict[str, object]:
    """Tensors, metadata and other files of a folder, by path."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name).view(torch.int16).tolist() for name in file.keys()}  # noqa: SIM118
                found[str(path.relative_to(folder))] = tensors, file.metadata()
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.fixture
def folder(tmp_path):
    """A folder of shards, as Transformers saves large models."""
    made = tmp_path / "model"
    (made / "more").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "more" / "vocabulary.txt").write_text("a b c")
    torch.manual_seed(0)
    names = {}
    for shard in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        tensors = {f"{shard[6:11]}.{i}": sparse(128, 256).bfloat16() for i in range(2)}
        save_file(tensors, made / shard, {"format": "pt"})
        names |= dict.fromkeys(tensors, shard)
    (made / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return made


def test_a_folder_of_shards_becomes_small_and_comes_back(folder, tmp_path):
    done = run("compress", folder, tmp_path / "small")
    assert done.exit_code == 0, done.output
    assert "small: " in done.stdout
    small = sum(os.path.getsize(path) for path in (tmp_path / "small").glob("*.safetensors"))
    assert small < 0.16 * sum(os.path.getsize(path) for path in folder.glob("*.safetensors"))
    assert run("expand", tmp_path / "small", tmp_path / "again").exit_code == 0
    assert content(tmp_path / "again") == content(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model", "small"]


def test_a_file_comes_back_with_what_else_it_said(tmp_path):
    save_file({"a": sparse(64, 64), "b": torch.ones(2)}, tmp_path / "a", {"format": "pt", "modelspec.title": "x"})
    compress(tmp_path / "a", tmp_path / "b")
    expand(tmp_path / "b", tmp_path / "c")
    with safe_open(tmp_path / "c", "pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.title": "x"}
    before, after = load_file(tmp_path / "a"), load_file(tmp_path / "c")
    assert all(torch.equal(before[name], after[name]) for name in before.keys() | after.keys())


def test_tied_names_are_each_written_when_expanded(tmp_path):
    gs.save({"a": (same := sparse(64, 64)), "b": same}, tmp_path / "small")
    expand(tmp_path / "small", tmp_path / "plain")
    assert all(torch.equal(load_file(tmp_path / "plain")[name], same) for name in "ab")


def test_a_state_dict_of_torch_is_compressed(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    gs.prune(model, 0.9)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert run("compress", tmp_path / "m.pt", tmp_path / "small").exit_code == 0
    loaded = gs.load(tmp_path / "small")
    assert list(loaded) == list(model.state_dict())
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("what", [Harmful(), {"model": {"a": torch.ones(1)}}, [torch.ones(1)], nn.Linear(2, 2)])
def test_a_file_of_torch_that_is_no_state_dict_is_refused_and_runs_nothing(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    torch.save(what, "m.pt")
    with pytest.raises(StateError, match=r"m.pt: is no state dict"):
        compress("m.pt", "small")
    assert os.listdir() == ["m.pt"]


def test_a_damaged_file_of_torch_is_refused(tmp_path):
    torch.save({"a": torch.ones(100)}, tmp_path / "m.pt")
    (tmp_path / "m.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:300])
    with pytest.raises(StateError, match=r"m.pt: is no state dict"):
        compress(tmp_path / "m.pt", tmp_path / "small")


@pytest.mark.parametrize(
    ("source", "destination", "said"),
    [
        ("model", "model", "is there already"),
        ("model", "model/small", "is inside"),
        ("model/more", "small", "has no .safetensors file"),
        ("none", "small", "cannot be read"),
        ("model/config.json", "small", "no safetensors file"),
    ],
)
def test_what_cannot_be_converted_is_told_in_a_line_and_nothing_is_written(folder, source, destination, said):
    before = content(folder.parent)
    done = run("compress", folder.parent / source, folder.parent / destination)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert content(folder.parent) == before
    assert not (folder.parent / "small").exists()


def test_a_folder_with_a_damaged_file_leaves_nothing_behind(folder, tmp_path):
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"damaged")
    with pytest.raises(StateError, match="model-00002-of-00002"):
        compress(folder, tmp_path / "small")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_of_transformers_comes_back_as_it_was(tmp_path):
    transformers = pytest.importorskip("transformers")
    with contextlib.suppress(ModuleNotFoundError):
        import_torchvision()  # Transformers does, and would stop where its operators cannot be loaded
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    gs.prune(model, 0.9)
    tokens = torch.arange(12).view(2, 6)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for kind in ("whole", "shards"):
        compress(tmp_path / kind, tmp_path / f"{kind}-small")
        expand(tmp_path / f"{kind}-small", tmp_path / f"{kind}-again")
        assert content(tmp_path / f"{kind}-again") == content(tmp_path / kind)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-again").eval()
        assert torch.equal(again(tokens).logits, expected)
    # Transformers leaves the tied name out: a model that ties takes it from the other.
    other = gs.load(tmp_path / "whole-small" / "model.safetensors", transformers.LlamaForCausalLM(config).eval())
    assert torch.equal(other(tokens).logits, expected)
    gs.save(model, tmp_path / "model")
    other = gs.load(tmp_path / "model", transformers.LlamaForCausalLM(config).eval())
    assert torch.equal(other(tokens).logits, expected)


def saved(tmp_path):
    torch.manual_seed(0)
    state = {"[red]a": sparse(100, 100), "b": torch.ones(3), "\x1b[2J": torch.zeros(()), "empty": torch.ones(0, 3)}
    gs.save(state | {"c": state["[red]a"]}, tmp_path / "f")
    return state, tmp_path / "f"


def test_inspect_tells_density_bytes_and_what_is_saved(tmp_path):
    state, path = saved(tmp_path)
    done = run("inspect", path, "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    first, *_, last = found["tensors"]
    nonzero = int(state["[red]a"].count_nonzero())
    assert [row["name"] for row in found["tensors"]] == [*state, "c"]
    assert (first["shape"], first["dtype"], first["encoding"]) == ([100, 100], "float32", "positions")
    assert first["density"] == nonzero / 10_000
    assert first["bytes"] / 40_000 == pytest.approx(first["part"])
    assert (last["encoding"], last["bytes"], last["density"]) == ("tied with [red]a", 0, first["density"])
    assert found["totals"]["bytes"] == os.path.getsize(path)
    assert found["totals"]["dense_bytes"] == 40_000 + 12 + 4
    assert found["totals"]["density"] == (nonzero + 3) / 10_004


def test_inspect_shows_a_table_whatever_tensors_are_called(tmp_path):
    _, path = saved(tmp_path)
    done = run("inspect", path)
    assert done.exit_code == 0
    assert "[red]a" in done.stdout
    assert "\x1b" not in done.stdout
    assert "tied with [red]a" in done.stdout
    assert "100×100" in done.stdout


def test_inspect_says_in_a_line_what_is_wrong(tmp_path):
    _, path = saved(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[-200] ^= 1
    path.write_bytes(damaged)
    done = run("inspect", path)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "'[red]a' is damaged" in done.stderr


def test_inspect_of_another_safetensors_file_counts_its_zeros(tmp_path):
    save_file({"a": torch.tensor([0.0, -0.0, 1.0, 0.0])}, tmp_path / "f")
    (row,) = inspect(tmp_path / "f").rows
    assert (row["encoding"], row["density"], row["part"]) == ("dense", 0.5, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inspect_says_how_many_numbers_are_negative_zeros(tmp_path, dtype):
    weight = torch.randn(64, 64, dtype=dtype)
    gs.save({"a": weight * (torch.rand(64, 64) < 0.1)}, tmp_path / "masked")
    count = inspect(tmp_path / "masked").totals["negative_zeros"]
    assert 1000 < count < 2600
    assert f"{count:,} numbers are −0.0" in run("inspect", tmp_path / "masked").stdout
    gs.save({"a": gs.load(tmp_path / "masked")["a"] + 0.0, "b": torch.tensor([-(2**31)]).int()}, tmp_path / "added")
    assert inspect(tmp_path / "added").totals["negative_zeros"] == 0
    assert "−0.0" not in run("inspect", tmp_path / "added").stdout
