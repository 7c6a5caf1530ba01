"""Regular, fixed random and changing random positions in ResNet-20: which spatial bottleneck costs least?

    python benchmarks/spatial_masks.py [--workers 2] [--out benchmarks/results/spatial_masks]

10,000 images of CIFAR-10 (and 1,000 for validation), ten epochs of 64 with a cosine schedule, in bf16. In every block
the first batch norm keeps one, two or three quarters of the positions. Two quarters have three seeds, the others one.
Nothing is searched: all settings are fixed beforehand, and the same for all.

Every finished run is one line of `runs.jsonl`; started again, the command goes on where it was stopped. It ends with
`spatial_masks.md`, `spatial_masks.json` and `spatial_masks.png`.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import data
from gossamer.nn import SparseActivation
from gossamer.recipe import Recipe
from gossamer.training import train
from jobs import complete, publish, spread

KINDS = ("structured", "static", "dynamic")
SEEDS = {2: (1, 2, 3), 1: (1,), 3: (1,)}
EPOCHS = 10


def recipe(kind: str | None, quarters: int | None) -> Recipe:
    """The recipe of a cell; no kind for the dense network."""
    model: dict[str, Any] = {"name": "cifar_resnet", "depth": 20}
    if kind is not None:
        model |= {"spatial_bottleneck": kind, "quarters": quarters}
    return Recipe.model_validate(
        {
            "data": {
                "name": "cifar10",
                "batch_size": 64,
                "validation": 1000,
                "train": 10_000,
                "augment": {"crop": 4, "padding": "zero", "flip": True},
            },
            "model": model,
            "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
            "schedule": {"type": "cosine"},
            "epochs": EPOCHS,
            "precision": "bf16",
            "channels_last": True,
            "threads": 1,
        }
    )


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train once. Where masks change, the test accuracy under fixed ones is measured too."""
    start = time.perf_counter()
    plan = recipe(job["kind"], job["quarters"])
    result = train(plan, seed=job["seed"], progress=False)
    masked = None
    if job["kind"] == "dynamic":
        assert result.model is not None
        for module in result.model.modules():
            if isinstance(module, SparseActivation):
                module.dense_inference = False
        masked = accuracy(result.model)
    return job | {
        "validation": result.validation_accuracy,
        "test": result.test_accuracy,
        "test_masked": masked,
        "seconds": round(time.perf_counter() - start, 1),
    }


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Fraction of the test images that a network classifies rightly."""
    correct = total = 0
    model.eval()
    for images, labels in data.load("cifar10", validation=0).test.batches(256):
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            correct += int((model(images).argmax(1) == labels).sum())
        total += len(labels)
    return correct / total


def key(job: dict[str, Any]) -> str:
    return json.dumps([job[part] for part in ("kind", "quarters", "seed")])


def jobs() -> list[dict[str, Any]]:
    """Every run; the dense network first, then those with three seeds."""
    found = [{"kind": None, "quarters": None, "seed": seed} for seed in SEEDS[2]]
    for quarters, seeds in SEEDS.items():
        found += [{"kind": kind, "quarters": quarters, "seed": seed} for seed in seeds for kind in KINDS]
    return found


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every cell: test accuracies in per cent, and differences to the dense network by seed."""
    dense = {each["seed"]: 100 * each["test"] for each in results if each["kind"] is None}
    cells: dict[tuple[str | None, int | None], list[dict[str, Any]]] = {}
    for each in results:
        cells.setdefault((each["kind"], each["quarters"]), []).append(each)
    return [
        {
            "kind": kind or "dense",
            "quarters": quarters,
            "tests": [100 * each["test"] for each in runs],
            "test_masked": [100 * each["test_masked"] for each in runs if each["test_masked"] is not None],
            "to_dense": [100 * each["test"] - dense[each["seed"]] for each in runs],
        }
        for (kind, quarters), runs in cells.items()
    ]


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Spatial masks in ResNet-20",
        "",
        f"`{command}`; torch {torch.__version__}, Python {platform.python_version()}. 10,000 images of CIFAR-10,",
        f"{EPOCHS} epochs. Test accuracy in per cent, mean ± standard error where there are several seeds (1, 2, 3).",
        "Dynamic masks are evaluated dense, as they are meant to be, and in brackets under the last masks of training.",
        "",
        "| positions kept | masks | test accuracy | difference to dense, same order of data |",
        "|---|---|---|---|",
    ]
    for row in rows:
        kept = "all" if row["quarters"] is None else f"{row['quarters']}/4"
        masked = f" (masked: {spread(row['test_masked'])})" if row["test_masked"] else ""
        lines.append(f"| {kept} | {row['kind']} | {spread(row['tests'])}{masked} | {spread(row['to_dense'], '+')} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    dense = next(row for row in rows if row["kind"] == "dense")
    axis.axhline(statistics.mean(dense["tests"]), color="black", linestyle="--", linewidth=1, label="dense")
    for kind, shift, color in zip(KINDS, (-0.08, 0, 0.08), ("tab:blue", "tab:orange", "tab:green"), strict=True):
        found = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["quarters"])
        for row in found:
            axis.plot([row["quarters"] + shift] * len(row["tests"]), row["tests"], "o", color=color, alpha=0.4)
        places = [row["quarters"] + shift for row in found]
        axis.plot(places, [statistics.mean(row["tests"]) for row in found], "-", color=color, label=kind)
    axis.set_xticks([1, 2, 3], ["1/4", "2/4", "3/4"])
    axis.set_xlabel("positions kept in every block")
    axis.set_ylabel("test accuracy, %")
    axis.set_title("ResNet-20, 10,000 images of CIFAR-10, ten epochs (a dot a seed)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    def rows(networks: list[str], log: Path, workers: int) -> list[dict[str, Any]]:
        return summarize(complete(jobs(), log, workers, run, key))

    publish(__doc__, "spatial_masks", rows, markdown, plot)


if __name__ == "__main__":
    main()
