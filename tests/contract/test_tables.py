"""The tables leave out no method and no optimizer."""

import pytest
from torch import optim

import gossamer as gs
from gossamer.weights import METHODS as REGISTRY

from .tables import LEARNED, METHODS, OPTIMIZERS, TinyNet


def test_every_registered_method_has_a_row() -> None:
    assert {row.method for row in [*METHODS, *LEARNED]} == set(REGISTRY.values())


def test_every_optimizer_class_of_torch_has_a_row_or_is_refused() -> None:
    classes = {
        cls
        for cls in vars(optim).values()
        if isinstance(cls, type) and issubclass(cls, optim.Optimizer) and cls is not optim.Optimizer
    }
    tested = {cls for row in OPTIMIZERS for cls in row.classes}
    assert classes == tested | {optim.LBFGS, optim.SparseAdam}


@pytest.mark.parametrize("cls", [optim.LBFGS, optim.SparseAdam])
def test_optimizers_that_masks_cannot_work_with_are_refused_by_name(cls: type[optim.Optimizer]) -> None:
    model = TinyNet()
    before = model.head.weight.clone()
    with pytest.raises(
        gs.ConfigurationError, match=rf"{cls.__name__} cannot train masked weights, since .*; use another"
    ):
        gs.attach(model, gs.SET(0.5), cls(model.parameters(), lr=0.1))
    assert model.head.weight.equal(before)
