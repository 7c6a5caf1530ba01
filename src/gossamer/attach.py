"""The engine: binds methods to a model, keeps masks in force through the optimizer, saves and restores their state.

Masks act through hooks of the optimizer (`gossamer.hooks`), not in the forward pass, so the model stays an ordinary
module with the same keys. Those of a `gossamer.targets.ComputedWeight` act there, since it is no parameter.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gossamer import guard, optimizers, state
from gossamer.checks import closest
from gossamer.errors import ConfigurationError, OrderError
from gossamer.hooks import StepHooks
from gossamer.masks import MaskedTensor, count_active, enforce, pack, rows_like
from gossamer.method import Masks, MaskUpdate, Method
from gossamer.summary import Summary, summarize
from gossamer.targets import local, named_weights, whole

logger = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    methods: Method | Sequence[Method],
    optimizer: object = None,
    *,
    masks: Masks = None,
    second_moment: str = "zero",
) -> Sparsity:
    """Make a model sparse by one or several methods.

    The methods are copied, so that the objects given can be used again. Pruned weights become 0.0 at once; from
    `follow` on (called here if `optimizer` is given) they stay so through every optimizer step.

    Args:
        model: The model, before it is compiled or wrapped.
        methods: One method or a list of them; a weight belongs to at most one.
        optimizer: As for `Sparsity.follow`, where nothing wraps the model. `"auto"` follows the first optimizer that
            steps with these weights, for training loops that make it themselves.
        masks: Where masks start: `None`, as each method says; `"zeros"`, the zeros the model has (sparse
            fine-tuning); or a mapping parameter name → mask, True or 1 where active, in the weight's shape.
        second_moment: Where Adam's second moment starts for newly active weights: `"zero"` as for a fresh
            parameter, or `"mean"`, the mean over the active weights of the tensor.

    Returns:
        The handle. It lives as long as the optimizer it follows.

    Raises:
        ConfigurationError: A selection, budget or mask that cannot work, or a weight claimed twice.
        OrderError: The model is already wrapped, or already has masks.
    """
    if second_moment not in optimizers.SECOND_MOMENTS:
        raise ConfigurationError(f"second_moment: got {second_moment!r}; allowed are 'zero' and 'mean'")
    guard.check_unwrapped(model)
    given = [methods] if isinstance(methods, Method) else methods
    if not isinstance(given, Sequence) or not all(isinstance(method, Method) for method in given):
        raise ConfigurationError(
            f"methods: expected methods such as gossamer.SET(...), or a list of them, got {methods!r}"
        )
    bound = [copy.deepcopy(method) for method in given]
    _check_masks(masks)
    for method in bound:
        method.bind(model, masks)
    guard.check_claims(bound)
    if isinstance(masks, Mapping):
        names = [target.name for method in bound for target in method.claims()]
        if unknown := sorted(set(masks) - set(names)):
            raise ConfigurationError(
                f"masks: {unknown[0]!r} is no target; leave it out of masks, or choose it" + closest(unknown[0], names)
            )
    automatic = isinstance(optimizer, str) and optimizer == "auto"
    followed = [] if optimizer is None or automatic else guard.check_follow(bound, optimizer)
    guard.check_unfollowed(None, followed)
    if followed and any(method.learns for method in bound):
        guard.check_room(model, followed)
    with torch.no_grad():
        for method in bound:
            method.install()
    sparsity = Sparsity(model, bound, second_moment)
    if followed:
        sparsity.follow(followed)
    if automatic:
        sparsity._hooks.adopt = sparsity._adopt
    return sparsity


class Sparsity:
    """The handle of a model's sparsity; made by `attach`.

    Attributes:
        methods: The methods in force (copies of those given).
    """

    def __init__(self, model: nn.Module, methods: Sequence[Method], second_moment: str = "zero") -> None:
        self.methods = tuple(methods)
        self._model = model
        self._hooks = StepHooks(model, self.methods, second_moment)

    # -- optimizer ---------------------------------------------------------------------------------------------------

    def follow(self, optimizer: object) -> None:
        """Keep the masks in force through the steps of an optimizer, or of several that share the parameters.

        Called after the model was wrapped and the optimizer made, before a scheduler is. Masks move to where the
        weights now are; learned parameters that the optimizer lacks are added to it, without weight decay. Following
        again replaces what was followed before.

        Args:
            optimizer: An optimizer, or a list of them in the order in which they step: steps of the first are counted.
                Wrappers with an `.optimizer` are looked through.

        Where processes work together and first masks were made from weights, this is a collective call: it makes sure
        that all ranks made the same.

        Raises:
            ConfigurationError: An optimizer or a sharding that masks cannot work with, or masks that differ over ranks.
            OrderError: A masked weight is in none of the optimizers.
        """
        self._require_attached()
        found = guard.check_follow(self.methods, optimizer)
        guard.check_unfollowed(self._hooks, found)
        groups = self.param_groups()
        learned = [parameter for group in groups for parameter in group["params"]]
        if learned:
            guard.check_room(self._model, found, learned)
        with torch.no_grad():
            _check_first_masks(self.methods)
            self._place_masks()
            for tensor in self._hooks.tensors():
                tensor.enforce()
        if not optimizers.have_own_groups(learned, found):
            optimizers.move_to_own_groups(groups, found)
        self._hooks.follow(found)
        for method in self.methods:
            method.followed()

    def _adopt(self, optimizer: optim.Optimizer) -> None:
        try:
            self.follow(optimizer)
        except OrderError as error:
            raise OrderError(
                f"{error}. optimizer='auto' follows the one that steps first; where several train these weights, call "
                "sparsity.follow([first, second]) before they step (of a DSModel: model.handle.follow)"
            ) from None

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of what the methods learn (scores, thresholds), without weight decay; may be empty."""
        self._reshard()  # the optimizer's parameters are the shards
        return [group for method in self.methods for group in method.param_groups()]

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip gradients as `torch.nn.utils.clip_grad_norm_` does, by the norm over *active* weights.

        Gradients of pruned weights do not count in the norm, but are scaled with the others, so that growth by
        gradient still ranks them.

        Args:
            max_norm: Largest norm allowed.
            norm_type: Order of the norm, `inf` allowed.
            error_if_nonfinite: Whether a norm that is not finite raises a RuntimeError.

        Returns:
            The norm before clipping, 0-dim.
        """
        self._require_attached()
        self._require_placed()
        masked = {id(tensor.parameter): tensor for tensor in self._hooks.tensors() if tensor.computed is None}
        followed = (p for each in self._hooks.optimizers for p in optimizers.parameters(each))
        owners = {id(parameter): parameter for parameter in (*followed, *self._model.parameters())}.values()
        trained = [parameter for parameter in owners if parameter.grad is not None]
        gradients = []
        for parameter in trained:
            gradient = parameter.grad
            assert gradient is not None
            if (tensor := masked.get(id(parameter))) is not None:
                part = local(gradient).clone()
                enforce(part, tensor.mask)
                gradient = tensor.distribute(part)
            if isinstance(gradient, DTensor) and not len(local(gradient)):
                # A rank that holds no rows has no largest gradient; torch refuses where a zero changes no norm.
                zero = local(gradient).new_zeros(1)
                gradient = DTensor.from_local(zero, gradient.device_mesh, gradient.placements, run_check=False)
            gradients.append(gradient)
        norm = whole(nn.utils.get_total_norm(gradients, norm_type, error_if_nonfinite))
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
        return norm

    def penalty(self) -> Tensor:
        """Sum of the methods' loss terms for this step, 0-dim; 0 where no method has one, and after the end."""
        self._hooks.asked = True
        methods = self.methods if self._hooks.attached else ()
        terms = [method.loss_term() for method in methods]
        if found := [term for term in terms if term is not None]:
            return torch.stack(found).sum()
        device = next((p.device for p in self._model.parameters()), None)
        return torch.zeros((), device=device)

    # -- masks ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hardened(self) -> Iterator[None]:
        """Within this, outputs are those that `finalize` would leave now: soft masks and thresholds act as hard ones.

        For an evaluation in the midst of training; nothing has changed afterwards. Save the model outside of it.

        Raises:
            OrderError: It is in force already; within it steps, updates, `state_dict` and what ends training raise one.
        """
        self._require_attached()
        self._require_soft()
        self._reshard()
        with contextlib.ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(method.hardened())
            self._hooks.hardened = True
            try:
                yield
            finally:
                self._hooks.hardened = False
                self._reshard()  # an evaluation left whole scores in the model, and shards are to be put back

    @property
    def step(self) -> int:
        """Optimizer steps completed; steps skipped for non-finite gradients do not count."""
        return self._hooks.step

    @torch.no_grad()
    def update(self, phase: str = "update", **arguments: Any) -> list[MaskUpdate]:
        """Update masks now, whatever the schedule says.

        Between an optimizer's step and the next backward pass; gradients stay as they are, also where an update that
        is due by the schedule would have left out their step.

        Args:
            phase: `"update"`, or the name of a phase that a method offers (DSR: `"prune"`, `"reallocate"`,
                `"adjust_threshold"`).
            arguments: What the phase takes besides, if anything.

        Returns:
            What each method with this phase did.

        Raises:
            ConfigurationError: No method has such a phase.
        """
        self._require_attached()
        self._require_soft()
        self._require_placed()
        self._reshard()
        phases = [{"update": method.update, **method.phases()} for method in self.methods]
        if not any(phase in each for each in phases):
            allowed = sorted({name for each in phases for name in each})
            raise ConfigurationError(f"update: no method has a phase {phase!r}; there are {allowed}")
        asked = [(method, each[phase]) for method, each in zip(self.methods, phases, strict=True) if phase in each]
        for method, ask in asked:
            try:
                inspect.signature(ask).bind(self.step, self._hooks.state_of, **arguments)
            except TypeError as error:
                raise ConfigurationError(f"update: phase {phase!r} of {method.name}: {error}") from None
        return self._hooks.commit(self._hooks.propose(asked, self.step, **arguments))

    def freeze(self, frozen: bool = True) -> None:
        """Stop mask updates (or let them go on); masks stay in force."""
        self._require_attached()
        self._hooks.freeze(frozen)

    def on_update(self, callback: Callable[[MaskUpdate], object]) -> None:
        """Call a function after every mask update; it is not part of copies and pickles of the handle."""
        self._hooks.callbacks.append(callback)

    def masks(self) -> dict[str, Tensor]:
        """Masks by parameter name, bool in the weight's shape, True where active; sharded as the weight is."""
        self._require_placed()
        return {tensor.name: tensor.distribute(tensor.mask != 0) for tensor in self._hooks.tensors()}

    def density(self) -> float:
        """Fraction of active weights among those that methods claim, in (0, 1]; 1.0 where there are none.

        A weight whose mask is still being learned counts as active.
        """
        claims = self._hooks.claims()
        total = sum(prod(each.shape) for each in claims)
        pruned = sum(tensor.weights - tensor.active for tensor in self._hooks.tensors())
        return (total - pruned) / total if total else 1.0

    def summary(self) -> Summary:
        """Counts for every tensor and in all; prints as a table."""
        groups = self.param_groups() if self._hooks.attached else []
        return summarize(self._model, self.methods, {id(each) for group in groups for each in group["params"]})

    @torch.no_grad()
    def project(self, copy: nn.Module) -> None:
        """Write the present masks into a copy of the model, such as an EMA or SWA average.

        Masks that are still being learned are none yet: the gates of a copy are its own.

        Args:
            copy: A module with the same parameter names, or one around such a module, on all ranks; its weights may
                be whole where those of the model are sharded, and the other way round.

        Raises:
            ConfigurationError: A masked weight is missing in the copy, or has another shape.
        """
        self._project(copy)

    @torch.no_grad()
    def _project(self, copy: nn.Module) -> dict[int, MaskedTensor]:
        """Project, and return whose mask each parameter of the copy now has, by the parameter's id."""
        self._require_placed()
        if not isinstance(copy, nn.Module):
            raise ConfigurationError(f"project: expected a module, a copy of the model, got {type(copy).__name__}")
        found = {target.name: target for target, _ in named_weights(copy)}
        pairs = []
        tensors = self._hooks.tensors()
        every = [target.name for target, _ in named_weights(self._model)]
        prefix = _prefix([tensor.name for tensor in tensors], every, found)
        for tensor in tensors:
            target = found.get(prefix + tensor.name)
            if target is None or target.shape != tensor.shape:
                shape = None if target is None else target.shape
                raise ConfigurationError(
                    f"project: the copy has {'no parameter' if shape is None else f'shape {shape} for'} {tensor.name} "
                    f"{tensor.shape}; it must be a copy of the attached model"
                )
            pairs.append((target, tensor))
        for target, tensor in pairs:
            weight = local(target.parameter)
            mask = rows_like(tensor.distribute(tensor.mask), target.parameter).to(weight.device)
            if target.computed is None:
                enforce(weight, mask)
            else:
                target.computed.mask = mask.clone()
        return {id(target.parameter): tensor for target, tensor in pairs}

    # -- end -----------------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Let go of the optimizer and the model as they are: from now on nothing keeps pruned weights at zero.

        A weight that is computed from other numbers keeps its mask.
        """
        self._require_attached()
        self._require_soft()
        self._hooks.expect_penalty([method for method in self.methods if method.penalized])
        learned = {id(parameter) for group in self.param_groups() for parameter in group["params"]}
        for method in self.methods:
            method.detach()
        for optimizer in self._hooks.optimizers:
            optimizers.drop_parameters(optimizer, learned)
        self._hooks.release()

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        """End training: a plain model with exact zeros, without hooks, added parameters or their optimizer state.

        Returns:
            The model that was attached.
        """
        self._require_attached()
        self._require_soft()
        self._require_placed()
        self._hooks.expect_penalty([method for method in self.methods if method.penalized])
        learned = {id(parameter) for group in self.param_groups() for parameter in group["params"]}
        for method in self.methods:
            method.finalize()
        tensors = self._hooks.tensors()
        numbers = [tensor.parameter for tensor in tensors if tensor.computed is not None]
        for tensor in tensors:
            tensor.finalize()
        count_active(tensors)
        for optimizer in self._hooks.optimizers:
            optimizers.drop_parameters(optimizer, learned)
            for parameter in numbers:  # which are the weights themselves now, in another shape
                optimizer.state.pop(parameter, None)
        self._hooks.release()
        return self._model

    # -- state ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Masks (1 bit a weight, packed by rows), counters, thresholds and random state, as tensors and JSON values.

        The masks of sharded weights are DTensors, sharded alike; the world size may be another when they are loaded.
        """
        self._require_soft()
        self._require_placed()
        self._hooks.tell()
        return state.save(self.methods, self.step, self._hooks.frozen, self._hooks.second_moment)

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; pruned weights are set to 0.

        Load the model's and the optimizer's state as well, in any order. Newly active weights keep the value and the
        optimizer state that were loaded. Arguments that steer what comes, such as a drop fraction, may be others than
        the saved ones; each difference is logged as a warning.

        Raises:
            StateError: The state is not of this format, or of other methods, tensors, shapes or budgets.
        """
        self._require_attached()
        self._require_soft()
        self._require_placed()
        self._reshard()
        state.check(self.methods, saved)
        for line in state.differences(self.methods, saved, self._hooks.second_moment):
            logger.warning("%s; the run is not the one that was stopped", line)
        state.restore(self.methods, saved)
        self._hooks.step = int(saved["step"])
        self._hooks.frozen = bool(saved["frozen"])

    def _require_attached(self) -> None:
        if not self._hooks.attached:
            raise OrderError("this handle was detached or finalized; attach the model again to go on")

    def _require_soft(self) -> None:
        if self._hooks.hardened:
            raise OrderError("sparsity.hardened() is in force, which is for evaluations; leave it first")

    def _require_placed(self) -> None:
        """Masks go where a moved model is, and before an optimizer is followed of itself they are sharded as it is."""
        tensors = self._hooks.tensors()
        sharded = any(isinstance(tensor.parameter, DTensor) and tensor.target.sharded is None for tensor in tensors)
        if sharded and self._hooks.adopt is None:
            raise OrderError(f"the model was sharded, and its masks were not; {guard.ORDER}")
        if sharded or any(tensor.mask.device != tensor.parameter.device for tensor in tensors):
            with torch.no_grad():
                self._place_masks()  # weights stay as they are: a state of theirs may be loaded already, and masks not

    def _reshard(self) -> None:
        """Shard again what FSDP2 left whole after an evaluation: methods read more than the weights they claim."""
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _place_masks(self) -> None:
        """Keep of every mask what belongs to this rank, as the weights are sharded now."""
        tensors = self._hooks.tensors()
        for tensor, (group, first) in zip(tensors, [tensor.sharding() for tensor in tensors], strict=True):
            tensor.follow_sharding(group, first)
        for method in self.methods:
            for target in method.claims():
                target.remember_shard()


def _prefix(names: Sequence[str], every: Sequence[str], found: Collection[str]) -> str:
    """What a module around a copy puts before its names; "" where it is not to be told.

    Args:
        names: Names of the masked weights.
        every: Names of all parameters, which tell where the masked ones' may be parts of others.
        found: Names of all parameters of the module around.

    Raises:
        ConfigurationError: It holds several networks with these names.
    """
    ends = [name.removesuffix(names[0]) for name in found if name.endswith(names[0])] if names else []
    whole = [end for end in ends if not end or end.endswith(".")]
    fitting = [end for end in whole if all(end + name in found for name in names)]
    whole = [end for end in fitting if all(end + name in found for name in every)]
    if len(whole) == 1:
        return whole[0]
    if "" in fitting or not fitting:
        return ""
    if len(fitting) > 1:
        raise ConfigurationError(
            f"project: the copy holds {len(fitting)} networks with these parameters, as {fitting[0][:-1]!r} and "
            f"{fitting[1][:-1]!r}; give the one that is meant, such as copy.get_submodule({fitting[0][:-1]!r})"
        )
    return fitting[0]


def _check_masks(masks: object) -> None:
    """Raise unless masks are None, a text, or tensors of zeros and ones by parameter name."""
    if masks is None or isinstance(masks, str):
        return
    if not isinstance(masks, Mapping):
        raise ConfigurationError(
            f"masks: expected None, 'zeros' or a mapping of parameter names to masks, got {type(masks).__name__}"
        )
    for name, mask in masks.items():
        if not isinstance(name, str) or not isinstance(mask, Tensor):
            raise ConfigurationError(
                f"masks: expected tensors by parameter name, got {type(mask).__name__} for {name!r}"
            )
        if mask.layout is not torch.strided or mask.device.type == "meta" or not ((mask == 0) | (mask == 1)).all():
            raise ConfigurationError(
                f"masks: the mask of {name} ({mask.dtype}, {mask.device}) must be a dense tensor of True and False, "
                "or of 1 where active and 0 elsewhere"
            )


def _check_first_masks(methods: Sequence[Method]) -> None:
    """Raise on every rank where masks that come from weights differ, because ranks made different first weights."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for method in methods:
        for tensor in method.tensors if method.masks_from_weights else ():
            if tensor.process_group is None:
                own = zlib.crc32(pack(tensor.mask).cpu().numpy().tobytes())
                extremes = torch.tensor([own, -own], device=local(tensor.parameter).device)
                dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
                if extremes[0] != -extremes[1]:
                    raise ConfigurationError(
                        f"{tensor.name}: its first mask comes from its weights, and those differ over ranks; seed all "
                        "ranks alike before the model is made, or load the same weights everywhere"
                    )
