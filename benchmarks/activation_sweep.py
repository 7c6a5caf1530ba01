"""Do learned thresholds make sparser activations at the same accuracy? A sweep over the strength of penalties.

    python benchmarks/activation_sweep.py [--workers 2] [--out benchmarks/results/activation_sweep]

LeNet on Fashion-MNIST (12 epochs, three seeds) and ResNet-20 on 10,000 images of CIFAR-10 (20 epochs in bf16, one
seed), each with:

- `ReLU`: nothing added; its own zeros count.
- `ReLU + L1`: the mean magnitude of what ReLUs give is a penalty.
- `thresholds`: learned ones after every ReLU, one a layer, from 0.5 on, with the L0 penalty (b = 0.1). The sharpness
  grows from 1 to 16, as in the protocol of the lossy sparsifier, but steadily, over two thirds of the run: where it
  was doubled at once, LeNet diverged at the strength 3.
- `thresholds, straight-through`: the same, hard from the start.
- `thresholds before ReLU` (LeNet): where that protocol has them, after convolutions and linear layers.
- `ReLU, cut`: the plain network and those with L1, with thresholds set afterwards: in every layer the same fraction of
  what is not zero on training images is cut off. It needs no training.

Accuracy is that on the test images, before thresholds became hard and after; sparsity is the measured fraction of zeros
in what ReLUs give on the same images, in the finished model, and `saved` that of the multiply-accumulates with zeros.
Nothing is chosen: every strength is shown.

Every finished run is one line of `runs.jsonl`; started again, the command goes on where it was stopped. It ends with
`activation_sweep.md`, `activation_sweep.json` and `activation_sweep.png`.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer import data
from gossamer.recipe import Recipe
from gossamer.training import train
from jobs import complete, publish, spread
from networks import NETWORKS, TITLES

EPOCHS = {"lenet": 12, "cifar_resnet": 20}
SEEDS = {"lenet": (1, 2, 3), "cifar_resnet": (1,)}
LEARNED = {
    "type": "lossy_threshold",
    "eps": 0.5,
    "norm": "l0:0.1",
    "final_sharpness": 16.0,
    "until": "67%",
}
METHODS: dict[str, dict[str, Any] | None] = {
    "ReLU": None,
    "ReLU + L1": {"type": "lossy_threshold", "eps": 0.0, "norm": "l1", "sites": "*relu*"},
    "thresholds": LEARNED | {"sites": "*relu*"},
    "thresholds, straight-through": LEARNED | {"sites": "*relu*", "hard": True},
    "thresholds before ReLU": LEARNED,
}
STRENGTHS: dict[str, dict[str, tuple[float, ...]]] = {
    "lenet": {
        "ReLU": (0.0,),
        "ReLU + L1": (0.03, 0.1, 0.3, 1.0, 3.0),
        "thresholds": (0.1, 0.3, 1.0, 3.0, 6.0),
        "thresholds, straight-through": (0.1, 0.3, 1.0, 3.0, 6.0),
        "thresholds before ReLU": (0.1, 0.3, 1.0, 3.0, 6.0),
    },
    "cifar_resnet": {
        "ReLU": (0.0,),
        "ReLU + L1": (0.1, 0.3, 1.0, 3.0),
        "thresholds": (0.1, 0.3, 1.0, 3.0),
        "thresholds, straight-through": (0.3, 1.0, 3.0),
    },
}
CUTS = (0.1, 0.2, 0.4, 0.6)
CALIBRATION = 1000
"""Training images on which it is seen where to cut."""


def recipe(network: str, method: str, strength: float) -> Recipe:
    """The recipe of a run."""
    chosen = METHODS[method]
    methods = [] if chosen is None else [chosen | {"strength": strength}]
    shared = {"epochs": EPOCHS[network], "clip_grad_norm": 5.0}
    return Recipe.model_validate(NETWORKS[network] | shared | {"methods": methods})


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train once and measure the finished model; where thresholds can be set afterwards, with these as well."""
    start = time.perf_counter()
    result = train(recipe(job["network"], job["method"], job["strength"]), seed=job["seed"], progress=False)
    seconds = time.perf_counter() - start
    assert result.model is not None
    model, bf16 = result.model.eval(), NETWORKS[job["network"]].get("precision") == "bf16"
    cuts = []
    if job["method"] in ("ReLU", "ReLU + L1"):
        cuts = [{"cut": fraction, **measure(cut(model, job["network"], fraction), job, bf16)} for fraction in CUTS]
    return job | {
        "validation": result.validation_accuracy,
        "soft": result.soft_test_accuracy,
        "learned": [
            {key: row[key] for key in ("site", "threshold", "sharpness", "moved")} for row in result.summary.learned
        ],
        **measure(model, job, bf16),
        "cuts": cuts,
        "seconds": round(seconds, 1),
    }


def batches(network: str, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    section = NETWORKS[network]["data"]
    dataset = data.load(section["name"], **{key: section[key] for key in ("validation", "train") if key in section})
    for images, labels in getattr(dataset, split).batches(500):
        if NETWORKS[network].get("channels_last"):
            images = images.contiguous(memory_format=torch.channels_last)
        yield images, labels


@torch.no_grad()
def measure(model: nn.Module, job: dict[str, Any], bf16: bool) -> dict[str, Any]:
    """Test accuracy, zeros in what ReLUs give, and the multiply-accumulates that these save."""
    right: list[Tensor] = []

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            right.append(model(batch[0]).argmax(1) == batch[1])

    found = gs.measure_activations(model, batches(job["network"], "test"), forward=forward)
    return {
        "test": float(torch.cat(right).float().mean()),
        "sparsity": found.totals["sparsity"],
        "saved": found.totals["saved"],
        "by_site": {row["name"]: round(row["sparsity"], 4) for row in found.sites},
    }


@torch.no_grad()
def cut(model: nn.Module, network: str, fraction: float) -> nn.Module:
    """A copy in which every ReLU cuts off this fraction of what it lets pass on training images."""
    result = copy.deepcopy(model)
    relus = {name: each for name, each in result.named_modules() if isinstance(each, nn.ReLU | gs.nn.FATReLU)}
    passed: dict[str, list[Tensor]] = {name: [] for name in relus}
    hooks = [
        relu.register_forward_hook(lambda _, inputs, y, name=name: passed[name].append(y[y > 0].flatten()[::7]))
        for name, relu in relus.items()
    ]
    seen = 0
    for images, _ in batches(network, "train"):
        result(images)
        seen += len(images)
        if seen >= CALIBRATION:
            break
    for hook in hooks:
        hook.remove()
    for name in relus:
        values = torch.cat(passed[name]).sort().values
        threshold = float(values[int(fraction * len(values))]) if len(values) else 0.0
        result.set_submodule(name, gs.nn.FATReLU(threshold))
    return result


def key(job: dict[str, Any]) -> str:
    return json.dumps([job[part] for part in ("network", "method", "strength", "seed")])


def jobs(network: str) -> list[dict[str, Any]]:
    """Every run of a network, seed by seed."""
    return [
        {"network": network, "method": method, "strength": strength, "seed": seed}
        for seed in SEEDS[network]
        for method, strengths in STRENGTHS[network].items()
        for strength in strengths
    ]


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every network, method, strength and cut: figures in per cent, one for each seed."""
    rows: dict[str, dict[str, Any]] = {}
    for each in results:
        for found in (each, *each["cuts"]):
            fraction = found.get("cut")
            method = each["method"] if fraction is None else f"{each['method']}, cut"
            cell = {"network": each["network"], "method": method, "strength": each["strength"], "cut": fraction}
            row = rows.setdefault(json.dumps(cell), cell | {"soft": [], "test": [], "sparsity": [], "saved": []})
            for figure in ("test", "sparsity", "saved"):
                row[figure].append(100 * found[figure])
            if fraction is None and each["soft"] is not None:
                row["soft"].append(100 * each["soft"])
    order = {name: place for place, name in enumerate((*METHODS, "ReLU, cut", "ReLU + L1, cut"))}
    return sorted(rows.values(), key=lambda row: (row["network"] != "lenet", order[row["method"]]))


def pareto(rows: list[dict[str, Any]], network: str) -> list[dict[str, Any]]:
    """The rows of a network that no other beats in both mean accuracy and mean sparsity, by sparsity."""
    own = [row for row in rows if row["network"] == network]
    points = [(statistics.mean(row["sparsity"]), statistics.mean(row["test"])) for row in own]
    best = [
        (point, row)
        for point, row in zip(points, own, strict=True)
        if not any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)
    ]
    return [row for _, row in sorted(best, key=lambda pair: pair[0])]


def label(row: dict[str, Any]) -> str:
    what = f"λ = {row['strength']:g}" if row["strength"] else ""
    if row["cut"] is not None:
        what += f"{', ' if what else ''}{100 * row['cut']:g} % cut"
    return what


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Activation sparsity against accuracy",
        "",
        f"`{command}`; torch {torch.__version__}, Python {platform.python_version()}.",
        "In per cent, mean ± standard error over seeds 1, 2, 3 for LeNet, seed 1 for ResNet-20. `soft` is the test",
        "accuracy before thresholds were made hard, `hard` that of the finished model; `zeros` is measured in the",
        "outputs of ReLUs and `saved` in the multiply-accumulates of all layers, in the finished model on test data.",
    ]
    for network in NETWORKS:
        own = [row for row in rows if row["network"] == network]
        if not own:
            continue
        on_front = [id(row) for row in pareto(rows, network)]
        name = TITLES[network]
        lines += ["", f"## {name}", "", "★: no other row has both more zeros and a better accuracy.", ""]
        lines += ["| method | strength | soft | hard | zeros | saved | |", "|---|---|---|---|---|---|---|"]
        for row in own:
            figures = " | ".join(spread(row[each]) for each in ("soft", "test", "sparsity", "saved"))
            star = "★" if id(row) in on_front else ""
            lines.append(f"| {row['method']} | {label(row)} | {figures} | {star} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    networks = [network for network in NETWORKS if any(row["network"] == network for row in rows)]
    figure, axes = pyplot.subplots(
        1, len(networks), figsize=(6.2 * len(networks), 5), layout="constrained", squeeze=False
    )
    colors = dict(zip((*METHODS, "ReLU, cut"), pyplot.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for axis, network in zip(axes[0], networks, strict=True):
        for method, color in colors.items():
            own = [row for row in rows if row["network"] == network and row["method"] == method]
            if not own:
                continue
            points = sorted((statistics.mean(row["sparsity"]), statistics.mean(row["test"])) for row in own)
            axis.plot(*zip(*points, strict=True), "o-", color=color, label=method, markersize=5, linewidth=1.2)
        cut_l1 = [row for row in rows if row["network"] == network and row["method"] == "ReLU + L1, cut"]
        if cut_l1:
            points = [(statistics.mean(row["sparsity"]), statistics.mean(row["test"])) for row in cut_l1]
            axis.plot(*zip(*points, strict=True), "x", color=colors["ReLU + L1"], label="ReLU + L1, cut", alpha=0.7)
        plain = next(row for row in rows if row["network"] == network and row["method"] == "ReLU")
        top = statistics.mean(plain["test"])
        axis.axhline(top, color="black", linestyle=":", linewidth=1)
        axis.set_ylim(top - (8 if network == "lenet" else 20), top + (1 if network == "lenet" else 3))
        axis.set_xlabel("zeros in what ReLUs give, %")
        axis.set_title(TITLES[network])
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy of the finished model, %")
    axes[0][0].legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path, dpi=130)


def main() -> None:
    def rows(networks: list[str], log: Path, workers: int) -> list[dict[str, Any]]:
        wanted = [job for network in networks for job in jobs(network)]
        return summarize(complete(wanted, log, workers, run, key))

    publish(__doc__, "activation_sweep", rows, markdown, plot, list(NETWORKS))


if __name__ == "__main__":
    main()
