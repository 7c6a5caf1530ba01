"""The three ways in which Numenta's notebook counts the use of a convolution's connections, as references.

Each is for `dilation=1` and `groups=1`, as there, and gives `H[o, c, j, h]`: how often the sigmoid of an output of map
`o`, and that of the input which it sees through weight `(o, c, j, h)`, were both above 0.5; float32.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn


def by_units(conv: nn.Conv2d, input: Tensor, output: Tensor) -> Tensor:
    """`f1`: for each place in a filter a convolution that has a 1 there alone gives the input seen through it."""
    counts = torch.zeros(conv.weight.shape)
    active = torch.sigmoid(output) > 0.5
    for c, j, h in product(*map(range, conv.weight.shape[1:])):
        weight = torch.zeros(conv.weight.shape)
        weight[:, c, j, h] = 1
        seen = torch.nn.functional.conv2d(input, weight, None, conv.stride, conv.padding)
        counts[:, c, j, h] = (active & (torch.sigmoid(seen) > 0.5)).sum((0, 2, 3))
    return counts


def stacked(conv: nn.Conv2d, input: Tensor, output: Tensor) -> Tensor:
    """`f2`: the convolutions of `by_units` as the groups of one, over as many copies of the input."""
    places = list(product(*map(range, conv.weight.shape[1:])))
    weight = torch.zeros(len(places), *conv.weight.shape)
    for number, (c, j, h) in enumerate(places):
        weight[number, :, c, j, h] = 1
    copies = input.repeat(1, len(places), 1, 1)
    seen = torch.nn.functional.conv2d(copies, weight.flatten(0, 1), None, conv.stride, conv.padding, groups=len(places))
    active = (torch.sigmoid(output) > 0.5).repeat(1, len(places), 1, 1)
    counts = (active & (torch.sigmoid(seen) > 0.5)).sum((0, 2, 3)).float()
    return counts.view(len(places), -1).t().reshape(conv.weight.shape)


def by_loops(conv: nn.Conv2d, input: Tensor, output: Tensor) -> Tensor:
    """`f3`: one output and one input after the other."""
    counts = torch.zeros(conv.weight.shape)
    _, inputs, height, width = input.shape
    x, y = (torch.sigmoid(each) > 0.5 for each in (input, output))
    for b, o, n, m in product(*map(range, output.shape)):
        for c, j, h in product(range(inputs), *map(range, conv.kernel_size)):
            row = n * conv.stride[0] - conv.padding[0] + j
            column = m * conv.stride[1] - conv.padding[1] + h
            inside = 0 <= row < height and 0 <= column < width  # σ(0), in the padding, is not above 0.5
            if inside and y[b, o, n, m] and x[b, c, row, column]:
                counts[o, c, j, h] += 1
    return counts


METHODS = (by_units, stacked, by_loops)
