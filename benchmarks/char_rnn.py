"""Recurrent networks on Shakespeare in characters: bits per character at 80 % and 90 % sparsity, and dense.

    python benchmarks/char_rnn.py [--workers 2] [--out benchmarks/results/char_rnn]

One layer of 128 LSTM, GRU or RNN units (`char_rnn`), trained for one epoch, 4.55 million characters. All recurrent
weights and the decoder are sparse. Every method has its own distribution (uniform for DSR, unless it is said, and ERK
for the others) and is trained with the settings of the recipe `shakespeare`, only for one epoch; the learning rate is
each cell's own, the same for all methods. It was chosen on the validation part with seed 1000, which is not used again
(bits per character, dense and DSR at 90 %; in brackets what was not chosen):

    lstm  0.02: 2.238 and 2.734 (0.01: 2.229 and 2.751; 0.04: DSR 2.773)
    gru   0.01: 2.264 and 2.746 (0.005: dense 2.242; 0.02: DSR 2.737)
    rnn   0.01: 2.406 and 2.895 (0.005: 2.420 and 2.958; 0.002: dense 2.526)

Test data are looked at once, at the end of each run.

Every finished run is one line of `runs.jsonl`; started again, the command goes on where it was stopped. It ends with
`char_rnn.md` and `char_rnn.json`, which tell of the cells and methods asked for.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from gossamer.recipe import Recipe, load_recipe
from gossamer.training import train
from jobs import Job, complete, mean_error

RATES = {"lstm": 0.02, "gru": 0.01, "rnn": 0.01}
SPARSITIES = (0.8, 0.9)
SEEDS = (0, 1, 2)
METHODS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "DSR": {"type": "dsr", "every": 100, "until": "75%"},
    "DSR from ERK": {"type": "dsr", "every": 100, "until": "75%", "distribution": "erk"},
    "gradual pruning": {"type": "gmp", "every": 100, "end": "75%"},
    "static": {"type": "static"},
}


def recipe(job: Job) -> Recipe:
    """The shipped recipe with what the job changes."""
    method = METHODS[job["method"]]
    methods = [] if method is None else [method | {"sparsity": job["sparsity"]}]
    changes = {
        "model.cell": job["cell"],
        "optimizer.lr": RATES[job["cell"]],
        "methods": methods,
        "epochs": 1,
        "threads": 1,
    }
    return load_recipe("shakespeare", [f"{key}={json.dumps(value)}" for key, value in changes.items()])


def run(job: Job) -> Job:
    """Train once, and test."""
    start = time.perf_counter()
    result = train(recipe(job), seed=job["seed"], progress=False)
    return job | {
        "validation": result.validation_bits_per_character,
        "test": result.test_bits_per_character,
        "active": result.summary.totals["targets_active"] if job["sparsity"] else None,
        "steps": result.steps,
        "seconds": round(time.perf_counter() - start, 1),
    }


def key(job: Job) -> str:
    return json.dumps([job[part] for part in ("cell", "sparsity", "method", "seed")])


def jobs(cells: list[str], methods: list[str]) -> list[Job]:
    """Every run of the cells and methods; dense has no sparsity."""
    return [
        {"cell": cell, "sparsity": sparsity, "method": method, "seed": seed}
        for cell in cells
        for method in methods
        for sparsity in ((None,) if METHODS[method] is None else SPARSITIES)
        for seed in SEEDS
    ]


def summarize(results: list[Job]) -> list[dict[str, Any]]:
    """Mean and standard error over the seeds, a row for each cell, method and sparsity."""
    rows: dict[tuple[str, str, float | None], list[Job]] = {}
    for each in results:
        rows.setdefault((each["cell"], each["method"], each["sparsity"]), []).append(each)
    return [
        {
            "cell": cell,
            "method": method,
            "sparsity": sparsity,
            "test_mean": mean_error([each["test"] for each in runs])[0],
            "test_standard_error": mean_error([each["test"] for each in runs])[1],
            "tests": [each["test"] for each in runs],
            "validations": [each["validation"] for each in runs],
            "active": runs[0]["active"],
            "recipe": recipe(runs[0]).to_yaml(),
            "seconds": [each["seconds"] for each in runs],
        }
        for (cell, method, sparsity), runs in rows.items()
    ]


def markdown(rows: list[dict[str, Any]], workers: int) -> str:
    by_row = {(row["cell"], row["method"], row["sparsity"]): row for row in rows}
    total = sum(sum(row["seconds"]) for row in rows)
    lines = [
        "# Recurrent networks on Shakespeare in characters",
        "",
        f"`python benchmarks/char_rnn.py`; torch {torch.__version__}, Python {platform.python_version()}.",
        "Bits per character of the test part, mean ± standard error over seeds "
        f"{', '.join(map(str, SEEDS))}; lower is better.",
        f"{sum(len(row['tests']) for row in rows)} runs of {total / 60:.0f} minutes in all, {workers} at a time.",
        "",
        "| cell | method | " + " | ".join(f"{100 * sparsity:g} % sparse" for sparsity in SPARSITIES) + " |",
        "|---|---|" + "---|" * len(SPARSITIES),
    ]
    for cell, method in dict.fromkeys((row["cell"], row["method"]) for row in rows):
        if METHODS[method] is None:
            row = by_row[cell, method, None]
            cells = [f"{row['test_mean']:.3f} ± {row['test_standard_error']:.3f} (dense)"] * len(SPARSITIES)
        else:
            found = [by_row[cell, method, sparsity] for sparsity in SPARSITIES]
            cells = [f"{row['test_mean']:.3f} ± {row['test_standard_error']:.3f}" for row in found]
        lines.append(f"| {cell} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "char_rnn")
    parser.add_argument("--cells", nargs="+", choices=RATES, default=list(RATES), help="only these")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="only these")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    wanted = jobs(arguments.cells, arguments.methods)
    rows = summarize(complete(wanted, arguments.out / "runs.jsonl", arguments.workers, run, key))
    (arguments.out / "char_rnn.json").write_text(json.dumps({"rows": rows}, indent=2) + "\n")
    text = markdown(rows, arguments.workers)
    (arguments.out / "char_rnn.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
