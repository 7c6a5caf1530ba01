"""Recipes: what `gossamer train` reads, checked down to the arguments of methods and optimizers."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator
from torch import nn, optim

from gossamer.activations import METHODS as ACTIVATION_METHODS
from gossamer.checks import MAX_SEED, closest
from gossamer.data import IMAGE_FOLDER
from gossamer.errors import ConfigurationError
from gossamer.learning_rate import ConstantSchedule, ScheduleRecipe
from gossamer.method import Method
from gossamer.optimizers import REFUSED
from gossamer.schedule import EpochPeriods
from gossamer.section import Named, Section, describe, key_in, refuse, refuse_other_kind, refuse_unknown
from gossamer.source import Source, dump
from gossamer.weights import METHODS as WEIGHT_METHODS

OPTIMIZERS: dict[str, type[optim.Optimizer]] = {
    name: value
    for name, value in vars(optim).items()
    if inspect.isclass(value) and issubclass(value, optim.Optimizer) and value not in (optim.Optimizer, *REFUSED)
}
"""Every `torch.optim` class that masks work with, by name."""

METHODS: dict[str, type[Method]] = WEIGHT_METHODS | ACTIVATION_METHODS
"""Every method by the name it has in recipes and saved states."""

CAPTURED = ("capturable", "differentiable")
"""Arguments of optimizers that are for CUDA graphs and for gradients through a step, which a run has no use for."""

_MANY = 10**9  # optimizer steps of a run of unknown length

_Count = Annotated[int, Field(ge=1, le=_MANY)]
_CountOrZero = Annotated[int, Field(ge=0, le=_MANY)]

_STEP_TEXT = re.compile(r"\s*(\d+\.?\d*)\s*(%|epochs?)\s*")


class AugmentRecipe(Section):
    """Random changes of training images; see `gossamer.data.Augment`."""

    crop: _CountOrZero = 0
    padding: Literal["reflect", "zero"] = "reflect"
    flip: bool = False


class DataRecipe(Section):
    """The data set and its batches: images an optimizer step sees are `batch_size` × `accumulate`.

    `validation` is the number of training images held out, the same ones for every seed; `None` for the data set's
    default. Of the rest `train` are trained on; `None` for all. Of text, `batch_size` is the number of parallel
    streams, `length` that of characters of each in a batch, and `validation` counts characters too; see
    `gossamer.data.StreamLoader`. `root`, `test`, `exclude`, `image_size` and `workers` are for a folder of images; see
    `gossamer.data.load_image_folder`.
    """

    name: str
    batch_size: _Count = 128
    validation: _CountOrZero | None = None
    train: _Count | None = None
    length: _Count | None = None
    augment: AugmentRecipe | None = None
    root: str | None = None
    test: _Count | None = None
    exclude: list[str] | None = None
    image_size: _Count | None = None
    workers: _CountOrZero | None = None

    @field_validator("root", mode="after")
    @classmethod
    def _from_anywhere(cls, root: str | None) -> str | None:
        """A run may be continued from another folder."""
        return None if root is None else os.path.abspath(os.path.expanduser(root))

    @model_validator(mode="after")
    def _fits_the_kind_of_data(self) -> DataRecipe:
        for key in ("root", "test", "exclude", "image_size", "workers"):
            if self.name != IMAGE_FOLDER and getattr(self, key) is not None:
                refuse(key, f"is for {IMAGE_FOLDER}, a folder of images, and not for {self.name!r}; leave it out")
        if self.name == IMAGE_FOLDER and self.train is not None:
            refuse(
                "train", f"is not for {IMAGE_FOLDER}; give a folder with fewer images, or hold out more with validation"
            )
        return self


class ModelRecipe(Named):
    """A network: a name and the arguments that `gossamer.zoo.build` takes for it."""

    name: str


class OptimizerRecipe(Named):
    """A class of `torch.optim` and its arguments."""

    name: str

    @model_validator(mode="after")
    def _check(self) -> OptimizerRecipe:
        if self.name not in OPTIMIZERS:
            refused = {cls.__name__: why for cls, why in REFUSED.items()}
            reason = f" ({refused[self.name]})" if self.name in refused else closest(self.name, OPTIMIZERS)
            refuse("name", f"no optimizer {self.name!r}{reason}; allowed are {', '.join(sorted(OPTIMIZERS))}")
        known = inspect.signature(OPTIMIZERS[self.name]).parameters
        refuse_unknown(self.arguments, [key for key in known if key not in ("params", *CAPTURED)])
        for key, value in self.arguments.items():
            refuse_other_kind(key, value, known[key].default)
            if isinstance(value, int | float) and abs(value) > torch.finfo(torch.float32).max:
                refuse(key, f"expected a number that weights can be multiplied by, got {value!r:.40}")
            if key in ("foreach", "fused") and not isinstance(value, bool | None):
                refuse(key, f"expected true, false or null, got {value!r}")
        weight = nn.Parameter(torch.zeros(1, 1))
        weight.grad = torch.ones(1, 1)
        try:
            self.build([weight]).step()  # some arguments are only looked at by a step
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).replace("learning rate", "lr")
            refuse(key_in(reason, self.arguments), f"{self.name}: {reason}")
        return self

    def build(self, parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
        """Make the optimizer; its own errors come as they are."""
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.arguments.items()}
        return OPTIMIZERS[self.name](parameters, **arguments)


class MethodRecipe(Named):
    """A method and its arguments; the values named in its `steps` may be "75%" or "30 epochs" instead of steps."""

    type: str

    @model_validator(mode="after")
    def _check(self) -> MethodRecipe:
        if self.type not in METHODS:
            refuse("type", f"no method {self.type!r}{closest(self.type, METHODS)}; allowed are {', '.join(METHODS)}")
        parameters, counts = inspect.signature(METHODS[self.type]).parameters, METHODS[self.type].steps
        refuse_unknown(self.arguments, parameters)
        for name, parameter in parameters.items():
            if parameter.default is inspect.Parameter.empty and name not in self.arguments:
                refuse(None, f"{self.type} needs {name!r}; add it")
        try:
            self.build(_MANY, _MANY // 1000, 0)
        except (ConfigurationError, TypeError, ValueError) as error:
            key = key_in(str(error), [*self.arguments, *counts])
            if key not in counts:  # those can be judged when the length of the run is known
                refuse(key, str(error))
        return self

    def build(self, steps: int, steps_per_epoch: int, seed: int) -> Method:
        """Make the method for a run of so many optimizer steps; `seed` is its seed unless the recipe gives one.

        Raises:
            ConfigurationError: An argument out of range, as the method says it.
        """
        arguments = dict(self.arguments)
        if "seed" in inspect.signature(METHODS[self.type]).parameters:
            arguments.setdefault("seed", seed)
        for name in METHODS[self.type].steps:
            if name in arguments:
                arguments[name] = _resolve(name, arguments[name], steps, steps_per_epoch)
        return METHODS[self.type](**arguments)


class Recipe(Section):
    """A training run: data, network, optimizer, schedule, methods and how to run them.

    With `label_smoothing` ε the target that is trained towards has 1 - ε + ε/K for the right one of K classes and ε/K
    for the others (Szegedy et al., 2016); validation and test losses are without.
    """

    description: str = ""
    data: DataRecipe
    model: ModelRecipe
    optimizer: OptimizerRecipe
    schedule: ScheduleRecipe = Field(default_factory=ConstantSchedule)
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    epochs: _Count
    methods: list[MethodRecipe] = Field(default_factory=list)
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] = Field(default_factory=lambda: [0], min_length=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulate: _Count = 1
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None

    _source: Source | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _distinct_seeds(self) -> Recipe:
        if len(set(self.seeds)) < len(self.seeds):
            refuse("seeds", f"a seed is given twice in {self.seeds}; give each once")
        return self

    @property
    def name(self) -> str:
        """The name of the file it was read from, without ending; `"run"` for one made in Python."""
        return Path(self._source.name).stem if self._source else "run"

    def with_seeds(self, seeds: Sequence[int]) -> Recipe:
        """The same recipe with other seeds.

        Raises:
            ConfigurationError: No seed, one below 0 or above 2⁶³ - 1, or one given twice.
        """
        if not seeds or min(seeds) < 0 or max(seeds) > MAX_SEED or len(set(seeds)) < len(seeds):
            raise ConfigurationError(
                f"seeds: expected different integers of at least 0 and at most {MAX_SEED}, got {list(seeds)}"
            )
        return self.model_copy(update={"seeds": list(seeds)})

    def error(self, path: Sequence[str | int], message: object) -> ConfigurationError:
        """An error about the value at `path`, saying where it was written."""
        return ConfigurationError(_locate(self._source, path, str(message)))

    def build_methods(self, steps: int, steps_per_epoch: int, seed: int) -> list[Method]:
        """Make the methods; see `MethodRecipe.build`. Errors say where the argument was written."""
        methods = []
        for i, method in enumerate(self.methods):
            try:
                methods.append(method.build(steps, steps_per_epoch, seed))
            except (ConfigurationError, TypeError, ValueError) as error:
                raise self.method_error(i, error) from None
        return methods

    def method_error(self, index: int, error: Exception) -> ConfigurationError:
        """An error about the method at `index`, placed at the argument that it names first."""
        key = key_in(str(error), self.methods[index].arguments)
        return self.error(("methods", index) if key is None else ("methods", index, key), error)

    def model_error(self, error: object) -> ConfigurationError:
        """An error about the network, placed at the argument that it names first, or at the name."""
        return self.error(("model", key_in(str(error), self.model.arguments) or "name"), error)

    def to_yaml(self) -> str:
        """The recipe with every value that counts, overrides and defaults included; reads back as the same recipe."""
        return dump(self.model_dump())


def shipped() -> dict[str, str]:
    """The text of each recipe that comes with gossamer, by name."""
    files = resources.files("gossamer").joinpath("recipes").iterdir()
    found = {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found)}


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        recipe: Path of a YAML file, or the name of a shipped recipe such as "digits".
        overrides: `key=value` each, such as `optimizer.lr=0.05` or `methods.0.sparsity=0.98`.

    Returns:
        The recipe; its errors from here on say the line in the file.

    Raises:
        ConfigurationError: No such recipe, or something in it that cannot work; one line that says the file, the line,
            the key, the value and what is allowed.
    """
    path = Path(recipe)
    known = shipped()
    if str(recipe) in known and not path.is_file():
        return parse_recipe(f"{recipe}.yaml", known[str(recipe)], overrides)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(
            f"{recipe}: no such file, and no shipped recipe has this name{closest(str(recipe), known)}; shipped are "
            f"{', '.join(known)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{recipe}: cannot be read as a text file: {error}") from None
    return parse_recipe(str(path), text, overrides)


def parse_recipe(name: str, text: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe's text, called `name` in messages; otherwise as `load_recipe`."""
    source = Source(name, text, overrides)
    try:
        recipe = Recipe.model_validate(source.data)
    except ValidationError as error:
        raise ConfigurationError(_locate(source, *describe(error, source.data))) from None
    recipe._source = source
    return recipe


def _locate(source: Source | None, path: Sequence[str | int], message: str) -> str:
    keys = ".".join(map(str, path))
    if path:
        message = f"{keys}: {message.removeprefix(f'{path[-1]}: ')}"
    message = " ".join(message.split())
    return f"{source.place(path)}: {message}" if source else message


def _resolve(name: str, value: Any, steps: int, steps_per_epoch: int) -> Any:
    """A count of optimizer steps, or a schedule, from the forms a recipe may give it in."""
    if isinstance(value, str):
        match = _STEP_TEXT.fullmatch(value)
        if match is None or (match[2] == "%" and float(match[1]) > 100):
            raise ConfigurationError(
                f"{name}: got {value!r}; allowed are a number of optimizer steps, a percentage of the run such as "
                "'75%', or epochs such as '30 epochs'"
            )
        return round(float(match[1]) * (steps / 100 if match[2] == "%" else steps_per_epoch))
    if isinstance(value, dict):
        if name != "every" or "periods" not in value or not isinstance(value["periods"], dict):
            raise ConfigurationError(
                f"{name}: got {value!r}; a mapping is for `every: {{periods: {{0: 100}}, until: 190}}`"
            )
        if unknown := sorted(set(value) - {"periods", "until"}):
            raise ConfigurationError(f"every: unknown key {unknown[0]!r}; allowed are periods, until")
        try:
            return EpochPeriods(**value, steps_per_epoch=steps_per_epoch)
        except ConfigurationError as error:
            raise ConfigurationError(f"every: {error}") from None
    if isinstance(value, list):
        return [_resolve(name, each, steps, steps_per_epoch) for each in value]
    return value
