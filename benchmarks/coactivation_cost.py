"""What it costs to count which connections are active at both ends.

    python benchmarks/coactivation_cost.py [--threads 2] [--pairs 40] [--out benchmarks/results/coactivation_cost.json]

For `Conv2d(3, 6, 5)` on images of CIFAR-10 and the layers of LeNet and ResNet-20, at batch 128: dense forward, dense
forward and backward, and both with counting in every forward pass, in every 20th (as a mean over 20 of them), and by
the stacked convolution of the seed's notebook. A and B alternate in one run; times are medians, ratios medians of
paired ratios. `peak_mb` is what a single count takes at most, beside input, output and weight (Linux).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cost import alternate, publish
from gossamer.scores import coactivation

BATCH = 128
LAYERS: dict[str, tuple[int, int, int, int, int]] = {
    # Input maps, side of an image, output maps, kernel, padding.
    "Conv2d(3, 6, 5), CIFAR-10": (3, 32, 6, 5, 0),
    "LeNet conv1": (1, 28, 6, 5, 0),
    "LeNet conv2": (6, 12, 16, 5, 0),
    "ResNet-20 stage 1": (16, 32, 16, 3, 1),
    "ResNet-20 stage 2": (32, 16, 32, 3, 1),
    "ResNet-20 stage 3": (64, 8, 64, 3, 1),
}
FIRST = ("Conv2d(3, 6, 5), CIFAR-10", "LeNet conv1")


def make(name: str) -> tuple[nn.Conv2d, Tensor]:
    maps, side, out, kernel, padding = LAYERS[name]
    torch.manual_seed(0)
    return nn.Conv2d(maps, out, kernel, padding=padding), torch.randn(BATCH, maps, side, side)


def stacked_weight(conv: nn.Conv2d) -> Tensor:
    """The weight of the notebook's convolution: a group for each place of a filter, 1 there and 0 elsewhere."""
    places = torch.eye(conv.weight[0].numel())
    return places.view(-1, 1, *conv.weight.shape[1:]).repeat(1, conv.out_channels, 1, 1, 1).flatten(0, 1)


def stacked_count(conv: nn.Conv2d, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """As the notebook counts: all taps at once, of as many copies of the input as a filter has weights."""
    places = conv.weight[0].numel()
    seen = F.conv2d(x.repeat(1, places, 1, 1), weight, None, conv.stride, conv.padding, groups=places)
    both = torch.sigmoid(y).gt(0.5).repeat(1, places, 1, 1) & torch.sigmoid(seen).gt(0.5)
    return both.sum((0, 2, 3)).float().view(places, -1).t().reshape(conv.weight.shape)


def peak(name: str, how: str) -> float:
    """Megabytes that a count takes at most, in a process of its own."""
    found = subprocess.run(
        [sys.executable, __file__, "--peak", name, how], capture_output=True, text=True, check=True
    ).stdout
    return float(found)


def measure_peak(name: str, how: str) -> float:
    conv, x = make(name)
    y = conv(x).detach()
    coactivation(x[:1], y[:1], conv)  # what libraries need once
    before = _resident("VmRSS")
    if how == "coactivation":
        coactivation(x, y, conv)
    else:
        stacked_count(conv, x, y, stacked_weight(conv))
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """Megabytes of this process, now or at most. What `getrusage` calls its peak is inherited from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(name: str, pairs: int) -> dict[str, Any]:
    conv, x = make(name)
    y = conv(x).detach()
    weight = stacked_weight(conv)
    # Layers behind the first also send a gradient back.
    fed = x.clone().requires_grad_(name not in FIRST)
    gradient = torch.randn_like(y)
    assert stacked_count(conv, x[:4], y[:4], weight).equal(coactivation(x[:4], y[:4], conv))

    def forward() -> None:
        with torch.no_grad():
            conv(x)

    def steps(times: int, counted: int) -> Callable[[], None]:
        def run() -> None:
            for step in range(times):
                found = conv(fed)
                if step < counted:
                    coactivation(x, found.detach(), conv)
                found.backward(gradient)

        return run

    count = alternate(lambda: stacked_count(conv, x, y, weight), lambda: coactivation(x, y, conv), max(3, pairs // 8))
    return {
        "forward": alternate(forward, lambda: (forward(), coactivation(x, y, conv)), pairs),
        "forward_and_backward, counted each time": alternate(steps(1, 0), steps(1, 1), pairs),
        "forward_and_backward, counted every 20th time": alternate(steps(20, 0), steps(20, 1), pairs),
        "one count: the notebook's, and coactivation": count | {"times_as_fast": 1 / count["ratio"]},
        "peak_mb": {how: peak(name, how) for how in ("coactivation", "stacked")},
    }


def measure_all(pairs: int) -> dict[str, object]:
    found = {}
    for name in LAYERS:
        found[name] = measure(name, pairs)
        print(name, json.dumps(found[name], indent=1), flush=True)
    return {"layers": found}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(measure_peak(*sys.argv[2:]))
    else:
        publish(__doc__, "coactivation_cost", 40, measure_all)
