"""The engine: binds methods to a model, keeps masks in force through the optimizer, saves and restores their state.

Masks act through hooks of the optimizer, never in the forward pass, so the model stays an ordinary module with the
same keys. Around one optimizer step:

before  if a method has an update due: new masks from the weights and gradients at hand, state of grown weights
        made fresh; then gradients of pruned weights are zeroed where the optimizer would mix them into others
after   every pruned weight is set to +0.0

With several optimizers one step is a round in which each steps once; updates are made before the first of them.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from gossamer import optimizers
from gossamer.errors import ConfigurationError, OrderError, StateError
from gossamer.masks import MaskedTensor, count_over_shards, enforce, pack, unpack
from gossamer.method import Masks, Method, Proposal
from gossamer.summary import Summary, summarize
from gossamer.targets import closest, local, plain_name

FORMAT = 1
"""Version of the saved state."""

ORDER = (
    "the order is: attach(model, methods) -> wrap (torch.compile, DDP, fully_shard) -> make the optimizer -> "
    "sparsity.follow(optimizer) -> make the scheduler -> load state"
)

_MARK = "gossamer_follows"  # in `optimizer.defaults`, which copies and pickles of an optimizer keep and hooks do not survive
_live: weakref.WeakSet[Sparsity] = weakref.WeakSet()
_seen: weakref.WeakKeyDictionary[optim.Optimizer, int] = weakref.WeakKeyDictionary()
_generation = 0  # changes with every attach, follow and detach, so that `_seen` knows when to look again


@dataclass(frozen=True)
class MaskUpdate:
    """What one mask update did.

    Attributes:
        step: The optimizer step it belongs to.
        method: Name of the method.
        rows: For each tensor `name`, `pruned` and `grown` (weights that changed), `active` and `total`.
        extras: Further numbers, such as the threshold of DSR.
    """

    step: int
    method: str
    rows: list[dict[str, Any]]
    extras: dict[str, float] = field(default_factory=dict)


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
        optimizer: As for `Sparsity.follow`, where nothing wraps the model.
        masks: Where masks start: `None`, as each method says; `"zeros"`, the zeros the model has (sparse
            fine-tuning); or a mapping parameter name → mask, nonzero where active, in the weight's shape.
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
    _check_unwrapped(model)
    bound = [copy.deepcopy(method) for method in ([methods] if isinstance(methods, Method) else methods)]
    for method in bound:
        if not isinstance(method, Method):
            raise ConfigurationError(f"methods: expected methods such as gossamer.SET(...), got {method!r}")
        method.bind(model, masks)
    _check_claims(model, bound)
    if isinstance(masks, Mapping):
        names = [name for method in bound for name in method.claims()]
        if unknown := sorted(set(masks) - set(names)):
            raise ConfigurationError(f"masks: {unknown[0]!r} is no target" + closest(unknown[0], names))
    followed = [] if optimizer is None else _check_follow(bound, optimizer)
    with torch.no_grad():
        for method in bound:
            method.install()
    sparsity = Sparsity(model, bound, second_moment)
    if followed:
        sparsity.follow(followed)
    return sparsity


class Sparsity:
    """The handle of a model's sparsity; made by `attach`.

    Attributes:
        methods: The methods in force (copies of those given).
    """

    def __init__(self, model: nn.Module, methods: Sequence[Method], second_moment: str = "zero") -> None:
        self.methods = tuple(methods)
        self._model = model
        self._second_moment = second_moment
        self._optimizers: list[optim.Optimizer] = []
        self._owned: list[list[MaskedTensor]] = []
        self._hooks: list[RemovableHandle] = []
        self._callbacks: list[Callable[[MaskUpdate], object]] = []
        self._step = 0
        self._skipped: Tensor | None = None
        self._stepped: set[int] = set()
        self._withheld: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._skip_round = False
        self._frozen = False
        self._attached = True
        _register(self)

    # -- optimizer ---------------------------------------------------------------------------------------------------

    def follow(self, optimizer: object) -> None:
        """Keep the masks in force through the steps of an optimizer, or of several that share the parameters.

        Called after the model was wrapped and the optimizer made, before a scheduler is. Masks move to where the
        weights now are; learned parameters that the optimizer lacks are added to it, without weight decay. Following
        again replaces what was followed before.

        Args:
            optimizer: An optimizer or a list of them; wrappers with an `.optimizer` are looked through.

        Raises:
            ConfigurationError: An optimizer masks cannot work with.
            OrderError: A masked weight is in none of the optimizers.
        """
        self._require_attached()
        found = _check_follow(self.methods, optimizer)
        with torch.no_grad():
            for tensor in self._tensors():
                tensor.follow_sharding()
        self._unhook()
        held = {id(parameter) for each in found for parameter in optimizers.parameters(each)}
        added = [parameter for parameter in self._learned() if id(parameter) not in held]
        if added:
            if any("initial_lr" in group for group in found[0].param_groups):
                raise OrderError(f"a scheduler was made before learned parameters could be added; {ORDER}")
            found[0].add_param_group({"params": added, "weight_decay": 0.0})
        self._optimizers = found
        self._hook()

    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of what the methods learn (scores, thresholds), without weight decay; may be empty."""
        learned = self._learned()
        return [{"params": learned, "weight_decay": 0.0}] if learned else []

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
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
        masked = {id(tensor.parameter): tensor for tensor in self._tensors()}
        owners = [p for each in self._optimizers for p in optimizers.parameters(each)] or list(
            self._model.parameters()
        )
        trained = [parameter for parameter in owners if parameter.grad is not None]
        gradients = []
        for parameter in trained:
            gradient = parameter.grad
            assert gradient is not None
            if (tensor := masked.get(id(parameter))) is not None:
                part = local(gradient).clone()
                enforce(part, tensor.mask)
                gradient = tensor.distribute(part)
            gradients.append(gradient)
        norm = nn.utils.get_total_norm(gradients, norm_type, error_if_nonfinite)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
        return norm

    def penalty(self) -> Tensor:
        """Sum of the methods' loss terms for this step, 0-dim; 0 where no method has one."""
        terms = [term for method in self.methods if (term := method.penalty()) is not None]
        if terms:
            return torch.stack(terms).sum()
        device = next((p.device for p in self._model.parameters()), None)
        return torch.zeros((), device=device)

    # -- masks ---------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps completed; steps skipped for non-finite gradients do not count."""
        self._settle()
        return self._step

    @torch.no_grad()
    def update(self, phase: str = "update") -> list[MaskUpdate]:
        """Update masks now, whatever the schedule says.

        Args:
            phase: `"update"`, or the name of a phase that a method offers (DSR: `"prune"`, `"reallocate"`,
                `"adjust_threshold"`).

        Returns:
            What each method with this phase did.

        Raises:
            ConfigurationError: No method has such a phase.
        """
        self._require_attached()
        phases = [{"update": method.update, **method.phases()} for method in self.methods]
        if not any(phase in each for each in phases):
            allowed = sorted({name for each in phases for name in each})
            raise ConfigurationError(f"update: no method has a phase {phase!r}; there are {allowed}")
        proposals = [
            (method, each[phase](self.step, self._state_of))
            for method, each in zip(self.methods, phases, strict=True)
            if phase in each
        ]
        return [self._commit(method, proposal, self.step) for method, proposal in proposals]

    def freeze(self, frozen: bool = True) -> None:
        """Stop mask updates (or let them go on); masks stay in force."""
        self._require_attached()
        self._frozen = frozen

    def on_update(self, callback: Callable[[MaskUpdate], object]) -> None:
        """Call a function after every mask update; it is not part of copies and pickles of the handle."""
        self._callbacks.append(callback)

    def masks(self) -> dict[str, Tensor]:
        """Masks by parameter name, bool in the weight's shape, True where active; sharded as the weight is."""
        return {tensor.name: tensor.distribute(tensor.mask != 0) for tensor in self._tensors()}

    def density(self) -> float:
        """Fraction of active weights among the masked ones, in (0, 1]; 1.0 where none is masked."""
        tensors = self._tensors()
        total = sum(tensor.weights for tensor in tensors)
        return sum(tensor.active for tensor in tensors) / total if total else 1.0

    def summary(self) -> Summary:
        """Counts for every tensor and in all; prints as a table."""
        return summarize(self._model, self.methods)

    @torch.no_grad()
    def project(self, copy: nn.Module) -> None:
        """Write the present masks into a copy of the model, such as an EMA or SWA average.

        Args:
            copy: A module with the same parameter names (prefixes of wrappers are ignored).

        Raises:
            ConfigurationError: A masked weight is missing in the copy, or has another shape.
        """
        found = {
            plain_name(name): parameter for name, parameter in copy.named_parameters(remove_duplicate=False)
        }
        pairs = []
        for tensor in self._tensors():
            parameter = found.get(tensor.name, found.get(f"module.{tensor.name}"))
            if parameter is None or local(parameter).shape != tensor.mask.shape:
                shape = None if parameter is None else tuple(parameter.shape)
                raise ConfigurationError(
                    f"project: the copy has {'no parameter' if shape is None else f'shape {shape} for'} {tensor.name} "
                    f"{tensor.shape}; it must be a copy of the attached model"
                )
            pairs.append((local(parameter), tensor.mask))
        for weight, mask in pairs:
            enforce(weight, mask.to(weight.device))

    # -- end -----------------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Let go of the optimizer and the model as they are: from now on nothing keeps pruned weights at zero."""
        self._require_attached()
        self._unhook()
        self._optimizers = []
        self._attached = False
        _register(self, gone=True)

    @torch.no_grad()
    def finalize(self) -> nn.Module:
        """End training: a plain model with exact zeros, without hooks, added parameters or their optimizer state.

        Returns:
            The model that was attached.
        """
        self._require_attached()
        learned = {id(parameter) for parameter in self._learned()}
        for tensor in self._tensors():
            enforce(local(tensor.parameter), tensor.mask)
        for method in self.methods:
            method.finalize()
        for optimizer in self._optimizers:
            _drop_parameters(optimizer, learned)
        self.detach()
        return self._model

    # -- state ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Masks (1 bit a weight, packed by rows), counters, thresholds and random state, as tensors and JSON values.

        The masks of sharded weights are DTensors, sharded alike; the world size may be another when they are loaded.
        """
        return {
            "format": FORMAT,
            "step": self.step,
            "frozen": self._frozen,
            "masks": {tensor.name: tensor.distribute(pack(tensor.mask)) for tensor in self._tensors()},
            "shapes": {tensor.name: list(tensor.shape) for tensor in self._tensors()},
            "methods": [{"config": method.config(), "state": method.state_dict()} for method in self.methods],
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; pruned weights are set to 0.

        Load the model's and the optimizer's state as well, in any order. Newly active weights keep the value and the
        optimizer state that were loaded.

        Raises:
            StateError: The state is not of this format, or of other methods, tensors, shapes or budgets.
        """
        self._require_attached()
        packed = self._check_state(state)
        for tensor, bits in zip(self._tensors(), packed, strict=True):
            tensor.mask.copy_(unpack(bits.to(tensor.mask.device), tensor.mask.shape))
            enforce(local(tensor.parameter), tensor.mask)
        counts = count_over_shards(
            self._tensors(), [tensor.mask.count_nonzero() for tensor in self._tensors()]
        )
        for tensor, count in zip(self._tensors(), counts, strict=True):
            tensor.active = count
        for method, saved in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(saved["state"])
        self._step = int(state["step"])
        self._frozen = bool(state["frozen"])
        self._skipped = None
        self._stepped.clear()

    def _check_state(self, state: Mapping[str, Any]) -> list[Tensor]:
        if state.get("format") != FORMAT:
            raise StateError(
                f"sparsity state: format {state.get('format')!r}, this version of gossamer reads {FORMAT}; it is a state of "
                "another version, or not one that Sparsity.state_dict() made"
            )
        if missing := [key for key in ("step", "frozen", "masks", "shapes", "methods") if key not in state]:
            raise StateError(f"sparsity state: {missing[0]!r} is missing; the file is incomplete")
        saved = [each["config"].get("method") for each in state["methods"]]
        here = [method.config().get("method") for method in self.methods]
        if saved != here:
            raise StateError(
                f"sparsity state: saved with methods {saved}, attached are {here}; attach the same methods"
            )
        for method, each in zip(self.methods, state["methods"], strict=True):
            for key, value in method.config().items():
                if each["config"].get(key) != value:
                    raise StateError(
                        f"sparsity state: {method.name} was saved with {key}={_brief(each['config'].get(key))}, attached is "
                        f"{_brief(value)}; attach with the arguments it was saved with"
                    )
            method.check_state(each["state"])
        packed = []
        saved_masks = {_strip(name): mask for name, mask in state["masks"].items()}
        for tensor in self._tensors():
            mask = saved_masks.get(_strip(tensor.name))
            if mask is None:
                raise StateError(
                    f"sparsity state: no mask of {tensor.name}; there are {_brief(sorted(saved_masks))}"
                )
            shape = next(
                shape for name, shape in state["shapes"].items() if _strip(name) == _strip(tensor.name)
            )
            expected = (tensor.shape[0], -(-(tensor.weights // tensor.shape[0]) // 8))
            if (
                list(shape) != list(tensor.shape)
                or tuple(mask.shape) != expected
                or mask.dtype != torch.uint8
            ):
                raise StateError(
                    f"sparsity state: the mask of {tensor.name} is for shape {tuple(shape)} (packed {tuple(mask.shape)}, "
                    f"{mask.dtype}), the weight has {tensor.shape} (packed {expected}, torch.uint8)"
                )
            packed.append(tensor.local_rows(mask))
        return packed

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return self.__dict__ | {
            "_hooks": [],
            "_callbacks": [],
            "_stepped": set(),
            "_withheld": {},
            "_owned": [],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._attached:
            _register(self)
            self._hook()

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        self._owned = []
        for optimizer in self._optimizers:
            held = {id(parameter) for parameter in optimizers.parameters(optimizer)}
            self._owned.append([tensor for tensor in self._tensors() if id(tensor.parameter) in held])
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
            optimizer.defaults[_MARK] = True
        self._stepped.clear()
        _register(self)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for optimizer in self._optimizers:
            optimizer.defaults.pop(_MARK, None)
        self._hooks = []

    def _before_step(
        self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        index = self._index(optimizer)
        held = {id(parameter) for parameter in optimizers.parameters(optimizer)}
        for tensor in self._owned[index]:
            if id(tensor.parameter) not in held:
                raise OrderError(
                    f"{tensor.name} was replaced after sparsity.follow(optimizer), so this optimizer no longer trains it; {ORDER}"
                )
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._with_gradients(optimizer, index)
            return None

        def closure_then_masks() -> Any:
            loss = closure()
            self._with_gradients(optimizer, index)
            return loss

        if len(args) > 1:
            return (args[0], closure_then_masks, *args[2:]), kwargs
        return args, kwargs | {"closure": closure_then_masks}

    @torch.no_grad()
    def _with_gradients(self, optimizer: optim.Optimizer, index: int) -> None:
        """Do what belongs between backward and the update of weights."""
        if not self._stepped or index in self._stepped:
            self._stepped.clear()
            self._skip_round = self._begin_round(optimizer)
        if self._skip_round:
            held = [p for p in optimizers.parameters(optimizer) if p.grad is not None]
            self._withheld[index] = [(p, p.grad) for p in held if p.grad is not None]
            for parameter in held:
                parameter.grad = None
        elif not optimizers.is_elementwise(optimizer):
            for tensor in self._owned[index]:
                if tensor.parameter.grad is not None:
                    enforce(local(tensor.parameter.grad), tensor.mask)

    def _begin_round(self, optimizer: optim.Optimizer) -> bool:
        """Count the step and make the updates that are due; returns whether the optimizers' step is left out."""
        self._step += 1
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None:
            # A fused optimizer is stepped even where gradients overflowed and it will do nothing. Waiting for the flag
            # at every step would stall the device, so it is summed there and read only when an update may be due.
            skipped = (overflow > 0).to(torch.int64).reshape(())
            self._skipped = skipped if self._skipped is None else self._skipped + skipped
        if self._frozen or not any(method.due(self._step) for method in self.methods):
            return False
        if overflow is not None:
            self._settle()
            if bool(overflow > 0):
                return False
        due = [method for method in self.methods if method.due(self._step)]
        proposals = [(method, method.update(self._step, self._state_of)) for method in due]
        for method, proposal in proposals:
            self._commit(method, proposal, self._step)
        return any(method.skip_step for method in due)

    def _after_step(self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = self._index(optimizer)
        for parameter, gradient in self._withheld.pop(index, ()):
            parameter.grad = gradient
        for tensor in self._owned[index]:
            enforce(local(tensor.parameter), tensor.mask)
        self._stepped.add(index)
        if len(self._stepped) == len(self._optimizers):
            self._stepped.clear()
            for method in self.methods:
                method.after_step(self._step)

    def _settle(self) -> None:
        """Take steps that were skipped on the device back from the count; waits for the device."""
        if self._skipped is not None:
            self._step -= int(self._skipped)
            self._skipped = None

    def _commit(self, method: Method, proposal: Proposal, step: int) -> MaskUpdate:
        before = [tensor.active for tensor, _, _ in proposal.changes]
        tensors = [tensor for tensor, _, _ in proposal.changes]
        grown = []
        for tensor, alive, active in proposal.changes:
            new = tensor.set_alive(alive, active)
            optimizer, group = self._group_of(tensor)
            if optimizer is not None and tensor.parameter in optimizer.state:
                optimizers.refresh(tensor, new, group, optimizer.state[tensor.parameter], self._second_moment)
            grown.append(new.count_nonzero())
        counts = count_over_shards(tensors, grown)
        rows = [
            {
                "name": tensor.name,
                "pruned": was - tensor.active + more,
                "grown": more,
                "active": tensor.active,
                "total": tensor.weights,
            }
            for tensor, was, more in zip(tensors, before, counts, strict=True)
        ]
        update = MaskUpdate(step, method.name, rows, proposal.extras)
        for callback in self._callbacks:
            callback(update)
        return update

    def _index(self, optimizer: optim.Optimizer) -> int:
        return next(i for i, each in enumerate(self._optimizers) if each is optimizer)

    def _group_of(self, tensor: MaskedTensor) -> tuple[optim.Optimizer | None, dict[str, Any]]:
        parameter = tensor.parameter
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if any(each is parameter for each in group["params"]):
                    return optimizer, group
        return None, {}

    def _state_of(self, tensor: MaskedTensor) -> Mapping[str, Any]:
        optimizer, _ = self._group_of(tensor)
        return {} if optimizer is None else optimizer.state.get(tensor.parameter, {})

    def _tensors(self) -> list[MaskedTensor]:
        return [tensor for method in self.methods for tensor in method.tensors]

    def _learned(self) -> list[nn.Parameter]:
        return [parameter for method in self.methods for parameter in method.learned()]

    def _require_attached(self) -> None:
        if not self._attached:
            raise OrderError("this handle was detached or finalized; attach the model again to go on")


def _register(sparsity: Sparsity, gone: bool = False) -> None:
    global _generation
    _generation += 1
    (_live.discard if gone else _live.add)(sparsity)


def _refuse_unfollowed(optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before any optimizer's step: raise where masked weights would be trained without their masks."""
    if _seen.get(optimizer) == _generation:
        return
    held = {id(parameter) for parameter in optimizers.parameters(optimizer)}
    followers = [sparsity for sparsity in _live if any(optimizer is each for each in sparsity._optimizers)]
    for sparsity in _live:
        for tensor in sparsity._tensors():
            if sparsity not in followers and id(tensor.parameter) in held:
                raise OrderError(
                    f"{tensor.name} has a mask, but no sparsity.follow(optimizer) was called; {ORDER}"
                )
    if optimizer.defaults.get(_MARK) and not followers:
        raise OrderError(
            "this optimizer is a copy of one that kept masks in force, made without the Sparsity handle, and would train "
            "pruned weights; copy or pickle (model, optimizer, sparsity) together, or call sparsity.follow(optimizer)"
        )
    _seen[optimizer] = _generation


register_optimizer_step_pre_hook(_refuse_unfollowed)


def _check_unwrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        raise OrderError(f"model: is already wrapped ({type(model).__name__}); {ORDER}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise OrderError(f"{name}: is already sharded; {ORDER}")


def _check_claims(model: nn.Module, methods: Sequence[Method]) -> None:
    owner: dict[str, Method] = {}
    for method in methods:
        for name in method.claims():
            if name in owner:
                raise ConfigurationError(
                    f"{name}: belongs to both {owner[name]!r} and {method!r}; give their `targets` so that they do not overlap"
                )
            owner[name] = method
        for tensor in method.tensors:
            if not tensor.parameter.requires_grad:
                raise ConfigurationError(
                    f"{tensor.name}: is frozen (requires_grad=False) and would not be trained; leave it out with "
                    f"targets=['!{tensor.name}'], or prune it with gossamer.prune"
                )
    parameters = dict(model.named_parameters())
    for sparsity in _live:
        for tensor in sparsity._tensors():
            if any(tensor.parameter is parameters.get(name) for name in owner):
                raise OrderError(
                    f"{tensor.name}: already has a mask from an earlier attach; call finalize() or detach() on that handle first"
                )


def _check_follow(methods: Sequence[Method], optimizer: object) -> list[optim.Optimizer]:
    """Unwrap optimizers and check that every masked weight is in exactly one of them."""
    given = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    found = [optimizers.unwrap(each) for each in given]
    holders: dict[int, int] = {}
    for each in found:
        for parameter in optimizers.parameters(each):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for method in methods:
        for tensor in method.tensors:
            count = holders.get(id(tensor.parameter), 0)
            if count != 1:
                raise OrderError(
                    f"{tensor.name}: is in {count} of the {len(found)} optimizers given, must be in one (wrapping a model may "
                    f"replace its parameters); {ORDER}"
                )
    return found


def _drop_parameters(optimizer: optim.Optimizer, gone: set[int]) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in gone:
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _strip(name: str) -> str:
    return plain_name(name).removeprefix("module.")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]} …"
