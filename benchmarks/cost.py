"""What sparsity costs in training: upkeep of masks at every step, and one mask update.

    python benchmarks/cost.py [--threads 2] [--out benchmarks/results/cost.json]

Dense and sparse steps alternate in one run; every figure is a median, and ratios are medians of paired ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import gossamer as gs
from gossamer.zoo import cifar_wrn


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def alternate(dense: Callable[[], None], sparse: Callable[[], None], pairs: int) -> dict[str, float]:
    """Median seconds of each and the median of the ratios of neighbours, after three pairs that do not count."""
    times = [(seconds(dense), seconds(sparse)) for _ in range(pairs + 3)][3:]
    return {
        "dense_ms": 1e3 * statistics.median(a for a, _ in times),
        "sparse_ms": 1e3 * statistics.median(b for _, b in times),
        "ratio": statistics.median(b / a for a, b in times),
        "pairs": pairs,
    }


def mlp_step(pairs: int) -> dict[str, float]:
    """A training step of an MLP 1024-4096-1024 with AdamW at batch 64, masks of 90 % sparsity, one byte a weight."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))
        return model, torch.optim.AdamW(model.parameters())

    x, y = torch.randn(64, 1024), torch.randint(1024, (64,))
    dense_model, dense_optimizer = make()
    sparse_model, sparse_optimizer = make()
    gs.attach(sparse_model, gs.Static(0.9), sparse_optimizer)
    return alternate(trainer(dense_model, dense_optimizer, x, y), trainer(sparse_model, sparse_optimizer, x, y), pairs)


def wrn_step(pairs: int) -> dict[str, float]:
    """A training step of WRN-28-2 with SGD at batch 128, and the time of the mask hooks alone within it."""

    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = cifar_wrn(depth=28, width=2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)

    x, y = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    dense_model, dense_optimizer = make()
    sparse_model, sparse_optimizer = make()
    upkeep: list[float] = []
    begin = [0.0]
    sparse_optimizer.register_step_pre_hook(lambda *_: begin.__setitem__(0, time.perf_counter()))
    gs.attach(sparse_model, gs.Static(0.9, targets=list(sparse_model.SPARSE_TARGETS)), sparse_optimizer)
    before = [0.0]
    sparse_optimizer.register_step_pre_hook(lambda *_: before.__setitem__(0, time.perf_counter() - begin[0]))
    hooks = list(sparse_optimizer._optimizer_step_post_hooks.values())

    def timed_after(*arguments: object) -> None:
        start = time.perf_counter()
        for hook in hooks:
            hook(*arguments)
        upkeep.append(before[0] + time.perf_counter() - start)

    sparse_optimizer._optimizer_step_post_hooks.clear()
    sparse_optimizer.register_step_post_hook(timed_after)
    result = alternate(
        trainer(dense_model, dense_optimizer, x, y), trainer(sparse_model, sparse_optimizer, x, y), pairs
    )
    result["upkeep_ms"] = 1e3 * statistics.median(upkeep)
    result["upkeep_fraction"] = result["upkeep_ms"] / result["dense_ms"]
    return result


def mask_update(repeats: int) -> dict[str, dict[str, float]]:
    """One prune-and-grow of 8.4 million weights (two tensors of 2048 × 2048, AdamW), milliseconds.

    Before each, weights and gradients are drawn anew, so that every update has something to do, as in training.
    """
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False), nn.Linear(2048, 2048, bias=False))
    result = {}
    for sparsity in (0.5, 0.9):
        for method in (gs.SET(sparsity), gs.RigL(sparsity), gs.DSR(sparsity, threshold=1e-2, prune_fraction=0.03)):
            optimizer = torch.optim.AdamW(model.parameters())
            handle = gs.attach(model, method, optimizer)
            times, changed = [], []
            handle.on_update(lambda update, changed=changed: changed.append(sum(row["grown"] for row in update.rows)))
            for _ in range(repeats + 2):
                for parameter in model.parameters():
                    nn.init.normal_(parameter, std=0.02)
                    parameter.grad = torch.randn_like(parameter)
                handle.project(model)
                optimizer.step()
                times.append(seconds(handle.update))
            result[f"{method.name}@{sparsity}"] = {
                "milliseconds": 1e3 * statistics.median(times[2:]),
                "weights_changed": round(statistics.median(changed[2:])),
            }
            handle.finalize()
    return result


def publish(description: str | None, name: str, pairs: int, measure: Callable[[int], dict[str, object]]) -> None:
    """The command line of a benchmark of times, which ends with what it measured, as JSON."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=pairs)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{name}.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        "command": f"python benchmarks/{name}.py --threads {arguments.threads} --pairs {arguments.pairs}",
        "machine": {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cores": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    } | measure(arguments.pairs)
    text = json.dumps(result, indent=2)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n")
    print(text)


def measure(pairs: int) -> dict[str, object]:
    return {
        "mlp_1024_4096_1024_adamw_batch64": mlp_step(pairs),
        "wrn_28_2_sgd_batch128": wrn_step(max(5, pairs // 10)),
        "update_8.4M_weights_ms": mask_update(max(5, pairs // 5)),
    }


if __name__ == "__main__":
    publish(__doc__, "cost", 100, measure)
