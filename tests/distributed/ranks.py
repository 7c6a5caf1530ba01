"""Runs named cases on every rank of a process group of two, and brings back what each rank returned.

Starting processes costs seconds, so one group runs many cases; each is then looked at by a test of its own.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

WORLD = 2
PATIENCE = timedelta(seconds=30)
"""How long a rank waits in a collective for one that does not come."""

Case = Callable[[Path], Any]
"""Takes a folder that all ranks share; returns tensors, numbers, strings, and lists and dicts of them."""


def start(cases: Callable[[], Mapping[str, Case]], folder: Path) -> Results:
    """Run all cases in order, on all ranks; `cases` is a function at the top of a module, so that ranks find it."""
    torch.multiprocessing.start_processes(_rank, (cases, str(folder)), nprocs=WORLD, start_method="spawn")
    return Results([torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)])


class Results:
    """What the ranks returned, by case."""

    def __init__(self, ranks: list[dict[str, dict[str, Any]]]) -> None:
        self._ranks = ranks

    def __getitem__(self, case: str) -> list[Any]:
        """The results of a case, one a rank; fails the test with the tracebacks where ranks raised."""
        raised = [f"rank {i}:\n{each[case]['error']}" for i, each in enumerate(self._ranks) if "error" in each[case]]
        if raised:
            pytest.fail("\n".join(raised), pytrace=False)
        return [results[case]["value"] for results in self._ranks]


def _rank(rank: int, cases: Callable[[], Mapping[str, Case]], folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    agreement = dist.FileStore(f"{folder}/agreement", WORLD)
    results = {}
    for number, (name, case) in enumerate(cases().items()):
        if not dist.is_initialized():
            method = f"file://{folder}/rendezvous{number}"
            dist.init_process_group("gloo", init_method=method, rank=rank, world_size=WORLD, timeout=PATIENCE)
        try:
            results[name] = {"value": case(Path(folder))}
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        agreement.set(f"{number}/{rank}", "failed" if "error" in results[name] else "passed")
        outcomes = [agreement.get(f"{number}/{each}") for each in range(WORLD)]
        if dist.is_initialized() and b"failed" in outcomes:
            dist.destroy_process_group()
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def error_of(action: Callable[[], object]) -> str:
    """The class and message of the error an action raises, or "none"."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"
