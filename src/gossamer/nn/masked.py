"""Binary masks on activations, one for all channels and images: fixed, or drawn anew at every training step."""

from __future__ import annotations

from math import floor
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.checks import MAX_SEED, check_boolean, check_integer, check_number
from gossamer.collect import Calls, Collected, recomputing, warn_missed
from gossamer.errors import ConfigurationError, OrderError
from gossamer.penalties import Penalty, as_penalty
from gossamer.splitmix import splitmix


def checkerboard(size: tuple[int, int], quarters: int) -> Tensor:
    """A regular mask that keeps 1, 2 or 3 of the four positions of every 2×2 square: bool `(height, width)`.

    One keeps rows and columns with even numbers, two also those with odd ones, three also even rows with odd columns.

    Raises:
        ConfigurationError: Another number of quarters.
    """
    check_integer("quarters", quarters, at_least=1, at_most=3)
    mask = torch.zeros(size, dtype=torch.bool)
    for row, column in ((0, 0), (1, 1), (0, 1))[:quarters]:
        mask[row::2, column::2] = True
    return mask


class SparseActivation(nn.Module):
    """Sets the same positions of every channel and image to 0 (Peng et al., 2018, for the regular ones).

    Inside activation checkpointing dynamic positions are those of the pass that is repeated, where it is the last one;
    else an OrderError says so. A compiled part draws again when it is repeated, and its gradients are then wrong: leave
    dynamic masks out of checkpoints that are compiled.

    Args:
        size: Height and width of the activations.
        mask: Which positions are kept, bool `size`; or
        quarters: a `checkerboard` of so many quarters; or
        density: a random mask with exactly `⌊density · height · width⌋` positions, in (0, 1].
        dynamic: Whether positions are drawn anew at every forward pass in training: as many, at random. Else they stay
            as they are.
        dense_inference: Whether evaluation leaves activations dense, scaled by the fraction kept; `None` where masks
            are dynamic.
        seed: Of the random positions. Layers of one size and seed have the same positions, at every draw too.
        norm: What `penalty` is of the output: `"l0"`, `"l1"`, `"l2"`, `"hoyer"`, or a `gossamer.penalties.Penalty`.

    Attributes:
        mask: bool `size`, a buffer: the present positions. A mask that is loaded may keep another number of them.
        seed: int64 `()`, a buffer, so that a loaded layer goes on with the positions that were saved.

    Raises:
        ConfigurationError: Not exactly one of `mask`, `quarters` and `density`, or a value out of range.
    """

    mask: Tensor
    draws: Tensor
    seed: Tensor

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        mask: Tensor | None = None,
        quarters: int | None = None,
        density: float | None = None,
        dynamic: bool = False,
        dense_inference: bool | None = None,
        seed: int = 0,
        norm: str | Penalty | None = None,
    ) -> None:
        super().__init__()
        sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
        if len(sides) != 2:
            raise ConfigurationError(f"size: expected a number, or a height and a width, got {size!r}")
        for side in sides:
            check_integer("size", side, at_least=1)
        self.size: tuple[int, int] = sides
        if sum(each is not None for each in (mask, quarters, density)) != 1:
            raise ConfigurationError("SparseActivation: give one of mask, quarters and density")
        check_boolean("dynamic", dynamic)
        check_integer("seed", seed, at_least=0, at_most=MAX_SEED)
        self.dynamic = dynamic
        self.dense_inference = dynamic if dense_inference is None else dense_inference
        check_boolean("dense_inference", self.dense_inference)
        self.norm = None if norm is None else as_penalty(norm, "norm")
        self._collected = Collected()
        self._calls = Calls()
        total = self.size[0] * self.size[1]
        if density is not None:
            check_number("density", density, 0, 1)
            self.kept = floor(density * total + 1e-9)
        elif quarters is not None:
            mask = checkerboard(self.size, quarters)
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise ConfigurationError(f"mask: expected a tensor of True and False, got a {type(mask).__name__}")
            if tuple(mask.shape) != self.size or not ((mask == 0) | (mask == 1)).all():
                raise ConfigurationError(
                    f"mask: got {tuple(mask.shape)}, {mask.dtype}; expected True and False for {self.size}"
                )
            self.kept = int(mask.sum())
        if not self.kept:
            raise ConfigurationError(f"SparseActivation: keeps none of {total} positions; give a larger density")
        self.register_buffer("seed", torch.tensor(seed))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", self._draw() if mask is None else mask != 0)

    @property
    def density(self) -> float:
        """Fraction of positions that are kept."""
        return self.kept / (self.size[0] * self.size[1])

    @property
    def sparsity(self) -> float:
        """Fraction of positions that are set to 0: none where inference is dense."""
        return 0.0 if self.dense_inference and not self.training else 1 - self.density

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, height, width)` → the same with zeros, or scaled in dense inference; a new tensor.

        Raises:
            ConfigurationError: Another height or width, or no floating point.
            OrderError: It is computed again for a backward pass, and which call is repeated is not known.
        """
        self.prepare(x, self.training)
        if not self.training and self.dense_inference:
            return x * self.density
        mask = self.mask.clone() if self.dynamic else self.mask  # the next call may come before the backward pass
        return self.collect(torch.where(mask, x, torch.zeros_like(x)), self.training)

    def penalty(self) -> Tensor:
        """Sum of `norm` over the outputs in training, 0-dim: a term of the loss.

        It may be asked for more than once: the first pass in training after that begins anew, and so does one after the
        backward pass of the others. Passes under `torch.no_grad` do not count. Ask in every step where the layer is
        compiled: a compiled layer keeps the norms until then.

        Warns:
            UserWarning: The layer ran without gradients alone, as under `checkpoint(use_reentrant=True)`.

        Raises:
            OrderError: No `norm` was given.
        """
        if self.norm is None:
            raise OrderError("SparseActivation: has no norm to penalise; make it with norm='l1', for example")
        values = self._collected.values()
        if not values and self._collected.missed:
            warn_missed(["SparseActivation"])
        return torch.stack(values).sum() if values else torch.zeros((), device=self.mask.device)

    @torch.no_grad()
    def redraw(self) -> None:
        """Choose other positions, as many, at random."""
        self.draws.add_(1)
        self.mask.copy_(self._draw())

    def prepare(self, x: Tensor, training: bool) -> None:
        """Check activations, and choose other positions where they are dynamic, before the mask is read.

        Raises:
            ConfigurationError: Another height or width, or no floating point.
            OrderError: It is computed again for a backward pass, and which call is repeated is not known.
        """
        if tuple(x.shape[-2:]) != self.size or not x.is_floating_point():
            raise ConfigurationError(
                f"SparseActivation: is for floating point of {self.size[0]}×{self.size[1]}, got shape "
                f"{tuple(x.shape)} of {x.dtype}"
            )
        if training and self.dynamic:
            if recomputing():
                self._calls.check("SparseActivation")
            else:
                self.redraw()

    def collect(self, y: Tensor, training: bool) -> Tensor:
        """Collect the norm of an output in training; returns the output."""
        if not training:
            return y
        if self.dynamic:
            self._calls.add(y)
        return y if self.norm is None else self._collected.until_backward(self.norm(y), y)

    def positions(self) -> Tensor:
        """The kept positions of a flattened image, int64 `(kept,)`, in order."""
        return self.mask.flatten().to(torch.int8).argsort(descending=True, stable=True)[: self.kept]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mask":
            fits = isinstance(value, Tensor) and tuple(value.shape) == self.size
            if not fits or not ((value == 0) | (value == 1)).all() or not value.any():
                got = f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else repr(value)
                raise ConfigurationError(f"mask: got {got}; expected True and False for {self.size}, not all False")
            value = value != 0
            self.kept = int(value.sum())
        super().__setattr__(name, value)

    def _draw(self) -> Tensor:
        """Positions that follow from the seed and the number of draws, alike on every device and compiled as well."""
        total = self.size[0] * self.size[1]
        keys = splitmix(torch.arange(total, device=self.draws.device), splitmix(self.draws, self.seed))
        ranks = keys.argsort().argsort()
        return (ranks < self.kept).view(self.size)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mask = state_dict.get(f"{prefix}mask")
        if isinstance(mask, Tensor) and mask.shape == self.mask.shape and not mask.is_meta:
            kept = int(mask.count_nonzero())
            if not kept:
                error_msgs.append(f"{prefix}mask: keeps none of {mask.numel()} positions; load another state")
                return
            self.kept = kept
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.size[0]}×{self.size[1]}, density={self.density:.4g}" + ", dynamic" * self.dynamic


class _OfKept:
    """What the two batch norms below share."""

    activation: SparseActivation
    num_features: int
    training: bool

    def __init__(self, num_features: int, activation: SparseActivation, **options: Any) -> None:
        if not isinstance(activation, SparseActivation):
            raise ConfigurationError(
                f"{type(self).__name__}: expected a SparseActivation as the second argument, got {activation!r}"
            )
        super().__init__(num_features, **options)  # type: ignore[call-arg]
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, height, width)` → the same, in the same memory format; a new tensor.

        Raises:
            ConfigurationError: Another shape than that of the channels and the mask, or no floating point.
            OrderError: See `SparseActivation.forward`.
        """
        activation, training = self.activation, self.training
        if x.dim() != 4 or x.shape[1] != self.num_features:
            raise ConfigurationError(
                f"{type(self).__name__}: is for activations of shape (N, {self.num_features}, height, width), got "
                f"{tuple(x.shape)}"
            )
        activation.prepare(x, training)
        normalize = super().forward  # type: ignore[misc]
        if not training and activation.dense_inference:
            return normalize(x) * activation.density  # type: ignore[no-any-return]
        if activation.kept == activation.mask.numel():
            return activation.collect(normalize(x), training)
        # The kept positions as one long dimension: the statistics of batch norm are then those of them alone.
        index = activation.positions()
        kept = normalize(x.flatten(2)[:, :, index].unsqueeze(2)).squeeze(2)
        y = x.new_zeros((*x.shape[:2], activation.mask.numel()), dtype=kept.dtype).index_copy(2, index, kept)
        y = y.view(x.shape)
        if x.is_contiguous(memory_format=torch.channels_last):
            y = y.contiguous(memory_format=torch.channels_last)
        return activation.collect(y, training)


class SparseBatchNorm(_OfKept, nn.BatchNorm2d):
    """Batch normalisation of the positions that a `SparseActivation` keeps, with zeros elsewhere.

    Mean and variance are those of the kept positions alone, and so are the running ones. Where every position is kept
    it is `torch.nn.BatchNorm2d`. In dense inference the output is that of every position, scaled by the fraction kept.

    Args:
        num_features: Channels.
        activation: The mask; where it is dynamic it is drawn anew by each forward pass in training. Its penalty is of
            what is normalised.
        options: Those of `torch.nn.BatchNorm2d`.
    """

    def synchronized(self, process_group: Any = None) -> SparseSyncBatchNorm:
        """One of the same parameters, statistics and mask that in training normalises over all processes."""
        options = {key: getattr(self, key) for key in ("eps", "momentum", "affine", "track_running_stats")}
        result = SparseSyncBatchNorm(self.num_features, self.activation, process_group=process_group, **options)
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            setattr(result, name, getattr(self, name))
        result.training = self.training
        return result


class SparseSyncBatchNorm(_OfKept, nn.SyncBatchNorm):
    """`SparseBatchNorm` over all processes; as `torch.nn.SyncBatchNorm` it needs a GPU in training.

    `SparseSyncBatchNorm.convert_sync_batchnorm(model)` converts a model; that of `torch.nn.SyncBatchNorm` would put
    plain batch norms in the place of sparse ones.
    """

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Put synchronised batch norms in the place of all of a model's, sparse ones for sparse ones.

        Arguments and result are those of `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.
        """
        if isinstance(module, SparseBatchNorm):
            return module.synchronized(process_group)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, cls):
            return nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)  # type: ignore[no-any-return, no-untyped-call]
        for name, child in module.named_children():
            module.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return module
