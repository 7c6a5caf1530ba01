"""The recipes for ImageNet train end to end on a small folder of pictures, and keep their published protocols."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from data import pictures
from gossamer import zoo
from gossamer.cli import app
from gossamer.errors import ConfigurationError, DataError, StateError
from gossamer.penalties import L0, as_penalty
from gossamer.recipe import load_recipe
from gossamer.training import train
from gossamer.weights import DSR, RigL
from test_training import equal, interrupted, lines, weights

if importlib.util.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed (gossamer[vision])", allow_module_level=True)

RECIPES = ("i1k_resnet50_dsr", "i1k_resnet50_rigl")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return pictures.write(tmp_path_factory.mktemp("pictures"))


def small(root: Path, *overrides: str) -> list[str]:
    own = ["data.image_size=32", "data.batch_size=8", "data.workers=0", "epochs=2", "methods.0.every=2"]
    return [f"data.root={root}", *own, *overrides]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments])


@pytest.mark.parametrize(
    ("name", "parts", "steps", "masked"),
    [
        # ResNet-18 with four classes: convolutions of the blocks and the classifier; with RigL the shortcuts as well.
        ("i1k_resnet50_dsr", 1, 10, 11_166_912 - 9_408 - 172_032 + 2_048),
        ("i1k_resnet50_rigl", 2, 6, 11_166_912 - 9_408 + 2_048),
    ],
)
def test_a_published_recipe_trains_on_a_small_folder(root, tmp_path, monkeypatch, name, parts, steps, masked):
    monkeypatch.chdir(tmp_path)
    result = run(name, *small(root, "model.depth=18", "data.validation=4", f"accumulate={parts}"))
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == "data     imagenet, images: 36 to train, 4 to validate, 16 to test"
    summary = json.loads((tmp_path / f"runs/{name}-1/summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (2, steps)
    totals = summary["summary"]["totals"]
    assert totals["targets_total"] == masked
    assert totals["targets_active"] == masked // 5
    assert len(lines(tmp_path / f"runs/{name}-1/metrics.jsonl")) == 2
    assert lines(tmp_path / f"runs/{name}-1/updates.jsonl")


def test_colours_are_learned_from_pictures(root):
    changes = ["model={name: cifar_resnet, depth: 8}", "methods=[{type: dsr, sparsity: 0.5, every: 5}]", "epochs=8"]
    recipe = load_recipe("i1k_resnet50_dsr", small(root)[:-1] + changes)
    result = train(recipe, progress=False)
    assert result.test_accuracy > 0.8
    assert result.sparsity == pytest.approx(0.5, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", RECIPES)
def test_an_interrupted_run_continues_to_the_bit(root, tmp_path, monkeypatch, name):
    changes = ["model={name: cifar_resnet, depth: 8}", "methods.0.targets=stage*", "epochs=3", "data.workers=1"]
    changes += ["methods.0.prune_count=1000"] if name.endswith("dsr") else ["accumulate=2"]
    recipe = load_recipe(name, small(root, *changes))
    whole = train(recipe, tmp_path / "whole", progress=False)
    interrupted(monkeypatch, 8, lambda: train(recipe, tmp_path / "parts", progress=False))
    assert len(lines(tmp_path / "parts" / "metrics.jsonl")) == 1
    result = run("--resume", str(tmp_path / "parts"))
    assert result.exit_code == 0, result.output
    parts = json.loads((tmp_path / "parts" / "summary.json").read_text())
    assert (parts["test_loss"], parts["steps"]) == (whole.test_loss, whole.steps)
    assert lines(tmp_path / "whole" / "updates.jsonl")
    for file in ("metrics.jsonl", "updates.jsonl"):
        assert lines(tmp_path / "whole" / file) == lines(tmp_path / "parts" / file)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_run_goes_on_where_its_folder_was_moved_to_and_with_other_workers(tmp_path, monkeypatch):
    pictures.write(tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    changes = ["model={name: cifar_resnet, depth: 8}", "methods.0.targets=stage*", "methods.0.prune_count=1000"]
    recipe = load_recipe("i1k_resnet50_dsr", small(Path("first"), *changes))
    whole = train(recipe, tmp_path / "whole", progress=False)
    interrupted(monkeypatch, 8, lambda: train(recipe, tmp_path / "parts", progress=False))
    interrupted_twice = tmp_path / "other"
    shutil.copytree(tmp_path / "parts", interrupted_twice)
    (tmp_path / "first").rename(tmp_path / "second")
    moved = [f"data.root={tmp_path / 'second'}", "data.workers=1"]
    again = load_recipe("i1k_resnet50_dsr", small(Path("first"), *changes, *moved))
    parts = train(again, tmp_path / "parts", progress=False, resume=True)
    assert (parts.test_loss, parts.steps) == (whole.test_loss, whole.steps)
    for part in ("val", "train"):
        picture = next((tmp_path / "second" / part).glob("*/*"))
        picture.rename(picture.with_name("renamed.jpg"))
        said = "files and labels of the test data changed" if part == "val" else "saved with files and labels="
        with pytest.raises(StateError, match=said):
            train(again, interrupted_twice, progress=False, resume=True)
        picture.with_name("renamed.jpg").rename(picture)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_the_number_of_workers_changes_nothing(root):
    one, two = (
        train(
            load_recipe(
                "i1k_resnet50_dsr",
                small(root, "model={name: cifar_resnet, depth: 8}", "methods=[]", "epochs=1", f"data.workers={count}"),
            ),
            progress=False,
        )
        for count in (0, 1)
    )
    assert equal(weights(one.model), weights(two.model))


def test_the_published_protocol_of_dsr_is_kept():
    recipe = load_recipe("i1k_resnet50_dsr")
    steps = -(-1_281_167 // 256)
    (dsr,) = recipe.build_methods(100 * steps, steps, 0)
    assert isinstance(dsr, DSR)
    assert (dsr.prune_count, dsr.threshold) == (400_000, 1e-3)
    due = [step for step in range(1, 100 * steps + 1) if dsr.due(step)]
    assert due[:2] == [1000, 2000]
    for first, end, period in ((0, 25, 1000), (25, 50, 2000), (50, 75, 4000), (75, 95, 8000)):
        assert {step % period for step in due if first * steps < step <= end * steps} == {0}
        assert sum(first * steps < step <= end * steps for step in due) >= (end - first) * steps // period - 1
    assert due[-1] <= 95 * steps
    rates = [recipe.optimizer.arguments["lr"] * recipe.schedule.factor(epoch, 1, 100) for epoch in range(100)]
    assert rates == pytest.approx([0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 10)
    assert recipe.optimizer.arguments["weight_decay"] == 1e-4
    assert (recipe.epochs, recipe.data.batch_size, recipe.accumulate) == (100, 256, 1)
    assert (recipe.data.validation, recipe.label_smoothing) == (None, 0)


def test_the_published_protocol_of_rigl_is_kept():
    recipe = load_recipe("i1k_resnet50_rigl")
    assert recipe.data.batch_size * recipe.accumulate == 4096
    steps = -(-1_281_167 // 4096)
    (rigl,) = recipe.build_methods(100 * steps, steps, 0)
    assert isinstance(rigl, RigL)
    assert (rigl.drop_fraction, rigl.every, rigl.distribution) == (0.3, 100, "erk")
    assert rigl.until == pytest.approx(25_000, rel=0.01)
    rates = [recipe.optimizer.arguments["lr"] * recipe.schedule.factor(epoch, 1, 100) for epoch in range(100)]
    warmup = [0.32, 0.64, 0.96, 1.28, 1.6]
    assert rates == pytest.approx(warmup + [1.6] * 25 + [0.16] * 40 + [0.016] * 20 + [0.0016] * 10)
    assert (recipe.optimizer.arguments["weight_decay"], recipe.label_smoothing) == (1e-4, 0.1)


def test_the_protocol_of_the_lossy_sparsifier_is_kept():
    recipe = load_recipe("caltech101_alexnet")
    steps = -(-(8677 - 2 * 1736) // 32)
    (method,) = recipe.build_methods(30 * steps, steps, 0)
    assert (method.strength, as_penalty(method.norm), method.eps, method.sharpness) == (0.1, L0(0.1), 0.5, 1.0)
    # The sharpness of an epoch, counted from 1, is that after the steps of those before it.
    sharpness = [method._sharpness((epoch - 1) * steps) for epoch in range(1, 31)]
    assert sharpness == [1] * 4 + [2] * 5 + [4] * 5 + [8] * 5 + [16] * 11
    rates = [recipe.optimizer.arguments["lr"] * recipe.schedule.factor(epoch, 1, 30) for epoch in range(30)]
    assert rates == pytest.approx([0.01] * 10 + [0.005] * 10 + [0.0025] * 10)
    assert recipe.optimizer.arguments == {"lr": 0.01, "weight_decay": 1e-3}
    assert (recipe.epochs, recipe.data.batch_size, recipe.model.name) == (30, 32, "torchvision:alexnet")


def test_the_protocol_of_the_lossy_sparsifier_trains_on_a_small_folder_of_classes(root, tmp_path):
    place = shutil.copytree(root / "train", tmp_path / "classes")
    shutil.copytree(place / "n01", place / "BACKGROUND_Google")
    own = ["data.image_size=64", "data.workers=0", "data.batch_size=16", "data.validation=4", "data.test=4", "epochs=1"]
    own += ["methods.0.double_at=[1 epochs]", "model.dropout=0.0"]
    result = train(load_recipe("caltech101_alexnet", [f"data.root={place}", *own]), progress=False)
    assert result.steps == 2  # of 32 images to train on
    learned = result.summary.learned
    layers = ["features.0", "features.3", "features.6", "features.8", "features.10", "classifier.1", "classifier.4"]
    assert [(row["site"], row["sharpness"]) for row in learned] == [(layer, 2.0) for layer in layers]


def test_what_dsr_makes_sparse_is_what_the_network_names():
    with torch.device("meta"):
        network = zoo.build("i1k_resnet", depth=50)
    assert load_recipe("i1k_resnet50_dsr").methods[0].arguments["targets"] == list(network.SPARSE_TARGETS)


@pytest.mark.parametrize(
    ("override", "place", "said"),
    [
        ("data.root=/nowhere", "command line 'data.root=/nowhere': data.root: /nowhere/train:", "no such folder"),
        ("data.image_size=0", "command line 'data.image_size=0': data.image_size:", "equal to 1, got 0"),
        ("data.workers=-1", "command line 'data.workers=-1': data.workers:", "greater than or equal to 0, got -1"),
        ("data.validation=40", "command line 'data.validation=40': data.validation:", "from 0 to 39"),
        ("data.batch_size=64", "command line 'data.batch_size=64': data.batch_size:", "has only 40 images to train on"),
        ("data.augment={flip: true}", "command line 'data.augment={flip: true}': data.augment:", "leave it out"),
        ("data.test=8", "command line 'data.test=8': data.test:", "has train and val, and the images in val are for"),
        ("data.exclude=[n09]", "command line 'data.exclude=[n09]': data.exclude:", "has no class 'n09'; did you mean"),
        ("data.name=cifar10", "command line 'data.root=", "is for imagenet, a folder of images, and not for 'cifar10'"),
        ("data.name=imagnet", "command line 'data.root=", "not for 'imagnet'"),
        ("label_smoothing=1", "command line 'label_smoothing=1': label_smoothing:", "less than 1, got 1"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_and_nothing_is_written(root, tmp_path, override, place, said):
    with pytest.raises((ConfigurationError, DataError)) as caught:
        train(load_recipe("i1k_resnet50_dsr", small(root, override)), tmp_path / "run", progress=False)
    message = str(caught.value)
    assert message.startswith(place)
    assert said in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_missing_imagenet_says_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("DATAPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    result = run("i1k_resnet50_rigl")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path}/imagenet/train: no such folder; expected train/CLASS/*.JPEG")
    assert "or set DATAPATH to the folder that holds imagenet/" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_missing_torchvision_is_named_at_the_data(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ConfigurationError, match=r"i1k_resnet50_dsr\.yaml:\d+.* data\.name: .*gossamer\[vision\]"):
        train(load_recipe("i1k_resnet50_dsr", small(root)), progress=False)


def test_a_damaged_picture_stops_a_run_that_goes_on_once_it_is_repaired(tmp_path):
    place = pictures.write(tmp_path / "pictures", train=3, test=1)
    file = place / "val" / "n02" / "val_0.JPEG"
    content = file.read_bytes()
    file.write_bytes(content[:300])
    own = small(place, "model={name: cifar_resnet, depth: 8}", "methods=[]", "epochs=1")
    result = run("i1k_resnet50_dsr", *own, "--out", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert f"error: {file}: cannot be decoded as an image" in result.stderr
    file.write_bytes(content)
    assert run("--resume", str(tmp_path / "run")).exit_code == 0
