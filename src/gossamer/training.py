"""Training from a recipe, once or for several seeds, into run folders that can be continued."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.checkpoint import write_text
from gossamer.console import display, stdout_console
from gossamer.errors import StateError, reason
from gossamer.loop import Run
from gossamer.recipe import Recipe
from gossamer.run_folder import CHECKPOINT, SUMMARY, RunFolder
from gossamer.summary import Summary


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        seed: Its seed.
        epochs: Epochs trained.
        steps: Optimizer steps taken.
        seconds: Time spent in epochs, evaluation on validation data included.
        validation_accuracy: Fraction in [0, 1] of the finished model, with exact zeros; None without validation data.
        test_accuracy: Fraction in [0, 1], likewise; None where it was not asked for.
        test_loss: Mean cross-entropy, in nats; None likewise.
        summary: The sparsity of every tensor and in all.
        history: The metrics of every epoch, as in `metrics.jsonl`.
        model: The trained model, plain, with exact zeros, on its device; None where the run was complete before.
        validation_bits_per_character: Mean cross-entropy of text in bits; None for images, or without validation data.
        test_bits_per_character: Likewise on the test data; None for images, or where it was not asked for.
        soft_validation_accuracy: That before what is smooth in training became hard, such as thresholds; None where
            nothing was smooth in the end.
        soft_test_accuracy: Likewise.
        activations: Totals of `gossamer.measure_activations` on the test images, of the finished model, where a method
            makes activations sparse; None elsewhere, where no test was asked for, and for several processes.
    """

    seed: int
    epochs: int
    steps: int
    seconds: float
    validation_accuracy: float | None
    test_accuracy: float | None
    test_loss: float | None
    summary: Summary
    history: list[dict[str, Any]] = field(repr=False)
    model: nn.Module | None = field(default=None, repr=False, compare=False)
    validation_bits_per_character: float | None = None
    test_bits_per_character: float | None = None
    soft_validation_accuracy: float | None = None
    soft_test_accuracy: float | None = None
    activations: dict[str, Any] | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the masked weights."""
        return self.summary.totals["targets_sparsity"]

    def as_dict(self) -> dict[str, Any]:
        """All but history and model, as JSON values."""
        own = {name: value for name, value in vars(self).items() if name not in ("history", "model", "summary")}
        return own | {"summary": self.summary.as_dict()}


def train(
    recipe: Recipe,
    out: str | Path | None = None,
    seed: int | None = None,
    *,
    progress: bool = True,
    resume: bool = False,
    test: bool = True,
) -> Result:
    """Train once, as a recipe says.

    Initial weights, masks, order of data, augmentation and dropout follow from the seed alone; the caller's random
    state and number of threads are left as they were.

    Args:
        recipe: From `gossamer.recipe.load_recipe`.
        out: The run folder to make, or to continue, see `gossamer.run_folder`; None to write nothing.
        seed: The run's seed; None for the recipe's first.
        progress: Whether to show how it goes, on standard output.
        resume: Whether to continue the run in `out` after its last finished epoch, to the same bits as without the
            interruption. A complete run is not trained again; one without a checkpoint begins anew.
        test: Whether to evaluate on the test data at the end. They are used for nothing else.

    Returns:
        The result.

    Raises:
        ConfigurationError: Something in the recipe cannot work; nothing has been written.
        DataError: The data cannot be had, and nothing has been written; or an image cannot be decoded, and the run
            folder is as after the last epoch.
        StateError: A file of the run folder is damaged, or the checkpoint does not match the recipe.
        NonFiniteError: The loss became infinite or NaN; the run folder is as after the last good epoch.
    """
    seed = recipe.seeds[0] if seed is None else seed
    folder = None if out is None else RunFolder(out, recipe, seed)
    resume = resume and folder is not None and folder.path.exists()
    if folder is not None and resume and (saved := folder.summary()) is not None:
        try:
            return Result(**(saved | {"summary": Summary(**saved["summary"])}), history=folder.metrics())
        except (KeyError, TypeError) as error:
            raise folder.damaged_summary(reason(error)) from None
    with _surroundings(recipe), contextlib.ExitStack() as stack:
        run = Run(recipe.with_seeds([seed]), seed)
        history: list[dict[str, Any]] = []
        writes = folder is not None and run.accelerator.is_main_process
        if folder is not None and resume:
            if writes:
                stack.enter_context(folder.locked())
            with run.accelerator.main_process_first():
                state = folder.restore(clean=writes)
            if state is not None:
                try:
                    run.load_state_dict(state)
                except StateError:
                    raise
                except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                    where = folder.path / CHECKPOINT
                    raise StateError(f"{where}: not the checkpoint of this run ({reason(error)})") from error
            history = folder.metrics()
        elif folder is not None and writes:
            folder.create()
            stack.enter_context(folder.locked())
        console = stdout_console() if progress and run.accelerator.is_main_process else None
        if console is not None and seed == recipe.seeds[0]:
            console.print(*run.describe(), sep="\n", highlight=False, soft_wrap=True)
        label = f"seed {seed}  " if len(recipe.seeds) > 1 else ""
        with display(console, label, recipe.epochs, run.steps_per_epoch * recipe.epochs, run.sparsity.step) as shown:
            while run.epoch < recipe.epochs:
                history.append(run.run_epoch(shown))
                if folder is not None and writes:
                    folder.record(history[-1], run.updates, run.state_dict())
                shown.epoch(history[-1])
        parts = ("validation", "test") if test else ("validation",)
        trained, hardens = history[-1] | run.measure(*parts[1:]), run.hardens
        run.finalize()
        finished = run.measure(*parts) if hardens else trained
        result = Result(
            seed=seed,
            epochs=run.epoch,
            steps=run.sparsity.step,
            seconds=sum(each["seconds"] for each in history),
            validation_accuracy=finished.get("validation_accuracy"),
            test_accuracy=finished.get("test_accuracy"),
            test_loss=finished.get("test_loss"),
            summary=run.sparsity.summary(),
            history=history,
            model=run.model,
            validation_bits_per_character=finished.get("validation_bits_per_character"),
            test_bits_per_character=finished.get("test_bits_per_character"),
            soft_validation_accuracy=trained.get("validation_accuracy") if hardens else None,
            soft_test_accuracy=trained.get("test_accuracy") if hardens else None,
            activations=run.measure_activations() if test else None,
        )
        run.release()
        if folder is not None and writes:
            folder.finish(result.as_dict())
    return result


def train_seeds(recipe: Recipe, out: str | Path, *, progress: bool = True, resume: bool = False) -> list[Result]:
    """Train once for every seed of a recipe; arguments and errors as for `train`.

    With several seeds, `out` gets a folder for each and a `summary.json` with means and standard errors.
    """
    results = [train(recipe, out, seed, progress=progress, resume=resume) for seed in recipe.seeds]
    if len(results) > 1:
        measures: dict[str, Any] = {}
        for name in (
            "test_accuracy",
            "test_bits_per_character",
            "validation_accuracy",
            "validation_bits_per_character",
            "sparsity",
        ):
            values = [value for result in results if (value := getattr(result, name)) is not None]
            if values:
                error = statistics.stdev(values) / math.sqrt(len(values))
                measures[name] = {"mean": statistics.fmean(values), "standard_error": error}
        summary = {"seeds": recipe.seeds, **measures}
        write_text(Path(out) / SUMMARY, json.dumps(summary, indent=1) + "\n")
    return results


@contextlib.contextmanager
def _surroundings(recipe: Recipe) -> Iterator[None]:
    """Set threads and determinism as the recipe says, and put them and the random state back at the end."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with torch.random.fork_rng(devices=devices):
        try:
            torch.set_num_threads(recipe.threads or threads)
            torch.use_deterministic_algorithms(deterministic or recipe.deterministic)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)
