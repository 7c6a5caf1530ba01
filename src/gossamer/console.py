"""What `gossamer train` shows: a bar on a terminal, a line an epoch elsewhere, and the table at the end."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from gossamer.training import Result

REFRESH = 0.25
"""Seconds between readings of the measures within an epoch; each reading waits for the device."""


class Display:
    """Shows nothing; the base of what does."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def due(self) -> bool:
        """Whether `step` would show something new; asked at every step."""
        return False

    def step(self, step: int, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Show the running means of an epoch."""

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished epoch."""


class Lines(Display):
    """One line an epoch, for logs."""

    def __init__(self, console: Console, label: str, epochs: int) -> None:
        self._console, self._label, self._epochs = console, label, epochs

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """See `Display.epoch`."""
        parts = [f"{self._label}epoch {metrics['epoch']}/{self._epochs}", _measures(metrics)]
        if metrics.get("validation_bits_per_character") is not None:
            parts.append(f"validation {metrics['validation_bits_per_character']:.3f} bits")
        elif metrics.get("validation_accuracy") is not None:
            hard = metrics.get("hard_validation_accuracy")
            beside = "" if hard is None else f" (hard {100 * hard:.1f} %)"
            parts.append(f"validation {100 * metrics['validation_accuracy']:.1f} %{beside}")
        self._console.print("  ".join([*parts, f"{metrics['seconds']:.1f} s"]), highlight=False, soft_wrap=True)


class Bar(Display):
    """A progress bar over the whole run."""

    def __init__(self, console: Console, label: str, epochs: int, steps: int, done: int) -> None:
        self._progress = Progress(
            TextColumn(f"{label}epoch {{task.fields[epoch]}}/{epochs}"),
            BarColumn(bar_width=10),
            TimeRemainingColumn(),
            TextColumn("{task.fields[measures]}"),
            console=console,
        )
        self._task = self._progress.add_task("", total=steps, completed=done, epoch=1, measures="")
        self._last = time.monotonic()

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def due(self) -> bool:
        """See `Display.due`."""
        return time.monotonic() - self._last > REFRESH

    def step(self, step: int, epoch: int, metrics: Mapping[str, Any]) -> None:
        """See `Display.step`."""
        self._last = time.monotonic()
        self._progress.update(self._task, completed=step, epoch=epoch, measures=_measures(metrics))

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """See `Display.epoch`."""
        self._progress.update(
            self._task, completed=metrics["step"], epoch=metrics["epoch"], measures=_measures(metrics)
        )


def stdout_console() -> Console:
    """The console of standard output; wide enough for parameter names where it is a file or a pipe."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def display(console: Console | None, label: str, epochs: int, steps: int, done: int) -> Display:
    """Choose how to show a run.

    Args:
        console: Where; None for nowhere.
        label: What to begin with, where several runs follow each other.
        epochs: Epochs of the run.
        steps: Optimizer steps of the run.
        done: Steps already taken.
    """
    if console is None:
        return Display()
    return Bar(console, label, epochs, steps, done) if console.is_terminal else Lines(console, label, epochs)


def print_results(console: Console, results: Sequence[Result]) -> None:
    """Print the sparsity of every tensor and the accuracies; over several seeds as mean ± standard error."""
    first = results[0].summary
    if first.rows and len(results) == 1:
        console.print(first.table())
    elif first.rows:
        console.print(_sparsity_table(results))
    if first.learned and len(results) == 1:
        console.print(first.learned_table())
    table = Table(show_header=False, box=None)
    percent = (100, 2, " %")
    for label, (scale, digits, unit), values in (
        ("test bits per character", (1, 3, ""), [each.test_bits_per_character for each in results]),
        ("validation bits per character", (1, 3, ""), [each.validation_bits_per_character for each in results]),
        ("test accuracy", percent, [each.test_accuracy for each in results]),
        ("validation accuracy", percent, [each.validation_accuracy for each in results]),
        ("test accuracy before what was soft became hard", percent, [each.soft_test_accuracy for each in results]),
        ("zeros in activations", percent, [(each.activations or {}).get("sparsity") for each in results]),
        ("MACs that they save", percent, [(each.activations or {}).get("saved") for each in results]),
        ("sparsity of masked weights", percent, [each.sparsity if each.summary.rows else None for each in results]),
        ("sparsity of whole model", percent, [each.summary.totals["all_sparsity"] for each in results]),
    ):
        known = [value for value in values if value is not None]
        if known:
            table.add_row(label, spread([scale * value for value in known], digits) + unit)
    total, kept = first.totals["all_total"], spread([each.summary.totals["all_nonzero"] for each in results], 0)
    table.add_row("parameters kept", f"{kept} of {total:,}")
    table.add_row("training time", f"{sum(each.seconds for each in results):.1f} s")
    if len(results) > 1:
        table.add_row("seeds", ", ".join(str(each.seed) for each in results) + " (mean ± standard error)")
    console.print(table)


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, with the standard error of the mean where there is more than one value."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):,.{digits}f}"


def _sparsity_table(results: Sequence[Result]) -> Table:
    table = Table(title="Sparsity")
    table.add_column("parameter", overflow="fold")
    for column in ("shape", "total", "sparsity"):
        table.add_column(column, justify="right")
    for rows in zip(*(each.summary.rows for each in results), strict=True):
        shape = "×".join(map(str, rows[0]["shape"]))
        table.add_row(rows[0]["name"], shape, f"{rows[0]['total']:,}", spread([row["sparsity"] for row in rows], 4))
    return table


def _measures(metrics: Mapping[str, Any]) -> str:
    accuracy, sparsity = 100 * metrics["train_accuracy"], 100 * metrics["sparsity"]
    bits = metrics.get("train_bits_per_character")
    loss = f"loss {metrics['train_loss']:.3f}" if bits is None else f"{bits:.3f} bits"
    hard = next((value for name, value in metrics.items() if name.endswith(".hard_density")), None)
    beside = "" if hard is None or 1 - hard <= metrics["sparsity"] else f" (hard {100 - 100 * hard:.1f} %)"
    return f"{loss}  accuracy {accuracy:.1f} %  sparsity {sparsity:.1f} %{beside}"
