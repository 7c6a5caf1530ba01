import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer import data
from gossamer.attach import Sparsity
from gossamer.checkpoint import load_tree, save_tree
from gossamer.errors import ConfigurationError, NonFiniteError, StateError
from gossamer.nn import FATReLU
from gossamer.recipe import Recipe, load_recipe
from gossamer.run_folder import RunFolder, recipe_of
from gossamer.training import train, train_seeds

SMALL = ("epochs=4", "model.width=0.3", "data.batch_size=64")
METHODS = {
    "dsr": "{type: dsr, sparsity: 0.9, every: 7}",
    "set": "{type: set, sparsity: 0.9, every: 7}",
    "rigl": "{type: rigl, sparsity: 0.9, every: 7, until: 75%}",
    "gmp": "{type: gmp, sparsity: 0.9, every: 7, end: 75%}",
    "static": "{type: static, sparsity: 0.9}",
}

LEARNED = (
    "{type: lossy_threshold, strength: 0.3, eps: 0.3, sites: '*relu*', norm: 'l0:0.05', double_at: [1 epoch, 50%]}"
)
COMBINED = METHODS | {
    "imp": "{type: imp, sparsity: 0.9, rounds: 2, length: 1 epoch, rewind: 5}",
    "thresholds": LEARNED,
    "dsr and thresholds": f"{METHODS['dsr']}, {LEARNED}",
    "continuous": "{type: continuous, rounds: 2, length: 1 epoch, rewind: 5, lr: 1.0}",
    "steered": "{type: continuous, sparsity: 0.8, rounds: 1, length: 2 epochs, rewind: 1 epoch, lr: 1.0}",
    "hard_concrete": "{type: hard_concrete, penalty: 1.0e-4}",
    "str": "{type: str, initial_value: -5.0, penalty: 0.01}",
}


def small(*overrides: str) -> Recipe:
    return load_recipe("digits", [*SMALL, *overrides])


def weights(model: nn.Module | None) -> dict[str, torch.Tensor]:
    assert model is not None
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(a: object, b: object) -> bool:
    """Equal to the bit, tensors included."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def lines(file: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in file.read_text().splitlines()]


def interrupted(monkeypatch: pytest.MonkeyPatch, step: int, run: Callable[[], object]) -> None:
    """Call `run`, with Ctrl-C pressed in its `step`-th training step."""
    ordinary, count = Sparsity.penalty, iter(range(1, 10**6))

    def penalty(self: Sparsity) -> torch.Tensor:
        if next(count) == step:
            raise KeyboardInterrupt
        return ordinary(self)

    with monkeypatch.context() as patch:
        patch.setattr(Sparsity, "penalty", penalty)
        with pytest.raises(KeyboardInterrupt):
            run()


def test_digits_are_learned_at_ninety_percent_zeros():
    result = train(load_recipe("digits"), progress=False)
    assert 0.94 < result.test_accuracy < 1
    assert result.validation_accuracy == result.history[-1]["validation_accuracy"] > 0.94
    assert (result.epochs, result.steps, len(result.history)) == (20, 20 * math.ceil(1293 / 32), 20)
    masked = {row["name"]: row for row in result.summary.rows}
    assert sum(row["active"] for row in masked.values()) == round(0.1 * 50_200)
    for name, weight in weights(result.model).items():
        if name in masked:  # a weight just grown is active and yet zero
            assert masked[name]["total"] - masked[name]["active"] <= int((weight == 0).sum()) < masked[name]["total"]
    assert result.sparsity == pytest.approx(0.9, abs=1e-12)
    losses = [each["train_loss"] for each in result.history]
    assert losses[-1] < 0.1 * losses[0]


def test_the_trained_model_is_plain():
    result = train(small("precision=bf16", "epochs=1"), progress=False)
    assert isinstance(result.model, nn.Module)
    assert not any(name.startswith("_original") for name in vars(result.model))
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.1)
    result.model(torch.rand(2, 1, 8, 8)).sum().backward()
    optimizer.step()  # an attached model would refuse an optimizer that does not know its masks


def test_a_seed_decides_everything():
    first, second, other = (train(small(), seed=seed, progress=False) for seed in (1, 1, 2))
    assert equal(weights(first.model), weights(second.model))
    assert [each["train_loss"] for each in first.history] == [each["train_loss"] for each in second.history]
    assert not equal(weights(first.model), weights(other.model))


def test_initial_weights_do_not_depend_on_the_method():
    dense, sparse = (
        train(small("optimizer.lr=0.0", f"methods=[{m}]"), progress=False) for m in ("", METHODS["static"])
    )
    kept = weights(sparse.model)
    for name, weight in weights(dense.model).items():
        alive = kept[name] != 0
        assert torch.equal(weight[alive], kept[name][alive])


def test_the_random_state_and_the_threads_of_the_caller_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    train(small("threads=2", "deterministic=true", "epochs=1"), progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_nothing_is_written_and_nothing_said_without_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train(small("epochs=1"), progress=False)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_test_data_are_left_alone_on_request():
    result = train(small("epochs=1"), progress=False, test=False)
    assert result.test_accuracy is None
    assert result.test_loss is None


def test_training_without_validation_data_uses_them_to_train():
    result = train(small("data.validation=0", "epochs=1"), progress=False)
    assert result.validation_accuracy is None
    assert result.steps == math.ceil(1437 / 64)


def test_a_dense_network_is_an_empty_list_of_methods():
    result = train(small("methods=[]"), progress=False)
    assert result.sparsity == 0
    assert result.summary.rows == []
    assert all((w != 0).all() for name, w in weights(result.model).items() if name.endswith("weight"))


def test_a_run_folder_holds_recipe_metrics_updates_checkpoint_and_summary(tmp_path):
    recipe = small("seeds=[3]", "methods.0.every=7", "methods.0.until=null")
    result = train(recipe, tmp_path / "run", progress=False)
    files = {"recipe.yaml", "metrics.jsonl", "updates.jsonl", "checkpoint.safetensors", "summary.json"}
    assert {file.name for file in (tmp_path / "run").iterdir()} == files
    assert recipe_of(tmp_path / "run").model_dump() == recipe.model_dump()

    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics == result.history
    assert [each["epoch"] for each in metrics] == [1, 2, 3, 4]
    assert [each["step"] for each in metrics] == [21, 42, 63, 84]
    expected = {"train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "sparsity", "lr", "seconds"}
    assert metrics[0].keys() == {"epoch", "step"} | expected

    updates = lines(tmp_path / "run" / "updates.jsonl")
    assert [each["step"] for each in updates] == list(range(7, 85, 7))
    assert [each["epoch"] for each in updates] == [math.ceil(each["step"] / 21) for each in updates]
    budget = result.summary.totals["targets_active"]
    for update in updates:
        assert sum(row["active"] for row in update["rows"]) == budget
        assert update["extras"]["threshold"] > 0

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"] == result.test_accuracy
    assert summary["summary"]["totals"] == result.summary.totals
    state = load_tree(tmp_path / "run" / "checkpoint.safetensors")
    assert equal(state["model"], dict(weights(result.model)))


@pytest.mark.filterwarnings("ignore:continuous. steering ended:UserWarning")  # which so few steps are too few for
@pytest.mark.parametrize("method", COMBINED)
@pytest.mark.parametrize("optimizer", ["{name: SGD, lr: 0.1, momentum: 0.9}", "{name: AdamW, lr: 0.01}"])
def test_a_run_interrupted_three_times_ends_as_one_that_was_not(tmp_path, monkeypatch, method, optimizer):
    recipe = small(
        f"methods=[{COMBINED[method]}]",
        f"optimizer={optimizer}",
        "schedule={type: cosine, warmup: 1}",
        "data.augment={crop: 1}",
        "clip_grad_norm=1.0",
    )
    whole = train(recipe, tmp_path / "whole", progress=False)
    for step in (30, 5, 25):  # in epoch 2, again in epoch 2, in epoch 3
        interrupted(monkeypatch, step, lambda: train(recipe, tmp_path / "parts", progress=False, resume=True))
    parts = train(recipe, tmp_path / "parts", progress=False, resume=True)

    assert equal(weights(whole.model), weights(parts.model))
    files = [load_tree(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts")]
    assert equal(*files)
    for name in ("metrics.jsonl", "updates.jsonl"):
        assert lines(tmp_path / "whole" / name) == lines(tmp_path / "parts" / name)
    assert (whole.test_accuracy, whole.test_loss, whole.summary) == (
        parts.test_accuracy,
        parts.test_loss,
        parts.summary,
    )
    assert [each["epoch"] for each in parts.history] == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what the compiler imports
@pytest.mark.parametrize("compiled", [False, True])
def test_accuracy_is_that_of_the_finished_model_with_hard_thresholds(compiled):
    options = ("model.width=1.0", f"methods=[{METHODS['static']}, {LEARNED.replace('eps: 0.3', 'eps: 0.9')}]")
    result = train(small(*options, *(["compile=true"] if compiled else [])), progress=False)
    assert result.history[-1]["validation_accuracy"] == result.soft_validation_accuracy
    test = data.load("digits").test
    images = (test.images.float() / test.maximum - test.mean[0]) / test.std[0]
    result.model.eval()
    right = (result.model(images).argmax(1) == test.labels).float().mean().item()
    assert result.test_accuracy == pytest.approx(right)
    assert result.test_accuracy != result.soft_test_accuracy
    assert [row["folded_into"] for row in result.summary.learned] == ["relu1", "relu2"]
    assert (result.model.layer1.weight == 0).float().mean() > 0.7
    assert isinstance(result.model.relu1, FATReLU)
    hidden = result.model.relu1(result.model.layer1(images.flatten(1)))
    last = result.model.relu2(result.model.layer2(hidden))
    zeros = int((hidden == 0).sum() + (last == 0).sum())
    assert result.activations["sparsity"] == pytest.approx(zeros / (hidden.numel() + last.numel()))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of what the compiler imports
def test_weights_and_activations_are_sparse_in_one_compiled_run_that_was_interrupted(tmp_path, monkeypatch):
    recipe = small(f"methods=[{COMBINED['dsr and thresholds']}]", "compile=true")
    whole = train(recipe, tmp_path / "whole", progress=False)
    for step in (30, 25):
        interrupted(monkeypatch, step, lambda: train(recipe, tmp_path / "parts", progress=False, resume=True))
    parts = train(recipe, tmp_path / "parts", progress=False, resume=True)
    assert equal(whole.model.state_dict(), parts.model.state_dict())
    assert whole.summary == parts.summary
    assert parts.summary.totals["targets_sparsity"] == pytest.approx(0.9, abs=1e-4)
    zeros = sum(int((row == 0).sum()) for row in weights(parts.model).values() if row.dim() > 1)
    # A weight that has just grown is zero and yet active.
    assert zeros >= parts.summary.totals["targets_total"] - parts.summary.totals["targets_active"]
    assert {type(parts.model.relu1), type(parts.model.relu2)} == {FATReLU}
    assert not any(module._forward_hooks for module in parts.model.modules())
    assert (whole.test_accuracy, whole.activations) == (parts.test_accuracy, parts.activations)


def test_rounds_are_driven_by_the_recipe_and_told_of_every_epoch(tmp_path):
    recipe = small("epochs=6", f"methods=[{COMBINED['continuous'].replace('1 epoch', '2 epochs')}]")
    result = train(recipe, tmp_path / "run", progress=False)
    history = result.history
    assert [each["continuous.rounds_done"] for each in history] == [0, 0, 1, 1, 2, 2]
    assert [each["continuous.temperature"] for each in history[1:4:2]] == [200.0, 200.0]
    assert [each["sparsity"] > 0 for each in history] == [False] * 4 + [True] * 2
    assert ["hard_validation_accuracy" in each for each in history] == [True] * 4 + [False] * 2
    for each in history[:4]:
        assert each["validation_gap"] == each["validation_accuracy"] - each["hard_validation_accuracy"]
    assert any(each["validation_gap"] for each in history[:4])
    densities = [each["continuous.hard_density"] for each in history]
    assert densities[4] == densities[5] == pytest.approx(1 - result.sparsity)
    assert densities[3] > densities[4] - 1e-6
    assert result.soft_validation_accuracy is None
    (first, ticket) = lines(tmp_path / "run" / "updates.jsonl")
    assert (first["step"], first["rows"], ticket["step"]) == (2 * 21 + 1, [], 4 * 21 + 1)
    assert sum(row["active"] for row in ticket["rows"]) == result.summary.totals["targets_active"]


def test_a_search_that_ends_with_the_run_is_made_hard_at_its_end():
    plan = COMBINED["steered"].replace("2 epochs, rewind: 1 epoch", "4 epochs")
    result = train(small(f"methods=[{plan}]"), progress=False)
    assert result.sparsity == pytest.approx(0.8, abs=1e-4)
    assert result.soft_test_accuracy is not None
    assert result.activations is None


def test_a_run_without_anything_soft_has_one_accuracy():
    result = train(small("epochs=1"), progress=False)
    assert result.soft_test_accuracy is result.soft_validation_accuracy is result.activations is None


def test_a_run_is_not_continued_by_two_processes_at_a_time(tmp_path, monkeypatch):
    interrupted(monkeypatch, 30, lambda: train(small(), tmp_path / "run", progress=False))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    program = (
        "import sys; from gossamer.recipe import load_recipe; from gossamer.run_folder import RunFolder, recipe_of\n"
        "recipe = recipe_of(sys.argv[1])\n"
        "with RunFolder(sys.argv[1], recipe, recipe.seeds[0]).locked(): print('locked', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ConfigurationError, match="another process trains this run; wait for it, or stop it"):
            train(small(), tmp_path / "run", progress=False, resume=True)
    finally:
        other.communicate()
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert train(small(), tmp_path / "run", progress=False, resume=True).epochs == 4


def test_a_network_with_batch_norm_and_dropout_continues_to_the_bit(tmp_path, monkeypatch):
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Linear(20, 10))

    monkeypatch.setattr("gossamer.zoo.build", lambda name, **arguments: Net())
    whole = train(small(), tmp_path / "whole", progress=False)
    interrupted(monkeypatch, 50, lambda: train(small(), tmp_path / "parts", progress=False))
    parts = train(small(), tmp_path / "parts", progress=False, resume=True)
    assert equal(weights(whole.model), weights(parts.model))
    assert [each["train_loss"] for each in whole.history] == [each["train_loss"] for each in parts.history]


def test_lines_that_no_checkpoint_followed_are_taken_back(tmp_path, monkeypatch):
    recipe = small("methods.0.every=7")
    whole = train(recipe, tmp_path / "whole", progress=False)
    ordinary, count = RunFolder.record, iter(range(10))

    def record(self, metrics, updates, state):
        if next(count) < 2:
            return ordinary(self, metrics, updates, state)
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + '\n{"epoch": 4, "st')
        with open(self.path / "updates.jsonl", "a") as file:
            file.writelines(json.dumps(each) + "\n" for each in updates)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "record", record)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "parts", progress=False)
    train(recipe, tmp_path / "parts", progress=False, resume=True)
    for name in ("metrics.jsonl", "updates.jsonl"):
        assert lines(tmp_path / "whole" / name) == lines(tmp_path / "parts" / name)
    assert whole.steps == 84


def test_a_run_interrupted_after_its_last_epoch_only_needs_its_test(tmp_path, monkeypatch):
    def finish(self: RunFolder, summary: object) -> None:
        raise KeyboardInterrupt

    whole = train(small(), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", finish)
        with pytest.raises(KeyboardInterrupt):
            train(small(), tmp_path / "run", progress=False)
    again = train(small(), tmp_path / "run", progress=False, resume=True)
    assert (again.test_loss, again.test_accuracy, again.steps) == (whole.test_loss, whole.test_accuracy, whole.steps)
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_complete_run_is_not_trained_again(tmp_path, monkeypatch):
    first = train(small(), tmp_path / "run", progress=False)
    monkeypatch.setattr(Sparsity, "penalty", None)
    again = train(small(), tmp_path / "run", progress=False, resume=True)
    assert again == first
    assert again.model is None


def test_a_run_does_not_continue_under_another_recipe(tmp_path, monkeypatch):
    interrupted(monkeypatch, 30, lambda: train(small(), tmp_path / "run", progress=False))
    with pytest.raises(
        StateError, match=r"^optimizer\.lr: the checkpoint was made with .*0\.1.* the recipe now has .*0\.5"
    ):
        train(small("optimizer.lr=0.5"), tmp_path / "run", progress=False, resume=True)


def test_a_damaged_checkpoint_is_named(tmp_path, monkeypatch):
    interrupted(monkeypatch, 30, lambda: train(small(), tmp_path / "run", progress=False))
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"broken")
    with pytest.raises(StateError, match=r"run/checkpoint\.safetensors: missing, incomplete or damaged"):
        train(small(), tmp_path / "run", progress=False, resume=True)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("metrics.jsonl", lambda content: b"garbage\n" + content, r"metrics\.jsonl:1: not a line that a run wrote"),
        ("metrics.jsonl", lambda content: b"\xff\x00\n" + content, r"metrics\.jsonl:1: not a line that a run wrote"),
        ("metrics.jsonl", lambda content: content + b'{"a": 1}\n', r"metrics\.jsonl:3: .*with epoch and seconds"),
        ("metrics.jsonl", lambda content: content + b"[]\n", r"metrics\.jsonl:3: .*expected a mapping"),
        ("metrics.jsonl", lambda content: b"", r"metrics\.jsonl: expected a line for each of the 2 epochs"),
        ("metrics.jsonl", None, r"metrics\.jsonl: expected a line for each of the 2 epochs"),
        ("updates.jsonl", lambda content: b"{}\n" + content, r"updates\.jsonl:1: .*expected a mapping with epoch"),
        ("checkpoint.safetensors", lambda content: content[:-1] + b"\xff", r"checkpoint\.safetensors: damaged"),
    ],
)
def test_a_damaged_file_of_a_stopped_run_is_named(tmp_path, monkeypatch, name, damage, said):
    recipe = small("methods.0.every=7")
    interrupted(monkeypatch, 50, lambda: train(recipe, tmp_path / "run", progress=False))
    file = tmp_path / "run" / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(StateError, match=said):
        train(recipe, tmp_path / "run", progress=False, resume=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: [], "holds no epoch"),
        (lambda state: {key: value for key, value in state.items() if key != "epoch"}, "holds no epoch"),
        (lambda state: {**state, "model": {}}, "not the checkpoint of this run"),
        (lambda state: {key: value for key, value in state.items() if key != "batches"}, r"this run \(KeyError: 'batc"),
    ],
)
def test_a_checkpoint_of_something_else_is_named(tmp_path, monkeypatch, change, said):
    interrupted(monkeypatch, 30, lambda: train(small(), tmp_path / "run", progress=False))
    file = tmp_path / "run" / "checkpoint.safetensors"
    save_tree(file, change(load_tree(file)))
    with pytest.raises(StateError, match=rf"run/checkpoint\.safetensors: .*{said}"):
        train(small(), tmp_path / "run", progress=False, resume=True)


@pytest.mark.parametrize("damage", [cut, lambda _: b"", lambda _: b"[]", lambda _: b"{}", lambda _: b'{"seed": 0}'])
def test_a_damaged_result_is_named_and_made_again_once_it_is_removed(tmp_path, damage):
    first = train(small("epochs=1"), tmp_path / "run", progress=False)
    file = tmp_path / "run" / "summary.json"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(StateError, match=r"run/summary\.json: not the result of a run .*remove it"):
        train(small("epochs=1"), tmp_path / "run", progress=False, resume=True)
    file.unlink()
    assert train(small("epochs=1"), tmp_path / "run", progress=False, resume=True).test_loss == first.test_loss


def test_what_a_killed_process_left_is_removed_on_resume(tmp_path, monkeypatch):
    interrupted(monkeypatch, 30, lambda: train(small(), tmp_path / "run", progress=False))
    (tmp_path / "run" / ".checkpoint.safetensors.123.tmp").write_bytes(b"half")
    train(small(), tmp_path / "run", progress=False, resume=True)
    assert not list((tmp_path / "run").glob(".*"))


def test_a_folder_in_use_is_not_written_into(tmp_path):
    (tmp_path / "mine").write_text("my thesis")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ConfigurationError, match="there is something here already"):
            train(small(), out, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "my thesis"


def test_several_seeds_have_a_folder_each_and_a_mean_with_its_standard_error(tmp_path):
    recipe = small("seeds=[4, 2, 9]", "epochs=1")
    results = train_seeds(recipe, tmp_path / "run", progress=False)
    assert [result.seed for result in results] == [4, 2, 9]
    assert {file.name for file in (tmp_path / "run").iterdir()} == {
        "recipe.yaml",
        "summary.json",
        "seed-4",
        "seed-2",
        "seed-9",
    }
    assert recipe_of(tmp_path / "run").seeds == [4, 2, 9]
    assert recipe_of(tmp_path / "run" / "seed-2").seeds == [2]
    single = train(small("epochs=1"), seed=2, progress=False)
    assert results[1].test_accuracy == single.test_accuracy
    accuracies = [result.test_accuracy for result in results]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_accuracy"]["mean"] == pytest.approx(statistics.mean(accuracies))
    assert summary["test_accuracy"]["standard_error"] == pytest.approx(statistics.stdev(accuracies) / 3**0.5)


def test_several_seeds_continue_where_they_were_interrupted(tmp_path, monkeypatch):
    recipe = small("seeds=[0, 1, 2]", "epochs=2")
    whole = train_seeds(recipe, tmp_path / "whole", progress=False)
    interrupted(monkeypatch, 42 + 30, lambda: train_seeds(recipe, tmp_path / "parts", progress=False))
    assert not (tmp_path / "parts" / "seed-2").exists()
    parts = train_seeds(recipe_of(tmp_path / "parts"), tmp_path / "parts", progress=False, resume=True)
    assert [each.test_loss for each in parts] == [each.test_loss for each in whole]
    assert [each.summary for each in parts] == [each.summary for each in whole]


def test_labels_are_smoothed_in_training_and_nowhere_else():
    plain, smooth = (train(small("optimizer.lr=0.0", f"label_smoothing={s}"), progress=False) for s in (0.0, 0.25))
    for key in ("train_loss", "validation_loss"):  # what is shown is without
        assert smooth.history[0][key] == plain.history[0][key]
    assert smooth.test_loss == plain.test_loss
    images = data.load("digits").train
    once = [f"data.batch_size={len(images)}", "epochs=1", "methods=[]", "label_smoothing=0.25", "optimizer={name: SGD}"]
    first, last = (
        train(load_recipe("digits", [*once, f"optimizer.lr={lr}"]), progress=False).model for lr in (0.0, 1.0)
    )
    assert first is not None
    assert last is not None
    ((x, y),) = images.batches(len(images))
    logs = first(x).log_softmax(1)
    targets = torch.full_like(logs, 0.25 / 10).scatter_(1, y[:, None], 0.75 + 0.25 / 10)
    gradients = torch.autograd.grad(-(targets * logs).sum(1).mean(), list(first.parameters()))
    for begin, gradient, end in zip(first.parameters(), gradients, last.parameters(), strict=True):
        torch.testing.assert_close(end, begin - gradient, rtol=1e-3, atol=1e-5)


def test_accumulated_micro_batches_make_one_step(monkeypatch):
    # 1,293 images: 20 batches of 64 and one of 13; pairs of 32 end with 13 alone, which is a step of its own.
    one, two = (
        train(small(f"data.batch_size={size}", f"accumulate={parts}", "methods.0.every=7"), progress=False)
        for size, parts in ((64, 1), (32, 2))
    )
    assert one.steps == two.steps == 84
    assert [each["train_loss"] for each in one.history] == pytest.approx(
        [each["train_loss"] for each in two.history], rel=1e-3
    )


def test_the_learning_rate_follows_the_schedule():
    per_epoch = train(small("schedule={type: multistep, milestones: [2], gamma: 0.5, per: epoch}"), progress=False)
    per_step = train(small("schedule={type: multistep, milestones: [2], gamma: 0.5}"), progress=False)
    for result in (per_epoch, per_step):
        assert [each["lr"] for each in result.history] == [0.1, 0.1, 0.05, 0.05]
    assert equal(weights(per_epoch.model), weights(per_step.model))


def test_a_schedule_with_a_cycle_begins_anew():
    schedule = "{type: multistep, milestones: [2], gamma: 0.5, cycle: 3, warmup: 0.5}"
    rates = [each["lr"] for each in train(small("epochs=6", f"schedule={schedule}"), progress=False).history]
    assert rates[:3] == rates[3:]
    assert rates[0] < rates[1] == 2 * rates[2]


def test_gradients_are_clipped(monkeypatch):
    free = train(small("optimizer={name: SGD, lr: 1.0}", "schedule={type: constant}", "epochs=1"), progress=False)
    tiny = train(
        small("optimizer={name: SGD, lr: 1.0}", "schedule={type: constant}", "epochs=1", "clip_grad_norm=1e-6"),
        progress=False,
    )
    start = train(small("optimizer={name: SGD, lr: 0.0}", "epochs=1"), progress=False)
    moved = [
        sum(float((w - weights(start.model)[name]).abs().sum()) for name, w in weights(result.model).items())
        for result in (free, tiny)
    ]
    assert moved[1] < 1e-3 < moved[0]


def test_precisions_may_follow_each_other_in_one_process():
    losses = [
        train(small(f"precision={precision}", "epochs=1"), progress=False).history[0]["train_loss"]
        for precision in ("fp32", "bf16", "fp32")
    ]
    assert losses[0] == losses[2] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_channels_last_gives_the_same_network():
    changes = ("model={name: cifar_resnet, depth: 8, width: 0.5}", "epochs=1")
    plain, last = (train(small(*changes, f"channels_last={flag}"), progress=False) for flag in ("false", "true"))
    assert last.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=1e-2)
    kernels = [w for w in weights(last.model).values() if w.dim() == 4 and w.shape[1] > 1 and w.shape[2] > 1]
    assert kernels
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)


def test_a_compiled_network_trains_the_same(monkeypatch):
    torch.compiler.reset()  # else what other tests compiled counts towards the limit of versions of one function
    graphs = 0
    ordinary = torch.compile

    def backend(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model: ordinary(model, backend=backend))
    eager, compiled = (
        train(small(f"compile={flag}", "methods.0.every=7"), progress=False) for flag in ("false", "true")
    )
    assert 1 <= graphs <= 6  # training and evaluation, with full and last batches
    assert equal(weights(eager.model), weights(compiled.model))


def test_a_run_that_diverges_stops_and_keeps_its_last_good_epoch(tmp_path):
    recipe = small("optimizer={name: SGD, lr: 1.0e+30}", "schedule={type: cosine}", "methods=[]")
    with pytest.raises(
        NonFiniteError, match=r"^epoch 1: the training loss is (nan|inf).* lower optimizer\.lr .*1e\+30"
    ):
        train(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("methods.0.targets=layer9*", "methods.0.targets: .*'layer9\\*' matches no weight"),
        ("data.augment={crop: 8}", "data.augment: crop=8 needs images of more than 8 pixels"),
        ("methods.0.every={periods: {0: 0}}", "methods.0.every: .*period from epoch 0: .* at least 1, got 0"),
        ("data.name=digit", "data.name: .*did you mean 'digits'"),
        ("data.validation=1500", "data.validation: .*1500"),
        ("model.name=mnist_mpl", "model.name: .*did you mean"),
        ("model.depth=3", "model.depth: .*no argument 'depth'"),
        ("model={name: mnist_mlp, in_features: 65}", "model.name: mnist_mlp cannot be evaluated on 1 image of shape"),
        ("model.classes=11", "model.classes: mnist_mlp gives \\(1, 11\\) .*digits, which has 10 classes"),
        ("model.width=1e13", "model.width: mnist_mlp .*can't allocate memory"),
        ("model.width=1e30", "model.width: mnist_mlp .*Overflow"),
        ("optimizer={name: Muon, lr: 0.1}", "optimizer: Muon: .*2D"),
        (
            "methods=[{type: continuous, length: 3 epochs}]",
            "methods.0.length: .*2 rounds of 63 steps are 126, .*has 84",
        ),
        ("methods=[{type: imp, sparsity: 0.9, length: 40}]", "methods.0.length: .*3 rounds of 40 steps are 120"),
        ("methods=[{type: continuous, length: 9, rewind: 50%}]", "methods.0.rewind: .*step 42, which is never reached"),
        ("methods=[{type: set, sparsity: 0.9}, {type: set, sparsity: 0.5}]", "methods: .*belongs to both"),
    ],
)
def test_what_only_shows_with_data_and_network_is_refused_before_anything_is_written(tmp_path, override, said):
    with pytest.raises(ConfigurationError, match="^command line .*: " + said):
        train(small(override), tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


class Failing(nn.Module):
    """A network of another library: fails in ways of its own, in training or always."""

    def __init__(self, error: Exception | None, only_in_training: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        self.error, self.only_in_training = error, only_in_training

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        outputs = self.layers(images)
        if self.only_in_training and not self.training:
            return outputs
        if self.error is not None:
            raise self.error
        return outputs, outputs


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (Failing(AssertionError("Wrong height!\nand more")), "cannot be trained on .* of digits: Wrong height!$"),
        (Failing(AssertionError(), only_in_training=False), "cannot be evaluated on .* of digits: AssertionError$"),
        (Failing(KeyError("nope")), "cannot be trained on .*: KeyError: 'nope'$"),
        (Failing(None), "gives a tuple when it is trained, expected one tensor"),
    ],
)
def test_a_network_that_fails_in_a_way_of_its_own_is_named_in_one_line(tmp_path, monkeypatch, network, said):
    monkeypatch.setattr("gossamer.zoo.build", lambda name, **arguments: network)
    with pytest.raises(ConfigurationError, match=rf"model.name: mnist_mlp {said}"):
        train(small(), tmp_path / "run", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_last_batch_too_small_for_batch_norm_is_refused_before_training(tmp_path, monkeypatch):
    def network(name: str, **arguments: object) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.Linear(20, 10))

    monkeypatch.setattr("gossamer.zoo.build", network)
    with pytest.raises(ConfigurationError, match=r"cannot be trained on 1 image .* another data\.batch_size makes it"):
        train(small("data.batch_size=68"), tmp_path / "run", progress=False)  # 1,293 images: 19 batches of 68, and 1
    assert list(tmp_path.iterdir()) == []
    train(small("data.batch_size=67", "epochs=1"), progress=False)


def test_trying_a_network_out_leaves_it_as_it_was_built(monkeypatch):
    built = []

    def network(name: str, **arguments: object) -> nn.Module:
        built.append(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 10)))
        built.append({key: value.clone() for key, value in built[0].state_dict().items()})
        built.append(torch.get_rng_state())
        return built[0]

    def attached(model: nn.Module, methods: object) -> None:
        assert equal(dict(model.state_dict()), built[1])
        assert torch.equal(torch.get_rng_state(), built[2])
        raise KeyboardInterrupt

    monkeypatch.setattr("gossamer.zoo.build", network)
    monkeypatch.setattr("gossamer.loop.attach", attached)
    with pytest.raises(KeyboardInterrupt):
        train(small(), progress=False)


def test_augmentation_changes_what_is_trained_on_but_not_what_is_validated_on():
    plain, flipped = (
        train(small("optimizer.lr=0.0", f"data.augment={augment}", "epochs=1"), progress=False).history[0]
        for augment in ("null", "{flip: true}")
    )
    assert plain["train_loss"] != flipped["train_loss"]
    assert plain["validation_loss"] == flipped["validation_loss"]


def test_a_channels_last_network_in_half_precision_continues_to_the_bit(tmp_path, monkeypatch):
    changes = ["model={name: cifar_resnet, depth: 8, width: 0.5}", "precision=bf16", "channels_last=true", "epochs=2"]
    recipe = small(*changes, "data.augment={crop: 1, flip: true}", "methods.0.every=5", "accumulate=2")
    whole = train(recipe, tmp_path / "whole", progress=False)
    interrupted(monkeypatch, 30, lambda: train(recipe, tmp_path / "parts", progress=False))
    parts = train(recipe, tmp_path / "parts", progress=False, resume=True)
    assert equal(weights(whole.model), weights(parts.model))
    strides = [[w.stride() for w in weights(run.model).values()] for run in (whole, parts)]
    assert strides[0] == strides[1]


def test_a_method_that_would_never_update_is_warned_of(caplog):
    train(small("epochs=1", "methods.0.every=1000", "methods.0.until=null"), progress=False)
    assert "methods.0: dsr never updates its masks in this run of" in caplog.text
    caplog.clear()
    train(small("epochs=1", "methods=[{type: static, sparsity: 0.5}]"), progress=False)
    assert not caplog.text
