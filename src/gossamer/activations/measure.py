"""Measures activations over a data set: zeros, magnitudes, and the multiply-accumulates that zeros would save."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from gossamer.activations.counts import THRESHOLDS, SiteCounter
from gossamer.activations.lossy import CHILD
from gossamer.activations.macs import LAYERS, MacCounter
from gossamer.activations.measurements import ActivationMeasurements, fraction
from gossamer.checks import check_boolean, check_not_nested
from gossamer.errors import ConfigurationError
from gossamer.nn.kwinners import KWinners
from gossamer.nn.lossy import LossySparsifier, hard_threshold, lossy_threshold
from gossamer.nn.masked import SparseActivation, SparseBatchNorm, SparseSyncBatchNorm
from gossamer.sites import Kind, Site, SiteSelection, called_modules, select_sites

_PROBABILITIES = ("MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax")
_FUNCTIONS = [name for name in nn.modules.activation.__all__ if name not in _PROBABILITIES]
_READERS = (SparseBatchNorm, SparseSyncBatchNorm)
_POSITIONS = (SparseActivation, *_READERS)
_NO_PRODUCTS = (nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)
"""Layers whose weights multiply element by element, or are looked up."""

SITES = Kind(
    (*(getattr(nn, name) for name in _FUNCTIONS), KWinners, *THRESHOLDS, *_POSITIONS),
    "activation function, threshold or mask of positions",
)
"""The modules whose outputs are measured without being named."""

_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag, nn.RNNBase)
_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, SparseActivation, KWinners)
"""Layers whose outputs have their channels along the last and along the second dimension."""


def measure_activations(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    sites: SiteSelection = None,
    hard: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> ActivationMeasurements:
    """Run a model over data, and measure its activations.

    The outputs of sites are measured, and the inputs of all convolutions (transposed ones too), linear and bilinear
    layers, so that whatever lies between counts for what it does. Counts are exact, over every call of a module, and
    take the same memory however many batches there are. The model runs in evaluation mode, compiled models without
    their compilation; afterwards it is as it was, and so is torch's random state. Hooks of others run as ever.

    Dimension 0 is that of samples. Channels lie along dimension 1 of what convolutions, batch norms, masks of positions
    and k-winners give, and along the last dimension for linear and bilinear layers, layer norms and embeddings; other
    sites have theirs where the last of these layers that ran before them has.

    Args:
        model: The model, attached, finalized or plain.
        loader: Batches, moved to the model's device: a `torch.utils.data.DataLoader`, or `[(x,)]` of one batch. Of
            a tuple or a list the first item is what the model is given, a batch of another type is given as it is; the
            model is given the items of a tuple or list as arguments, and those of a dict by name.
        sites: Whose outputs are measured; see `gossamer.sites.select_sites`. By default, and chosen among by globs,
            activation functions (modules of `torch.nn`, without softmax), thresholds and masks of positions.
        hard: Whether learned thresholds are hard while measuring, as `Sparsity.finalize` would make them. The outputs
            of smoothed ones are never exactly zero.
        forward: Called with the model and a batch instead.

    Raises:
        ConfigurationError: A selection that matches nothing; a site that was chosen and not called, or that gives
            anything but a tensor of floating point; nested tensors; a loader without batches, or that is no iterable
            of them: a tensor or a data set, of which samples would be taken for batches.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_boolean("hard", hard)
    _check_loader(loader)
    called = called_modules(model)
    chosen = _default_sites(called) if sites is None else select_sites(model, sites, logits=True, default=SITES)
    counters = {site.name: SiteCounter(site.module) for site in chosen}
    layers = {name: MacCounter(module) for name, module in called.items() if isinstance(module, LAYERS)}
    if not counters and not layers:
        raise ConfigurationError(
            f"sites: {type(model).__name__} calls no {SITES.words}, and no convolution, linear or bilinear layer; name "
            "others exactly, or give a type or a predicate"
        )
    devices = [each.device for each in chain(model.parameters(), model.buffers())]
    batches = 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if "torch._dynamo" in sys.modules:  # its import takes seconds, and nothing was compiled without it
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would pass over the hooks
        stack.enter_context(torch.random.fork_rng({device for device in devices if device.type == "cuda"}))
        stack.enter_context(_evaluating(model))
        stack.enter_context(_gates(called, hard))
        stack.enter_context(_hooks(called, counters, layers))
        for batch in loader:
            (forward or _forward)(model, _moved(batch, devices[0] if devices else None))
            batches += 1
    if not batches:
        raise ConfigurationError("loader: gave no batch; give one that has data left")
    if sites is None:  # a mask that batch norms read is not called
        read = [module.activation for module in called.values() if isinstance(module, _READERS)]
        counters = {name: each for name, each in counters.items() if each.calls or each.module not in read}
    elif idle := [name for name, counter in counters.items() if not counter.calls]:
        raise ConfigurationError(
            f"{idle[0]}: was not called in any forward pass, so that there is nothing to measure; leave it out with "
            f"sites=['!{idle[0]}', ...]" + (f" (and {len(idle) - 1} others)" if idle[1:] else "")
        )
    site_rows = [_identity(name, called[name], counter.calls) | counter.row() for name, counter in counters.items()]
    layer_rows = [_identity(name, called[name], counter.calls) | counter.row() for name, counter in layers.items()]
    uncounted = [{"name": name, "type": type(each).__name__} for name, each in called.items() if _is_uncounted(each)]
    smoothed = 0 if hard else sum(isinstance(module, LossySparsifier) for module in called.values())
    totals: dict[str, Any] = {"batches": batches, "hard": hard, "smoothed_thresholds": smoothed}
    totals |= {key: sum(row[key] for row in site_rows) for key in ("elements", "zeros")}
    totals["sparsity"] = fraction(totals["zeros"], totals["elements"])
    totals |= {f"input_{key}": sum(row[key] for row in layer_rows) for key in ("elements", "zeros")}
    totals["input_sparsity"] = fraction(totals["input_zeros"], totals["input_elements"])
    totals |= {key: sum(row[key] for row in layer_rows) for key in ("macs", "saved_macs", "padding_macs")}
    totals["saved"] = fraction(totals["saved_macs"], totals["macs"])
    totals["uncounted"] = uncounted
    return ActivationMeasurements(site_rows, layer_rows, totals)


def _default_sites(called: Mapping[str, nn.Module]) -> list[Site]:
    """Modules of `SITES`; of one with a threshold of its own, and that threshold, only the threshold."""
    return [
        Site(name, module)
        for name, module in called.items()
        if isinstance(module, SITES.types) and not isinstance(module._modules.get(CHILD), THRESHOLDS)
    ]


def _identity(name: str, module: nn.Module, calls: int) -> dict[str, Any]:
    return {"name": name, "type": type(module).__name__, "calls": calls}


def _is_uncounted(module: nn.Module) -> bool:
    """Whether a module multiplies activations with matrices of its own that are not counted, as far as can be seen."""
    matrices = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    alone = not any(module.children()) or isinstance(module, nn.MultiheadAttention)
    return matrices and alone and not isinstance(module, LAYERS + _NO_PRODUCTS)


# -- running the model -------------------------------------------------------------------------------------------------


def _check_loader(loader: object) -> None:
    dataset = isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)
    if dataset or isinstance(loader, Tensor | np.ndarray | str | bytes | Mapping) or not isinstance(loader, Iterable):
        remedy = "torch.utils.data.DataLoader(dataset, 64)" if dataset else "a DataLoader, or [(x,)] of one batch x"
        raise ConfigurationError(f"loader: expected batches, got {type(loader).__name__}; give {remedy}")


def _forward(model: nn.Module, batch: Any) -> Any:
    if batch is None or (isinstance(batch, tuple | list) and not batch):
        raise ConfigurationError(f"loader: gave {batch!r} as a batch, in which there is nothing to give the model")
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def _moved(batch: Any, device: torch.device | None) -> Any:
    """A batch with its tensors on the model's device, of the same types."""
    if device is None:
        return batch
    if hasattr(batch, "to"):  # tensors, and what holds them in a way of its own
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [_moved(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, module by module, without what a model's own `train` may do besides."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _gates(called: Mapping[str, nn.Module], hard: bool) -> Iterator[None]:
    """Learned thresholds that compute their values and nothing else, hard ones if asked."""
    replaced = [(name, module) for name, module in called.items() if isinstance(module, LossySparsifier)]
    before = [{key: module.__dict__[key] for key in ("forward",) if key in module.__dict__} for _, module in replaced]
    try:
        for name, module in replaced:
            module.forward = partial(_gate, name, module, hard)  # type: ignore[method-assign]
        yield
    finally:
        for (_, module), own in zip(replaced, before, strict=True):
            del module.forward
            module.__dict__.update(own)


def _gate(name: str, module: LossySparsifier, hard: bool, x: Tensor) -> Tensor:
    try:
        if hard or getattr(module, "is_hard", False):
            return hard_threshold(x, module.eps, module.dim)
        return lossy_threshold(x, module.eps, module.a, module.dim)[0]
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None


# -- hooks -------------------------------------------------------------------------------------------------------------


@contextmanager
def _hooks(
    called: Mapping[str, nn.Module], sites: Mapping[str, SiteCounter], layers: Mapping[str, MacCounter]
) -> Iterator[None]:
    """Hooks that count, for as long as the context lasts."""
    channels = _Channels()
    with ExitStack() as stack:
        for module in called.values():
            if isinstance(module, _LAST + _SECOND):
                # First of all, so that a threshold before or after a layer counts along the layer's channels.
                stack.callback(module.register_forward_pre_hook(channels.enter, prepend=True).remove)
        for name, macs in layers.items():
            hook = partial(_count_macs, name, macs)
            stack.callback(called[name].register_forward_hook(hook, with_kwargs=True).remove)
        for name, site in sites.items():
            hook = partial(_count_site, name, site, channels)
            stack.callback(called[name].register_forward_hook(hook).remove)
        yield


class _Channels:
    """The dimension of channels of the layer that ran last."""

    def __init__(self) -> None:
        self.dim = 1

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self.dim = -1 if isinstance(module, _LAST) else 1


def _count_site(
    name: str, counter: SiteCounter, channels: _Channels, module: nn.Module, inputs: Any, output: Any
) -> None:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        what = str(output.dtype) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise ConfigurationError(
            f"{name}: gives {what}, and only tensors of floating point are measured; leave it out with "
            f"sites=['!{name}', ...], or name modules within it"
        )
    check_not_nested(name, output)
    per_channel = isinstance(module, THRESHOLDS) and len(module.eps) > 1
    counter.add(output, int(module.dim) if per_channel else channels.dim)  # type: ignore[arg-type]


def _count_macs(
    name: str, counter: MacCounter, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    names = ("input1", "input2") if isinstance(module, nn.Bilinear) else ("input",)
    inputs = tuple(args[i] if i < len(args) else kwargs[key] for i, key in enumerate(names))
    check_not_nested(name, *inputs)
    counter.add(inputs, output)
