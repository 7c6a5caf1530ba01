"""The training loop, on Hugging Face Accelerate, with masks kept by `gossamer.attach`."""

from __future__ import annotations

import contextlib
import copy
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
from gossamer.attach import Sparsity, attach
from gossamer.console import Display
from gossamer.errors import ConfigurationError, DataError, NonFiniteError, StateError, reason
from gossamer.method import MaskUpdate, Method
from gossamer.recipe import Recipe
from gossamer.section import key_in

_Dataset = data.Dataset | data.FolderDataset


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
        self.images = {part: len(split) for part, split in parts.items() if split is not None}
        self.batches = self._batches(dataset.train, shuffle=True)
        self.validation = None if dataset.validation is None else self._batches(dataset.validation)
        self.test = self._batches(dataset.test)
        self.steps_per_epoch = math.ceil(len(self.batches) / recipe.accumulate)
        methods = recipe.build_methods(self.steps_per_epoch * recipe.epochs, self.steps_per_epoch, seed)

        torch.manual_seed(seed)
        self.model = self._build_model(dataset)
        self.sparsity = self._attach(methods)
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

    def describe(self) -> list[str]:
        """What is trained, on what and how sparse, a line each, for people."""
        images = ", ".join(f"{count:,} to {part}" for part, count in self.images.items())
        totals = self.sparsity.summary().totals
        sparse = "none, every weight is trained"
        if methods := " and ".join(method.name for method in self.sparsity.methods):
            sparse = (
                f"{methods}, starts with {totals['targets_active']:,} of {totals['targets_total']:,} weights active"
            )
        return [
            f"data     {self.recipe.data.name}, images: {images}",
            f"network  {self.recipe.model.name}, {totals['all_total']:,} parameters",
            f"method   {sparse}",
        ]

    def run_epoch(self, shown: Display) -> dict[str, Any]:
        """Train and validate for one epoch; return its metrics."""
        start = time.perf_counter()
        self.updates = []
        lr = self.optimizer.param_groups[0]["lr"]
        loss, accuracy = self._train_epoch(shown)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"epoch {self.epoch + 1}: the training loss is {loss}, the run diverged; lower optimizer.lr "
                f"(it was {lr:g}) or set clip_grad_norm"
            )
        if self.recipe.schedule.per == "epoch":
            self.scheduler.step()
        self.epoch += 1
        metrics = {"epoch": self.epoch, "step": self.sparsity.step, "train_loss": loss, "train_accuracy": accuracy}
        if self.validation is not None:
            metrics["validation_loss"], metrics["validation_accuracy"] = self.evaluate(self.validation)
        return metrics | {
            "sparsity": 1 - self.sparsity.density(),
            "lr": lr,
            "seconds": time.perf_counter() - start,
        }

    def _train_epoch(self, shown: Display) -> tuple[float, float]:
        accumulate, per_step = self.recipe.accumulate, self.recipe.schedule.per == "step"
        sums, seen = torch.zeros(2, device=self.accelerator.device), 0
        self.forward.train()
        for i, (inputs, labels) in enumerate(self.batches):
            first = i - i % accumulate
            window = min(accumulate, len(self.batches) - first)
            last = i == first + window - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.forward):
                logits = self.forward(self._lay_out(inputs))
                loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
                self.accelerator.backward((loss + self.sparsity.penalty()) / window)
            _add(sums, loss.detach() * len(labels), logits, labels)
            seen += len(labels)
            if last:
                if self.recipe.clip_grad_norm is not None:
                    self.sparsity.clip_grad_norm_(self.recipe.clip_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                if per_step:
                    self.scheduler.step()
            if shown.due():
                mean_loss, accuracy = (sums / seen).tolist()
                shown.step(self.sparsity.step, self.epoch + 1, mean_loss, accuracy, 1 - self.sparsity.density())
        return self._means(sums, seen)

    @torch.no_grad()
    def evaluate(self, batches: data.Batches) -> tuple[float, float]:
        """Mean cross-entropy and accuracy over all of the batches."""
        sums, seen = torch.zeros(2, device=self.accelerator.device), 0
        self.forward.eval()
        for inputs, labels in batches:
            logits = self.forward(self._lay_out(inputs))
            _add(sums, F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
            seen += len(labels)
        return self._means(sums, seen)

    def finish(self) -> None:
        """Make the model plain: no hooks, exact zeros."""
        self.sparsity.finalize()
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
            "random": torch.get_rng_state(),
            "device_random": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, under the same recipe."""
        now = self.recipe.model_dump()
        if changed := [key for key, value in state["recipe"].items() if now.get(key) != value]:
            raise StateError(
                f"{changed[0]}: the checkpoint was made with {state['recipe'][changed[0]]!r}, the recipe now has "
                f"{now.get(changed[0])!r}; a run continues with the recipe it began with"
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
                    return data.load(section.name, validation=section.validation)
                options = section.model_dump(include={"validation", "image_size", "workers"}, exclude_none=True)
                return data.load_image_folder(section.root, **options)
        except ConfigurationError as error:
            raise self.recipe.error(("data", key_in(str(error), ("validation",)) or "name"), error) from None
        except DataError as error:
            if section.root is None:
                raise
            raise DataError(str(self.recipe.error(("data", "root"), error))) from None

    def _batches(self, split: data.Split | data.FolderSplit, shuffle: bool = False) -> data.Batches:
        section, accelerator = self.recipe.data, self.accelerator
        augment = section.augment if shuffle else None
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
            )
        except ConfigurationError as error:
            key = "augment" if str(error).startswith("augment: ") else "batch_size"
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
        """Refuse a network that cannot be used so on `count` images, before the run finds out in its last batch."""
        name = self.recipe.model.name
        images = f"{count} image{'s' if count > 1 else ''} of shape {dataset.shape} of {dataset.name}"
        # A copy, since statistics of batch norms change; with random numbers of its own, since dropout draws some.
        tried = copy.deepcopy(model).train(use == "trained")
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                outputs = tried(torch.zeros(count, *dataset.shape))
        except Exception as error:  # a network of another library may raise anything
            what = f"{name} cannot be {use} on {images}: {reason(error)}"
            if use == "trained" and count == 1 < self.batches.batch_size:
                what += "; this is the smallest batch of an epoch, another data.batch_size makes it larger"
            raise self.recipe.model_error(what) from None
        if not isinstance(outputs, Tensor):
            raise self.recipe.model_error(
                f"{name} gives a {type(outputs).__name__} when it is {use}, expected one tensor; a network with "
                "auxiliary outputs may have an argument that turns them off, such as aux_logits: false"
            )
        if outputs.shape != (count, dataset.classes):
            what = f"gives {tuple(outputs.shape)} for {images}, which has {dataset.classes} classes"
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

    def _lay_out(self, inputs: Tensor) -> Tensor:
        return inputs.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else inputs

    def _means(self, sums: Tensor, seen: int) -> tuple[float, float]:
        counted = torch.cat([sums, sums.new_tensor([seen])])
        loss, correct, count = self.accelerator.reduce(counted, "sum").tolist()
        return loss / count, correct / count


def _add(sums: Tensor, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
    """Add a batch to the sums of losses and of right answers, on the device, without waiting for it."""
    sums[0] += loss
    sums[1] += (logits.detach().argmax(1) == labels).sum()


def _accelerator(recipe: Recipe) -> Accelerator:
    precision = {"fp32": "no", "bf16": "bf16"}[recipe.precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # Accelerate keeps the first precision of a process for all later runs
    try:
        # Unless told so, Accelerate takes several processes on a machine without accelerators for runs of their own.
        return Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())
    except ValueError as error:
        raise recipe.error(("precision",), error) from None
