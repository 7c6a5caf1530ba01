"""Masks: storage, exact enforcement, and their sharding.

A mask is an int8 tensor of its weight's shape, −1 where the weight is active and 0 where it is pruned. Read as an
integer of the weight's own width, −1 is all ones, so a bitwise *and* leaves active weights as they are and makes
pruned ones +0.0 whatever they were: negative zero, infinity and NaN included, which a product would keep. One byte
a weight, no second copy, one pass.

Masks are about single weights; which weights live or die together, and how they are ranked, is in `gossamer.groups`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.utils import parametrize

from gossamer.errors import ConfigurationError
from gossamer.targets import Target, local, unshare_class, whole

INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of so many bytes, for work on the bits of a number."""

_CHUNK = 1 << 19  # weights a part


class MaskedTensor:
    """A weight under a mask.

    Attributes:
        target: The weight, found by its owner, so that a replaced Parameter is seen.
        computed: What computes the weight where it is no parameter itself; then the mask acts there.
        structure: What its mask is made of, for tables.
        row_multiple: A shard of the weight must begin at a multiple of so many rows.
        shape: The weight's global shape.
        weights: Number of weights of the global weight.
        mask: int8 mask (−1 active, 0 pruned) of the part of the weight that this rank holds.
        active: Number of active weights of the global weight.
        begun: int8 mask, −1 where a weight began anew while its optimizer had no state to make fresh; `None` for none.
        process_group: The ranks that share the weight; `None` where each holds all of it.
        first_row: The first row of the global weight that this rank holds.
    """

    def __init__(self, target: Target, structure: str = "element", row_multiple: int = 1) -> None:
        self.target = target
        self.computed = target.computed
        self.structure = structure
        self.row_multiple = row_multiple
        self.shape = target.shape
        self.weights = prod(self.shape)
        self.mask = torch.full_like(self.values(), -1, dtype=torch.int8)
        self.active = self.weights
        self.begun: Tensor | None = None
        self.process_group, self.first_row = self.sharding()

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.target.name

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is in the model now; see `Target.parameter`."""
        return self.target.parameter

    @property
    def input_dim(self) -> int:
        """The dimension that runs over inputs."""
        return self.target.input_dim

    def values(self) -> Tensor:
        """The weights on this rank; shares memory with the parameter, if it is one."""
        numbers = local(self.parameter)
        if self.computed is None:
            return numbers
        with torch.no_grad():
            return self.computed(numbers)  # type: ignore[no-any-return]

    def enforce(self) -> None:
        """Set pruned weights to +0.0."""
        if self.computed is None:
            enforce(local(self.parameter), self.mask)
        else:
            self.computed.mask = self.mask

    def finalize(self) -> None:
        """Leave a plain parameter with exact zeros."""
        self.enforce()
        if self.computed is not None:
            for owner, attribute in self.target.places:
                unshare_class(owner)
                parametrize.remove_parametrizations(owner, attribute, leave_parametrized=True)
            self.parameter.grad = None  # that of the numbers, in their shape
            self.computed = None

    def apply(self, change: Change) -> tuple[Tensor, Tensor]:
        """Put a new mask in force. Pruned weights become 0, newly active and renewed ones start at the change's values.

        `active` is for the caller to count, of all tensors at once.

        Returns:
            int8 masks of this rank's weights, −1 where a weight is newly active, and where one is newly active or
            renewed.
        """
        grown = self.mask.bitwise_not().bitwise_and_(change.mask)
        begun = grown if change.renewed is None else grown | (change.renewed & change.mask)
        if self.computed is None:
            weight = local(self.parameter)
            enforce(weight, change.mask ^ begun)
            if change.values is not None:
                weight.copy_(torch.where(begun != 0, change.values, weight))
        self.mask.copy_(change.mask)
        if self.computed is not None:
            self.computed.mask = self.mask
        return grown, begun

    def sharding(self) -> tuple[dist.ProcessGroup | None, int]:
        """How the weight is sharded now: the ranks that share it (None where it is whole) and this rank's first row.

        Raises:
            ConfigurationError: The weight is sharded in a way that splits groups, or over several mesh dimensions; on
                every rank alike.
        """
        parameter = self.parameter
        if self.target.shape != self.shape:
            raise ConfigurationError(
                f"{self.name}: had shape {self.shape} when it was attached and has {self.target.shape} now"
            )
        if not isinstance(parameter, DTensor):
            return None, 0
        if self.computed is not None:
            raise ConfigurationError(
                f"{self.name}: is computed from numbers that are sharded, which masks cannot follow; leave its module "
                "out of `fully_shard` (ignored_params), or exclude it from targets"
            )
        placements = parameter.placements
        sharded = [dim for dim, placement in enumerate(placements) if placement.is_shard()]
        if not sharded:
            return None, 0
        placement = placements[sharded[0]]
        if len(sharded) > 1 or type(placement) is not Shard or placement.dim != 0:
            raise ConfigurationError(
                f"{self.name}: is sharded as {placements}; masks follow weights that are sharded once, along "
                "dimension 0, as `fully_shard` does"
            )
        group = parameter.device_mesh.get_group(sharded[0])
        rank = dist.get_rank(group)
        rows = torch.zeros(dist.get_world_size(group), dtype=torch.int64)
        rows[rank] = len(local(parameter))
        rows = sum_over_ranks(rows, group, local(parameter).device)
        multiple = self.row_multiple
        if (rows.cumsum(0)[rows.cumsum(0) < self.shape[0]] % multiple).any():
            raise ConfigurationError(
                f"{self.name}: structure {self.structure} needs shards of a multiple of {multiple} rows, but the ranks "
                f"hold {rows.tolist()} of its {self.shape[0]} rows; shard over fewer ranks, or exclude this weight"
            )
        return group, int(rows[:rank].sum())

    def follow_sharding(self, process_group: dist.ProcessGroup | None, first_row: int) -> None:
        """Keep of the mask what belongs to this rank, in the layout and on the device of the weight as it is now.

        Args:
            process_group: As `sharding` found it.
            first_row: Likewise.
        """
        parts = [self.mask, *([] if self.begun is None else [self.begun])]
        if self.process_group is None:
            parts = [rows_like(part, self.parameter) for part in parts]
        self.process_group, self.first_row = process_group, first_row
        self.target.remember_shard()
        like = self.values()
        placed = [torch.empty_like(like, dtype=torch.int8).copy_(part) for part in parts]
        self.mask, self.begun = placed[0], placed[1] if len(placed) > 1 else None
        if self.computed is not None:
            self.computed.mask = self.mask

    def distribute(self, part: Tensor) -> Tensor:
        """A tensor of this rank's rows as a DTensor sharded as the weight is, or as it is where nothing is sharded."""
        parameter = self.parameter
        if not isinstance(parameter, DTensor):
            return part
        shape = torch.Size((self.shape[0], *part.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        )

    def pack(self, mask: Tensor) -> Tensor:
        """A mask of this rank's weights as bits, sharded as the weight is; see the function `pack`."""
        return self.distribute(pack(mask))


@dataclass(eq=False)
class Change:
    """A new mask of one tensor, not yet in force.

    Attributes:
        tensor: The tensor.
        mask: int8 mask (−1 active, 0 pruned) of this rank's part of the weight, in its shape.
        renewed: int8 mask, −1 where a weight that stays active is to begin anew, as a newly active one does; likewise.
        values: What newly active and renewed weights start from, likewise; 0 where there are none.
    """

    tensor: MaskedTensor
    mask: Tensor
    renewed: Tensor | None = None
    values: Tensor | None = None


class Shared(Protocol):
    """What ranks may share the parts of."""

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share it; `None` where each holds all of it."""
        ...


def rows_like(values: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of values that are whole or sharded in any way, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return whole(values)
    mesh, placements = parameter.device_mesh, parameter.placements
    if isinstance(values, DTensor):
        return values.redistribute(mesh, placements).to_local()
    device = local(parameter).device
    return distribute_tensor(values.to(device), mesh, placements, src_data_rank=None).to_local()


def enforce(tensor: Tensor, mask: Tensor) -> None:
    """Make `tensor` exactly +0.0 where the int8 `mask` is 0, in place; NaN, infinity and −0.0 too."""
    bits = tensor.view(INTEGER[tensor.element_size()])
    if bits.device.type != "cpu" or bits.numel() <= _CHUNK:
        bits.bitwise_and_(mask)
        return
    # On the CPU torch first widens the whole mask into a new tensor; in parts that stay in the cache it costs half.
    rows = max(1, _CHUNK * len(bits) // bits.numel())
    for part, kept in zip(torch.split(bits, rows), torch.split(mask, rows), strict=True):
        part.bitwise_and_(kept)


def pack(mask: Tensor) -> Tensor:
    """Pack a mask into bits, row by row along dim 0: `(rows, …)` → uint8 `(rows, ⌈weights a row / 8⌉)`."""
    rows = (mask != 0).reshape(mask.shape[0], prod(mask.shape[1:]))
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8))
    octets = padded.view(len(rows), padded.shape[1] // 8, 8) << torch.arange(8, device=mask.device, dtype=torch.uint8)
    return octets.sum(2).to(torch.uint8)


def is_packed(value: object, shape: Sequence[int]) -> bool:
    """Whether this can be a packed mask of a whole weight of this shape."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type == "meta":
        return False
    return tuple(value.shape) == packed_shape(shape) and value.dtype == torch.uint8


def packed_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Shape of a packed mask of a weight of this shape."""
    return shape[0], -(-prod(shape[1:]) // 8)


def unpack_like(packed: Tensor, weight: Target | MaskedTensor) -> Tensor:
    """This rank's part of a packed mask of a whole weight: int8, where and as the weight is."""
    part = local(weight.parameter)
    shape = part.shape if weight.computed is None else weight.shape
    return unpack(rows_like(packed, weight.parameter).to(part.device), shape)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `pack`: uint8 `(rows, bytes)` → int8 mask of `shape`, −1 active and 0 pruned."""
    bits = (packed.unsqueeze(-1) >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, : prod(shape[1:])].to(torch.int8).neg_().reshape(*shape)


def count_active(tensors: Sequence[MaskedTensor]) -> None:
    """Count the active weights of tensors; one transfer for all."""
    counts = count_over_shards(tensors, [tensor.mask.count_nonzero() for tensor in tensors])
    for tensor, count in zip(tensors, counts, strict=True):
        tensor.active = count


def count_over_shards(parts: Sequence[Shared], counts: Sequence[Tensor]) -> list[int]:
    """Add up one count each over the ranks that share it; one transfer and at most one collective a process group."""
    return [int(n) for n in sum_over_shards(parts, [count.view(1) for count in counts])[:, 0]]


def sum_over_shards(parts: Sequence[Shared], rows: Sequence[Tensor]) -> np.ndarray:
    """Stack one vector each and add it up over the ranks that share the part; one transfer to the host.

    Args:
        parts: What the vectors are of.
        rows: int64 vectors of one length, this rank's contribution to each.

    Returns:
        int64 array, a row each.
    """
    if not rows:
        return np.zeros((0, 1), dtype=np.int64)
    device = rows[0].device
    matrix = torch.stack([row.to(device=device, dtype=torch.int64) for row in rows])
    for group in dict.fromkeys(part.process_group for part in parts if part.process_group is not None):
        members = torch.tensor([part.process_group is group for part in parts], device=device)
        chosen = matrix[members]
        dist.all_reduce(chosen, group=group)
        matrix[members] = chosen
    return matrix.cpu().numpy()


def sum_over_ranks(values: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """Sum over a group's ranks; the values come from and return to the CPU, and travel on the weights' device."""
    moved = values.to(device)
    dist.all_reduce(moved, group=group)
    return moved.cpu()
