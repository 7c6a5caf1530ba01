"""The two networks and data sets that several benchmarks train, as parts of a recipe."""

from __future__ import annotations

from typing import Any

NETWORKS: dict[str, dict[str, Any]] = {
    "lenet": {
        "data": {"name": "fashion_mnist", "batch_size": 128},
        "model": {"name": "lenet"},
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
        "schedule": {"type": "cosine"},
        "threads": 1,
    },
    "cifar_resnet": {
        "data": {
            "name": "cifar10",
            "batch_size": 64,
            "validation": 1000,
            "train": 10_000,
            "augment": {"crop": 4, "padding": "reflect", "flip": True},
        },
        "model": {"name": "cifar_resnet", "depth": 20},
        "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
        "schedule": {"type": "cosine", "warmup": 1},
        "precision": "bf16",
        "channels_last": True,
        "threads": 1,
    },
}
TITLES = {"lenet": "LeNet, Fashion-MNIST", "cifar_resnet": "ResNet-20, 10,000 images of CIFAR-10"}
