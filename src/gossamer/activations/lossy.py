"""Learned lossy thresholds: activations below a threshold that is trained become nearly zero, and zero in the end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from gossamer.checks import check_boolean, check_integer, check_number
from gossamer.collect import Collected, warn_missed
from gossamer.errors import ConfigurationError, OrderError
from gossamer.fold import foldable_relus, turn_into
from gossamer.method import Masks, Method
from gossamer.nn.lossy import LossyHardSparsifier, LossySparsifier, hard_threshold, lossy_threshold
from gossamer.penalties import Penalty, as_penalty
from gossamer.sites import Site, SiteSelection, see_hooks, select_sites
from gossamer.targets import matches, plain_name, whole

MOST = 1e30
"""Below this thresholds, sharpness and learning rates have to be."""

PATIENCE = 10
"""Steps after which a site that has not run is an error: a branch that is not always taken has had its turn."""

CHILD = "sparsifier"
"""The name of the module that is put into each site."""


@dataclass(eq=False)
class LossyThreshold(Method):
    """A learned threshold after (or before) modules, and a penalty on what passes it.

    A site's output `x` becomes `x·(σ(a(x − e)) + σ(−a(x + e)))`, `e = |eps|`: the threshold `eps` is trained with the
    weights, without weight decay, and the sharpness `a` may grow while it is. `Sparsity.penalty()` is the term of the
    loss; `finalize` puts the hard threshold `x·(|x| > e)` in the place of the smoothed one. Each site's module gets a
    child `sparsifier`, a `gossamer.nn.LossySparsifier`; no other key of the `state_dict` changes.

    With `eps=0` a threshold stays 0 and changes nothing: what is left is a plain penalty on activations.

    Args:
        strength: The penalty's factor λ, at least 0: one for all sites, or a mapping of globs over their names, of
            which the first that matches counts.
        sites: Which modules; see `gossamer.sites.select_sites`.
        logits: Whether the default, globs and types may choose the last module too.
        position: `"after"` or `"before"` the modules.
        eps: First threshold.
        per_channel: Whether each channel has a threshold of its own.
        norm: The penalty on what passes the thresholds: `"l0"`, `"l1"`, `"l2"`, `"hoyer"`, or a
            `gossamer.penalties.Penalty`.
        normalized: Whether the sum of the penalties is divided by the number of activations of all sites.
        sharpness: First sharpness `a`, above 0.
        double_at: Steps after which the sharpness is doubled.
        final_sharpness: Sharpness at step `until`, which it reaches in a geometric progression, instead.
        until: See there.
        max_sharpness: The sharpness stays at most this.
        hard: Whether values are those of the hard threshold from the start, with the gradients of the smoothed one (a
            straight-through estimator).
        lr: Learning rate of the thresholds; `None` for the optimizer's.
        fold: Whether `finalize` makes one operation of a threshold and the ReLU that follows it in an `nn.Sequential`,
            where no forward pass of the model shows that anything else sees what lies between them, or that is its
            site. What does not go through the model's `forward`, such as a call of its parts from outside, is not seen.

    Raises:
        ConfigurationError: A value out of range, when the method is made.
    """

    strength: float | Mapping[str, float] = 0.1
    _: KW_ONLY
    sites: SiteSelection = None
    logits: bool = False
    position: str = "after"
    eps: float = 0.1
    per_channel: bool = False
    norm: str | Penalty = "l0"
    normalized: bool = True
    sharpness: float = 1.0
    double_at: Sequence[int] = ()
    final_sharpness: float | None = None
    until: int | None = None
    max_sharpness: float = 2.0**16
    hard: bool = False
    lr: float | None = None
    fold: bool = True
    placed: list[Site] = field(default_factory=list, init=False, repr=False)

    name = "lossy_threshold"
    steps = ("double_at", "until")
    hardens = True
    learns = True

    def __post_init__(self) -> None:
        strengths = self.strength if isinstance(self.strength, Mapping) else {"": self.strength}
        for glob, value in strengths.items():
            if not isinstance(glob, str):
                raise ConfigurationError(f"strength: expected globs over names of sites, got {glob!r}")
            check_number(f"strength[{glob!r}]" if glob else "strength", value, 0, float("inf"), open_high=True)
        if self.position not in ("after", "before"):
            raise ConfigurationError(f"position: got {self.position!r}; allowed are 'after' and 'before'")
        for name in ("logits", "per_channel", "normalized", "hard", "fold"):
            check_boolean(name, getattr(self, name))
        check_number("eps", self.eps, -MOST, MOST)
        for name in ("sharpness", "final_sharpness", "max_sharpness", "lr"):
            value = getattr(self, name)
            if value is not None or name in ("sharpness", "max_sharpness"):
                check_number(name, value, 0, MOST, open_high=True)
                if value == 0 and name != "lr":
                    raise ConfigurationError(f"{name}: expected a number above 0, got 0")
        if not isinstance(self.double_at, list | tuple | range):
            raise ConfigurationError(f"double_at: expected a list of numbers of steps, got {self.double_at!r}")
        for step in self.double_at:
            check_integer("double_at", step, at_least=0)
        if (self.final_sharpness is None) != (self.until is None) or (self.double_at and self.until is not None):
            raise ConfigurationError(
                f"final_sharpness={self.final_sharpness}, until={self.until}, double_at={list(self.double_at)}: give "
                "final_sharpness with until, or double_at, or none of them"
            )
        if self.until is not None:
            check_integer("until", self.until, at_least=1)
        self._penalty = as_penalty(self.norm, "norm")

    # -- life cycle --------------------------------------------------------------------------------------------------

    def bind(self, model: nn.Module, masks: Masks) -> None:
        """See `Method.bind`."""
        self.placed = select_sites(model, self.sites, logits=self.logits)
        for site in self.placed:
            check_free(site)
        self._channels = [_channels(site, self.position) if self.per_channel else (None, 1) for site in self.placed]
        for site, (channels, _) in zip(self.placed, self._channels, strict=True):
            if channels == 0:
                raise ConfigurationError(f"{site.name}: its channels are not known yet; run the model once before")
        self._strengths = [self._strength_of(site) for site in self.placed]
        globs = list(self.strength) if isinstance(self.strength, Mapping) else []
        if idle := [glob for glob in globs if not any(matches(site.name, glob) for site in self.placed)]:
            raise ConfigurationError(f"strength: {idle[0]!r} matches no site; the first is {self.placed[0].name}")
        self._told = self._sharpness(0)
        self._model = model
        self._steps = 0  # since it was attached, or its state was loaded

    def occupies(self) -> list[str]:
        """See `Method.occupies`: the sites."""
        return [site.name for site in self.placed]

    def install(self) -> None:
        """See `Method.install`."""
        see_hooks()
        for site, (channels, dim) in zip(self.placed, self._channels, strict=True):
            sparsifier = PlacedSparsifier(self.eps, self._told, channels=channels, dim=dim)
            sparsifier.remember_for(self._penalty, self.hard)
            sparsifier.join(site, self._model, self.position)

    def param_groups(self) -> list[dict[str, Any]]:
        """See `Method.param_groups`."""
        group: dict[str, Any] = {"params": [each.eps for each in self._sparsifiers()], "weight_decay": 0.0}
        return [group if self.lr is None else group | {"lr": self.lr}]

    @property
    def penalized(self) -> bool:  # type: ignore[override]
        """See `Method.penalized`."""
        return any(self._strengths)

    def loss_term(self) -> Tensor | None:
        """See `Method.loss_term`: of the forward passes in training since the last step.

        It may be asked for more than once; the first pass in training after that begins anew. Passes under
        `torch.no_grad` do not count.

        Warns:
            UserWarning: A site ran without gradients alone, as under `checkpoint(use_reentrant=True)`.

        Raises:
            ConfigurationError: A site has not run in any forward pass of the first `PATIENCE` steps.
        """
        terms, count = [], 0
        sparsifiers = self._sparsifiers()
        for strength, sparsifier in zip(self._strengths, sparsifiers, strict=True):
            for sums, numel in sparsifier.collected.values():
                terms.append(strength * self._penalty.value(*sums))
                count += numel
        missed = [site.name for site, each in zip(self.placed, sparsifiers, strict=True) if each.missed()]
        if missed:
            warn_missed(missed)
        idle = [site.name for site, each in zip(self.placed, sparsifiers, strict=True) if not each.has_run]
        if idle and self._steps >= PATIENCE:
            raise ConfigurationError(
                f"{idle[0]}: has not run in a forward pass for training, so that nothing is learned there; leave it "
                f"out with sites=['!{idle[0]}']" + (f" (and {len(idle) - 1} others)" if idle[1:] else "")
            )
        return torch.stack(terms).sum() / (max(count, 1) if self.normalized else 1) if terms else None

    def after_step(self, step: int) -> None:
        """See `Method.after_step`: forgets the passes so far, and sharpens the thresholds."""
        sharpness = self._sharpness(step)
        self._steps += 1
        for sparsifier in self._sparsifiers():
            sparsifier.collected.forget()
            if sharpness != self._told:
                sparsifier.a.fill_(sharpness)
        self._told = sharpness

    def detach(self) -> None:
        """See `Method.detach`: takes the thresholds off."""
        for site in self.placed:
            _take_off(site.module)

    @contextmanager
    def hardened(self) -> Iterator[None]:
        """See `Method.hardened`."""
        before = [(each, each.is_hard, each._moved) for each in self._sparsifiers()]
        try:
            for each, *_ in before:
                each.is_hard = True
            yield
        finally:
            for each, is_hard, moved in before:
                each.is_hard, each._moved = is_hard, moved

    def finalize(self) -> None:
        """See `Method.finalize`: hard thresholds stay, as the children `sparsifier`, each a `LossyHardSparsifier`.

        With `fold`, where a `torch.nn.ReLU` follows a site in an `nn.Sequential`, and where the site is one, the
        ReLU becomes a `gossamer.nn.FATReLU` with the same outputs, and the site is left as it was before.
        """
        self._last = self.learned()
        relus = {}
        if self.fold and self.position == "after":
            modules = [site.module for site in self.placed]
            relus = foldable_relus(self._model, modules, lambda hook: hook is _after)
        names = {module: plain_name(name) for name, module in self._model.named_modules()}
        for site, sparsifier, row in zip(self.placed, self._sparsifiers(), self._last, strict=True):
            relu = relus.get(site.module)
            row["folded_into"] = None if relu is None else names[relu]
            if relu is None:
                site.module._modules[CHILD] = sparsifier.hard()
            else:
                _take_off(site.module)
                turn_into(relu, sparsifier.relu())

    # -- what it tells -----------------------------------------------------------------------------------------------

    def learned(self) -> list[dict[str, Any]]:
        """See `Method.learned`: the threshold of each site, over its channels, and its sharpness.

        `moved` is by how much the hard threshold changes the site's output, `‖hard − smoothed‖ / ‖smoothed‖` over the
        forward passes in evaluation mode since the last one in training; `None` where there was none. After `finalize`,
        `folded_into` is the ReLU that the threshold became one with. `moved` is of this process alone; of sharded
        thresholds it is a collective call.
        """
        found = []
        for site in self.placed:
            sparsifier = site.module._modules.get(CHILD)
            if not isinstance(sparsifier, PlacedSparsifier):
                return getattr(self, "_last", [])
            e = whole(sparsifier.eps).abs()
            found.append(
                {
                    "site": site.name,
                    "threshold": float(e.mean()),
                    "least": float(e.min()),
                    "most": float(e.max()),
                    "sharpness": float(sparsifier.a),
                    "moved": sparsifier.moved(),
                }
            )
        return found

    def config(self) -> dict[str, Any]:
        """See `Method.config`."""
        names = [site.name for site in self.placed]
        return {"sites": names, "position": self.position, "per_channel": self.per_channel}

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return {
            "strength": self._strengths,
            "norm": repr(self._penalty),
            "normalized": self.normalized,
            "sharpness": [self.sharpness, self.final_sharpness, self.until, list(self.double_at), self.max_sharpness],
            "hard": self.hard,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`: thresholds and sharpness are in the model's own state."""
        self._told = float("nan")  # whatever the model has now, the next step says it again

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for site in self.placed:
            if isinstance(each := site.module._modules.get(CHILD), PlacedSparsifier):
                each.collects = True

    # -- parts -------------------------------------------------------------------------------------------------------

    def _sparsifiers(self) -> list[PlacedSparsifier]:
        found = [site.module._modules[CHILD] for site in self.placed]
        assert all(isinstance(each, PlacedSparsifier) for each in found)
        return found  # type: ignore[return-value]

    def _strength_of(self, site: Site) -> float:
        if not isinstance(self.strength, Mapping):
            return self.strength
        glob = next((glob for glob in self.strength if matches(site.name, glob)), None)
        if glob is None:
            raise ConfigurationError(
                f"strength: no glob of {list(self.strength)} gives {site.name} a factor; add one ('*' matches the rest)"
            )
        return float(self.strength[glob])

    def _sharpness(self, step: int) -> float:
        """The sharpness after so many completed steps."""
        if self.final_sharpness is not None and self.until is not None:
            ratio = self.final_sharpness / self.sharpness
            value = self.sharpness * float(ratio ** min(step / self.until, 1.0))
        else:
            value = self.sharpness * float(2 ** sum(step >= at for at in self.double_at))
        return min(value, self.max_sharpness)


class SiteSparsifier(LossySparsifier):
    """The threshold of a site, `site`, which errors name."""

    site: str

    def join(self, site: Site, model: nn.Module, position: str = "after") -> None:
        """Become the child of a site's module, applied to its output or input, on its device."""
        self.site = site.name
        # Of the type of the weights beside it: FSDP2 shards parameters of one type together.
        parameters = itertools.chain(site.module.parameters(), model.parameters())
        reference = next((each for each in parameters if each.is_floating_point()), None)
        if reference is not None:
            self.to(reference.device)
            self.eps.data = self.eps.to(reference.dtype)
        self.train(site.module.training)
        put(self, site, position)

    def forward(self, x: Tensor) -> Tensor:
        """The threshold of a site's output, or input."""
        return self.threshold(x)[0]

    def threshold(self, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """See `gossamer.nn.lossy_threshold`."""
        if not isinstance(x, Tensor):
            raise ConfigurationError(
                f"{self.site}: gives a {type(x).__name__}, and a threshold takes one tensor; leave it out with "
                f"sites=['!{self.site}']"
            )
        try:
            return lossy_threshold(x, self.eps, self.a, self.dim, **options)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self.site}: {error}; leave it out with sites=['!{self.site}']") from None


class PlacedSparsifier(SiteSparsifier):
    """The threshold of a site: it remembers what a penalty needs of each forward pass."""

    def remember_for(self, penalty: Penalty, hard: bool) -> None:
        """Say what it is for."""
        self.penalty = penalty
        self.is_hard = hard
        self.has_run = False
        self.collected = Collected()
        self.collects = True
        self._moved: Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.collects = False  # in a copy of the model alone nobody asks, and graphs would pile up; see LossyThreshold

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        self._moved = None
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        """The threshold of a site's output, or input."""
        y, sums = self.threshold(
            x,
            hard=self.is_hard,
            terms=self.penalty.terms if self.training and self.collects else (),
            b=self.penalty.b,
        )
        if self.training:
            if self.collects:
                self.collected.add((sums, y.numel()))
            self.has_run = True
            self._moved = None
        elif not torch.compiler.is_compiling():
            with torch.no_grad():
                change = hard_threshold(x, self.eps, self.dim) - y
                squares = torch.stack([change.float().square().sum(), y.detach().float().square().sum()])
                self._moved = squares if self._moved is None else squares + self._moved
        return y

    def missed(self) -> bool:
        """Whether it ran in training without gradients alone."""
        return self.collected.missed and not self.collected.values()

    def moved(self) -> float | None:
        """See `LossyThreshold.learned`."""
        if self._moved is None:
            return None
        change, size = map(float, self._moved.tolist())
        return float((change / size) ** 0.5) if size else 0.0


def check_free(site: Site) -> None:
    """Raise unless a threshold can be put after or before a site."""
    if isinstance(site.module._modules.get(CHILD), LossyHardSparsifier):
        raise OrderError(
            f"{site.name}: has the hard threshold of a run that was finalized; load its weights into a model without "
            "thresholds, and attach that"
        )
    if hasattr(site.module, CHILD) and CHILD not in site.module._modules:
        raise ConfigurationError(
            f"{site.name}: has an attribute {CHILD!r}, which is the name of the threshold's module"
        )
    if CHILD in site.module._modules:
        raise OrderError(
            f"{site.name}: has a threshold already; call finalize() or detach() on the handle that put it there"
        )
    if isinstance(site.module, nn.Sequential):
        raise ConfigurationError(
            f"{site.name}: a Sequential would call the threshold as one of its modules; name its last module"
        )


def put(threshold: nn.Module, site: Site, position: str) -> None:
    """Make a threshold the child of a site's module, applied to its output, or input."""
    site.module.add_module(CHILD, threshold)
    if position == "after":
        site.module.register_forward_hook(_after)
    else:
        site.module.register_forward_pre_hook(_before, with_kwargs=True)


def _after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return module._modules[CHILD](output)  # type: ignore[misc]


def _before(
    module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    threshold: Any = module._modules[CHILD]
    if inputs:
        return (threshold(inputs[0]), *inputs[1:]), named
    first = next(iter(named))
    return (), named | {first: threshold(named[first])}


def _take_off(module: nn.Module) -> None:
    module._modules.pop(CHILD, None)
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_after, _before)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def _channels(site: Site, position: str) -> tuple[int, int]:
    """Number of channels of a site, and the dimension that runs over them."""
    module, side = site.module, "out" if position == "after" else "in"
    if isinstance(module, nn.modules.conv._ConvNd):
        return getattr(module, f"{side}_channels"), -1 - len(module.kernel_size)
    features = f"{side}1_features" if isinstance(module, nn.Bilinear) and side == "in" else f"{side}_features"
    if isinstance(module, nn.Linear | nn.Bilinear):
        return getattr(module, features), -1
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.num_features, 1
    if isinstance(module, nn.GroupNorm):
        return module.num_channels, 1
    raise ConfigurationError(
        f"{site.name}: is a {type(module).__name__}, whose channels are not known; use per_channel=False, or leave it "
        f"out with sites=['!{site.name}']"
    )
