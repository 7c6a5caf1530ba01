"""Many training runs, a few at a time, of which none is made twice, and what they came to."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
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


def publish(
    description: str | None,
    name: str,
    rows: Callable[[list[str], Path, int], list[Any]],
    markdown: Callable[[list[Any], str], str],
    plot: Callable[[list[Any], Path], None],
    networks: Sequence[str] = (),
) -> None:
    """The command line of a benchmark, which ends with what it found as JSON, as a text and as a picture.

    Args:
        description: What it does.
        name: Its own, and that of its folder and its files.
        rows: Makes what is to be shown of the networks, the log for `complete`, and jobs at a time.
        markdown: Tells that, and the command that made it.
        plot: Draws it into a file.
        networks: Among which one may choose; none where there is no choice.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / name)
    if networks:
        parser.add_argument("--networks", nargs="+", choices=networks, default=list(networks), help="only these")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = rows(arguments.networks if networks else [], arguments.out / "runs.jsonl", arguments.workers)
    (arguments.out / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
    text = markdown(found, f"python benchmarks/{name}.py")
    (arguments.out / f"{name}.md").write_text(text)
    plot(found, arguments.out / f"{name}.png")
    print(text)


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def spread(values: list[float], sign: str = "") -> str:
    """Mean ± standard error, or the one value; a dash where there is none."""
    if len(values) < 2:
        return f"{values[0]:{sign}.2f}" if values else "–"
    mean, error = mean_error(values)
    return f"{mean:{sign}.2f} ± {error:.2f}"
