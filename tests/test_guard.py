"""An optimizer that would train masked weights without their masks is stopped before it changes anything."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import gossamer as gs


def sgd(*models):
    return torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)


def with_gradients(*models):
    for model in models:
        model(torch.ones(1, 4)).sum().backward()


def test_second_model_with_the_same_names_is_noticed_beside_a_followed_one():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    followed, forgotten = gs.attach(first, gs.SET(0.5)), gs.attach(second, gs.SET(0.5))
    optimizer = sgd(first, second)
    followed.follow(optimizer)
    with_gradients(first, second)
    before = second.weight.detach().clone()
    with pytest.raises(gs.OrderError, match=r"weight: has a mask, but no sparsity.follow\(optimizer\) was called"):
        optimizer.step()
    assert second.weight.equal(before)
    assert forgotten.density() == 0.5


def test_handle_that_was_dropped_without_following_is_still_noticed():
    model = nn.Linear(4, 4)
    gs.attach(model, gs.SET(0.5))
    optimizer = sgd(model)
    with_gradients(model)
    with pytest.raises(gs.OrderError, match=r"weight: has a mask, but no sparsity.follow"):
        optimizer.step()


def test_optimizer_of_other_weights_steps_freely():
    sparse, dense = nn.Linear(4, 4), nn.Linear(4, 4)
    sparsity = gs.attach(sparse, gs.SET(0.5))
    with_gradients(sparse, dense)
    before = dense.weight.detach().clone()
    sgd(dense).step()
    assert not dense.weight.equal(before)
    assert sparsity.density() == 0.5


def test_parameter_added_to_an_optimizer_later_is_noticed():
    sparse, dense = nn.Linear(4, 4), nn.Linear(4, 4)
    sparsity = gs.attach(sparse, gs.SET(0.5))
    optimizer = sgd(dense)
    with_gradients(sparse, dense)
    optimizer.step()
    optimizer.add_param_group({"params": list(sparse.parameters())})
    with pytest.raises(gs.OrderError, match=r"weight: has a mask, but no sparsity.follow"):
        optimizer.step()
    assert sparsity.density() == 0.5


@pytest.mark.parametrize("end", ["finalize", "detach"])
def test_after_the_end_any_optimizer_may_train_the_weights(end):
    model = nn.Linear(4, 4)
    sparsity = gs.attach(model, gs.SET(0.5), sgd(model))
    getattr(sparsity, end)()
    with_gradients(model)
    sgd(model).step()
    assert model.weight.count_nonzero() == 16


def test_who_only_imports_gossamer_has_no_hook_on_optimizers():
    program = (
        "from torch.optim import Optimizer; import gossamer; "
        "raise SystemExit(len(Optimizer.profile_hook_step.__globals__['_global_optimizer_pre_hooks']))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_an_optimizer_that_wraps_a_followed_one_is_named():
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner
            super().__init__(inner.param_groups, {})

        def step(self, closure=None):
            self.inner.step()

    model = nn.Linear(4, 4)
    inner = sgd(model)
    gs.attach(model, gs.SET(0.5), inner)
    with_gradients(model)
    with pytest.raises(gs.OrderError, match=r"follow was called with SGD, not with the Lookahead that"):
        Lookahead(inner).step()
