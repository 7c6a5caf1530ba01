"""The notebooks of the examples: executed as Jupyter does, on small data and for few epochs."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from data import pictures

nbformat, nbclient, _ = (
    pytest.importorskip(name, reason="not installed (gossamer[dev])") for name in ("nbformat", "nbclient", "mlflow")
)

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def read(name: str) -> Any:
    return nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)


def cell(notebook: Any, name: str) -> str:
    (found,) = (each.source for each in notebook.cells if each.id == name)
    return found


def executed(notebook: Any, parameters: dict[str, Any], place: Path) -> Any:
    """Run a notebook in a folder, with other parameters than it has, as papermill would."""
    (first,) = (i for i, each in enumerate(notebook.cells) if "parameters" in each.metadata.get("tags", []))
    text = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    assert all(f"\n{name} = " in f"\n{notebook.cells[first].source}" for name in parameters)
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(text))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(place)}}).execute()
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs_and_without_traces_of_a_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    for each in notebook.cells:
        assert not each.get("outputs")
        assert each.get("execution_count") is None
        assert set(each.metadata) <= {"tags"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_lossy_sparsifier_trains_measures_and_logs_its_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parameters = {"EPOCHS": 2, "STRENGTHS": [2.0], "RUNS": "some/runs"}
    notebook = executed(read("lossy_sparsifier"), parameters, tmp_path)
    outputs = {each.id: each.get("outputs", []) for each in notebook.cells}
    assert {each.name for found in outputs.values() for each in found if each.output_type == "stream"} == {"stdout"}
    assert outputs["data"][0].text.endswith("{'train': 1293, 'validation': 144, 'test': 360}\n")
    for name in ("sparsity-figure", "thresholds-figure"):
        assert [list(each.data) for each in outputs[name]] == [["text/plain", "image/png"]]
    assert [path.name for path in tmp_path.iterdir()] == ["some"]

    from mlflow import MlflowClient  # the notebook's own runs, read as anybody would

    place = tmp_path / "some" / "runs"
    assert {path.name for path in place.glob("*.png")} == {"sparsity.png", "thresholds.png"}
    client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'lossy thresholds'")
    relu, lossy = sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.info.start_time)
    assert [run.info.status for run in (relu, lossy)] == ["FINISHED"] * 2
    assert [run.data.params["strength"] for run in (relu, lossy)] == ["None", "2.0"]
    figures = [run.data.metrics for run in (relu, lossy)]
    assert figures[0]["test_accuracy_soft"] == figures[0]["test_accuracy_hard"] > 0.9
    assert figures[1]["test_accuracy_hard"] > 0.8
    assert figures[1]["activation_sparsity"] > figures[0]["activation_sparsity"] + 0.1
    assert len(client.get_metric_history(lossy.info.run_id, "threshold/conv1")) == 2
    for run, measured in zip((relu, lossy), figures, strict=True):
        (file,) = (place / "artifacts" / run.info.run_id).rglob("measured.json")
        sites = json.loads(file.read_text())["sites"]
        assert {f"activation_sparsity/{row['name']}": row["sparsity"] for row in sites} == {
            name: value for name, value in measured.items() if name.startswith("activation_sparsity/")
        }
    assert "strength 2" in outputs["table"][0].text


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_hebbian_network_counts_trains_and_shows_its_filters(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parameters = {"DATA": "digits", "IMAGES": 640, "EPOCHS": 3, "EVERY": 20, "SECONDS": 0.01}
    notebook = executed(read("hebbian_sparse_cnn"), parameters, tmp_path)
    outputs = {each.id: each.get("outputs", []) for each in notebook.cells}
    assert {each.name for found in outputs.values() for each in found if each.output_type == "stream"} == {"stdout"}
    assert "224 connections" in outputs["equal"][0].text  # where all ways to count are compared
    cost = "".join(each.text for each in outputs["timing"])
    times = {name: float(time) for name, time in re.findall(r"^(\w+) +([\d.]+) ms; every", cost, re.MULTILINE)}
    assert set(times) == {"coactivation", "stacked", "by_units"}
    assert 10 * times["coactivation"] < min(times["stacked"], times["by_units"])
    rows = {line[:14].strip(): line[14:].split() for line in outputs["table"][0].text.splitlines()[1:]}
    assert set(rows) == {"dense", "random masks", "SET", "Hebbian"}
    assert [row[0] for row in rows.values()] == ["0.0%", "88.0%", "88.0%", "88.0%"]
    for row in rows.values():
        _, overall, *by_class = (float(each.rstrip("%")) for each in row)
        assert 20 < overall < 100  # after 60 steps; chance is 10
        assert len(by_class) == 10
        assert sum(by_class) / 10 == pytest.approx(overall, abs=1)  # classes of about one size
    for name in ("accuracy-figure", "filters-figure"):
        assert [list(each.data) for each in outputs[name]] == [["text/plain", "image/png"]]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_the_data_of_the_lossy_sparsifier_may_be_a_folder_of_images(tmp_path):
    place = pictures.write(tmp_path / "pictures") / "train"  # classes alone
    options = {"image_size": 16, "validation": 8, "test": 8, "workers": 0}
    names: dict[str, Any] = {"DATA": str(place), "FOLDER": options, "device": "cpu"}
    notebook = read("lossy_sparsifier")
    exec(cell(notebook, "imports").partition("\nlogging.")[0], names)
    exec(cell(notebook, "data"), names)
    exec(cell(notebook, "network"), names)
    dataset = names["dataset"]
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [24, 8, 8]
    net = names["network"](dataset.shape, dataset.classes)
    assert 0 <= names["accuracy"](net, dataset.test) <= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_missing_is_installed_and_nothing_else_is(path, monkeypatch):
    source = cell(read(path.stem), "install")
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    exec(source, {"SOURCE": "gossamer[plots]"})
    assert asked == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(source, {"SOURCE": "gossamer[plots]"})
    assert asked == [[sys.executable, "-m", "pip", "install", "--quiet", "gossamer[plots]"]]


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("colab", [False, True])
def test_a_drive_is_mounted_in_colab_where_it_is_asked_for(tmp_path, monkeypatch, asked, colab):
    mounted: list[str] = []
    made: list[Path] = []
    drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setattr(Path, "mkdir", lambda self, **options: made.append(self))
    if colab:
        for name, module in (("google", types.ModuleType("google")), ("google.colab", types.ModuleType("colab"))):
            monkeypatch.setitem(sys.modules, name, module)
        sys.modules["google.colab"].drive = drive  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    exec(cell(read("lossy_sparsifier"), "folder"), {"sys": sys, "RUNS": "runs", "DRIVE": asked})
    assert mounted == (["/content/drive"] if asked and colab else [])
    assert made == [Path("/content/drive/MyDrive/runs") if asked and colab else tmp_path / "runs"]
