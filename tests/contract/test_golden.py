"""The published network at its published size: WRN-28-2 under dynamic sparse reparameterization."""

import pytest
import torch

import gossamer as gs
from gossamer.zoo import cifar_wrn

from .tables import bits, weights

PARAMETERS, SPARSE = 1_467_610, 1_451_520


@pytest.mark.parametrize(("over", "budget", "updates"), [("targets", 145_152, 1000), ("all", 130_671, 100)])
def test_wrn_28_2_keeps_its_exact_budget_through_many_updates(over: str, budget: int, updates: int) -> None:
    torch.manual_seed(0)
    model = cifar_wrn()
    sparsity = gs.attach(model, gs.DSR(0.9, targets=list(model.SPARSE_TARGETS), over=over, prune_count=20_000))
    totals = sparsity.summary().totals
    assert (totals["all_total"], totals["targets_total"]) == (PARAMETERS, SPARSE)
    assert totals["all_nonzero"] == budget + PARAMETERS - SPARSE
    targets = [weight for _, weight, _ in weights(model, sparsity.masks())]
    noise = [torch.randn_like(weight) for weight in targets]
    generator = torch.Generator().manual_seed(0)
    changed = 0
    for step in range(updates):
        with torch.no_grad():
            for weight, change, size in zip(targets, noise, torch.rand(len(targets), generator=generator), strict=True):
                weight.add_(change, alpha=0.01 * float(size))
        (update,) = sparsity.update()
        changed += sum(row["grown"] for row in update.rows)
        counts = [int(mask.count_nonzero()) for mask in sparsity.masks().values()]
        assert sum(counts) == budget
        assert min(counts) >= 1
        if step % 100 == 0:
            for _, weight, mask in weights(model, sparsity.masks()):
                assert not bits(weight)[~mask].any()
    assert changed > updates * 1000
