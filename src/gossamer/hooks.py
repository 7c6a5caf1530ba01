"""What happens around an optimizer's step.

before  if a method has an update due: new masks from the weights and gradients at hand, and fresh state for grown
        weights; then gradients of pruned weights are zeroed where the optimizer would mix them into others
after   every pruned weight is set to +0.0

With several optimizers the steps of the first are counted, and updates are made before those: a gradient scaler may
leave out any of them, so what belongs together cannot be told from how often each has stepped.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils.hooks import RemovableHandle

from gossamer import guard, optimizers
from gossamer.errors import OrderError
from gossamer.masks import MaskedTensor, enforce, sum_over_shards
from gossamer.method import MaskUpdate, Method, Proposal
from gossamer.targets import Target, local, plain_name


class StepHooks:
    """Keeps the masks of methods in force through the steps of optimizers, and runs the updates that are due.

    Attributes:
        optimizers: The optimizers followed.
        attached: Whether masks are to be kept; `release` ends it.
        frozen: Whether updates that are due are left out.
        hardened: Whether masks are hard for an evaluation, in which no step may be made.
        asked: Whether the penalty was asked for, or its absence was told.
        second_moment: Where Adam's second moment starts for weights that begin anew.
        callbacks: Called after every update; not part of copies and pickles.
        adopt: Follows an optimizer that steps unfollowed with claimed weights, where that was asked for.
    """

    def __init__(self, model: nn.Module, methods: Sequence[Method], second_moment: str) -> None:
        self.optimizers: list[optim.Optimizer] = []
        self.attached = True
        self.frozen = False
        self.hardened = False
        self.asked = False
        self.callbacks: list[Callable[[MaskUpdate], object]] = []
        self.adopt: Callable[[optim.Optimizer], None] | None = None
        self._model = model
        self._methods = methods
        self.second_moment = second_moment
        self._handles: list[RemovableHandle] = []
        self._stepped = False  # since it was made, loaded or not
        self._step = 0
        self._told = 0  # the last step that methods were told of
        self._overflows: Tensor | None = None
        self._left_out: set[int] = set()  # optimizers whose next step is withheld, since an update asked for it
        self._withheld: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._loaded: set[int] = set()  # optimizers that may have state of pruned weights, from before they had masks
        guard.watch(self)

    def tensors(self) -> list[MaskedTensor]:
        """The masked tensors of all methods."""
        return [tensor for method in self._methods for tensor in method.tensors]

    def claims(self) -> list[Target | MaskedTensor]:
        """What belongs to the methods, by name and parameter, whether its masks are hard already or not."""
        return [each for method in self._methods for each in method.holdings()]

    def trained_with(self) -> dict[int, str]:
        """Where methods added parameters to the model: the names of all of its parameters, by id; else nothing."""
        if not any(method.param_groups() for method in self._methods):
            return {}
        return {id(parameter): plain_name(name) for name, parameter in self._model.named_parameters()}

    def learned_in(self, parameters: Sequence[Tensor]) -> str | None:
        """The name of one of these parameters that methods added to the model; None where there is none."""
        added = {id(each) for method in self._methods for group in method.param_groups() for each in group["params"]}
        if not any(id(parameter) in added for parameter in parameters):
            return None
        names = {id(parameter): plain_name(name) for name, parameter in self._model.named_parameters()}
        return next(names.get(id(each), "a parameter") for each in parameters if id(each) in added)

    def follow(self, found: list[optim.Optimizer]) -> None:
        """Hook into these optimizers instead of those followed before."""
        self.release()
        self.optimizers = found
        for optimizer in found:
            # A compiled `optimizer.step` runs these as they are, between its graphs.
            before, after = (torch.compiler.disable(hook) for hook in (self._before_step, self._after_step))  # type: ignore[no-untyped-call]
            self._handles.append(optimizer.register_step_pre_hook(before))
            self._handles.append(optimizer.register_step_post_hook(after))
            optimizer.defaults = guard.FollowedDefaults(optimizer.defaults)
            if not optimizers.is_elementwise(optimizer):
                self._handles.append(optimizer.register_load_state_dict_post_hook(self._note_loaded))
                self._loaded.add(id(optimizer))
        self.attached = True
        guard.watch(self)

    def _note_loaded(self, optimizer: optim.Optimizer) -> None:
        self._loaded.add(id(optimizer))

    def release(self) -> None:
        """Let go of the optimizers."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self.optimizers:
            optimizer.defaults = dict(optimizer.defaults)
        self.optimizers, self._handles = [], []
        self._left_out.clear()
        self._loaded.clear()
        self.attached = False
        guard.release(self)

    @property
    def step(self) -> int:
        """Steps completed; reading it waits for the device where steps may have been skipped."""
        self._settle()
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step, self._told, self._overflows = value, value, None
        self._left_out.clear()

    def freeze(self, frozen: bool) -> None:
        """Leave out updates that are due from now on, or no longer."""
        # A due step is met by counting; taken back only after the stretch, overflows would let it be passed over.
        self._settle()
        self.frozen = frozen

    def expect_penalty(self, penalized: Sequence[Method]) -> None:
        """Warn, once, where steps were made without these methods' terms of the loss."""
        if penalized and self._stepped and not self.asked:
            self.asked = True
            warnings.warn(
                f"{penalized[0].name}: sparsity.penalty() was never called, and without it in the loss nothing drives "
                "what is learned towards zeros; train with loss + sparsity.penalty()",
                stacklevel=3,
            )

    def propose(
        self, due: Sequence[tuple[Method, Callable[..., Proposal]]], step: int, **arguments: Any
    ) -> list[tuple[Method, Proposal]]:
        """Ask methods for new masks; where one fails, the state of all is as before."""
        before = [_snapshot(method.state_dict()) for method, _ in due]
        penalized = {method for method, _ in due if method.penalized}
        try:
            found = [(method, ask(step, self.state_of, **arguments)) for method, ask in due]
            self.expect_penalty(
                [each for each, made in found if each in penalized and (made.changes or made.skip_step)]
            )
            return found
        except BaseException:
            for (method, _), state in zip(due, before, strict=True):
                method.load_state_dict(state)
            raise

    def commit(self, proposals: Sequence[tuple[Method, Proposal]]) -> list[MaskUpdate]:
        """Put new masks in force, give weights that begin anew fresh optimizer state, then tell the callbacks."""
        updates = [self._apply(method, proposal) for method, proposal in proposals]
        for update in updates:
            for callback in self.callbacks:
                callback(update)
        return updates

    def _apply(self, method: Method, proposal: Proposal) -> MaskUpdate:
        for each in self.optimizers:
            optimizers.restart(each, proposal.restarted)
        if proposal.write is not None:
            proposal.write()
            for tensor in self.tensors():
                tensor.enforce()
        tensors = [change.tensor for change in proposal.changes]
        before = [tensor.active for tensor in tensors]
        counts = []
        for tensor, change in zip(tensors, proposal.changes, strict=True):
            grown, begun = tensor.apply(change)
            if not self._refresh(tensor, begun):
                tensor.begun = begun if tensor.begun is None else tensor.begun | begun
            counts.append(torch.stack([grown.count_nonzero(), tensor.mask.count_nonzero()]))
        found = sum_over_shards(tensors, counts).tolist()
        for tensor, (_, active) in zip(tensors, found, strict=True):
            tensor.active = active
        rows = [
            {
                "name": tensor.name,
                "pruned": was - tensor.active + more,
                "grown": more,
                "active": tensor.active,
                "total": tensor.weights,
            }
            for tensor, was, (more, _) in zip(tensors, before, found, strict=True)
        ]
        return MaskUpdate(self.step, method.name, rows, proposal.extras)

    def _refresh(self, tensor: MaskedTensor, begun: Tensor) -> bool:
        """Give weights that begin anew fresh optimizer state; returns whether there is any state of the tensor."""
        optimizer, group = self._holder(tensor)
        state = None if optimizer is None else optimizer.state.get(tensor.parameter)
        if optimizer is None or not state:
            return False
        mixes = not optimizers.is_elementwise(optimizer)
        optimizers.refresh(tensor, begun, group, state, mixes, self.second_moment)
        return True

    def _refresh_late(self) -> None:
        """The same for updates by hand that were made before the optimizer was followed, or before it was loaded."""
        for tensor in self.tensors():
            if tensor.begun is not None:
                self._refresh(tensor, tensor.begun)
                tensor.begun = None

    def state_of(self, tensor: MaskedTensor) -> Mapping[str, Any]:
        """The optimizer's state of a tensor's parameter; empty before its first step."""
        optimizer, _ = self._holder(tensor)
        return {} if optimizer is None else optimizer.state.get(tensor.parameter, {})

    def _holder(self, tensor: MaskedTensor) -> tuple[optim.Optimizer | None, Mapping[str, Any]]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if any(each is tensor.parameter for each in group["params"]):
                    return optimizer, group
        return None, {}

    def _held(self, optimizer: optim.Optimizer) -> list[MaskedTensor]:
        """The masked tensors that an optimizer trains; asked anew at every step, since masks may become hard midway."""
        held = {id(parameter) for parameter in optimizers.parameters(optimizer)}
        tensors = self.tensors()
        mine = [tensor for tensor in tensors if id(tensor.parameter) in held]
        if len(mine) < len(tensors):
            others = {id(p) for each in self.optimizers for p in optimizers.parameters(each)}
            for tensor in tensors:
                if id(tensor.parameter) not in others:
                    raise OrderError(
                        f"{tensor.name}: was replaced after sparsity.follow(optimizer), or taken out of the optimizer, "
                        f"which no longer trains it; {guard.ORDER}"
                    )
        return mine

    def _before_step(
        self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _is_no_step(optimizer):
            return None
        if self.hardened:
            raise OrderError("sparsity.hardened() is in force, which is for evaluations; leave it before the next step")
        index = self._index(optimizer)
        self._held(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._with_gradients(optimizer, index)
            return None

        calls = itertools.count()  # an optimizer may evaluate its closure several times in one step

        def closure_then_masks() -> Any:
            loss = closure()
            self._with_gradients(optimizer, index, begins=next(calls) == 0)
            return loss

        if len(args) > 1:
            return (args[0], closure_then_masks, *args[2:]), kwargs
        return args, kwargs | {"closure": closure_then_masks}

    @torch.no_grad()
    def _with_gradients(self, optimizer: optim.Optimizer, index: int, begins: bool = True) -> None:
        """Do what belongs between backward and the change of weights."""
        if begins:
            for parameter, gradient in self._withheld.pop(index, ()):  # a step that raised did not give them back
                if parameter.grad is None:
                    parameter.grad = gradient
        if begins and index == 0:
            self.tell()  # where a gradient scaler left out the last optimizer
            self._left_out = set(range(len(self.optimizers))) if self._begin_step(optimizer) else set()
            self._refresh_late()
        if index in self._left_out:
            held = [(p, p.grad) for p in optimizers.parameters(optimizer) if p.grad is not None]
            self._withheld[index] = held
            for parameter, _ in held:
                parameter.grad = None
        elif not optimizers.is_elementwise(optimizer):
            tensors = self._held(optimizer)
            if id(optimizer) in self._loaded:  # only now, since masks may be loaded after the optimizer
                self._loaded.discard(id(optimizer))
                for tensor in tensors:
                    optimizers.forget_pruned(tensor, optimizer.state.get(tensor.parameter, {}))
            for tensor in tensors:
                if tensor.computed is None and tensor.parameter.grad is not None:
                    enforce(local(tensor.parameter.grad), tensor.mask)

    def _begin_step(self, optimizer: optim.Optimizer) -> bool:
        """Count the step and make the updates that are due; returns whether the optimizers' step is left out."""
        self._step += 1
        self._stepped = True
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None:
            # A fused optimizer is stepped also where gradients overflowed, and then does nothing. Waiting for that flag
            # at every step would stall the device, so it is added up there and read only when an update may be due.
            skipped = (overflow > 0).to(torch.int64).reshape(())
            self._overflows = skipped if self._overflows is None else self._overflows + skipped
        if self.frozen or not any(method.due(self._step) for method in self._methods):
            return False
        self._settle()
        if overflow is not None and bool(overflow > 0):
            return False
        due = [(method, method.update) for method in self._methods if method.due(self._step)]
        try:
            proposals = self.propose(due, self._step)
        except BaseException:
            self._step -= 1
            raise
        self.commit(proposals)
        return any(proposal.skip_step for _, proposal in proposals)

    def _after_step(self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_no_step(optimizer):
            return
        index = self._index(optimizer)
        self._left_out.discard(index)
        for parameter, gradient in self._withheld.pop(index, ()):
            parameter.grad = gradient
        for tensor in self._held(optimizer):
            with torch.no_grad():
                tensor.enforce()
        if index == len(self.optimizers) - 1:
            self.tell()

    @torch.no_grad()
    def tell(self) -> None:
        """Tell methods of a completed step that they were not told of yet, and commit what they propose."""
        listening = [method for method in self._methods if type(method).after_step is not Method.after_step]
        if not listening or self.step == self._told:  # reading the step waits for the device
            return
        self._told = self.step
        for method in listening:
            method.after_step(self._told)

    def _settle(self) -> None:
        if self._overflows is not None:
            self._step -= int(self._overflows)
            self._overflows = None

    def _index(self, optimizer: optim.Optimizer) -> int:
        return next(i for i, each in enumerate(self.optimizers) if each is optimizer)

    def __getstate__(self) -> dict[str, Any]:
        transient: dict[str, Any] = {"_handles": [], "_withheld": {}, "_loaded": set(), "callbacks": []}
        return self.__dict__ | {"_step": self.step} | transient

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.optimizers:
            self.follow(self.optimizers)
        elif self.attached:
            guard.watch(self)


def _snapshot(state: Any) -> Any:
    """A copy of a state, but for its tensors: methods replace those, and a rewind point is as large as the model."""
    if isinstance(state, Mapping):
        return {key: _snapshot(value) for key, value in state.items()}
    return [_snapshot(value) for value in state] if isinstance(state, list) else state


def _is_no_step(optimizer: optim.Optimizer) -> bool:
    """Whether this hook runs though no step is made, or within one that its hook runs for already.

    torch runs the hooks of a subclass and of its base class, where both define `step` and the one calls the other.
    Its functions for distributed checkpoints step an optimizer that has no state yet, with learning rates of zero, to
    have it make one: often between the loading of weights and that of masks.
    """
    steps = 0
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module, name = frame.f_globals.get("__name__"), frame.f_code.co_name
        if module == "torch.optim.optimizer":
            args = frame.f_locals.get("args")
            steps += isinstance(args, tuple) and len(args) > 0 and args[0] is optimizer  # this one is the first
        if steps > 1 or (module == "torch.distributed.checkpoint.state_dict" and name == "_init_optim_state"):
            return True
        frame = frame.f_back
    return False
