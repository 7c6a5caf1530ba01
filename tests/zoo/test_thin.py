"""Thin dense networks have as many parameters as their budget allows, and no more."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer import ConfigurationError, zoo
from gossamer.targets import parameter_count
from gossamer.zoo.thin import STEPS


@given(st.integers(min_value=1_100, max_value=600_000))
def test_the_next_wider_network_is_above_the_budget(budget):
    width = zoo.width_for_parameters(zoo.mnist_mlp, budget)
    assert parameter_count(zoo.mnist_mlp(width)) <= budget
    assert parameter_count(zoo.mnist_mlp((round(width * STEPS) + 1) / STEPS)) > budget


@pytest.mark.parametrize("width", [0.37, 1, 1.3, 2])
def test_a_budget_that_a_network_meets_exactly_gives_that_network_and_one_less_a_thinner_one(width):
    budget = parameter_count(zoo.cifar_wrn(10, width))
    found, below = (zoo.width_for_parameters(lambda w: zoo.cifar_wrn(10, w), budget - less) for less in (0, 1))
    assert parameter_count(zoo.cifar_wrn(10, found)) == budget
    assert below < width <= found


def test_searching_draws_no_random_number():
    before = torch.get_rng_state()
    zoo.width_for_parameters(zoo.mnist_mlp, 10_000)
    assert torch.equal(before, torch.get_rng_state())


def test_budgets_that_no_width_meets_are_refused():
    with pytest.raises(ConfigurationError, match="budget=10, but the thinnest network"):
        zoo.width_for_parameters(zoo.mnist_mlp, 10)
    with pytest.raises(ConfigurationError, match="does `build` use its width"):
        zoo.width_for_parameters(lambda width: torch.nn.Linear(3, 3), 100)
