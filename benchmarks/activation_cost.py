"""What sparse activations cost in training: time and memory of each, against ReLU and against the plain formula.

    python benchmarks/activation_cost.py [--pairs 15] [--out benchmarks/results/activation_cost]

Forward and backward on activations of 64×64×56×56 (51 MB in single precision), with one thread and with two. Everything
is run in turn, once a round; figures are medians over rounds, and ratios medians of the ratios within rounds. Memory is
the most that tensors hold at a time during forward and backward, beyond the input.

`formula` is the smoothed threshold written with plain operations, as the lossy sparsifier of the seed has it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gossamer as gs

SHAPE = (64, 64, 56, 56)
Forward = Callable[[Tensor], Tensor]


class Formula(nn.Module):
    """The smoothed threshold in plain operations."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        e = torch.abs(self.eps)
        return torch.sigmoid(4.0 * (x - e)) * x + torch.sigmoid(4.0 * (-e - x)) * x


def penalized(module: Forward) -> Forward:
    """The sum of what passes and of its L0 penalty, in plain operations."""

    def run(x: Tensor) -> Tensor:
        y = module(x)
        return y.sum() + (y**2 / (y**2 + 0.1)).sum()

    return run


def with_penalty(x: Tensor, eps: Tensor) -> Tensor:
    """The same where the penalty's sums are taken while the threshold is applied."""
    y, sums = gs.nn.lossy_threshold(x, eps, 4.0, terms=("near_one",), b=0.1)
    return y.sum() + sums.sum()


def watched(squashed: bool) -> nn.Module:
    """A module whose inputs are aggregated, or multiplied by the mask that was made from them."""
    module = nn.Identity()
    sparsifier = gs.ActivationSparsifier(
        nn.Sequential(module),
        aggregate_fn=torch.maximum,
        reduce_fn=lambda x: x.mean(0),
        mask_fn=lambda x: (x > 0.5).float(),
    )
    sparsifier.register_layer(module)
    if squashed:
        module(torch.randn(SHAPE))
        sparsifier.step()
        sparsifier.squash_mask()
    return module


def candidates() -> dict[str, Forward]:
    """Everything that is measured, by name."""
    size, channels = SHAPE[2], SHAPE[1]
    eps = nn.Parameter(torch.tensor([0.5]))
    return {
        "ReLU": nn.ReLU(),
        "formula": Formula(),
        "LossySparsifier": gs.nn.LossySparsifier(0.5, 4.0),
        "LossySparsifier, a threshold a channel": gs.nn.LossySparsifier(0.5, 4.0, channels=channels),
        "LossyHardSparsifier, straight-through": gs.nn.LossyHardSparsifier(0.5, a=4.0),
        "LossyHardSparsifier": gs.nn.LossyHardSparsifier(0.5),
        "FATReLU": gs.nn.FATReLU(0.5),
        "formula with L0": penalized(Formula()),
        "lossy_threshold with L0": lambda x: with_penalty(x, eps),
        "SparseActivation, static": gs.nn.SparseActivation(size, density=0.5),
        "SparseActivation, dynamic": gs.nn.SparseActivation(size, density=0.5, dynamic=True),
        "BatchNorm2d": nn.BatchNorm2d(channels),
        "SparseBatchNorm, half kept": gs.nn.SparseBatchNorm(channels, gs.nn.SparseActivation(size, density=0.5)),
        "KWinners, a tenth": gs.nn.KWinners(channels, 0.1),
        "ActivationSparsifier, aggregating": watched(squashed=False),
        "ActivationSparsifier, masking": watched(squashed=True),
    }


def step(run: Forward, x: Tensor, grad: Tensor) -> None:
    y = run(x)
    y.backward(grad if y.dim() else None)
    x.grad = None


def peak_memory(run: Forward, x: Tensor, grad: Tensor) -> float:
    """The most that tensors hold at a time, beyond what there was before, in MB."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(run, x, grad)
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def measure(threads: int, pairs: int) -> list[dict[str, Any]]:
    """A row for each candidate."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x, grad = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    runs = candidates()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(pairs + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            step(run, x, grad)
            if round_ >= 2:  # the first ones touch memory that nobody had
                times[name].append(time.perf_counter() - start)

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))

    return [
        {
            "name": name,
            "threads": threads,
            "milliseconds": 1e3 * statistics.median(times[name]),
            "to_relu": ratio(name, "ReLU"),
            "faster_than_formula": ratio("formula with L0" if "with L0" in name else "formula", name),
            "peak_mb": peak_memory(run, x, grad),
        }
        for name, run in runs.items()
    ]


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    threads = sorted({row["threads"] for row in rows})
    by_cell = {(row["name"], row["threads"]): row for row in rows}
    lines = [
        "# The cost of sparse activations in training",
        "",
        f"`{command}`; torch {torch.__version__}, Python {platform.python_version()},",
        f"{torch.backends.cpu.get_cpu_capability()}.",
        f"Forward and backward on {'×'.join(map(str, SHAPE))}, single precision; medians, in turn within one run. Last",
        "column: the most that tensors hold at a time beyond the input, which is 49 MB.",
        "",
        "| | "
        + " | ".join(f"{n} thread{'s' * (n > 1)}, ms | × ReLU | formula's time / this" for n in threads)
        + " | peak, MB |",
        "|---|" + "---|---|---|" * len(threads) + "---|",
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [by_cell[name, n] for n in threads]
        figures = " | ".join(
            f"{cell['milliseconds']:.0f} | {cell['to_relu']:.2f} | {cell['faster_than_formula']:.2f}" for cell in cells
        )
        lines.append(f"| {name} | {figures} | {cells[0]['peak_mb']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "activation_cost")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = [row for threads in (1, 2) for row in measure(threads, arguments.pairs)]
    (arguments.out / "activation_cost.json").write_text(json.dumps(rows, indent=2) + "\n")
    text = markdown(rows, f"python benchmarks/activation_cost.py --pairs {arguments.pairs}")
    (arguments.out / "activation_cost.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
