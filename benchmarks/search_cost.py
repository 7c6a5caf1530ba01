"""What a step costs in which masks are learned: ResNet-20 for CIFAR-10 at batch 128, SGD, beside a dense step.

    python benchmarks/search_cost.py [--threads 2] [--pairs 20] [--out benchmarks/results/search_cost.json]

Dense and sparse steps alternate in one run; times are medians, ratios medians of paired ratios. A step is forward,
loss, penalty, backward and optimizer, in the midst of a search; `extra_bytes` are those of all tensors that the method
keeps between steps, beside the weights and the optimizer's state, for each weight that it masks.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

import gossamer as gs
from cost import alternate, publish
from gossamer.zoo import cifar_resnet

METHODS: dict[str, Any] = {
    "continuous": lambda: gs.ContinuousSparsification(length=100_000),
    "continuous, filters": lambda: gs.ContinuousSparsification(length=100_000, structure="filter"),
    "continuous, steered": lambda: gs.ContinuousSparsification(length=1000, rounds=1, sparsity=0.9),
    "hard-concrete": gs.HardConcrete,
    "soft thresholds": gs.STR,
    "iterative pruning (the second round)": lambda: gs.IMP(0.9, length=2, rounds=1, rewind=None),
}


def make(method: gs.Method | None) -> tuple[nn.Module, gs.Sparsity | None, Any]:
    torch.manual_seed(0)
    model = cifar_resnet(depth=20).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    sparsity = None if method is None else gs.attach(model, method, optimizer)
    x = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (128,))

    def step() -> None:
        loss = nn.functional.cross_entropy(model(x), y)
        if sparsity is not None:
            loss = loss + sparsity.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, sparsity, step


def kept_bytes() -> int:
    """Of all tensors that are alive."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor):  # isinstance would ask modules of torch that warn
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def extra_bytes(method: gs.Method) -> float:
    """Bytes a masked weight between steps, without those of the optimizer's state of the scores, which is as large."""
    before = kept_bytes()
    dense = make(None)
    dense[2]()
    middle = kept_bytes()
    sparse = make(method)
    sparse[2]()
    sparse[2]()
    after = kept_bytes()
    assert sparse[1] is not None
    scores = sum(p.numel() * p.element_size() for group in sparse[1].param_groups() for p in group["params"])
    total = sparse[1].summary().totals["targets_total"]
    return (after - middle - (middle - before) - scores) / total


def measure(pairs: int) -> dict[str, object]:
    found = {}
    for name, method in METHODS.items():
        extra = extra_bytes(method())
        _, _, dense = make(None)
        _, _, sparse = make(method())
        found[name] = alternate(dense, sparse, pairs) | {"extra_bytes_a_weight": round(extra, 2)}
        print(name, found[name], flush=True)
    return {"resnet_20_sgd_batch128": found}


if __name__ == "__main__":
    publish(__doc__, "search_cost", 20, measure)
