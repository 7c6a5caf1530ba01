"""Are connections that are active at both ends the ones to keep? Hebbian rules beside random ones, SET, RigL and dense.

    python benchmarks/hebbian.py [--workers 2] [--out benchmarks/results/hebbian]

The network of the seed's notebook, two convolutions of 6 and 16 maps and hidden layers of 120 and 84 units, on CIFAR-10
and on Fashion-MNIST, 10 epochs, at 80 % and 95 % sparsity of every layer, three seeds. All methods have the same
learning rate and schedule, begin with random masks, and change theirs every 200 steps until three quarters of the run;
nothing is chosen by results. Rules:

- `by strength`: the seed's. In every kernel, and every row of a linear layer, the weakest go and the strongest of the
  others come, with values drawn anew. At 95 % one weight of a 5×5 kernel would be left, which nothing could replace:
  there whole layers are ranked.
- `Hebbian`, `OR magnitude`, `weighted magnitude`: over whole layers the weakest go (of the second only those whose
  weight is small too), and random ones come.
- `magnitude, anew`: the smallest weights go; what comes begins as in the rules above. It tells how much of a difference
  is how new weights begin.
- `random`: random ones go and random ones come. `static`: random masks that stay.
- `SET`, `RigL`: the smallest weights go; random ones, or those with the largest gradient, come, and begin at 0.

Every finished run is one line of `runs.jsonl`; started again, the command goes on where it was stopped. It ends with
`hebbian.md`, `hebbian.json` and `hebbian.png`.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import gossamer as gs
from gossamer import data
from gossamer.recipe import METHODS as RECIPE_METHODS
from gossamer.recipe import Recipe
from gossamer.scores import Score
from gossamer.training import train
from jobs import complete, mean_error, publish, spread

DATA = {"cifar10": "CIFAR-10", "fashion_mnist": "Fashion-MNIST"}
SPARSITIES = (0.8, 0.95)
SEEDS = (1, 2, 3)
EPOCHS = 10


@dataclass(eq=False)
class RandomRewiring(gs.SET):
    """Random weights go, and random ones come."""

    name = "random_rewiring"
    drop_score: str | Score = "random"

    def _drop_by(self) -> Score:
        return lambda view: torch.rand(view.weight.shape, generator=self.generator)


RECIPE_METHODS["random_rewiring"] = RandomRewiring

SCHEDULE = {"every": 200, "until": "75%"}
HEBBIAN = SCHEDULE | {"type": "hebbian", "count_every": 20}
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "static": {"type": "static", "distribution": "uniform"},
    "random": SCHEDULE | {"type": "random_rewiring", "distribution": "uniform"},
    "by strength": HEBBIAN | {"grow_score": "strength"},
    "Hebbian": HEBBIAN,
    "OR magnitude": HEBBIAN | {"drop_score": "strength_or_magnitude", "drop_fraction": 0.5},
    "weighted magnitude": HEBBIAN | {"drop_score": "weighted_magnitude"},
    "magnitude, anew": HEBBIAN | {"drop_score": "magnitude"},
    "SET": SCHEDULE | {"type": "set", "distribution": "uniform"},
    "RigL": SCHEDULE | {"type": "rigl", "distribution": "uniform"},
}


def recipe(job: dict[str, Any]) -> Recipe:
    method = METHODS[job["method"]]
    if job["method"] == "by strength" and job["sparsity"] == 0.8:
        method = METHODS[job["method"]] | {"scope": "slice"}
    return Recipe.model_validate(
        {
            "data": {"name": job["data"], "batch_size": 128},
            "model": {"name": "lenet"},
            "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
            "schedule": {"type": "cosine"},
            "epochs": EPOCHS,
            "methods": [] if method is None else [method | {"sparsity": job["sparsity"]}],
            "threads": 1,
        }
    )


def run(job: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    result = train(recipe(job), seed=job["seed"], progress=False)
    assert result.model is not None
    return job | {
        "validation": result.validation_accuracy,
        "test": result.test_accuracy,
        "classes": by_class(result.model, job["data"]),
        "layers": {row["name"]: row["active"] for row in result.summary.rows},
        "seconds": round(time.perf_counter() - start, 1),
    }


@torch.no_grad()
def by_class(model: torch.nn.Module, name: str) -> list[float]:
    """The test accuracy of each class."""
    dataset = data.load(name)
    right, total = torch.zeros(2, dataset.classes)
    model.eval()
    for images, labels in dataset.test.batches(500):
        right += torch.bincount(labels[model(images).argmax(1) == labels], minlength=dataset.classes)
        total += torch.bincount(labels, minlength=dataset.classes)
    return (right / total).tolist()


def key(job: dict[str, Any]) -> str:
    return json.dumps([job[part] for part in ("data", "method", "sparsity", "seed")])


def jobs() -> list[dict[str, Any]]:
    return [
        {"data": name, "method": method, "sparsity": sparsity, "seed": seed}
        for seed in SEEDS
        for name in DATA
        for method in METHODS
        for sparsity in ((None,) if method == "dense" else SPARSITIES)
    ]


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every data set, sparsity and method, in per cent; beside each the paired difference to random masks."""
    found: dict[tuple[str, float | None, str], list[dict[str, Any]]] = {}
    for each in results:
        found.setdefault((each["data"], each["sparsity"], each["method"]), []).append(each)
    rows = []
    for (name, sparsity, method), runs in found.items():
        runs.sort(key=lambda each: each["seed"])
        tests = [100 * each["test"] for each in runs]
        row: dict[str, Any] = {"data": name, "sparsity": sparsity, "method": method, "tests": tests}
        row["classes"] = [
            100 * sum(parts) / len(parts) for parts in zip(*(each["classes"] for each in runs), strict=True)
        ]
        row["active"] = None if sparsity is None else sum(runs[0]["layers"].values())
        for rival in ("static", "random"):
            if sparsity is not None and method != rival:
                others = sorted(found[name, sparsity, rival], key=lambda each: each["seed"])
                row[f"above_{rival}"] = [a - 100 * b["test"] for a, b in zip(tests, others, strict=True)]
        rows.append(row)
    return rows


def verdict(differences: list[float] | None) -> str:
    if differences is None:
        return "–"
    mean, error = mean_error(differences)
    return f"{mean:+.2f} ± {error:.2f}" + (" **" if abs(mean) > 2 * error else "")


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Hebbian rules",
        "",
        f"`{command}`; torch {torch.__version__}, Python {platform.python_version()}.",
        f"Test accuracy in per cent after {EPOCHS} epochs, mean ± standard error over seeds",
        f"{', '.join(map(str, SEEDS))};",
        "differences are paired, ** where they are more than two standard errors.",
    ]
    for name, title in DATA.items():
        lines += ["", f"## {title}", "", "| sparsity | method | test | to static masks | to random rewiring |"]
        lines += ["|---|---|---|---|---|"]
        mine = [row for row in rows if row["data"] == name]
        for row in sorted(mine, key=lambda row: (row["sparsity"] or 0, list(METHODS).index(row["method"]))):
            level = "" if row["sparsity"] is None else f"{100 * row['sparsity']:g} %"
            above = [verdict(row.get(f"above_{rival}")) for rival in ("static", "random")]
            lines.append(f"| {level} | {row['method']} | {spread(row['tests'])} | {' | '.join(above)} |")
        lines += ["", "By class, mean over the seeds:", ""]
        classes = range(len(mine[0]["classes"]))
        lines += ["| sparsity | method | " + " | ".join(map(str, classes)) + " |", "|---|---|" + "---|" * len(classes)]
        for row in sorted(mine, key=lambda row: (row["sparsity"] or 0, list(METHODS).index(row["method"]))):
            level = "" if row["sparsity"] is None else f"{100 * row['sparsity']:g} %"
            lines.append(f"| {level} | {row['method']} | {' | '.join(f'{each:.0f}' for each in row['classes'])} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(DATA), figsize=(11, 4.6), layout="constrained")
    compared = [method for method in METHODS if method != "dense"]
    for axis, (name, title) in zip(axes, DATA.items(), strict=True):
        tests = {(row["method"], row["sparsity"]): row["tests"] for row in rows if row["data"] == name}
        dense = mean_error(tests["dense", None])[0]
        axis.axhline(dense, color="black", linestyle=":", linewidth=1.2, label="dense")
        for sparsity, shift, color in zip(SPARSITIES, (-0.15, 0.15), ("tab:blue", "tab:red"), strict=True):
            for place, method in enumerate(compared):
                values = tests[method, sparsity]
                axis.plot([place + shift] * len(values), values, "o", color=color, alpha=0.35, markersize=4)
            means = [mean_error(tests[method, sparsity])[0] for method in compared]
            places = [place + shift for place in range(len(compared))]
            label = f"{100 * sparsity:g} % sparse"
            axis.plot(places, means, "_", color=color, markersize=14, markeredgewidth=2.5, label=label)
        axis.set_xticks(range(len(compared)), compared, rotation=35, ha="right")
        axis.set_title(title)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("test accuracy, % (a dot a seed)")
    axes[0].legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=130)


def main() -> None:
    def rows(networks: list[str], log: Path, workers: int) -> list[dict[str, Any]]:
        return summarize(complete(jobs(), log, workers, run, key))

    publish(__doc__, "hebbian", rows, markdown, plot)


if __name__ == "__main__":
    main()
