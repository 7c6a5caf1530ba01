"""The folder of a run: its recipe, what was measured, and the state it can go on from.

- `recipe.yaml`: the resolved recipe, with this run's seed
- `metrics.jsonl`: one line an epoch
- `updates.jsonl`: one line a mask update
- `checkpoint.safetensors`: everything at the end of the last epoch
- `summary.json`: the result; its presence means that the run is complete
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.checkpoint import load_tree, save_tree, write_text
from gossamer.errors import ConfigurationError
from gossamer.recipe import Recipe, load_recipe

RECIPE, METRICS, UPDATES, CHECKPOINT, SUMMARY = (
    "recipe.yaml",
    "metrics.jsonl",
    "updates.jsonl",
    "checkpoint.safetensors",
    "summary.json",
)


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
            ConfigurationError: There is something in its place.
        """
        check_free(self.path)
        if self.path != self._root and _recipe_text(self._root) != self._recipe.to_yaml():
            check_free(self._root)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self._root / RECIPE, self._recipe.to_yaml())
        write_text(self.path / RECIPE, self._recipe.with_seeds([self._seed]).to_yaml())

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

    def restore(self) -> Any:
        """The state of the last checkpoint, or None where there is none; lines of later epochs are removed.

        Raises:
            StateError: The checkpoint is damaged.
        """
        state = load_tree(self.path / CHECKPOINT) if (self.path / CHECKPOINT).exists() else None
        last = 0 if state is None else state["epoch"]
        for name in (METRICS, UPDATES):
            if (self.path / name).exists():
                lines = (self.path / name).read_text(encoding="utf-8").splitlines(keepends=True)
                whole = (line for line in lines if line.endswith("\n"))
                write_text(self.path / name, "".join(line for line in whole if json.loads(line)["epoch"] <= last))
        return state

    def metrics(self) -> list[dict[str, Any]]:
        """What `record` was given so far, an epoch an entry."""
        path = self.path / METRICS
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the result, which marks the run as complete."""
        write_text(self.path / SUMMARY, json.dumps(summary, indent=1) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """The result, or None where the run is not complete."""
        path = self.path / SUMMARY
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def next_free(recipe: Recipe, parent: str | Path = "runs") -> Path:
    """The first of `parent/<recipe>-1`, `-2` … that does not exist yet; it is not made."""
    names = (Path(parent) / f"{recipe.name}-{n}" for n in itertools.count(1))
    return next(path for path in names if not path.exists())


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
