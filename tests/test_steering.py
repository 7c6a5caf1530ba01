"""The controller of a penalty: its formula, and the bounds that it keeps."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.weights.steering import Steering

FIRST, FINAL, SCALE = 1.0, 0.1, 1e-8
densities = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=30)


def steered(found: list[float], pull: float, steps: int = 40) -> list[float]:
    steering = Steering(SCALE)
    told = []
    for step, density in enumerate(found):
        steering.steer(torch.tensor(density), FIRST, FINAL, step / steps, torch.tensor(pull, dtype=torch.float64))
        told.append(float(steering.strength))
    return told


@given(densities)
def test_the_penalty_follows_the_documented_formula_where_nothing_bounds_it(found: list[float]) -> None:
    level, expected = 0.0, []
    for step, density in enumerate(found):
        way = min(step / 40 / 0.6, 1.0)
        goal = FIRST * (FINAL / FIRST) ** way
        density = float(torch.tensor(density))
        few = density < FINAL
        error = max(-1.0, min(1.0, math.log(density / (FINAL if few else goal))))
        least = -math.inf if few and way >= 0.5 else 0.0
        level = max(level + 1.5 * error, least)
        expected.append(SCALE * math.sinh(max(level + 25 * error, least)))
    torch.testing.assert_close(torch.tensor(steered(found, 1e200)), torch.tensor(expected), rtol=1e-4, atol=1e-12)


@given(densities, st.floats(1e-10, 1e-3))
def test_the_penalty_pulls_at_most_three_times_as_hard_as_the_loss_and_a_reward_once(
    found: list[float], pull: float
) -> None:
    for step, strength in enumerate(steered(found, pull)):
        assert strength <= 3 * pull * (1 + 1e-5)
        assert strength >= (0 if step / 40 < 0.3 else -pull * (1 + 1e-5))


def test_a_penalty_that_can_do_no_more_is_not_wound_up() -> None:
    """As soon as too few are left it falls, however long too many were."""
    steering = Steering(SCALE)
    for _ in range(1000):
        steering.steer(torch.tensor(1.0), FIRST, FINAL, 1.0, torch.tensor(1e-6))
    assert math.isclose(float(steering.strength), 3e-6, rel_tol=1e-4)
    steering.steer(torch.tensor(0.05), FIRST, FINAL, 1.0, torch.tensor(1e-6))
    assert float(steering.strength) < 0


def test_what_is_not_known_of_the_loss_changes_no_bound() -> None:
    steering = Steering(SCALE)
    for pull in (1e-6, math.nan, math.inf):
        steering.steer(torch.tensor(1.0), FIRST, FINAL, 1.0, torch.tensor(pull))
    assert math.isclose(float(steering.strength), 3e-6, rel_tol=1e-4)


def test_the_bound_follows_the_pull_of_the_loss_smoothly() -> None:
    steering = Steering(SCALE)
    steering.steer(torch.tensor(1.0), FIRST, FINAL, 1.0, torch.tensor(1e-6))
    steering.steer(torch.tensor(1.0), FIRST, FINAL, 1.0, torch.tensor(2e-6))
    assert math.isclose(float(steering.strength), 3 * 1.1e-6, rel_tol=1e-4)
