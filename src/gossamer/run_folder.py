"""The folder of a run: its recipe, what was measured, and the state it can go on from.

- `recipe.yaml`: the resolved recipe, with this run's seed
- `metrics.jsonl`: one line an epoch
- `updates.jsonl`: one line a mask update
- `checkpoint.safetensors`: everything at the end of the last epoch
- `summary.json`: the result; its presence means that the run is complete
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gossamer.checkpoint import load_tree, save_tree, sweep, write_text
from gossamer.errors import ConfigurationError, StateError, reason
from gossamer.recipe import Recipe, load_recipe

RECIPE, METRICS, UPDATES, CHECKPOINT, SUMMARY = (
    "recipe.yaml",
    "metrics.jsonl",
    "updates.jsonl",
    "checkpoint.safetensors",
    "summary.json",
)

LOCK = ".lock"

_NEEDED = {METRICS: {"epoch", "seconds"}, UPDATES: {"epoch"}}  # keys of a line that a resumed run uses


class RunFolder:
    """The files of one run.

    Args:
        root: The folder asked for.
        recipe: The recipe. If it has several seeds, `root` holds the recipe and a folder `seed-<seed>` for each run.
        seed: The run's seed.

    Attributes:
        path: The folder of this run, which need not exist yet.
    """

    def __init__(self, root: str | Path, recipe: Recipe, seed: int) -> None:
        self._root = Path(root)
        self._recipe = recipe
        self._seed = seed
        self.path = self._root if recipe.seeds == [seed] else self._root / f"seed-{seed}"

    def create(self) -> None:
        """Make the folder and write the recipe into it.

        Raises:
            ConfigurationError: There is something in its place, or it cannot be made.
        """
        try:
            self._make()
        except OSError as error:
            raise ConfigurationError(
                f"{self.path}: {error.strerror}; give a folder that can be made with --out"
            ) from None
        write_text(self._root / RECIPE, self._recipe.to_yaml())
        write_text(self.path / RECIPE, self._recipe.with_seeds([self._seed]).to_yaml())

    def _make(self) -> None:
        check_free(self.path)
        if self.path != self._root and _recipe_text(self._root) != self._recipe.to_yaml():
            check_free(self._root)
        self.path.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder.

        Raises:
            ConfigurationError: One does, or nothing can be written here.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise ConfigurationError(f"{self.path}: another process trains this run; wait for it, or stop it") from None
        except NotImplementedError:  # a file system without locks
            yield
            return
        except OSError as error:
            raise ConfigurationError(
                f"{self.path}: {error.strerror}; a run goes on in its own folder, make that writable or copy it"
            ) from None
        try:
            yield
        finally:
            lock.release()
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink(missing_ok=True)

    def record(self, metrics: Mapping[str, Any], updates: Sequence[Mapping[str, Any]], state: Any) -> None:
        """Add an epoch: its metrics and mask updates, both with the key `epoch`, and the state after it.

        The lines are on the disk before the checkpoint is, so that a checkpoint never lacks a line; `restore` takes
        back lines that no checkpoint followed.
        """
        for name, records in ((METRICS, [metrics]), (UPDATES, updates)):
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(each) + "\n" for each in records)
                file.flush()
                os.fsync(file.fileno())
        save_tree(self.path / CHECKPOINT, state)

    def restore(self, clean: bool = True) -> Any:
        """The state of the last checkpoint, or None where there is none.

        Args:
            clean: Whether to remove lines of later epochs and what a killed process left behind: for one process only.

        Raises:
            StateError: The checkpoint is damaged, or lines of epochs before it are damaged or missing.
        """
        if clean:
            sweep(self.path)
        state = load_tree(self.path / CHECKPOINT) if (self.path / CHECKPOINT).exists() else None
        last = 0
        if state is not None:
            if not isinstance(state, dict) or not isinstance(state.get("epoch"), int):
                raise StateError(f"{self.path / CHECKPOINT}: holds no epoch, this is not the checkpoint of a run")
            last = state["epoch"]
        kept = {name: [each for each in self._records(name) if each[1]["epoch"] <= last] for name in (METRICS, UPDATES)}
        epochs = [record["epoch"] for _, record in kept[METRICS]]
        if epochs != list(range(1, last + 1)):
            raise StateError(
                f"{self.path / METRICS}: expected a line for each of the {last} epochs before the checkpoint, it has "
                f"those of {epochs}; use an earlier copy of the folder"
            )
        for name, records in kept.items():
            if clean and (self.path / name).exists():
                write_text(self.path / name, "".join(line for line, _ in records))
        return state

    def metrics(self) -> list[dict[str, Any]]:
        """What `record` was given so far, an epoch an entry.

        Raises:
            StateError: A line is damaged.
        """
        return [record for _, record in self._records(METRICS)]

    def _records(self, name: str) -> list[tuple[str, dict[str, Any]]]:
        """Each whole line of a file of lines, and its values; a last line without end was cut off and is left out."""
        path = self.path / name
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        records = []
        for number, line in enumerate((each for each in lines if each.endswith(b"\n")), start=1):
            try:
                text = line.decode()
                record = json.loads(text)
                if not isinstance(record, dict) or not _NEEDED[name] <= record.keys():
                    raise ValueError(f"expected a mapping with {' and '.join(sorted(_NEEDED[name]))}")
                if not isinstance(record["epoch"], int):
                    raise ValueError(f"epoch is {record['epoch']!r}")
            except (ValueError, RecursionError) as error:
                raise StateError(
                    f"{path}:{number}: not a line that a run wrote ({reason(error)}); use an earlier copy of the folder"
                ) from None
            records.append((text, record))
        return records

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the result, which marks the run as complete."""
        write_text(self.path / SUMMARY, json.dumps(summary, indent=1) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """The result, or None where the run is not complete.

        Raises:
            StateError: The file is damaged.
        """
        path = self.path / SUMMARY
        if not path.exists():
            return None
        try:
            saved = json.loads(path.read_bytes())
            if not isinstance(saved, dict):
                raise ValueError("expected a mapping")
        except (ValueError, RecursionError) as error:
            raise self.damaged_summary(reason(error)) from None
        return saved

    def damaged_summary(self, why: str) -> StateError:
        """The error about a result that cannot be used."""
        return StateError(
            f"{self.path / SUMMARY}: not the result of a run ({why}); remove it and continue the run, which makes it "
            "again from the checkpoint"
        )


@contextlib.contextmanager
def claimed(recipe: Recipe, parent: str | Path = "runs") -> Iterator[Path]:
    """Make the first of `parent/<recipe>-1`, `-2` … that does not exist yet; remove it if it is left empty.

    Raises:
        ConfigurationError: It cannot be made.
    """
    for n in itertools.count(1):
        path = Path(parent) / f"{recipe.name}-{n}"
        try:
            path.mkdir(parents=True)
        except OSError as error:
            if path.exists():  # another run may have made it just now
                continue
            raise ConfigurationError(f"{path}: {error.strerror}; give a folder that can be made with --out") from None
        break
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):  # there is something in it
            path.rmdir()
            path.parent.rmdir()


def check_free(path: str | Path) -> None:
    """Raise a ConfigurationError where a run folder cannot be made at `path` because something is there."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigurationError(
            f"{path}: there is something here already; give another folder, or continue a run with --resume"
        )


def recipe_of(path: str | Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        ConfigurationError: This is not a run folder, or its recipe was made invalid.
    """
    file = Path(path) / RECIPE
    if not file.is_file():
        raise ConfigurationError(f"{path}: has no {RECIPE}; give a run folder, as `gossamer train` makes them")
    return load_recipe(file)


def _recipe_text(path: Path) -> str | None:
    file = path / RECIPE
    return file.read_text(encoding="utf-8") if file.is_file() else None
