"""Does it work: accuracy on Fashion-MNIST at 95 % and 98 % sparsity, every method against its rivals.

    python benchmarks/accuracy.py [--workers 2] [--out benchmarks/results/accuracy]

Two networks (`mnist_mlp` 20 epochs, `lenet` 8 epochs), equal epochs for all. Each method gets the same search on the
validation split with one seed that is not used again: four trials, two learning rates by two values of the knob that
matters most to it. That is weight decay for dense networks, the distribution for gradual pruning, and for all that
begin with random masks whether their first weights are rescaled to the inputs that are left: it helps signals through
sparse layers, but then new weights, which begin at zero, compete with larger ones. SET, RigL and DSR
begin with the masks of static ERK. The best trial is trained with five other seeds, and only then is the test set
looked at. At the end a few variants of chosen trials tell where differences come from, on the validation split.

Every finished run is one line of `runs.jsonl`; started again, the command goes on where it was stopped. It ends with
`accuracy.md`, `accuracy.json` and `accuracy.png`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from gossamer import zoo
from gossamer.recipe import Recipe
from gossamer.training import train
from jobs import complete, mean_error

NETWORKS = {"mnist_mlp": 20, "lenet": 8}
SPARSITIES = (0.95, 0.98)
RATES = (0.03, 0.1)
SEARCH_SEED = 1000
SEEDS = (1, 2, 3, 4, 5)
DECAY = {"weight_decay": (1e-4, 5e-4)}
RESCALE = {"rescale": (False, True)}
MASKED: dict[str, tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "static uniform": ({"type": "static", "distribution": "uniform"}, RESCALE),
    "static ERK": ({"type": "static", "distribution": "erk"}, RESCALE),
    "SET": ({"type": "set", "distribution": "erk", "every": 100, "until": "75%"}, RESCALE),
    "RigL": ({"type": "rigl", "distribution": "erk", "every": 100, "until": "75%"}, RESCALE),
    "DSR": ({"type": "dsr", "distribution": "erk", "every": 100, "until": "75%", "prune_fraction": 0.004}, RESCALE),
    "gradual pruning": ({"type": "gmp", "every": 100, "end": "75%"}, {"distribution": ("erk", "global")}),
}
METHODS = ("dense", "thin dense", *MASKED)
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("RigL", {"drop_fraction": 0.1}),
    ("RigL", {"skip_step": False}),
    ("DSR", {"distribution": "uniform"}),
)


def trials(method: str) -> list[dict[str, Any]]:
    """The four trials of a method's search."""
    ((knob, values),) = (MASKED[method][1] if method in MASKED else DECAY).items()
    return [{"lr": rate, knob: value} for rate, value in itertools.product(RATES, values)]


def thin_width(network: str, sparsity: float) -> float:
    """The width at which a dense network has no more parameters than the sparse one has active ones."""
    build = {"mnist_mlp": zoo.mnist_mlp, "lenet": zoo.lenet}[network]
    parameters = dict(build().named_parameters())
    weights = sum(p.numel() for p in parameters.values() if p.dim() > 1)
    others = sum(p.numel() for p in parameters.values() if p.dim() == 1)
    return zoo.width_for_parameters(lambda width: build(width), others + round((1 - sparsity) * weights))


def recipe(network: str, sparsity: float | None, method: str, trial: dict[str, Any]) -> Recipe:
    """The recipe of one trial."""
    optimizer = {"name": "SGD", "lr": trial["lr"], "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    model: dict[str, Any] = {"name": network}
    methods = []
    knobs = {key: value for key, value in trial.items() if key != "lr"}
    if "weight_decay" in knobs:
        optimizer["weight_decay"] = knobs.pop("weight_decay")
    if method == "thin dense":
        assert sparsity is not None
        model["width"] = thin_width(network, sparsity)
    elif method != "dense":
        methods = [MASKED[method][0] | {"sparsity": sparsity} | knobs]
    return Recipe.model_validate(
        {
            "data": {"name": "fashion_mnist", "batch_size": 128},
            "model": model,
            "optimizer": optimizer,
            "schedule": {"type": "cosine"},
            "epochs": NETWORKS[network],
            "methods": methods,
            "threads": 1,
        }
    )


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train once; the test set only where the job is a final run."""
    start = time.perf_counter()
    plan = recipe(job["network"], job["sparsity"], job["method"], job["trial"])
    result = train(plan, seed=job["seed"], progress=False, test=job["final"])
    return job | {
        "validation": result.validation_accuracy,
        "test": result.test_accuracy,
        "active": result.summary.totals["targets_active"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def key(job: dict[str, Any]) -> str:
    return json.dumps([job[part] for part in ("network", "sparsity", "method", "trial", "seed")])


def cells() -> list[tuple[str, float | None, str]]:
    """Every combination of network, sparsity and method; dense has no sparsity."""
    return [
        (network, sparsity, method)
        for network in NETWORKS
        for method in METHODS
        for sparsity in ((None,) if method == "dense" else SPARSITIES)
    ]


def summarize(finals: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with standard errors, and DSR against the better static by paired differences."""
    test: dict[tuple[str, float | None, str], list[float]] = {}
    chosen = {}
    for each in finals:
        cell = (each["network"], each["sparsity"], each["method"])
        test.setdefault(cell, []).append(100 * each["test"])
        chosen[cell] = each["trial"]
    rows = [
        {
            "network": network,
            "sparsity": sparsity,
            "method": method,
            "test_mean": mean_error(values)[0],
            "test_standard_error": mean_error(values)[1],
            "tests": values,
            "chosen": chosen[network, sparsity, method],
        }
        for (network, sparsity, method), values in test.items()
    ]
    claims = []
    for network, sparsity in itertools.product(NETWORKS, SPARSITIES):
        statics = [name for name in METHODS if name.startswith("static")]
        better = max(statics, key=lambda name: statistics.mean(test[network, sparsity, name]))
        for method in MASKED:
            if method not in statics:
                pairs = zip(test[network, sparsity, method], test[network, sparsity, better], strict=True)
                mean, error = mean_error([a - b for a, b in pairs])
                claims.append(
                    {
                        "network": network,
                        "sparsity": sparsity,
                        "method": method,
                        "better_static": better,
                        "difference": mean,
                        "standard_error": error,
                        "above_by_two_errors": mean > 2 * error,
                    }
                )
    return {"rows": rows, "against_better_static": claims}


def compare(finals: list[dict[str, Any]], varied: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Validation accuracy of every variant beside that of the trial it varies, seed by seed."""
    rows: dict[str, dict[str, Any]] = {}
    for each in varied:
        row = rows.setdefault(
            json.dumps([each["network"], each["sparsity"], each["method"], each["change"]]),
            {part: each[part] for part in ("network", "sparsity", "method", "change")} | {"chosen": [], "variant": []},
        )
        same = {key(job): job for job in finals}[key(each | {"trial": each["of"]})]
        row["chosen"].append(100 * same["validation"])
        row["variant"].append(100 * each["validation"])
    return list(rows.values())


def markdown(summary: dict[str, Any], command: str) -> str:
    by_cell = {(row["network"], row["sparsity"], row["method"]): row for row in summary["rows"]}
    lines = [
        "# Accuracy on Fashion-MNIST",
        "",
        f"`{command}`; torch {torch.__version__}, Python {platform.python_version()}.",
        "Test accuracy in per cent, mean ±",
        f"standard error over seeds {', '.join(map(str, SEEDS))}; chosen on the validation split",
        f"with seed {SEARCH_SEED} from four trials each.",
        "",
        "| network | method | " + " | ".join(f"{100 * sparsity:g} % sparse" for sparsity in SPARSITIES) + " |",
        "|---|---|" + "---|" * len(SPARSITIES),
    ]
    for network in NETWORKS:
        for method in METHODS:
            found = [by_cell[network, None if method == "dense" else sparsity, method] for sparsity in SPARSITIES]
            cells_ = [f"{row['test_mean']:.2f} ± {row['test_standard_error']:.2f}" for row in found]
            if method == "dense":
                cells_ = [f"{cells_[0]} (dense)"] * len(cells_)
            lines.append(f"| {network} | {method} | " + " | ".join(cells_) + " |")
    lines += ["", "Paired differences to the better static mask (same seeds):", ""]
    lines += [
        "| network | sparsity | method | difference | more than two standard errors above |",
        "|---|---|---|---|---|",
    ]
    for claim in summary["against_better_static"]:
        verdict = "yes" if claim["above_by_two_errors"] else "no"
        lines.append(
            f"| {claim['network']} | {100 * claim['sparsity']:g} % | {claim['method']} − {claim['better_static']} | "
            f"{claim['difference']:+.2f} ± {claim['standard_error']:.2f} | {verdict} |"
        )
    collapsed = [
        f"{row['network']} {100 * row['sparsity']:g} % {row['method']}: {count} of {len(row['tests'])}"
        for row in summary["rows"]
        if row["sparsity"] and (count := sum(each < 10.5 for each in row["tests"]))
    ]
    lines += ["", f"Runs that ended at chance (10 %): {'; '.join(collapsed) or 'none'}."]
    lines += ["", "Chosen trials:", "", "| network | sparsity | method | trial |", "|---|---|---|---|"]
    for row in summary["rows"]:
        level = "dense" if row["sparsity"] is None else f"{100 * row['sparsity']:g} %"
        lines.append(f"| {row['network']} | {level} | {row['method']} | {json.dumps(row['chosen'])} |")
    lines += ["", "Variants of chosen trials; validation accuracy, mean over the same five seeds and the lowest:", ""]
    lines += ["| network | sparsity | method | change | as chosen | changed |", "|---|---|---|---|---|---|"]
    for row in summary["variants"]:
        found_ = [f"{statistics.mean(row[part]):.2f} ({min(row[part]):.2f})" for part in ("chosen", "variant")]
        lines.append(
            f"| {row['network']} | {100 * row['sparsity']:g} % | {row['method']} | {json.dumps(row['change'])} | "
            + " | ".join(found_)
            + " |"
        )
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, axes = pyplot.subplots(1, len(NETWORKS), figsize=(10, 4.6), sharey=True, layout="constrained")
    compared = [method for method in METHODS if method != "dense"]
    for axis, network in zip(axes, NETWORKS, strict=True):
        rows = {(row["method"], row["sparsity"]): row for row in summary["rows"] if row["network"] == network}
        axis.axhline(100 - rows["dense", None]["test_mean"], color="black", linestyle="--", linewidth=1, label="dense")
        for sparsity, shift, color in zip(SPARSITIES, (-0.15, 0.15), ("tab:blue", "tab:red"), strict=True):
            for place, method in enumerate(compared):
                errors = [100 - each for each in rows[method, sparsity]["tests"]]
                axis.plot([place + shift] * len(errors), errors, "o", color=color, alpha=0.35, markersize=4)
            means = [100 - rows[method, sparsity]["test_mean"] for method in compared]
            places = [place + shift for place in range(len(compared))]
            label = f"{100 * sparsity:g} % sparse, mean"
            axis.plot(places, means, "_", color=color, markersize=14, markeredgewidth=2.5, label=label)
        axis.set_yscale("log")
        axis.set_yticks([10, 12, 15, 20, 30, 50, 90], ["10", "12", "15", "20", "30", "50", "90"])
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xticks(range(len(compared)), compared, rotation=35, ha="right")
        axis.set_title(network)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("test error, % (log scale, a dot a seed)")
    axes[0].legend(loc="upper right", frameon=False)
    figure.suptitle("Fashion-MNIST, equal epochs, five seeds; 90 % is chance")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "accuracy")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="only these; the tables need all")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = arguments.out / "runs.jsonl"
    chosen_cells = [cell for cell in cells() if cell[0] in arguments.networks]
    search = [
        {"network": n, "sparsity": s, "method": m, "trial": trial, "seed": SEARCH_SEED, "final": False}
        for n, s, m in chosen_cells
        for trial in trials(m)
    ]
    best: dict[tuple[str, float | None, str], dict[str, Any]] = {}
    for each in complete(search, log, arguments.workers, run, key):
        cell = (each["network"], each["sparsity"], each["method"])
        if cell not in best or each["validation"] > best[cell]["validation"]:
            best[cell] = each
    finals = [
        {"network": n, "sparsity": s, "method": m, "trial": best[n, s, m]["trial"], "seed": seed, "final": True}
        for n, s, m in chosen_cells
        for seed in SEEDS
    ]
    results = complete(finals, log, arguments.workers, run, key)
    variants = [
        each | {"final": False, "change": change, "of": each["trial"], "trial": each["trial"] | change}
        for method, change in VARIANTS
        for each in finals
        if each["method"] == method and each["sparsity"] == max(SPARSITIES)
    ]
    varied = complete(variants, log, arguments.workers, run, key)
    if set(arguments.networks) != set(NETWORKS):
        return
    summary = summarize(results) | {"variants": compare(results, varied)}
    (arguments.out / "accuracy.json").write_text(json.dumps(summary, indent=2) + "\n")
    text = markdown(summary, "python benchmarks/accuracy.py")
    (arguments.out / "accuracy.md").write_text(text)
    plot(summary, arguments.out / "accuracy.png")
    print(text)


if __name__ == "__main__":
    main()
