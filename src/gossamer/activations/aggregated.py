"""Masks from aggregated activations: watch what enters layers, choose what may pass, and let nothing else pass.

The interface is that of PyTorch's experimental `ActivationSparsifier`: code for it runs after changing the import.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer.activations.functions import FUNCTIONS, Aggregate, RowByRow, by_name, check_options, kind
from gossamer.activations.over_ranks import over_ranks
from gossamer.checks import check_not_nested
from gossamer.collect import recomputing
from gossamer.errors import ConfigurationError, NonFiniteError, StateError
from gossamer.sites import SiteSelection, see_hooks, select_sites
from gossamer.targets import plain_name

AggregateFn = str | Aggregate | Callable[[Tensor, Tensor], Tensor]
ReduceFn = str | Callable[[Tensor], Tensor]
MaskFn = str | Callable[..., Tensor]

_ARGUMENTS = ("aggregate_fn", "reduce_fn", "mask_fn", "features", "feature_dim")
_STATES = ("aggregate", "sparsify", "None")


class ActivationSparsifier:
    """Multiplies what enters layers by masks made from what entered them before.

    `mask = mask_fn(reduce_fn(aggregate), **sparse_config)`, where the aggregate is of a layer's first inputs at all its
    calls. `register_layers` begins to watch, `step` makes masks, `squash_mask` applies them: where a mask is 0, exact
    zeros enter the layer.

    Each function may be one of `gossamer.activations.functions`, by name or not, or one's own. Aggregates are
    detached, and taken over all processes, so that these have the same masks.

    Args:
        model: The model.
        aggregate_fn: Default of all layers: `"mean"`, `"running_mean"`, `"max"`, `"quantile"`, or an `Aggregate`. A
            function takes two batches and returns one of their shape, beginning with the first two, `aggregate_fn(…
            aggregate_fn(x₁, x₂) …, xₙ)`; where a batch is smaller than others its rows are aggregated with as many of
            theirs.
        reduce_fn: Likewise: `"batch_mean"`, `"channel_mean"`, or a function that takes the aggregate and returns what
            the mask is made of.
        mask_fn: Likewise: `"magnitude"` (with `threshold`), `"top_fraction"` (`fraction`), `"quantile"` (`q`), or a
            function that takes that, and the configuration by name; returns the mask, which broadcasts over inputs.
        features: Likewise: indices along `feature_dim`, or lists of them, that have masks of their own; other features
            pass. `None` for one mask of all.
        feature_dim: Likewise: the dimension of features.
        sparse_config: Likewise: further arguments of `mask_fn`.

    Attributes:
        model: The model.
        defaults: The defaults.
        data_groups: For each registered layer, by its name in the model, its functions and configuration, its `layer`,
            its `hook` and `hook_state` (`"aggregate"`, `"sparsify"` or `"None"`), and, where it was called since the
            last step, `data`: what is kept of its inputs, one tensor or one for each feature.
        state: For each registered layer its `mask`: a tensor, or one for each feature.
    """

    def __init__(
        self,
        model: nn.Module,
        aggregate_fn: AggregateFn | None = None,
        reduce_fn: ReduceFn | None = None,
        mask_fn: MaskFn | None = None,
        features: Sequence[Any] | None = None,
        feature_dim: int | None = None,
        **sparse_config: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        values = aggregate_fn, reduce_fn, mask_fn, features, feature_dim
        self.defaults: dict[str, Any] = dict(zip(_ARGUMENTS, values, strict=True)) | {"sparse_config": sparse_config}
        self.data_groups: dict[str, dict[str, Any]] = {}
        self.state: dict[str, dict[str, Any]] = {}

    # -- layers --------------------------------------------------------------------------------------------------------

    def register_layers(self, sites: SiteSelection = None, **options: Any) -> ActivationSparsifier:
        """Begin to aggregate what enters layers of the model.

        Args:
            sites: Which, as in `gossamer.sites.select_sites`, the last one too; `None` for every convolution, linear,
                bilinear or identity module.
            options: As of `register_layer`, for all of them.

        Returns:
            Itself, so that this may follow the constructor.

        Raises:
            ConfigurationError: As of `register_layer`, or a selection that matches nothing; none is registered.
        """
        given = {key: options.pop(key, None) for key in _ARGUMENTS}
        found = select_sites(self._root(), sites, logits=True)
        configs = [self._config(site.name, given, options) for site in found]
        for site, config in zip(found, configs, strict=True):
            self._register(site.name, site.module, config)
        return self

    def register_layer(
        self,
        layer: nn.Module,
        aggregate_fn: AggregateFn | None = None,
        reduce_fn: ReduceFn | None = None,
        mask_fn: MaskFn | None = None,
        features: Sequence[Any] | None = None,
        feature_dim: int | None = None,
        **sparse_config: Any,
    ) -> None:
        """Begin to aggregate what enters a layer of the model; arguments that are left out are the defaults'.

        A layer that is registered already begins anew, with a warning.

        Raises:
            ConfigurationError: The layer is not in the model, a function is missing or unknown, the mask's does not
                take its configuration, or features that are no numbers, or without a dimension.
        """
        name = self._name_of(layer)
        values = aggregate_fn, reduce_fn, mask_fn, features, feature_dim
        self._register(name, layer, self._config(name, dict(zip(_ARGUMENTS, values, strict=True)), sparse_config))

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
            ConfigurationError: Neither a name nor a layer, one that is not registered, or one that has not been called
                yet, so that its shape is unknown.
        """
        if name is None:
            if layer is None:
                raise ConfigurationError("get_mask: give the name of a layer, or the layer")
            name = self._name_of(layer)
        self._group(name)
        mask = self.state[name]["mask"]
        if mask is None:
            raise ConfigurationError(
                f"{name}: has no mask yet, since the layer was not called; run a forward pass first"
            )
        return mask  # type: ignore[no-any-return]

    def _config(self, name: str, given: Mapping[str, Any], sparse_config: Mapping[str, Any]) -> dict[str, Any]:
        """What is given, and the defaults where it is not; functions are looked up, and everything checked."""
        config = self.defaults | {key: value for key, value in given.items() if value is not None}
        config["sparse_config"] = {**self.defaults["sparse_config"], **sparse_config}
        try:
            for key in _ARGUMENTS[:3]:
                config[key] = by_name(key, config[key])
            signature = inspect.signature(config["mask_fn"])
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}: {error}") from None
        except ValueError:  # a builtin, which does not say what it takes
            signature = None
        try:
            if signature is not None:
                signature.bind(None, **config["sparse_config"])
            if config["mask_fn"] in FUNCTIONS["mask_fn"].values():
                check_options(**config["sparse_config"])
        except (ConfigurationError, TypeError) as error:
            raise ConfigurationError(f"{name}: mask_fn with {config['sparse_config']}: {error}") from None
        if config["features"] is not None:
            try:
                config["feature_dim"] = index(config["feature_dim"])
            except TypeError:
                raise ConfigurationError(
                    f"{name}: features={config['features']!r} need a feature_dim, an integer; got "
                    f"{config['feature_dim']!r}"
                ) from None
            try:
                config["features"] = _plain(config["features"])
            except (TypeError, ValueError):
                raise ConfigurationError(
                    f"{name}: features={config['features']!r}; give integers, or lists of them"
                ) from None
        return config

    def _register(self, name: str, layer: nn.Module, config: Mapping[str, Any], state: str = "aggregate") -> None:
        if name in self.data_groups:
            warnings.warn(f"{name}: is registered already, and begins anew", stacklevel=3)
            self.unregister_layer(name)
        self.data_groups[name] = {**{key: config[key] for key in self.defaults}, "layer": layer}
        self.state[name] = {"mask": None}
        self._hook(name, state)

    # -- masks ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Make the masks of all layers from what was aggregated since the last step, which is then forgotten.

        Where processes work together this is a collective call.

        Raises:
            OrderError: A layer was not called since, in one of the processes.
            ConfigurationError, NonFiniteError: As for `update_mask`; no mask is changed.
        """
        watched = {name: group for name, group in self.data_groups.items() if group["hook_state"] == "aggregate"}
        kinds = {
            name: [*(kind(group[key]) for key in _ARGUMENTS[:3]), group["features"], group["feature_dim"]]
            for name, group in watched.items()
        }
        kept = over_ranks({name: _listed(group.get("data")) for name, group in watched.items()}, kinds)
        masks = {}
        for name, group in watched.items():
            aggregate = _as_aggregate(group["aggregate_fn"])
            joined = [_call(name, "aggregate_fn", reduce, aggregate.join, parts) for parts in kept[name]]
            data = [_call(name, "aggregate_fn", aggregate.finish, each) for each in joined]
            masks[name] = self._mask_of(name, data, group)
        for name, mask in masks.items():
            self.state[name]["mask"] = mask
            del self.data_groups[name]["data"]

    @torch.no_grad()
    def update_mask(self, name: str, data: Any, configs: Mapping[str, Any]) -> None:
        """Make one layer's mask from an aggregate.

        Args:
            name: The layer's name.
            data: The aggregate, a tensor; with features a list of one for each.
            configs: `reduce_fn`, `mask_fn` and `sparse_config`, in the place of the layer's; others are the layer's.

        Raises:
            ConfigurationError: No layer is registered by this name, the data are not of its features, or a function
                raises, returns something else than a tensor, or a mask that does not broadcast over the layer's inputs.
            NonFiniteError: A function returns NaN.
        """
        group, parts = self._group(name), _listed(data)
        count = 1 if group["features"] is None else len(group["features"])
        if len(parts) != count or not all(isinstance(part, Tensor) for part in parts):
            expected = "a tensor" if group["features"] is None else f"a list of {count} tensors, one for each feature"
            raise ConfigurationError(
                f"{name}: data: expected {expected}, got {', '.join(type(part).__name__ for part in parts) or None}"
            )
        if not isinstance(configs, Mapping) or not isinstance(configs.get("sparse_config", {}), Mapping):
            raise ConfigurationError(
                f"{name}: configs: expected a dict of functions, and sparse_config as a dict; got {configs!r}"
            )
        self.state[name]["mask"] = self._mask_of(name, parts, {**group, **configs, "features": group["features"]})

    def squash_mask(self, attach_sparsify_hook: bool = True, **kwargs: Any) -> None:
        """Stop aggregating, and from now on multiply what enters the layers by their masks.

        Args:
            attach_sparsify_hook: Whether to do so, or only to stop.
            kwargs: Nothing; for code written for PyTorch's class.

        Raises:
            ConfigurationError: A layer has no mask.
        """
        if attach_sparsify_hook:
            for name in self.data_groups:
                self.get_mask(name)
        for name in self.data_groups:
            self._hook(name, "sparsify" if attach_sparsify_hook else "None")

    def _mask_of(self, name: str, data: list[Tensor], configs: Mapping[str, Any]) -> Tensor | list[Tensor]:
        masks = []
        for part in data:
            value = part.clone()  # functions may write into what they get
            for key, options in (("reduce_fn", {}), ("mask_fn", configs["sparse_config"])):
                value = _call(name, key, configs[key], value, **options)
                if not isinstance(value, Tensor):
                    raise ConfigurationError(f"{name}: {key} returned {type(value).__name__}, expected a tensor")
                if value.isnan().any():
                    raise NonFiniteError(f"{name}: {key} returned NaN; it, or the layer's inputs, have to be finite")
            if not _broadcasts(value, part):
                raise ConfigurationError(
                    f"{name}: mask_fn returned a mask of shape {tuple(value.shape)}, which does not broadcast over "
                    f"inputs of shape {tuple(part.shape)}"
                )
            masks.append(value.detach().clone())
        return _like(configs["features"], masks)  # type: ignore[no-any-return]

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def _hook(self, name: str, state: str) -> None:
        group = self.data_groups[name]
        hook: RemovableHandle | None = group.pop("hook", None)
        if hook is not None:
            hook.remove()
        group["hook_state"] = state
        if state != "None":
            see_hooks()
            call = _Hook(self, name, sparsify=state == "sparsify")
            group["hook"] = group["layer"].register_forward_pre_hook(call, with_kwargs=True)

    @torch.no_grad()
    def _aggregate(self, name: str, x: Tensor) -> None:
        group = self.data_groups[name]
        aggregate, features, before = _as_aggregate(group["aggregate_fn"]), group["features"], group.get("data")
        x = x.detach()
        parts = [x] if features is None else [x.index_select(*each) for each in self._indices(name, x)]
        if before is None:
            data = [_call(name, "aggregate_fn", aggregate.start, part) for part in parts]
        else:
            data = [self._updated(name, *pair, aggregate) for pair in zip(_listed(before), parts, strict=True)]
        group["data"] = _like(features, data)
        if self.state[name]["mask"] is None:
            self.state[name]["mask"] = _like(features, [torch.ones_like(part) for part in parts])

    def _updated(self, name: str, before: Tensor, x: Tensor, aggregate: Aggregate) -> Tensor:
        if before.shape[1:] != x.shape[1:]:
            raise ConfigurationError(
                f"{name}: inputs have shape {tuple(x.shape)}, and earlier ones (…, {str(tuple(before.shape[1:]))[1:]}; "
                "only batches of other sizes can be aggregated"
            )
        return _call(name, "aggregate_fn", aggregate.update, before, x)  # type: ignore[no-any-return]

    def _sparsify(self, name: str, x: Tensor) -> Tensor:
        group, mask = self.data_groups[name], self.state[name]["mask"]
        if group["features"] is None:
            return _masked(name, x, mask)
        for (dim, places), part in zip(self._indices(name, x), mask, strict=True):
            x = x.index_copy(dim, places, _masked(name, x.index_select(dim, places), part))
        return x

    def _indices(self, name: str, x: Tensor) -> list[tuple[int, Tensor]]:
        """The dimension of features and the indices of each, which may be a number or a list of them."""
        group = self.data_groups[name]
        dim, features = group["feature_dim"], group["features"]
        if not -x.dim() <= dim < x.dim():
            raise ConfigurationError(f"{name}: feature_dim={dim}, but inputs have shape {tuple(x.shape)}")
        found = [[feature] if isinstance(feature, int) else feature for feature in features]
        size = x.shape[dim]
        if wrong := next((indices for indices in found if not all(0 <= each < size for each in indices)), None):
            raise ConfigurationError(
                f"{name}: feature {wrong} is out of range; inputs have {size} along dimension {dim}"
            )
        return [(dim, torch.tensor(each, dtype=torch.int64, device=x.device)) for each in found]

    # -- names ---------------------------------------------------------------------------------------------------------

    def _root(self) -> nn.Module:
        """The model, in whatever is around it to train it in several processes."""
        root = self.model
        while isinstance(root, nn.parallel.DistributedDataParallel | nn.DataParallel):
            root = root.module
        return root

    def _modules(self) -> dict[str, nn.Module]:
        return {plain_name(name): module for name, module in self._root().named_modules()}

    def _name_of(self, layer: nn.Module) -> str:
        for name, module in self._modules().items():
            if module is layer:
                return name
        raise ConfigurationError(f"layer: this {type(layer).__name__} is not a module of the model")

    def _group(self, name: str) -> dict[str, Any]:
        if name not in self.data_groups:
            raise ConfigurationError(f"no layer {name!r} is registered; registered are {sorted(self.data_groups)}")
        return self.data_groups[name]

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks, aggregates and whether each layer is watched or masked, as tensors and plain values.

        Functions and their configurations are code, and are not saved: what is still watched has to be registered
        before loading. Of `aggregate_fn` the name is saved, and arguments of a ready-made one, since what is kept of
        inputs means nothing to another. Masks alone need no function.
        """
        keys = ("hook_state", "features", "feature_dim", "data")
        return {
            "state": {name: {"mask": each["mask"]} for name, each in self.state.items()},
            "data_groups": {
                name: {key: each.get(key) for key in keys} | {"aggregate_fn": kind(each["aggregate_fn"])}
                for name, each in self.data_groups.items()
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> None:
        """Restore what `state_dict` gave, here or in PyTorch's class.

        Layers that are not registered are, with the functions in a state of PyTorch's class, else the defaults.

        Args:
            state_dict: The state.
            strict: Whether the state must have all layers that are registered, and the model all layers of the state.
                Otherwise the former stay as they are, and the latter are left out.

        Raises:
            StateError: It is no such state, of other layers, features or another aggregate, or damaged; nothing is
                changed.
            ConfigurationError: A layer is watched and not registered, and there are no functions.
        """
        groups = state_dict.get("data_groups") if isinstance(state_dict, Mapping) else None
        masks = state_dict.get("state") if isinstance(state_dict, Mapping) else None
        if not isinstance(groups, Mapping) or not isinstance(masks, Mapping) or set(groups) != set(masks):
            raise StateError(
                "state: expected 'state' and 'data_groups' of the same layers; it is not one of this class"
            )
        if strict and (missing := sorted(set(self.data_groups) - set(groups))):
            raise StateError(f"{missing[0]}: is registered, and the state has no such layer; load with strict=False")
        modules = self._modules()
        found = []
        for name, group in groups.items():
            if name not in modules:
                if not strict:
                    continue
                raise StateError(f"{name}: the state is of this layer, and the model has none; load with strict=False")
            found.append((name, *self._read(name, group, masks[name])))
        for name, config, state, mask, data in found:
            if name in self.data_groups:
                self.unregister_layer(name)
            self._register(name, modules[name], config, state)
            self.state[name]["mask"] = mask
            if data is not None:
                self.data_groups[name]["data"] = data

    def _read(self, name: str, group: Any, saved: Any) -> tuple[dict[str, Any], str, Any, Any]:
        """A layer's configuration, hook state, mask and data, from its saved state; raises where it is damaged."""
        try:
            state, features, dim = group["hook_state"], group["features"], group["feature_dim"]
            features = features if features is None else _plain(features)
            mask, data = (self._copied(each) for each in (saved["mask"], group.get("data")))
            sizes = {len(_listed(each)) for each in (mask, data)} - {0}
            damaged = sizes - {1 if features is None else len(features)} or state not in _STATES
            damaged = damaged or (state == "sparsify" and mask is None)
            damaged = damaged or any(part.isnan().any() for part in _listed(mask))
        except (AttributeError, KeyError, TypeError, ValueError):
            damaged = True
        if damaged:
            raise StateError(f"{name}: the saved state is damaged")
        if (config := self.data_groups.get(name)) is None:
            code = {key: group[key] for key in _ARGUMENTS[:3] if callable(group.get(key))}  # of PyTorch's class
            given = {**code, "features": features, "feature_dim": dim}
            config = self.defaults | given
            if state == "aggregate":
                config = self._config(name, given, group.get("sparse_config", {}))
        elif (config["features"], config["feature_dim"]) != (features, dim):
            raise StateError(
                f"{name}: the state has features={features}, feature_dim={dim}, and the layer is registered with "
                f"{config['features']}, {config['feature_dim']}; register it as it was saved"
            )
        if data is not None and config["aggregate_fn"] is not None:
            known = group.get("aggregate_fn")
            known, here = kind(known) if callable(known) else known, kind(config["aggregate_fn"])
            if known not in (None, here):
                raise StateError(
                    f"{name}: the state has an aggregate of {known}, and aggregate_fn is {here}; register it as it was "
                    "saved"
                )
            rows = _as_aggregate(config["aggregate_fn"]).rows
            if any(not part.dim() or rows not in (None, len(part)) for part in _listed(data)):
                raise StateError(f"{name}: the saved aggregate is damaged")
        return config, state, mask, data

    def _copied(self, saved: Any) -> Any:
        """A copy of a saved mask or aggregate, where the model is; PyTorch's class saves masks as sparse tensors."""
        device = next((parameter.device for parameter in self.model.parameters()), None)
        copies = [each.to_dense().to(device=device, copy=True) for each in _listed(saved)]
        return copies if isinstance(saved, list) else next(iter(copies), None)

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
        check_not_nested(self.name, x)
        if not x.is_floating_point() or not x.dim():
            raise ConfigurationError(
                f"{self.name}: got activations of shape {tuple(x.shape)} and dtype {x.dtype}; expected batches of "
                "floating point; unregister this layer"
            )
        if not self.sparsify:
            if len(x) and not recomputing():
                self.sparsifier._aggregate(self.name, x)
            return None
        y = self.sparsifier._sparsify(self.name, x)
        if isinstance(key, int):
            return (*args[:key], y, *args[key + 1 :]), kwargs
        return args, {**kwargs, str(key): y}


def _as_aggregate(function: Any) -> Aggregate:
    return function if isinstance(function, Aggregate) else RowByRow(function)


def _call(name: str, key: str, function: Callable[..., Any], *values: Any, **options: Any) -> Any:
    """Call what a layer has as `key`; what it raises is told with the layer's name."""
    try:
        return function(*values, **options)
    except ConfigurationError as error:
        raise ConfigurationError(f"{name}: {error}") from None
    except Exception as error:
        raise ConfigurationError(f"{name}: {key} raised {type(error).__name__}: {error}") from error


def _broadcasts(mask: Tensor, x: Tensor) -> bool:
    """Whether a mask stands for one of the shape of `x`."""
    sizes = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    return mask.dim() <= x.dim() and all(size in (1, whole) for size, whole in sizes)


def _masked(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """The product, with +0 wherever the mask is 0, whatever was there."""
    if not _broadcasts(mask, x):
        raise ConfigurationError(
            f"{name}: its mask has shape {tuple(mask.shape)}, which does not broadcast over inputs of shape "
            f"{tuple(x.shape)}; make masks without a batch dimension (by reduce_fn), from inputs of this shape"
        )
    mask = mask.to(x.device)
    kept = x if mask.dtype == torch.bool else x * mask.to(x.dtype)
    return torch.where(mask != 0, kept, torch.zeros_like(kept))


def _plain(features: Any) -> list[Any]:
    """Features as numbers and lists of them; raises TypeError or ValueError where they are anything else."""
    indices = [np.asarray(feature).astype(int, casting="safe") for feature in features]
    if not indices or any(each.ndim > 1 for each in indices):
        raise ValueError
    return [each.tolist() for each in indices]


def _listed(value: Any) -> list[Any]:
    """One tensor, or one for each feature, as a list; empty where there is none."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _like(features: Any, values: list[Tensor]) -> Any:
    """The opposite of `_listed`."""
    return values[0] if features is None else values
