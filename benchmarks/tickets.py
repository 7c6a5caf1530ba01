"""Is a ticket found by continuous sparsification worth more than a random one with as many weights in every layer?

    python benchmarks/tickets.py [--workers 2] [--networks lenet cifar_resnet] [--out benchmarks/results/tickets]

LeNet on Fashion-MNIST (12 epochs a round, first scores -0.1, 0 and 0.1, three seeds) and ResNet-20 on 10,000 images of
CIFAR-10 (25 epochs a round in bf16, first score 0, one seed), each with two rounds of search, after which the ticket is
rewound to the second epoch of the first round and trained for as long as a round. The last temperature is that of
Savarese et al. (2020), 200. The learning rate of the scores is their 0.1 times 33,235 / (steps of a round): theirs has
33,235 steps, and so scores go as far. λ is their 1e-8 or, where that leaves the first seed more than 25 % of its
weights, the first of 1e-7, 1e-6, ... that leaves 5 to 25 %; where one leaves less than 5 %, the geometric mean of it
and the one before, and so on. 25 and not 30, so that other seeds stay below 30 too. All that was tried is told. Rivals:

- `random`: the same search and the same rewound weights, with the masks of every layer shuffled before the ticket
  is trained, on the same order of data. The paired difference is the value of the masks.
- `IMP`: iterative magnitude pruning to the ticket's sparsity, two rounds, the same length and rewind point.
- `dense`: trained for one round. Tickets, random ones and IMP's were trained to the rewind point before theirs, so two
  epochs longer.
- `steered` (LeNet): a sparsity is asked for, that of the ticket found with the first score 0, and the penalty steered
  towards it; `density before ranking` is what steering alone came to.

Nothing is chosen by accuracies. (The rule for λ was added when the first searches, with 1e-8, had been seen.) Every
finished run is one line of `runs.jsonl`; started again, the command goes on where it was stopped. It ends with
`tickets.md`, `tickets.json` and `tickets.png`.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from gossamer.console import Display
from gossamer.loop import Run
from gossamer.recipe import Recipe
from gossamer.training import train
from jobs import complete, mean_error, publish, spread
from networks import NETWORKS, TITLES

LENGTH = {"lenet": 12, "cifar_resnet": 25}
STEPS = {"lenet": 12 * 430, "cifar_resnet": 25 * 157}
FIRST = {"lenet": (-0.1, 0.0, 0.1), "cifar_resnet": (0.0,)}
SEEDS = {"lenet": (1, 2, 3), "cifar_resnet": (1,)}
ROUNDS, REWIND, PUBLISHED_STEPS, PUBLISHED_RATE, PUBLISHED_PENALTY = 2, 2, 33_235, 0.1, 1e-8
LEAST, MOST = 0.05, 0.25


def recipe(network: str, rounds: int, method: dict[str, Any] | None) -> Recipe:
    """So many rounds and a last one, under a method."""
    length = LENGTH[network]
    shared = {"length": f"{length} epochs", "rewind": f"{REWIND} epochs", "rounds": ROUNDS}
    methods = [] if method is None else [shared | method]
    plan = NETWORKS[network]
    schedule = plan["schedule"] | {"cycle": length}
    return Recipe.model_validate(plan | {"schedule": schedule, "epochs": (rounds + 1) * length, "methods": methods})


def search(network: str, **arguments: Any) -> Recipe:
    rate = PUBLISHED_RATE * PUBLISHED_STEPS / STEPS[network]
    return recipe(network, ROUNDS, {"type": "continuous", "every": "1 epochs", "lr": rate} | arguments)


def run(job: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    network, kind, seed = job["network"], job["kind"], job["seed"]
    if kind == "dense":
        found = _of(train(recipe(network, 0, None), seed=seed, progress=False))
    elif kind == "IMP":
        found = _of(
            train(recipe(network, ROUNDS, {"type": "imp", "sparsity": job["sparsity"]}), seed=seed, progress=False)
        )
    elif kind == "steered":
        result = train(search(network, sparsity=job["sparsity"]), seed=seed, progress=False)
        last = result.history[ROUNDS * LENGTH[network] - 1]
        found = _of(result) | {"unranked": last["continuous.hard_density"]}
    else:
        found = _search(network, job["first"], job["penalty"], seed)
    return job | found | {"seconds": round(time.perf_counter() - start, 1)}


def _of(result: Any) -> dict[str, Any]:
    return {"validation": result.validation_accuracy, "test": result.test_accuracy, "density": 1 - result.sparsity}


def _search(network: str, first: float, penalty: float, seed: int) -> dict[str, Any]:
    """Search once, and train the ticket and a random one from the same rewound weights."""
    plan, length = search(network, initial_value=first, penalty=penalty), LENGTH[network]
    torch.set_num_threads(1)
    run = Run(plan.with_seeds([seed]), seed)
    history = [run.run_epoch(Display()) for _ in range(ROUNDS * length)]
    ends = [history[(number + 1) * length - 1] for number in range(ROUNDS)]
    searched = copy.deepcopy(run.state_dict())
    found: dict[str, Any] = {
        "rounds": [
            {
                "density": end["continuous.hard_density"],
                "soft": end["validation_accuracy"],
                "hard": end["hard_validation_accuracy"],
            }
            for end in ends
        ]
    }
    for kind in ("ticket", "random"):
        if kind == "random":
            run = Run(plan.with_seeds([seed]), seed)
            run.load_state_dict(searched)
            _shuffle(run, seed)
        for _ in range(length):
            last = run.run_epoch(Display())
        run.finalize()
        measured = run.measure("validation", "test")
        found[kind] = {
            "validation": measured["validation_accuracy"],
            "test": measured["test_accuracy"],
            "density": 1 - last["sparsity"],
            "layers": {row["name"]: row["active"] for row in run.sparsity.summary().rows},
        }
    assert found["ticket"]["layers"] == found["random"]["layers"]
    return found | {"validation": found["ticket"]["validation"]}


@torch.no_grad()
def _shuffle(run: Run, seed: int) -> None:
    """Give the scores of every layer to other weights of it, at random."""
    generator = torch.Generator().manual_seed(seed)
    for group in run.sparsity.param_groups():
        for scores in group["params"]:
            order = torch.randperm(scores.numel(), generator=generator)
            scores.copy_(scores.flatten()[order].view(scores.shape))


def key(job: dict[str, Any]) -> str:
    return json.dumps([job[part] for part in ("network", "kind", "first", "penalty", "seed")])


def next_penalty(tried: dict[float, float]) -> float | None:
    """λ to try next, where each of these left such a density; `None` where the last is the one to take."""
    if not tried:
        return PUBLISHED_PENALTY
    last = list(tried)[-1]
    if LEAST <= tried[last] <= MOST:
        return None
    weak = max((λ for λ, density in tried.items() if density > MOST), default=None)
    strong = min((λ for λ, density in tried.items() if density < LEAST), default=None)
    if strong is None:
        return float(f"{last * 10:.3g}")
    return float(f"{math.sqrt(strong * (strong / 100 if weak is None else weak)):.3g}")


def everything(
    networks: list[str], log: Path, workers: int
) -> tuple[dict[tuple[str, float], dict[float, float]], list[dict[str, Any]]]:
    """What was tried for λ, and all runs: the searches first, since others are asked for the sparsities they found."""
    tried: dict[tuple[str, float], dict[float, float]] = {(n, first): {} for n in networks for first in FIRST[n]}
    while wanted := [
        _search_job(network, first, penalty, SEEDS[network][0])
        for (network, first), densities in tried.items()
        if (penalty := next_penalty(densities)) is not None
    ]:
        for each in complete(wanted, log, workers, run, key):
            tried[each["network"], each["first"]][each["penalty"]] = each["ticket"]["density"]
    jobs = []
    for network in networks:
        for seed in SEEDS[network]:
            jobs.append({"network": network, "kind": "dense", "first": None, "penalty": None, "seed": seed})
            jobs += [_search_job(network, s, list(tried[network, s])[-1], seed) for s in FIRST[network]]
    results = complete(jobs, log, workers, run, key)
    rest = []
    for each in results:
        if each["kind"] == "search":
            asked = {"sparsity": round(1 - each["ticket"]["density"], 4)}
            job = {name: each[name] for name in ("network", "first", "penalty", "seed")} | asked
            rest.append(job | {"kind": "IMP"})
            if each["network"] == "lenet" and each["first"] == 0:
                rest.append(job | {"kind": "steered"})
    return tried, results + complete(rest, log, workers, run, key)


def _search_job(network: str, first: float, penalty: float, seed: int) -> dict[str, Any]:
    return {"network": network, "kind": "search", "first": first, "penalty": penalty, "seed": seed}


def summarize(
    tried: dict[tuple[str, float], dict[float, float]], results: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for every network and first score, in per cent."""
    rows = []
    for network in dict.fromkeys(each["network"] for each in results):
        mine = [each for each in results if each["network"] == network]
        dense = [100 * each["test"] for each in mine if each["kind"] == "dense"]
        for first in FIRST[network]:
            found = sorted((e for e in mine if e["kind"] == "search" and e["first"] == first), key=lambda e: e["seed"])
            beside = {
                kind: sorted((e for e in mine if e["kind"] == kind and e["first"] == first), key=lambda e: e["seed"])
                for kind in ("IMP", "steered")
            }
            tickets, random = ([100 * each[kind]["test"] for each in found] for kind in ("ticket", "random"))
            rows.append(
                {
                    "network": network,
                    "first": first,
                    "tried": [[penalty, 100 * density] for penalty, density in tried[network, first].items()],
                    "rounds": [
                        {
                            name: [100 * each["rounds"][number][name] for each in found]
                            for name in ("density", "soft", "hard")
                        }
                        for number in range(ROUNDS)
                    ],
                    "density": [100 * each["ticket"]["density"] for each in found],
                    "ticket": tickets,
                    "random": random,
                    "difference": _differences(tickets, random),
                    "IMP": [100 * each["test"] for each in beside["IMP"]],
                    "steered": [100 * each["test"] for each in beside["steered"]],
                    "steered_density": [100 * each["density"] for each in beside["steered"]],
                    "unranked_density": [100 * each["unranked"] for each in beside["steered"]],
                    "dense": dense,
                }
            )
    return rows


def _differences(these: list[float], others: list[float]) -> list[float]:
    return [a - b for a, b in zip(these, others, strict=True)]


def verdict(row: dict[str, Any]) -> str:
    """Whether the ticket is above the random one by more than two standard errors of the paired difference."""
    if len(row["difference"]) < 2:
        return "one seed"
    mean, error = mean_error(row["difference"])
    return f"{'yes' if mean > 2 * error else 'no'} ({mean / error if error else math.inf:.1f})"


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    lines = [
        "# Tickets of continuous sparsification",
        "",
        f"`{command}`; torch {torch.__version__}, Python {platform.python_version()}.",
        "In per cent, mean ± standard error over seeds 1, 2, 3 for LeNet, seed 1 for ResNet-20. Accuracies of rounds",
        "are on validation images, under soft masks and under hard ones; those of tickets on test images.",
        "Differences are paired by seeds; `> 2 errors` says whether the ticket is above the random one by more than",
        "two standard errors of the difference, and by how many it is.",
    ]
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        lines += ["", f"## {TITLES[network]}", "", f"Dense: {spread(mine[0]['dense'])}.", ""]
        lines += [
            "| s₀ | λ | left after round 1 | soft, hard | left after round 2 | soft, hard |",
            "|---|---|---|---|---|---|",
        ]
        for row in mine:
            cells = [f"{spread(r['density'])} | {spread(r['soft'])}, {spread(r['hard'])}" for r in row["rounds"]]
            lines.append(f"| {row['first']:g} | {row['tried'][-1][0]:g} | {' | '.join(cells)} |")
        for row in (row for row in mine if len(row["tried"]) > 1):
            left = ", ".join(f"{density:.2f} with {penalty:g}" for penalty, density in row["tried"])
            lines += ["", f"s₀ = {row['first']:g}: λ was chosen by what the first seed was left with: {left}."]
        lines += [
            "",
            "| s₀ | left | ticket | random ticket | IMP | ticket − random | > 2 errors | − IMP | − dense |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in mine:
            cells = [spread(row[name]) for name in ("density", "ticket", "random", "IMP")]
            cells += [spread(row["difference"], "+"), verdict(row)]
            cells += [spread(_differences(row["ticket"], row[name]), "+") for name in ("IMP", "dense")]
            lines.append(f"| {row['first']:g} | {' | '.join(cells)} |")
        for row in (row for row in mine if row["steered"]):
            lines += [
                "",
                f"Steered to the density of the tickets found with s₀ = 0, {spread(row['density'])}: density by "
                f"steering {spread(row['unranked_density'])}, after ranking {spread(row['steered_density'])}; accuracy "
                f"{spread(row['steered'])}, where the λ above has {spread(row['ticket'])}.",
            ]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(networks), figsize=(6.2 * len(networks), 4.6), layout="constrained", squeeze=False
    )
    styles = {
        "ticket": ("tab:green", "o", "ticket"),
        "random": ("tab:red", "s", "random ticket"),
        "IMP": ("tab:blue", "^", "iterative magnitude pruning"),
        "steered": ("tab:purple", "D", "steered to a sparsity"),
    }
    for axis, network in zip(axes[0], networks, strict=True):
        mine = sorted(
            (row for row in rows if row["network"] == network), key=lambda row: statistics.mean(row["density"])
        )
        dense = statistics.mean(mine[0]["dense"])
        axis.axhline(dense, color="black", linestyle=":", linewidth=1.2, label="dense")
        for name, (color, marker, label) in styles.items():
            if not (shown := [row for row in mine if row[name]]):
                continue
            for row in shown:
                axis.plot(row["density"][: len(row[name])], row[name], marker, color=color, alpha=0.35, markersize=4)
            places = [statistics.mean(row["density"]) for row in shown]
            axis.plot(places, [statistics.mean(row[name]) for row in shown], marker=marker, color=color, label=label)
        axis.set_xlim(left=0, right=1.15 * max(max(row["density"]) for row in mine))
        axis.set_xlabel("weights left, %")
        axis.set_ylabel("test accuracy, %")
        axis.set_title(TITLES[network])
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    def rows(networks: list[str], log: Path, workers: int) -> list[dict[str, Any]]:
        return summarize(*everything(networks, log, workers))

    publish(__doc__, "tickets", rows, markdown, plot, list(NETWORKS))


if __name__ == "__main__":
    main()
