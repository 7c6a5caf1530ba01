"""Many training runs, a few at a time, of which none is made twice."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

Job = dict[str, Any]


def complete(
    jobs: list[Job], log: Path, workers: int, run: Callable[[Job], Job], key: Callable[[Job], str]
) -> list[Job]:
    """Run the jobs that the log lacks, writing each as it ends; return all of theirs, in order.

    Args:
        jobs: What to run.
        log: A file with a line for every finished job, made where there is none.
        workers: Jobs at a time.
        run: Makes a job's result, which has `validation` and `seconds`, and the job's own entries.
        key: What makes a job the same as another.
    """
    done = {}
    if log.exists():
        done = {key(each): each for each in map(json.loads, log.read_text().splitlines())}
    missing = [job for job in jobs if key(job) not in done]
    with ProcessPoolExecutor(workers) as pool, log.open("a") as file:
        futures = [pool.submit(run, job) for job in missing]
        for count, future in enumerate(as_completed(futures), 1):
            if future.exception() is not None:  # told at the end, so that what others come to is not lost
                continue
            result = future.result()
            done[key(result)] = result
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(
                f"{count}/{len(missing)} {key(result)} validation {result['validation']:.4f} {result['seconds']} s",
                flush=True,
            )
        for job, future in zip(missing, futures, strict=True):
            if (error := future.exception()) is not None:
                raise RuntimeError(f"{key(job)} failed; the others are written") from error
    return [done[key(job)] for job in jobs]


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard error, or the one value; a dash where there is none."""
    if len(values) < 2:
        return f"{values[0]:{sign}.2f}" if values else "–"
    mean, error = mean_error(values)
    return f"{mean:{sign}.2f} ± {error:.2f}"
