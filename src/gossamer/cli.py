"""The commands. Exit status: 0 done, 1 training failed, 2 bad input and nothing written, 3 interrupted."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import torch.distributed as dist
import typer
from accelerate import PartialState
from rich.table import Table

from gossamer import convert
from gossamer.console import print_results, stdout_console
from gossamer.errors import ConfigurationError, DataError, GossamerError, NonFiniteError
from gossamer.inspection import inspect as inspection_of
from gossamer.recipe import Recipe, load_recipe, parse_recipe, shipped
from gossamer.run_folder import RECIPE, claimed, recipe_of
from gossamer.training import Result, train_seeds

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 3

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse PyTorch networks, from a recipe.",
)


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without "±" must not cost the end of a run
    try:
        app(prog_name="gossamer")
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # its threads may not outlive the interpreter


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A YAML file, or a name that `gossamer recipes` lists.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes: optimizer.lr=0.05, methods.0.sparsity=0.98 ..."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds to train with: 0,1,2; or how many: 3.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder to make, instead of runs/RECIPE-N.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Continue this run folder instead.")] = None,
    fallback: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="What to train instead where the data cannot be had.")
    ] = None,
) -> None:
    """Train as a recipe says: a run folder, and a table of sparsity and test accuracy."""
    with _clear_errors():
        if resume is not None:
            if recipe or overrides or seeds or out or fallback:
                raise ConfigurationError("--resume: goes alone, a run continues as it began")
            results, folder = _run(recipe_of(resume), resume, resume=True)
        elif not recipe:
            raise ConfigurationError("no recipe given; `gossamer recipes` lists those that come with gossamer")
        else:
            try:
                results, folder = _run(_with_seeds(load_recipe(recipe, overrides or []), seeds), out)
            except DataError as error:
                if fallback is None:
                    raise
                changes = ", without the changes given" if overrides else ""
                typer.echo(f"{error}\nTraining {fallback!r} instead{changes}.", err=True)
                results, folder = _run(_with_seeds(load_recipe(fallback), seeds), out)
        if PartialState().is_main_process:
            print_results(stdout_console(), results)
            typer.echo(f"run folder: {folder}")
        PartialState().wait_for_everyone()


@app.command()
def recipes() -> None:
    """List the recipes that come with gossamer."""
    with _clear_errors():
        table = Table(show_header=False, box=None)
        for name, text in shipped().items():
            table.add_row(name, parse_recipe(f"{name}.yaml", text).description)
        stdout_console().print(table)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A file that gs.save wrote, or another safetensors file.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Read a whole file of tensors, check it, and show how each is written and what that saves."""
    with _clear_errors():
        inspection = inspection_of(file)
        if as_json:
            typer.echo(json.dumps(inspection.as_dict(), indent=2))
        else:
            stdout_console().print(inspection.table())


@app.command()
def compress(
    source: Annotated[Path, typer.Argument(help="A safetensors file, a state dict of torch, or a folder of models.")],
    destination: Annotated[Path, typer.Argument(help="The file or folder to make.")],
) -> None:
    """Make a file of tensors, or those in a folder of Transformers, small where there are zeros."""
    _convert(convert.compress, source, destination)


@app.command()
def expand(
    source: Annotated[Path, typer.Argument(help="What compress, or gs.save, wrote.")],
    destination: Annotated[Path, typer.Argument(help="The file or folder to make.")],
) -> None:
    """Undo compress: plain safetensors, bit for bit, which any library reads."""
    _convert(convert.expand, source, destination)


def _convert(change: Callable[[Path, Path], None], source: Path, destination: Path) -> None:
    with _clear_errors():
        change(source, destination)
        before, after = _bytes(source), _bytes(destination)
        typer.echo(f"{destination}: {after:,} bytes, {after / max(1, before):.4f} of {source}")


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(each.stat().st_size for each in files if each.is_file())


def _run(recipe: Recipe, out: Path | None, resume: bool = False) -> tuple[list[Result], Path]:
    # Of several processes only the first writes; the others need no folder. Accelerate knows which only in the run.
    first = os.environ.get("RANK", "0") == "0"
    claim = claimed(recipe) if out is None and first else nullcontext(out or Path("runs"))
    with claim as folder:
        return _run_in(recipe, folder, resume), folder


def _run_in(recipe: Recipe, folder: Path, resume: bool) -> list[Result]:
    try:
        return train_seeds(recipe, folder, resume=resume)
    except KeyboardInterrupt:
        if (folder / RECIPE).is_file():
            typer.echo(f"interrupted; to continue: gossamer train --resume {folder}", err=True)
        else:
            typer.echo("interrupted before training began; nothing was written", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _with_seeds(recipe: Recipe, seeds: str | None) -> Recipe:
    if seeds is None:
        return recipe
    if not re.fullmatch(r"[1-9]\d{0,3}|\d{1,19}(,\d{1,19})+", seeds):
        raise ConfigurationError(f"--seeds: got {seeds!r}; allowed are seeds such as 0,1,2, or how many, such as 3")
    numbers = [int(part) for part in seeds.split(",")]
    return recipe.with_seeds(numbers if "," in seeds else range(numbers[0]))


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn gossamer's errors, and those of the file system, into one line and an exit status."""
    try:
        yield
    except (GossamerError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(FAILED if isinstance(error, NonFiniteError | OSError) else BAD_INPUT) from None
