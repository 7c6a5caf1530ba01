"""The training loop, on Hugging Face Accelerate, with masks kept by `gossamer.attach`."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gossamer import data, zoo
from gossamer.activations import METHODS as ACTIVATION_METHODS
from gossamer.activations import measure_activations
from gossamer.attach import Sparsity, attach
from gossamer.console import Display
from gossamer.errors import ConfigurationError, DataError, NonFiniteError, StateError, reason
from gossamer.method import MaskUpdate, Method
from gossamer.recipe import Recipe
from gossamer.section import key_in

_Dataset = data.Dataset | data.FolderDataset
_Split = data.Split | data.FolderSplit | data.TextSplit


logger = logging.getLogger(__name__)


class Run:
    """What a run trains with. Making it refuses everything that cannot work, before anything is written."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self.seed = seed
        self.epoch = 0
        self.updates: list[dict[str, Any]] = []
        self.accelerator = _accelerator(recipe)
        dataset = self._load_data()
        parts = {"train": dataset.train, "validate": dataset.validation, "test": dataset.test}
        self.samples = {part: len(split) for part, split in parts.items() if split is not None}
        self.text = isinstance(dataset.train, data.TextSplit)
        self.batches = self._batches(dataset.train, shuffle=True)
        self.validation = None if dataset.validation is None else self._batches(dataset.validation)
        self.test = self._batches(dataset.test)
        self.steps_per_epoch = math.ceil(len(self.batches) / recipe.accumulate)
        methods = recipe.build_methods(self.steps_per_epoch * recipe.epochs, self.steps_per_epoch, seed)

        if self.text and recipe.channels_last:
            raise recipe.error(("channels_last",), "got true, but it is for images; leave it out")

        torch.manual_seed(seed)
        self.model = self._build_model(dataset)
        self.sparsity = self._attach(methods)
        self._check_length()
        self.sparsity.on_update(self._note_update)
        self.forward: nn.Module = self.accelerator.prepare(self.model)
        if recipe.compile:
            self.forward = torch.compile(self.forward)  # type: ignore[assignment]
        # The optimizer stays unwrapped: Accelerate's wrapper serves loss scaling and XLA, which are not used here,
        # and costs as much as a tenth of a small network's step.
        try:
            self.optimizer = recipe.optimizer.build(self.model.parameters())
        except (TypeError, ValueError) as error:
            raise recipe.error(("optimizer",), f"{recipe.optimizer.name}: {error}") from None
        self.sparsity.follow(self.optimizer)
        units = self.steps_per_epoch if recipe.schedule.per == "step" else 1
        self.scheduler = LambdaLR(self.optimizer, lambda count: recipe.schedule.factor(count, units, recipe.epochs))

    @property
    def hardens(self) -> bool:
        """Whether `finalize` would change outputs now."""
        return any(method.hardens for method in self.sparsity.methods)

    def _check_length(self) -> None:
        """Refuse methods that need a longer run; warn of those whose first update would come after its last step."""
        steps = self.steps_per_epoch * self.recipe.epochs
        for i, method in enumerate(self.sparsity.methods):
            try:
                method.check_run(steps)
            except ConfigurationError as error:
                raise self.recipe.method_error(i, error) from None
            periodic = type(method).due is not Method.due and not method.learns
            if periodic and not any(method.due(step) for step in range(1, steps + 1)):
                what = f"{method.name} never updates its masks in this run of {steps} steps; give a shorter period"
                logger.warning("%s", self.recipe.error(("methods", i), what))

    def describe(self) -> list[str]:
        """What is trained, on what and how sparse, a line each, for people."""
        samples = ", ".join(f"{count:,} to {part}" for part, count in self.samples.items())
        totals = self.sparsity.summary().totals
        sparse = "none, every weight is trained"
        if methods := " and ".join(method.name for method in self.sparsity.methods):
            sparse = methods
        if totals["targets_total"]:
            sparse = (
                f"{methods}, starts with {totals['targets_active']:,} of {totals['targets_total']:,} weights active"
            )
        return [
            f"data     {self.recipe.data.name}, {'characters' if self.text else 'images'}: {samples}",
            f"network  {self.recipe.model.name}, {totals['all_total']:,} parameters",
            f"method   {sparse}",
        ]

    def run_epoch(self, shown: Display) -> dict[str, Any]:
        """Train and validate for one epoch; return its metrics."""
        start = time.perf_counter()
        self.updates = []
        lr = self.optimizer.param_groups[0]["lr"]
        trained = self._train_epoch(shown)
        if not math.isfinite(trained["loss"]):
            raise NonFiniteError(
                f"epoch {self.epoch + 1}: the training loss is {trained['loss']}, the run diverged; lower optimizer.lr "
                f"(it was {lr:g}) or set clip_grad_norm"
            )
        if self.recipe.schedule.per == "epoch":
            self.scheduler.step()
        self.epoch += 1
        metrics = {"epoch": self.epoch, "step": self.sparsity.step} | _named("train", trained)
        soft, hard = self.measure("validation"), {}
        if self.hardens:
            with self.sparsity.hardened():
                hard = {f"hard_{name}": value for name, value in self.measure("validation").items()}
            if self.validation is not None and not self.text:
                hard["validation_gap"] = soft["validation_accuracy"] - hard["hard_validation_accuracy"]
        methods = {f"{m.name}.{name}": value for m in self.sparsity.methods for name, value in m.metrics().items()}
        return (
            metrics
            | soft
            | hard
            | methods
            | {
                "sparsity": 1 - self.sparsity.density(),
                "lr": lr,
                "seconds": time.perf_counter() - start,
            }
        )

    def _train_epoch(self, shown: Display) -> dict[str, float]:
        accumulate, per_step = self.recipe.accumulate, self.recipe.schedule.per == "step"
        sums, state = torch.zeros(3, device=self.accelerator.device), None
        self.forward.train()
        for i, (inputs, labels) in enumerate(self.batches):
            first = i - i % accumulate
            window = min(accumulate, len(self.batches) - first)
            last = i == first + window - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.forward):
                logits, state = self._predict(inputs, state)
                loss = F.cross_entropy(logits, labels.flatten(), label_smoothing=self.recipe.label_smoothing)
                self.accelerator.backward((loss + self.sparsity.penalty()) / window)
            with torch.no_grad():
                plain = F.cross_entropy(logits, labels.flatten()) if self.recipe.label_smoothing else loss.detach()
            _add(sums, plain * labels.numel(), logits, labels)
            if last:
                if self.recipe.clip_grad_norm is not None:
                    self.sparsity.clip_grad_norm_(self.recipe.clip_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if per_step:
                    self.scheduler.step()
            if shown.due():
                measures = _named("train", self._means(sums)) | {"sparsity": 1 - self.sparsity.density()}
                shown.step(self.sparsity.step, self.epoch + 1, measures)
        return self._means(self.accelerator.reduce(sums, "sum"))

    @torch.no_grad()
    def evaluate(self, batches: data.Batches) -> dict[str, float]:
        """Mean cross-entropy ("loss") and accuracy over all of the batches, of text also bits per character."""
        sums, state = torch.zeros(3, device=self.accelerator.device), None
        self.forward.eval()
        for inputs, labels in batches:
            logits, state = self._predict(inputs, state)
            _add(sums, F.cross_entropy(logits, labels.flatten(), reduction="sum"), logits, labels)
        return self._means(self.accelerator.reduce(sums, "sum"))

    def measure(self, *parts: str) -> dict[str, Any]:
        """What `evaluate` tells of the parts `"validation"`, where there is one, and `"test"`, as in metrics."""
        loaders = {"validation": self.validation, "test": self.test}
        found: dict[str, Any] = {}
        for part in parts:
            if (loader := loaders[part]) is not None:
                found |= _named(part, self.evaluate(loader))
        return found

    def measure_activations(self) -> dict[str, Any] | None:
        """Totals of `gossamer.measure_activations` on the test images, where a method makes activations sparse.

        None for text, and for several processes.
        """
        makes_sparse = any(method.name in ACTIVATION_METHODS for method in self.sparsity.methods)
        if not makes_sparse or self.text or self.accelerator.num_processes > 1:
            return None
        found = measure_activations(self.model, self.test, forward=lambda _, batch: self._predict(batch[0], None))
        return found.totals

    def finalize(self) -> None:
        """Make the model plain: no hooks, exact zeros."""
        self.sparsity.finalize()

    def release(self) -> None:
        """Take off what Accelerate put around the model."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next epoch depends on."""
        device = self.accelerator.device
        return {
            "recipe": self.recipe.model_dump(),
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sparsity": self.sparsity.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "batches": self.batches.state_dict(),
            "evaluated_on": self._evaluated_on(),
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def _evaluated_on(self) -> dict[str, Any]:
        """What validation and test data are, so that others are noticed."""
        loaders = {"validation": self.validation, "test": self.test}
        return {name: each.state_dict()["settings"] for name, each in loaders.items() if each is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, under the same recipe."""
        now = self.recipe.model_dump()
        for key in ("root", "workers"):  # where images are and who decodes them changes nothing
            now["data"][key] = state["recipe"].get("data", {}).get(key)
        if (changed := _difference(state["recipe"], now)) is not None:
            key, there, here = changed
            raise StateError(
                f"{key}: the checkpoint was made with {there!r}, the recipe now has {here!r}; a run continues with the "
                "recipe it began with"
            )
        if (other := _difference(state["evaluated_on"], self._evaluated_on())) is not None:
            part, _, what = other[0].partition(".")
            raise StateError(
                f"data: {what or 'all'} of the {part} data changed since the run was stopped "
                f"({other[1]!s:.12} before, {other[2]!s:.12} now); a run continues with the data it began with"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sparsity.load_state_dict(state["sparsity"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["random"])
        if state["device_random"] is not None and self.accelerator.device.type == "cuda":
            torch.cuda.set_rng_state(state["device_random"], self.accelerator.device)
        self.epoch = state["epoch"]

    def _load_data(self) -> _Dataset:
        section = self.recipe.data
        try:
            with self.accelerator.main_process_first():
                if section.name != data.IMAGE_FOLDER:
                    return data.load(section.name, validation=section.validation, train=section.train)
                keys = {"validation", "test", "exclude", "image_size", "workers"}
                options = section.model_dump(include=keys, exclude_none=True)
                return data.load_image_folder(section.root, **options)
        except ConfigurationError as error:
            key = key_in(str(error), ("validation", "train", "test", "exclude")) or "name"
            raise self.recipe.error(("data", key), error) from None
        except DataError as error:
            if section.root is None:
                raise
            raise DataError(str(self.recipe.error(("data", "root"), error))) from None

    def _batches(self, split: _Split, shuffle: bool = False) -> data.Batches:
        section, accelerator = self.recipe.data, self.accelerator
        augment = section.augment if shuffle else None
        length = {} if section.length is None else {"length": section.length}
        if length and not self.text:
            what = f"got {section.length}, but {section.name} holds images; leave it out, it is for text"
            raise self.recipe.error(("data", "length"), what)
        try:
            return split.batches(
                section.batch_size,
                shuffle=shuffle,
                augment=None if augment is None else data.Augment(**augment.model_dump()),
                seed=self.seed,
                device=accelerator.device,
                # Ranks average their gradients, which is the mean over the batch only where their shares are equal.
                drop_last=shuffle and accelerator.num_processes > 1,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                **length,
            )
        except ConfigurationError as error:
            key = str(error).partition(": ")[0]
            key = key if key in ("augment", "length") else "batch_size"
            raise self.recipe.error(("data", key), error) from None

    def _build_model(self, dataset: _Dataset) -> nn.Module:
        section = self.recipe.model
        try:
            fitting = zoo.arguments(section.name, dataset.shape, dataset.classes)
            model = zoo.build(section.name, **(fitting | section.arguments))
        except ConfigurationError as error:
            raise self.recipe.model_error(error) from None
        except Exception as error:  # sizes that cannot be had end in many kinds of error
            what = f"{section.name} cannot be built with {section.arguments}: {reason(error)}"
            raise self.recipe.model_error(what) from None
        if self.recipe.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._try_out(model, 1, dataset, "evaluated")
        # One image is what batch norm may refuse; thousands would only take memory.
        self._try_out(model, min(self.batches.smallest, 2), dataset, "trained")
        return model

    def _try_out(self, model: nn.Module, count: int, dataset: _Dataset, use: Literal["evaluated", "trained"]) -> None:
        """Refuse a network that cannot be used so on `count` images or streams of text, before a last batch does."""
        name = self.recipe.model.name
        inputs = torch.zeros(count, 1, dtype=torch.int64) if self.text else torch.zeros(count, *dataset.shape)
        shape = f" of shape {dataset.shape}" if dataset.shape else ""
        samples = f"{count} {'stream' if self.text else 'image'}{'s' if count > 1 else ''}{shape} of {dataset.name}"
        # A copy, since statistics of batch norms change; with random numbers of its own, since dropout draws some.
        tried = copy.deepcopy(model).train(use == "trained")
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                outputs = tried(inputs)
        except Exception as error:  # a network of another library may raise anything
            what = f"{name} cannot be {use} on {samples}: {reason(error)}"
            if use == "trained" and count == 1 < self.batches.batch_size:
                what += "; this is the smallest batch of an epoch, another data.batch_size makes it larger"
            raise self.recipe.model_error(what) from None
        if self.text:
            outputs, _ = outputs
        if not isinstance(outputs, Tensor):
            raise self.recipe.model_error(
                f"{name} gives a {type(outputs).__name__} when it is {use}, expected one tensor; a network with "
                "auxiliary outputs may have an argument that turns them off, such as aux_logits: false"
            )
        if outputs.shape != (*inputs.shape[: inputs.dim() - len(dataset.shape)], dataset.classes):
            labels = "symbols" if self.text else "classes"
            what = f"gives {tuple(outputs.shape)} for {samples}, which has {dataset.classes} {labels}"
            raise self.recipe.model_error(f"{name} {what}")

    def _attach(self, methods: list[Method]) -> Sparsity:
        try:
            return attach(self.model, methods)
        except ConfigurationError as error:
            for i, method in enumerate(methods):
                try:
                    method.bind(self.model, None)
                except ConfigurationError as own:
                    raise self.recipe.method_error(i, own) from None
            raise self.recipe.error(("methods",), error) from None

    def _note_update(self, update: MaskUpdate) -> None:
        self.updates.append({"epoch": self.epoch + 1, **asdict(update)})

    def _predict(self, inputs: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Logits, a row for each label, and for text the state to go on with, through which no gradient goes back."""
        if not self.text:
            channels_last = self.recipe.channels_last
            return self.forward(inputs.contiguous(memory_format=torch.channels_last) if channels_last else inputs), None
        logits, state = self.forward(inputs, state)
        return logits.flatten(0, 1), tuple(each.detach() for each in state)

    def _means(self, sums: Tensor) -> dict[str, float]:
        loss, correct, count = sums.tolist()
        means = {"loss": loss / count, "accuracy": correct / count}
        return means | {"bits_per_character": means["loss"] / math.log(2)} if self.text else means


def _add(sums: Tensor, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Add a batch to the sums of losses, of right answers and of labels, on the device, without waiting for it."""
    labels = labels.flatten()
    sums += torch.stack([loss, (logits.detach().argmax(1) == labels).sum(), (labels >= 0).sum()])


def _named(part: str, means: dict[str, float]) -> dict[str, Any]:
    return {f"{part}_{name}": mean for name, mean in means.items()}


def _difference(there: Any, here: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first value in which two nested mappings or lists differ, with its dotted key."""
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(name, there.get(name), here.get(name)) for name in {**there, **here}]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(i, *each) for i, each in enumerate(zip(there, here, strict=True))]
    else:
        return None if there == here else (key, there, here)
    found = (_difference(old, new, f"{key}.{name}".lstrip(".")) for name, old, new in pairs)
    return next((each for each in found if each is not None), None)


def _accelerator(recipe: Recipe) -> Accelerator:
    precision = {"fp32": "no", "bf16": "bf16"}[recipe.precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # Accelerate keeps the first precision of a process for all later runs
    try:
        # Unless told so, Accelerate takes several processes on a machine without accelerators for runs of their own.
        return Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())
    except ValueError as error:
        raise recipe.error(("precision",), error) from None
