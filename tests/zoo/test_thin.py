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


def test_the_full_budget_gives_the_network_itself_and_one_less_a_thinner_one():
    full = parameter_count(zoo.cifar_wrn(10, 2))
    assert parameter_count(zoo.cifar_wrn(10, zoo.width_for_parameters(lambda w: zoo.cifar_wrn(10, w), full))) == full
    assert zoo.width_for_parameters(lambda w: zoo.cifar_wrn(10, w), full - 1) < 2


def test_searching_draws_no_random_number():
    before = torch.get_rng_state()
    zoo.width_for_parameters(zoo.mnist_mlp, 10_000)
    assert torch.equal(before, torch.get_rng_state())


def test_budgets_that_no_width_meets_are_refused():
    with pytest.raises(ConfigurationError, match="budget=10, but the thinnest network"):
        zoo.width_for_parameters(zoo.mnist_mlp, 10)
    with pytest.raises(ConfigurationError, match="does `build` use its width"):
        zoo.width_for_parameters(lambda width: torch.nn.Linear(3, 3), 100)
