"""Continuous sparsification: soft masks that a rising temperature makes hard, over rounds, and the ticket they find."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim

from gossamer.checks import check_boolean, check_integer, check_number
from gossamer.choice import largest_in_cells
from gossamer.distribution import active_weights
from gossamer.errors import ConfigurationError, NonFiniteError, OrderError, StateError
from gossamer.groups import Groups, Spread
from gossamer.masks import Change, rows_like
from gossamer.method import Proposal, StateOf
from gossamer.nn.gates import KEPT, SoftMask, centered_in_cells, code_scale, lasting, soft_mask, suppress
from gossamer.rewind import Rounds
from gossamer.structure import as_structure
from gossamer.targets import Target, local, whole
from gossamer.weights.learned import LearnedMethod, Scored, gates_of
from gossamer.weights.steering import Steering

HOTTEST = 1e6
"""The highest final temperature: at it a score of 1e-6 is a mask of 0.73, and beyond there is no precision left."""

MEASUREMENTS = 200
"""How often in a round the density is measured at most, by which a penalty is steered."""

NEAR = 0.005
"""How far steering may end from the density that was asked for, without a warning."""


@dataclass(eq=False)
class ContinuousSparsification(LearnedMethod):
    """Learn masks with the weights, as sigmoids of scores that a temperature hardens (Savarese et al., 2020).

    A weight acts as `w·σ(β·s)`; `Sparsity.penalty()` is `λ·Σ σ(β·s)` over all weights, and β rises from 1 to
    `final_temperature` in each round, geometrically. Between rounds `s ← min(β·s, s₀)` where `s > 0`; all other weights
    are suppressed, and never return. After the last round the masks become the hard ones `s > 0`: the ticket. Where a
    rewind point was asked for, the model is put back to it, and what is trained from then on is the ticket.

    A round ends with the first step after it: that step is left out, since its gradients are of the model before.

    Args:
        initial_value: First score `s₀`: 0 in the paper, about -0.1 for fewer weights, 0.1 for more.
        penalty: The factor λ, at least 0; with `sparsity` where it starts.
        final_temperature: β at the end of a round, above 1.
        rounds: Rounds of search, at least 1.
        rewind: Steps of the first round after which weights, buffers and all else are kept for the ticket, from 0 on;
            `None` to go on with the weights as they are. Parameters that are frozen at the end stay as they are.
        length: Optimizer steps of a round.
        every: Steps after which the temperature is raised; with those of an epoch it is as in the paper.
        scaling: `"paper"`, masks as above; `"code"`, masks, also hard ones and those of the penalty, divided by
            `σ(s₀)`, as in the authors' code.
        sparsity: Fraction of weights to suppress in all, in [0, 1): the penalty is steered towards it (see
            `gossamer.weights.steering`), a geometric part of the way in each round. `None` for a penalty that stays.
        ranking: Whether, with `sparsity`, the ticket has exactly so many weights, those with the highest scores; else
            it has those with scores above 0, which steering brings near to that number.

    See `LearnedMethod` for the other arguments. N:M needs one round: its masks are relative to the other scores of a
    cell, so that exactly N of M end above 0.

    Raises:
        ConfigurationError: A value out of range, when the method is made.
    """

    initial_value: float = 0.0
    penalty: float = 1e-8
    final_temperature: float = 200.0
    rounds: int = 2
    rewind: int | None = None
    _: KW_ONLY
    length: int
    every: int = 1
    scaling: str = "paper"
    sparsity: float | None = None
    ranking: bool = True

    name = "continuous"
    steps = ("length", "rewind", "every")

    def _check(self) -> None:
        super()._check()
        check_number("initial_value", self.initial_value, -50, 50)
        check_number("penalty", self.penalty, 0, float("inf"), open_high=True)
        check_number("final_temperature", self.final_temperature, 1, HOTTEST)
        if self.final_temperature == 1:
            raise ConfigurationError("final_temperature: got 1, where masks would stay as soft as they begin; raise it")
        check_integer("every", self.every, at_least=1)
        if self.scaling not in ("paper", "code"):
            raise ConfigurationError(f"scaling: got {self.scaling!r}; allowed are 'paper' and 'code'")
        check_boolean("ranking", self.ranking)
        if self.sparsity is not None:
            check_number("sparsity", self.sparsity, 0, 1, open_high=True)
            if self.penalty == 0:
                raise ConfigurationError(
                    "penalty: got 0, from where it cannot be steered towards sparsity; leave it out"
                )
        if (structure := as_structure(self.structure)).cell is not None and (
            self.rounds > 1 or self.sparsity is not None
        ):
            raise ConfigurationError(
                f"structure {structure} has a number of active weights of its own, which one round reaches; got "
                f"rounds={self.rounds}, sparsity={self.sparsity}; use rounds=1 without sparsity"
            )
        Rounds(self.length, self.rounds, self.rewind)
        if self.every >= self.length > 1:
            raise ConfigurationError(
                f"every: got {self.every} with length={self.length}: the temperature would not rise within a round; "
                f"give at most {self.length - 1}"
            )

    # -- life cycle --------------------------------------------------------------------------------------------------

    def _bind(self, model: nn.Module, groups: Sequence[Groups]) -> None:
        self._rounds = Rounds(self.length, self.rounds, self.rewind)
        self._steering = None
        if self.sparsity is not None:
            self._measured = -(-self.length // MEASUREMENTS)
            self._steering = Steering(self.penalty)

    def install(self) -> None:
        """See `Method.install`."""
        super().install()
        self._rounds.reach(0, self._model)

    def check_optimizer(self, optimizer: optim.Optimizer) -> None:
        """See `Method.check_optimizer`: scores that are to stay for good are too large to take a step size from."""
        if isinstance(optimizer, optim.Adafactor):
            raise ConfigurationError(
                "optimizer: Adafactor takes its steps in proportion to what a parameter is, and scores of suppressed "
                f"weights are {-KEPT:g}; use another optimizer, or HardConcrete or STR"
            )

    def followed(self) -> None:
        """See `Method.followed`."""
        self._rounds.followed(self._model)

    def _first_score(self) -> float:
        return float(self.initial_value)

    def _gates(
        self,
        scores: Sequence[nn.Parameter],
        spreads: Sequence[Spread],
        cells: Sequence[tuple[int, int] | None],
    ) -> SoftMask:
        return SoftMask(scores, spreads, cells, self._scale())

    def _scale(self) -> float:
        return 1.0 if self.scaling == "paper" else code_scale(self.initial_value)

    def loss_term(self) -> Tensor | None:
        """See `Method.loss_term`: λ times the sum of the masks, counting weights; none of the ticket, and of N:M.

        Raises:
            OrderError: Scores are frozen.
        """
        if self.tensors:
            return None
        self._check_trained()
        if self.scored[0].cell is not None:
            return None
        mass = self._scale() * self._mass()
        return (self.penalty if self._steering is None else self._steering.strength.to(mass.device)) * mass

    @property
    def penalized(self) -> bool:  # type: ignore[override]
        """See `Method.penalized`: until there is a ticket."""
        return self.penalty != 0 and not self.tensors and as_structure(self.structure).cell is None

    def due(self, step: int) -> bool:
        """See `Method.due`."""
        return self._rounds.done < self.rounds and self._rounds.over(step)

    def update(self, step: int, state: StateOf) -> Proposal:
        """See `Method.update`: ends the present round, the last one with the ticket, rewound where that was asked for.

        Warns:
            UserWarning: Nothing of a layer is left, or steering ended far from the sparsity that was asked for.
        """
        if self.tensors:
            return Proposal([])
        if self._rounds.done + 1 < self._rounds.rounds:
            return self._next_round()
        proposal = self.ticket(step, state)
        if self.rewind is not None:
            back = self._rounds.back(self._model)
            writes = (proposal.write, back.write)
            proposal.restarted = [*proposal.restarted, *back.restarted]
            proposal.write = lambda: [write() for write in writes if write is not None]
        return proposal

    def phases(self) -> dict[str, Callable[..., Proposal]]:
        """See `Method.phases`."""
        return {"ticket": self.ticket} | self._rounds.phases(self._model)

    def _next_round(self) -> Proposal:
        """Suppress for good what does not live, and begin the next round with the rest."""
        self._rounds.end()
        kept = self._chosen(last=False)
        self._warn_of(kept, last=False)

        def write() -> None:
            temperature = self._temperature()
            for scored, chosen in zip(self.scored, kept, strict=True):
                scores, stays = local(scored.scores), rows_like(chosen, scored.scores)
                scores.copy_(suppress(scores, temperature, self.initial_value, stays))
            self._set_temperature(1.0)

        scores = [each.scores for each in self.scored]
        return Proposal([], self._extras(kept), True, scores, write)

    def ticket(self, step: int, state: StateOf) -> Proposal:
        """Make masks hard."""
        if self.tensors:
            return Proposal([])
        self._rounds.end(last=True)
        kept = self._chosen(last=True)
        self._warn_of(kept, last=True)
        self.tensors = self._under_masks()
        changes = [Change(tensor, self._mask(tensor.target, kept)) for tensor in self.tensors]
        scores = [each.scores for each in self.scored]
        return Proposal(changes, self._extras(kept), True, scores, lambda: self._write_scores(kept))

    def after_step(self, step: int) -> None:
        """See `Method.after_step`: keeps the rewind point, steers the penalty, raises the temperature."""
        self._rounds.reach(step, self._model)
        if not self.tensors:
            if self._steering is not None and self._rounds.into % self._measured == 0:
                self._steer()  # by gradients that were taken at this temperature
            if self._rounds.into % self.every == 0:
                self._set_temperature(self._temperature_at(self._rounds.into))

    def finalize(self) -> None:
        """See `Method.finalize`: the ticket; taken now where the rounds are not over.

        Warns:
            UserWarning: The temperature is not at its end, so that masks change when they become hard; or nothing of a
                layer is left.
        """
        if not self.tensors:
            temperature = float(self._temperature())
            if temperature < self.final_temperature * (1 - 1e-6):
                warnings.warn(
                    f"{self.name}: finalized in round {self._rounds.done + 1} of {self.rounds} at temperature "
                    f"{temperature:.4g}, below {self.final_temperature:g}: masks that are still soft become hard "
                    "now; train to the end of the rounds",
                    stacklevel=4,
                )
            if self.rewind is not None:
                warnings.warn(
                    f"{self.name}: finalized before the ticket was rewound to step {self.rewind}; train one step "
                    f"beyond the {self.rounds} rounds of {self.length} steps, and then the ticket",
                    stacklevel=4,
                )
            kept = self._chosen(last=True)
            self._warn_of(kept, last=True)
            self._write_scores(kept)
            self._put_under_masks([self._mask(target, kept) for target in self._claimed])
        super().finalize()

    @contextmanager
    def hardened(self) -> Iterator[None]:
        """See `Method.hardened`."""
        if self.tensors:
            yield
            return
        kept = self._chosen(last=True)
        before = [local(each.scores).clone() for each in self.scored]
        try:
            self._write_scores(kept)
            yield
        finally:
            with torch.no_grad():
                for each, scores in zip(self.scored, before, strict=True):
                    local(each.scores).copy_(scores)

    # -- what it tells -----------------------------------------------------------------------------------------------

    @property
    def hardens(self) -> bool:  # type: ignore[override]
        """See `Method.hardens`: until there is a ticket."""
        return not self.tensors

    def _learned(self) -> list[dict[str, Any]]:
        """Of every division how many scores are above 0, and the mass of the soft mask."""
        rows, temperature = [], self._temperature()
        for each in self.scored:
            scores = self._centered(each)
            rows.append(
                {
                    "name": each.name,
                    "groups": each.total,
                    "above_0": int((scores > 0).sum()),
                    "mass": float(soft_mask(scores, temperature).sum()),
                    "temperature": float(temperature),
                }
            )
        return rows

    def metrics(self) -> dict[str, float]:
        """See `Method.metrics`: rounds that are over, hard and soft density, temperature and λ."""
        if not self._placed():
            return {}
        strength = self.penalty if self._steering is None else float(self._steering.strength)
        return {
            "rounds_done": self._rounds.done,
            "hard_density": float(self._density()),
            "soft_density": self._soft_density(),
            "temperature": float(self._temperature()),
            "penalty": 0.0 if self.tensors else strength,
        }

    def check_run(self, steps: int) -> None:
        """See `Method.check_run`."""
        self._rounds.check_run(steps, more=0 if self.rewind is None else 1)

    def config(self) -> dict[str, Any]:
        """See `Method.config`."""
        return super().config() | {"rounds": self.rounds, "scaling": self.scaling}

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        names = (
            "initial_value",
            "penalty",
            "final_temperature",
            "rewind",
            "length",
            "every",
            "sparsity",
            "ranking",
            "lr",
        )
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """See `Method.state_dict`."""
        steering = None if self._steering is None else self._steering.state_dict()
        return self._rounds.state_dict() | {"steering": steering}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """See `Method.check_state`."""
        self._rounds.check_state(self.name, state, self._model)
        hard = state["rounds"][0] == self.rounds
        if wrong := next((target.name for target in self._claimed if (target.name in masks) != hard), None):
            raise StateError(
                f"sparsity state: {'no' if hard else 'a'} mask of {wrong} after {state['rounds'][0]} of {self.rounds} "
                "rounds; the file is damaged, use an earlier one"
            )
        steering = state.get("steering")
        if not (steering is None if self._steering is None else self._steering.check_state(steering)):
            raise StateError(
                f"{self.name}: the saved penalty is {steering!r:.80}, attached with sparsity={self.sparsity}; "
                "attach with a sparsity where it was saved with one, or the file is damaged"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`: scores and temperature are in the model's own state."""
        self._rounds.load_state_dict(state)
        hard = self._rounds.done == self.rounds
        if hard != bool(self.tensors):  # else masks stay in force until others are loaded
            self.tensors = self._under_masks() if hard else []
        if self._steering is not None:
            self._steering.load_state_dict(state["steering"])

    # -- parts -------------------------------------------------------------------------------------------------------

    def _temperature_at(self, into: int) -> float:
        """β after so many steps of a round: `β_T^(t / (E - 1))` in stage t of E (0 is the first)."""
        stages = -(-self.length // self.every)
        stage = min(into // self.every, stages - 1)
        return float(self.final_temperature ** (stage / (stages - 1))) if stages > 1 else self.final_temperature

    def _temperature(self) -> Tensor:
        """β as the gates have it, 0-dim."""
        gates = gates_of(self._claimed[0])
        assert isinstance(gates, SoftMask)
        return gates.temperature

    def _set_temperature(self, value: float) -> None:
        for target in self._claimed:
            gates = gates_of(target)
            assert isinstance(gates, SoftMask)
            gates.temperature.fill_(value)

    def _mass(self) -> Tensor:
        """`Σ σ(β·s)`, counting the weights of whole groups; 0-dim."""
        temperature = self._temperature()
        return self._sum(lambda scores: soft_mask(scores, temperature))

    def _steer(self) -> None:
        """Steer the penalty by the density there is."""
        assert self.sparsity is not None
        assert self._steering is not None
        first, final = ((1 - self.sparsity) ** ((self._rounds.done + part) / self.rounds) for part in (0, 1))
        gradients = [part.scores.grad / part.size for part in self.scored if part.scores.grad is not None]
        if len(gradients) < len(self.scored):
            return
        temperature, scale, strength = self._temperature(), self._scale(), self._steering.strength

        def slope(scores: Tensor) -> Tensor:
            mask = torch.sigmoid(temperature * scores)
            return scale * temperature * mask * (1 - mask)

        pull = self._sum(lambda s, gradient: (gradient - strength * slope(s)).abs(), gradients) / self._sum(slope)
        self._steering.steer(self._density(), first, final, self._rounds.into / self.length, pull)

    def _centered(self, scored: Scored) -> Tensor:
        """Whole scores as the gates have them: those of N:M relative to the others of their cell."""
        scores = whole(scored.scores)
        return scores if scored.cell is None else centered_in_cells(scores, *scored.cell)

    def _soft_density(self) -> float:
        """The mean of the soft mask over weights; where groups overlap each counts the whole."""
        return self._weights([row["mass"] for row in self._learned()]) / self._total()

    def _density(self) -> Tensor:
        """The fraction of weights whose group is to live, 0-dim; where groups overlap each counts the whole."""
        if (cell := self.scored[0].cell) is not None:
            return torch.tensor(cell[0] / cell[1])
        return self._sum(lambda scores: (scores.detach() > 0).double()) / self._total()

    def _chosen(self, last: bool) -> list[Tensor]:
        """Which groups live where masks become hard now: bool, in the shape of whole scores.

        Those above 0; the highest where a sparsity was asked for and this is the last time, or they are too few for it.
        """
        scores = [whole(each.scores) for each in self.scored]
        for part, each in zip(self.scored, scores, strict=True):
            if each.isnan().any():
                raise NonFiniteError(
                    f"{part.name}: its scores contain NaN, so its weights cannot be chosen; training has diverged "
                    "(lower lr, clip gradients), or the optimizer takes its steps in proportion to what a parameter "
                    "is (LARS, LAMB), which scores of suppressed weights are too large for"
                )
        if (cell := self.scored[0].cell) is not None:
            n = torch.tensor([cell[0]], device=scores[0].device)
            return [largest_in_cells(each, n, cell[1]) for each in scores]
        above = [each > 0 for each in scores]
        if self.sparsity is None or not self.ranking:
            return above
        left = active_weights(self.sparsity, self._total())
        if not last and self._weights([int(each.sum()) for each in above]) >= left:
            return above
        ranked = torch.cat([each.reshape(-1) for each in scores]).sort(descending=True, stable=True).indices
        sizes = torch.cat([torch.full((part.total,), part.size, device=ranked.device) for part in self.scored])
        order = ranked
        kept = torch.zeros_like(ranked, dtype=torch.bool)
        while len(order := order[sizes[order] <= left]):  # as often as there are sizes, at most
            fits = sizes[order].cumsum(0) <= left
            kept[order[fits]] = True
            left -= int(sizes[order[fits]].sum())
            order = order[~fits]
        parts = kept.tensor_split([sum(each.numel() for each in scores[:i]) for i in range(1, len(scores))])
        # What an earlier round has suppressed does not come back, also where fewer are left than were asked for.
        return [
            part.view(each.shape) & (each > -lasting(each.dtype) / 2) for part, each in zip(parts, scores, strict=True)
        ]

    def _check_trained(self) -> None:
        """Raise an OrderError where masks would go on to harden though nothing trains their scores."""
        if frozen := next((each.name for each in self.scored if not each.scores.requires_grad), None):
            raise OrderError(
                f"{frozen}: its scores are frozen (requires_grad is False), and its masks would harden without them; "
                "train them until the ticket is taken, or attach without this layer (targets)"
            )

    def _warn_of(self, kept: Sequence[Tensor], last: bool) -> None:
        if self.sparsity is not None:
            found, asked = float(self._density()), 1 - self.sparsity
            if abs(found - asked) > NEAR if last else found < asked - NEAR:
                stays = self._weights([int(chosen.sum()) for chosen in kept]) / self._total()
                warnings.warn(
                    f"{self.name}: steering ended round {self._rounds.done} of {self.rounds} with {found:.2%} of the "
                    f"weights above 0, where {asked:.2%} are asked for in the end; "
                    + (f"{stays:.2%} stay, those with the highest scores; " if self.ranking else "")
                    + f"masks are {self._soft_density():.2%} open on average; where that is far off, they were not "
                    "hard yet, and rounds need more steps; else scores moved too fast (lower their lr: of Adam and the "
                    "like it is to be a few thousandths) or too slowly",
                    stacklevel=5,
                )
        for scored, chosen in zip(self.scored, kept, strict=True):
            if not chosen.any():
                warnings.warn(
                    f"{scored.name}: no weight is left, so that nothing passes this layer; lower the penalty "
                    f"({self.penalty:g}) or raise initial_value ({self.initial_value:g}), or leave it out with "
                    f"targets=['!{scored.name}']",
                    stacklevel=5,
                )

    def _extras(self, kept: Sequence[Tensor]) -> dict[str, float]:
        left = self._weights([int(chosen.sum()) for chosen in kept])
        return {"round": self._rounds.done, "density": left / self._total()}

    def _write_scores(self, kept: Sequence[Tensor]) -> None:
        """Make scores such that soft masks are hard ones."""
        with torch.no_grad():
            for scored, chosen in zip(self.scored, kept, strict=True):
                scores = scored.scores
                most = lasting(scores.dtype)
                local(scores).copy_(rows_like(torch.where(chosen, most, -most), scores))

    def _mask(self, target: Target, kept: Sequence[Tensor]) -> Tensor:
        """This rank's part of a hard mask of a weight, int8."""
        return rows_like(self._spread(target, [each.to(torch.int8) for each in kept]).neg(), target.parameter)
