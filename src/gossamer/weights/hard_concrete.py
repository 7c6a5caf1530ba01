"""L0 regularization: gates that are open with a learned probability, and a penalty on how many are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.checks import MAX_SEED, check_integer, check_number
from gossamer.errors import ConfigurationError
from gossamer.groups import Groups, Spread
from gossamer.masks import rows_like
from gossamer.nn.gates import HardConcreteGates, chance, hard_concrete
from gossamer.state import check_random
from gossamer.structure import as_structure
from gossamer.targets import whole
from gossamer.weights.learned import LearnedMethod, gates_of


@dataclass(eq=False)
class HardConcrete(LearnedMethod):
    """Learn with which probability each weight is there, by hard-concrete gates (Louizos et al., 2018).

    In training every step draws gates in [0, 1] anew, many of them exactly 0 or 1; `Sparsity.penalty()` is λ times the
    expected number of weights whose gate is not 0. In evaluation, and after `finalize`, a weight is multiplied by the
    gate without noise, which is exactly 0 where `log α` is below -2.4.

    Args:
        penalty: The factor λ, at least 0. The paper divides it by the number of training images.
        drop_rate: Probability with which a gate is closed at first, in (0, 1).
        seed: Seed of the noise.

    See `LearnedMethod` for the other arguments; N:M is no structure for gates that open independently.

    Raises:
        ConfigurationError: A value out of range, when the method is made.
    """

    penalty: float = 1e-5
    _: KW_ONLY
    drop_rate: float = 0.5
    seed: int = 0

    name = "hard_concrete"
    steps = ()

    def _check(self) -> None:
        super()._check()
        check_number("penalty", self.penalty, 0, float("inf"), open_high=True)
        check_number("drop_rate", self.drop_rate, 0, 1, open_high=True)
        if self.drop_rate == 0:
            raise ConfigurationError("drop_rate: expected a number in (0, 1), got 0")
        check_integer("seed", self.seed, at_least=0, at_most=MAX_SEED)
        if as_structure(self.structure).cell is not None:
            raise ConfigurationError(
                f"structure {self.structure}: gates open independently of each other, which leaves no N of M; use "
                "ContinuousSparsification, or a method of hard masks"
            )

    def _bind(self, model: nn.Module, groups: Sequence[Groups]) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def install(self) -> None:
        """See `Method.install`."""
        super().install()
        self._draw()

    def _first_score(self) -> float:
        return math.log(1 - self.drop_rate) - math.log(self.drop_rate)

    def _gates(
        self, scores: Sequence[nn.Parameter], spreads: Sequence[Spread], cells: Sequence[tuple[int, int] | None]
    ) -> HardConcreteGates:
        return HardConcreteGates(scores, spreads)

    @property
    def penalized(self) -> bool:  # type: ignore[override]
        """See `Method.penalized`."""
        return self.penalty != 0

    def loss_term(self) -> Tensor | None:
        """See `Method.loss_term`."""
        return self.penalty * self._expected()

    def after_step(self, step: int) -> None:
        """See `Method.after_step`: draws new noise."""
        self._draw()

    @contextmanager
    def hardened(self) -> Iterator[None]:
        """See `Method.hardened`: gates without noise, also in training."""
        gates = [gates_of(target) for target in self._claimed]
        before = [each.training for each in gates]
        try:
            for each in gates:
                each.eval()
            yield
        finally:
            for each, training in zip(gates, before, strict=True):
                each.train(training)

    def finalize(self) -> None:
        """See `Method.finalize`: weights times their gates; exact zeros where those are 0."""
        open = self._open()
        self._put_under_masks([rows_like(self._spread(t, open).neg(), t.parameter) for t in self._claimed])
        super().finalize()

    def _learned(self) -> list[dict[str, Any]]:
        """Of every division how many gates are not 0 in evaluation, and are in expectation."""
        expected = [float(chance(whole(each.scores)).sum()) for each in self.scored]
        return [
            {"name": each.name, "groups": each.total, "open": int(gates.sum()), "expected": count}
            for each, gates, count in zip(self.scored, self._open(), expected, strict=True)
        ]

    def metrics(self) -> dict[str, float]:
        """See `Method.metrics`: the density in evaluation, and the one that is expected in training."""
        if not self._placed():
            return {}
        rows = self._learned()
        return {
            "hard_density": self._weights([row["open"] for row in rows]) / self._total(),
            "expected_density": self._weights([row["expected"] for row in rows]) / self._total(),
        }

    def settings(self) -> dict[str, Any]:
        """See `Method.settings`."""
        return {"penalty": self.penalty, "drop_rate": self.drop_rate, "lr": self.lr}

    def state_dict(self) -> dict[str, Any]:
        """See `Method.state_dict`: the random state before the present noise was drawn."""
        return {"generator": self._before}

    def check_state(self, state: Mapping[str, Any], masks: Mapping[str, Tensor]) -> None:
        """See `Method.check_state`."""
        check_random(self.name, state.get("generator"), self.generator)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Method.load_state_dict`: log α is in the model's own state."""
        self.generator.set_state(state["generator"].cpu())
        self._draw()

    def _draw(self) -> None:
        self._before = self.generator.get_state()
        for each in self.scored:
            noise = torch.rand(each.scores.shape, generator=self.generator).logit_(1e-6)
            for target, i in each.places:
                gates_of(target).get_buffer(f"noise_{i}").copy_(noise)

    def _expected(self) -> Tensor:
        return self._sum(chance)

    def _open(self) -> list[Tensor]:
        """Which gates are not 0 in evaluation, int8, in the shape of whole scores."""
        return [(hard_concrete(whole(each.scores)) > 0).to(torch.int8) for each in self.scored]
