"""Masks from aggregated activations: watch what enters layers, choose what may pass, and let nothing else pass.

The interface is that of PyTorch's experimental `ActivationSparsifier`: code for it runs after changing the import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer.errors import ConfigurationError, NonFiniteError, OrderError, StateError
from gossamer.targets import plain_name

Aggregate = Callable[[Tensor, Tensor], Tensor]
Reduce = Callable[[Tensor], Tensor]
MaskOf = Callable[..., Tensor]

_FUNCTIONS = ("aggregate_fn", "reduce_fn", "mask_fn")
_STATES = ("aggregate", "sparsify", "None")


class ActivationSparsifier:
    """Multiplies what enters layers by masks made from what entered them before.

    `mask = mask_fn(reduce_fn(aggregate_fn(… aggregate_fn(x₁, x₂) …, xₙ)), **sparse_config)`, where `xᵢ` is a layer's
    first input at its i-th call. `register_layer` begins to watch, `step` makes masks, `squash_mask` applies them.

    Aggregates are detached. Where a batch is smaller than others its rows are aggregated with as many of theirs. Ranks'
    aggregates are aggregated in turn, so that all have the same masks.

    Args:
        model: The model.
        aggregate_fn: Default of all layers: takes two tensors and returns one of their shape.
        reduce_fn: Likewise: takes the aggregate and returns what the mask is made of.
        mask_fn: Likewise: takes that, and the configuration by name; returns the mask, which broadcasts over inputs.
        features: Likewise: indices along `feature_dim` that have masks of their own; other features pass. `None` for
            one mask of all.
        feature_dim: Likewise: the dimension of features.
        sparse_config: Likewise: further arguments of `mask_fn`.

    Attributes:
        model: The model.
        defaults: The defaults.
        data_groups: For each registered layer, by its name in the model, its functions and configuration, its `layer`,
            its `hook` and `hook_state` (`"aggregate"`, `"sparsify"` or `"None"`), and `data`, the aggregate so far.
        state: For each registered layer its `mask`: a tensor, or one for each feature.
    """

    def __init__(
        self,
        model: nn.Module,
        aggregate_fn: Aggregate | None = None,
        reduce_fn: Reduce | None = None,
        mask_fn: MaskOf | None = None,
        features: Sequence[int] | None = None,
        feature_dim: int | None = None,
        **sparse_config: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.defaults: dict[str, Any] = {
            "sparse_config": sparse_config,
            "aggregate_fn": aggregate_fn,
            "reduce_fn": reduce_fn,
            "mask_fn": mask_fn,
            "features": features,
            "feature_dim": feature_dim,
        }
        self.data_groups: dict[str, dict[str, Any]] = {}
        self.state: dict[str, dict[str, Any]] = {}

    # -- layers --------------------------------------------------------------------------------------------------------

    def register_layer(
        self,
        layer: nn.Module,
        aggregate_fn: Aggregate | None = None,
        reduce_fn: Reduce | None = None,
        mask_fn: MaskOf | None = None,
        features: Sequence[int] | None = None,
        feature_dim: int | None = None,
        **sparse_config: Any,
    ) -> None:
        """Begin to aggregate what enters a layer of the model; arguments that are left out are the defaults'.

        A layer that is registered already begins anew.

        Raises:
            ConfigurationError: The layer is not in the model, a function is missing, or features without a dimension.
        """
        name = self._name_of(layer)
        given = {
            "aggregate_fn": aggregate_fn,
            "reduce_fn": reduce_fn,
            "mask_fn": mask_fn,
            "features": features,
            "feature_dim": feature_dim,
        }
        config = self.defaults | {key: value for key, value in given.items() if value is not None}
        config["sparse_config"] = {**self.defaults["sparse_config"], **sparse_config}
        for key in _FUNCTIONS:
            if not callable(config[key]):
                raise ConfigurationError(f"{name}: {key} is {config[key]!r}; give a function, here or as a default")
        if config["features"] is not None and config["feature_dim"] is None:
            raise ConfigurationError(f"{name}: features={config['features']!r} need a feature_dim; give it as well")
        if name in self.data_groups:
            self.unregister_layer(name)
        self.data_groups[name] = config | {"layer": layer, "hook_state": "None"}
        self.state[name] = {"mask": None}
        self._hook(name, "aggregate")

    def unregister_layer(self, name: str) -> None:
        """Take the hook off a layer and forget it.

        Raises:
            ConfigurationError: No layer is registered by this name.
        """
        self._group(name)
        self._hook(name, "None")
        del self.data_groups[name], self.state[name]

    def get_mask(self, name: str | None = None, layer: nn.Module | None = None) -> Tensor | list[Tensor]:
        """A layer's mask, one for each feature where it has features; ones before the first `step`.

        Raises:
            ConfigurationError: Neither a name nor a layer, or one that is not registered.
            OrderError: The layer has not been called yet, so that its shape is unknown.
        """
        if name is None:
            if layer is None:
                raise ConfigurationError("get_mask: give the name of a layer, or the layer")
            name = self._name_of(layer)
        self._group(name)
        mask = self.state[name]["mask"]
        if mask is None:
            raise OrderError(f"{name}: has no mask yet, since the layer was not called; run a forward pass first")
        return mask  # type: ignore[no-any-return]

    # -- masks ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Make the masks of all layers from what was aggregated since the last step, which is then forgotten.

        Raises:
            OrderError: A layer was not called since.
            ConfigurationError, NonFiniteError: As for `update_mask`; no mask is changed.
        """
        masks = {}
        for name, group in self.data_groups.items():
            if group["hook_state"] != "aggregate":
                continue
            if group.get("data") is None:
                raise OrderError(f"{name}: nothing was aggregated since the last step; run a forward pass first")
            masks[name] = self._mask_of(name, self._over_ranks(group["data"], group["aggregate_fn"]), group)
        for name, mask in masks.items():
            self.state[name]["mask"] = mask
            self.data_groups[name]["data"] = None

    @torch.no_grad()
    def update_mask(self, name: str, data: Any, configs: Mapping[str, Any]) -> None:
        """Make one layer's mask from an aggregate.

        Args:
            name: The layer's name.
            data: The aggregate, a tensor; with features one for each.
            configs: `reduce_fn`, `mask_fn`, `features`, `feature_dim` and `sparse_config`.

        Raises:
            ConfigurationError: A function returns something else than a tensor, or a mask that does not broadcast over
                the layer's inputs.
            NonFiniteError: A mask has NaN.
        """
        self.state[name]["mask"] = self._mask_of(name, data, configs)

    def squash_mask(self, attach_sparsify_hook: bool = True, **kwargs: Any) -> None:
        """Stop aggregating, and from now on multiply what enters the layers by their masks.

        Args:
            attach_sparsify_hook: Whether to do so, or only to stop.
            kwargs: Nothing; for code written for PyTorch's class.

        Raises:
            OrderError: A layer has no mask.
        """
        if attach_sparsify_hook:
            for name in self.data_groups:
                self.get_mask(name)
        for name in self.data_groups:
            self._hook(name, "sparsify" if attach_sparsify_hook else "None")

    def _mask_of(self, name: str, data: Any, configs: Mapping[str, Any]) -> Tensor | list[Tensor]:
        parts = [data] if configs["features"] is None else data
        masks = []
        for part in parts:
            reduced = configs["reduce_fn"](part)
            if not isinstance(reduced, Tensor):
                raise ConfigurationError(f"{name}: reduce_fn returned {type(reduced).__name__}, expected a tensor")
            mask = configs["mask_fn"](reduced, **configs["sparse_config"])
            if not isinstance(mask, Tensor):
                raise ConfigurationError(f"{name}: mask_fn returned {type(mask).__name__}, expected a tensor")
            try:
                fits = mask.expand_as(part).shape == part.shape
            except RuntimeError:
                fits = False
            if not fits:
                raise ConfigurationError(
                    f"{name}: mask_fn returned a mask of shape {tuple(mask.shape)}, which does not broadcast over "
                    f"inputs of shape {tuple(part.shape)}"
                )
            if mask.is_floating_point() and mask.isnan().any():
                raise NonFiniteError(f"{name}: mask_fn returned a mask with NaN")
            masks.append(mask.detach().clone())
        return masks[0] if configs["features"] is None else masks

    def _over_ranks(self, data: Any, aggregate: Aggregate) -> Any:
        """The aggregate of all ranks'."""
        if isinstance(data, list):
            return [self._over_ranks(part, aggregate) for part in data]
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return data
        rows = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=data.device)
        rows[dist.get_rank()] = len(data)
        dist.all_reduce(rows)
        padded = data.new_zeros((int(rows.max()), *data.shape[1:]))
        padded[: len(data)] = data
        gathered = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(gathered, padded)
        whole = None
        for part, count in zip(gathered, rows.tolist(), strict=True):
            whole = part[:count] if whole is None else _aggregate(whole, part[:count], aggregate)
        return whole

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _hook(self, name: str, state: str) -> None:
        group = self.data_groups[name]
        hook: RemovableHandle | None = group.pop("hook", None)
        if hook is not None:
            hook.remove()
        group["hook_state"] = state
        if state != "None":
            call = _Hook(self, name, sparsify=state == "sparsify")
            group["hook"] = group["layer"].register_forward_pre_hook(call, with_kwargs=True)

    @torch.no_grad()
    def _aggregate(self, name: str, x: Tensor) -> None:
        group = self.data_groups[name]
        x = x.detach()
        before = group.get("data")
        features = group["features"]
        if features is None:
            group["data"] = x.clone() if before is None else self._checked(name, before, x)
            if self.state[name]["mask"] is None:
                self.state[name]["mask"] = torch.ones_like(x)
            return
        parts = [x.index_select(group["feature_dim"], index) for index in self._indices(name, x)]
        if before is None:
            group["data"] = parts
        else:
            group["data"] = [self._checked(name, *pair) for pair in zip(before, parts, strict=True)]
        if self.state[name]["mask"] is None:
            self.state[name]["mask"] = [torch.ones_like(part) for part in parts]

    def _checked(self, name: str, before: Tensor, x: Tensor) -> Tensor:
        if before.shape[1:] != x.shape[1:]:
            raise ConfigurationError(
                f"{name}: inputs have shape {tuple(x.shape)}, and earlier ones {tuple(before.shape)}; only batches of "
                "other sizes can be aggregated"
            )
        try:
            return _aggregate(before, x, self.data_groups[name]["aggregate_fn"])
        except _WrongResultError as error:
            raise ConfigurationError(f"{name}: aggregate_fn {error}") from None

    def _sparsify(self, name: str, x: Tensor) -> Tensor:
        group, mask = self.data_groups[name], self.state[name]["mask"]
        if group["features"] is None:
            return x * mask.to(x.device, x.dtype)  # type: ignore[no-any-return]
        for index, part in zip(self._indices(name, x), mask, strict=True):
            chosen = x.index_select(group["feature_dim"], index)
            x = x.index_copy(group["feature_dim"], index, chosen * part.to(x.device, x.dtype))
        return x

    def _indices(self, name: str, x: Tensor) -> list[Tensor]:
        """The indices of each feature, which may be a number or a list of them."""
        group = self.data_groups[name]
        dim, features = group["feature_dim"], group["features"]
        if not -x.dim() <= dim < x.dim():
            raise ConfigurationError(f"{name}: feature_dim={dim}, but inputs have shape {tuple(x.shape)}")
        found = [torch.as_tensor(feature, dtype=torch.int64, device=x.device).reshape(-1) for feature in features]
        size = x.shape[dim]
        if wrong := next((index for index in found if ((index < 0) | (index >= size)).any()), None):
            raise ConfigurationError(
                f"{name}: feature {wrong.tolist()} is out of range; inputs have {size} along dimension {dim}"
            )
        return found

    def _group(self, name: str) -> dict[str, Any]:
        if name not in self.data_groups:
            raise ConfigurationError(f"no layer {name!r} is registered; registered are {sorted(self.data_groups)}")
        return self.data_groups[name]

    def _name_of(self, layer: nn.Module) -> str:
        for name, module in self.model.named_modules():
            if module is layer:
                return plain_name(name)
        raise ConfigurationError(f"layer: this {type(layer).__name__} is not a module of the model")

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks, aggregates and whether each layer is watched or masked, as tensors and plain values.

        Functions and configurations are code, and are not saved: register the layers before loading.
        """
        return {
            "state": {name: {"mask": each["mask"]} for name, each in self.state.items()},
            "data_groups": {
                name: {"hook_state": each["hook_state"], "data": each.get("data")}
                for name, each in self.data_groups.items()
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Restore what `state_dict` gave; layers that are not registered yet get the defaults.

        Args:
            state_dict: The state.
            strict: Whether the layers must be the same.

        Raises:
            StateError: It is no such state, or of other layers; nothing is changed.
            ConfigurationError: A layer is not registered, and there are no default functions.
        """
        groups = state_dict.get("data_groups") if isinstance(state_dict, Mapping) else None
        masks = state_dict.get("state") if isinstance(state_dict, Mapping) else None
        if not isinstance(groups, Mapping) or not isinstance(masks, Mapping) or set(groups) != set(masks):
            raise StateError(
                "state: expected 'state' and 'data_groups' of the same layers; it is not one of this class"
            )
        modules = {plain_name(name): module for name, module in self.model.named_modules()}
        for name, group in groups.items():
            if name not in modules:
                raise StateError(
                    f"{name}: the state is of this layer, and the model has none; load it into its own model"
                )
            if not isinstance(group, Mapping) or group.get("hook_state") not in _STATES:
                raise StateError(f"{name}: the saved state is damaged")
        if strict and (missing := sorted(set(self.data_groups) - set(groups))):
            raise StateError(f"{missing[0]}: is registered, and the state has no such layer; load with strict=False")
        for name in groups:
            if name not in self.data_groups:
                self.register_layer(modules[name])
        for name, group in groups.items():
            self.state[name] = {"mask": _copied(masks[name]["mask"])}
            self.data_groups[name]["data"] = _copied(group.get("data"))
            self._hook(name, group["hook_state"])

    def __repr__(self) -> str:
        layers = "\n".join(
            f"  {name}: {group['hook_state']}, {group['sparse_config']}" for name, group in self.data_groups.items()
        )
        return f"{type(self).__name__} (\n{layers}\n)"


class _Hook:
    """A forward pre-hook of one layer; an object, so that copies and pickles of the model keep it."""

    def __init__(self, sparsifier: ActivationSparsifier, name: str, sparsify: bool) -> None:
        self.sparsifier, self.name, self.sparsify = sparsifier, name, sparsify

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Work on the first input that is a tensor; the others pass."""
        values: list[tuple[Any, Any]] = [*enumerate(args), *kwargs.items()]
        key, x = next(((key, value) for key, value in values if isinstance(value, Tensor)), (None, None))
        if x is None:
            raise ConfigurationError(f"{self.name}: was called without a tensor; unregister this layer")
        if not x.is_floating_point():
            raise ConfigurationError(f"{self.name}: got activations of dtype {x.dtype}; expected floating point")
        if not self.sparsify:
            self.sparsifier._aggregate(self.name, x)
            return None
        y = self.sparsifier._sparsify(self.name, x)
        if isinstance(key, int):
            return (*args[:key], y, *args[key + 1 :]), kwargs
        return args, {**kwargs, str(key): y}


class _WrongResultError(Exception):
    """What a user's function returned cannot be used."""


def _aggregate(before: Tensor, x: Tensor, aggregate: Aggregate) -> Tensor:
    """Aggregate two tensors; of the larger, the rows that the other lacks stay as they are."""
    rows = min(len(before), len(x))
    both = aggregate(before[:rows], x[:rows])
    if not isinstance(both, Tensor) or both.shape != x[:rows].shape:
        found = tuple(both.shape) if isinstance(both, Tensor) else type(both).__name__
        raise _WrongResultError(f"returned {found}, expected a tensor of shape {tuple(x[:rows].shape)}")
    longer = before if len(before) > len(x) else x
    return both.detach() if len(longer) == rows else torch.cat([both.detach(), longer[rows:]])


def _copied(value: Any) -> Any:
    return [each.clone() for each in value] if isinstance(value, list) else None if value is None else value.clone()
