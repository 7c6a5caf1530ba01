"""Pruning in one shot, and the import of masks that `torch.nn.utils.prune` made."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from gossamer import guard
from gossamer.distribution import Distribution
from gossamer.errors import ConfigurationError
from gossamer.masks import count_active, enforce
from gossamer.scores import Score
from gossamer.structure import Structure
from gossamer.summary import Summary, summarize
from gossamer.targets import Selection, plain_name
from gossamer.weights.gmp import GMP


class Prune(GMP):
    """Gradual pruning without a training, which could not leave frozen weights for later."""

    _frozen_too = True


@torch.no_grad()
def prune(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    score: str | Score = "magnitude",
    distribution: Distribution = "global",
    structure: str | Structure = "element",
    targets: Selection = None,
    over: str = "targets",
    p: float = 2.0,
) -> Summary:
    """Prune a model in one shot: its lowest-scoring weights become exactly 0.0. Needs no optimizer and leaves no hook.

    A weight that is computed from other numbers (`gossamer.nn.hash_weight`) becomes a plain parameter.

    To train on, `gossamer.attach(model, method, optimizer, masks="zeros")`.

    Args:
        model: The model, changed in place.
        sparsity: Fraction of zeros, in [0, 1); `None` with an explicit distribution or N:M.
        score: A name of `gossamer.scores.SCORES` or a function of a View; `"gradient"` and `"movement"` need a
            backward before, `"momentum"` an optimizer and so a method.
        distribution: As for `gossamer.distribution.allocate`, or `"global"`: all weights ranked together, each
            tensor keeps at least one group.
        structure: Which weights live or die together.
        targets: Which weights; frozen ones are allowed.
        over: `"targets"` or `"all"`: what the sparsity is a fraction of.
        p: Order of the norm that scores a group.

    Returns:
        The summary of what is active now.

    Raises:
        ConfigurationError: As for `attach`; or the score needs gradients and there are none.
        NonFiniteError: A score is NaN.
    """
    method = Prune(
        sparsity,
        end=1,
        score=score,
        distribution=distribution,
        structure=structure,
        targets=targets,
        over=over,
        p=p,
    )
    guard.check_unwrapped(model)
    method.bind(model, None)
    guard.check_unclaimed(tensor.parameter for tensor in method.tensors)
    for change in method.update(method.end, lambda _: {}).changes:
        change.tensor.apply(change)
        change.tensor.finalize()
    count_active(method.tensors)
    return summarize(model, [method])


@torch.no_grad()
def import_torch_masks(model: nn.Module) -> dict[str, Tensor]:
    """Make the masks of `torch.nn.utils.prune` plain zeros, and return them for `attach(..., masks=...)`.

    Every module pruned by `torch.nn.utils.prune` gets its parameter back under its own name, with exact +0.0 where
    it was masked, in the order of the model's modules.

    Returns:
        Masks by parameter name, bool, True where active; of pruned biases too, which `attach` does not take.

    Raises:
        ConfigurationError: No module is pruned so.
    """
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    masks = {}
    for prefix, module in model.named_modules():
        for name in [key.removesuffix("_mask") for key in module._buffers if key.endswith("_mask")]:
            if f"{name}_orig" not in module._parameters:
                continue
            mask = module._buffers[f"{name}_mask"]
            assert mask is not None
            kept = mask != 0
            torch_prune.remove(module, name)  # type: ignore[no-untyped-call]
            parameter = module._parameters[name]
            assert parameter is not None
            enforce(parameter.detach(), kept.to(torch.int8).neg_())
            masks[plain_name(f"{prefix}.{name}" if prefix else name)] = kept
    if not masks:
        raise ConfigurationError("model: no module is pruned by torch.nn.utils.prune (no weight_orig with weight_mask)")
    return masks
