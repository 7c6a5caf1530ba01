"""How strong connections are: how often, or how much, their two ends are active together.

Both statistics are the gradient that a layer's weight would have if some function of its input were what goes in and
some function of its output were the gradient that comes back. So they cost about one backward pass of the layer, and
are right for every stride, padding, dilation and number of groups.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.checks import check_boolean, check_number
from gossamer.errors import ConfigurationError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""The layers whose connections can be measured."""

_CHUNK = 1 << 22
"""Numbers that are worked on at a time where a product for every position is needed."""

Layer = nn.Linear | nn.modules.conv._ConvNd


@torch.no_grad()
def coactivation(
    input: Tensor,
    output: Tensor,
    layer: nn.Module,
    *,
    threshold: float = 0.0,
    sigmoid: bool = False,
    deviations: float | None = None,
) -> Tensor:
    """Count how often the input and the output of each connection are both active.

    `H[o, i, k] = Σ 1[y > t]·1[x > t]` over all samples and positions, `x` being what the connection sees of the input
    (its padding included) for the output `y`.

    Args:
        input: What went into the layer: `(N, C, …)`, or `(C, …)`, of a convolution; `(…, features)` of a linear one.
        output: What came out, or that after an activation function.
        layer: An `nn.Linear`, an `nn.Conv1d`, `2d` or `3d`, or a transposed one.
        threshold: `t`: what is above it is active.
        sigmoid: Whether `σ(x)` and `σ(y)` are compared with the threshold instead.
        deviations: Instead of a threshold: active is what is above mean + so many standard deviations of its channel
            (feature) in this batch; below 0 for what is above mean - so many.

    Returns:
        float32 in the shape of the layer's weight; exact up to 2^24 for each connection. Zeros without samples.

    Raises:
        ConfigurationError: Another kind of layer, or tensors that do not belong to it.
    """
    layer = check_layer(layer)
    check_activity(threshold, sigmoid, deviations)
    x, y = _samples(layer, input, output)
    if not len(x):
        return x.new_zeros(layer.weight.shape, dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        if sigmoid:
            x, y = torch.sigmoid(x), torch.sigmoid(y)
        limits = [threshold if deviations is None else _limits(each, deviations) for each in (x, y)]
        # What lies in the padding is 0 before any function is applied to it, or what the layer puts there.
        padded = _pad(layer, x, 0.5 if sigmoid else 0.0)
        return _weight_gradient(layer, _above(padded, limits[0]), _above(y, limits[1])).round_()


@torch.no_grad()
def correlation(input: Tensor, output: Tensor, layer: nn.Module, *, absolute: bool = False) -> Tensor:
    """Correlate the input and the output of each connection.

    `ρ = cov(x, y)/(σ_x σ_y)` over the samples, at each position of a convolution by itself, and the mean over
    positions; 0 where either does not vary. Of a linear layer all leading dimensions are samples.

    Args:
        input: As of `coactivation`.
        output: Likewise.
        layer: Likewise.
        absolute: Whether the mean is of `|ρ|`.

    Returns:
        float32 in the shape of the layer's weight, in [-1, 1]. Zeros without samples.

    Raises:
        ConfigurationError: Another kind of layer, or tensors that do not belong to it.
    """
    layer = check_layer(layer)
    x, y = _samples(layer, input, output)
    if not len(x):
        return x.new_zeros(layer.weight.shape, dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, y = _standardized(x), _standardized(y)
        count = occasions(x, y, layer)
        x = _pad(layer, x, 0.0)
        if absolute and not isinstance(layer, nn.Linear):
            return _absolute(layer, x, y) / count
        found = _weight_gradient(layer, x, y) / count
        return found.abs_() if absolute else found


def occasions(input: Tensor, output: Tensor, layer: nn.Module) -> int:
    """The most that `coactivation` could count: samples, times positions that a weight is applied at."""
    layer = check_layer(layer)
    if isinstance(layer, nn.Linear):
        return output.numel() // layer.out_features
    return input.numel() // layer.in_channels if layer.transposed else output.numel() // layer.out_channels


def check_activity(threshold: float, sigmoid: bool, deviations: float | None) -> None:
    """Raise a ConfigurationError unless these say what is active; see `coactivation`."""
    check_number("threshold", threshold, float("-inf"), float("inf"))
    check_boolean("sigmoid", sigmoid)
    if deviations is not None:
        check_number("deviations", deviations, float("-inf"), float("inf"))
        if sigmoid or threshold:
            raise ConfigurationError(f"deviations={deviations} beside a threshold or sigmoid=True; give one of them")


def check_layer(layer: nn.Module) -> Layer:
    """Return the layer, or raise a ConfigurationError where its connections cannot be measured."""
    if not isinstance(layer, LAYERS):
        raise ConfigurationError(
            f"layer: got a {type(layer).__name__}; connections can be measured of "
            f"{', '.join(each.__name__ for each in LAYERS)}"
        )
    return layer


def _samples(layer: Layer, input: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Both as `(samples, channels, …)`, in single precision where they are in half."""
    if isinstance(layer, nn.Linear):
        sides, rank = (layer.in_features, layer.out_features), 0
        x, y = (each.reshape(-1, each.shape[-1]) if each.dim() else each for each in (input, output))
    else:
        sides, rank = (layer.in_channels, layer.out_channels), len(layer.kernel_size)
        x, y = (each.unsqueeze(0) if each.dim() == rank + 1 else each for each in (input, output))
    fits = x.dim() == y.dim() == rank + 2 and (x.shape[1], y.shape[1]) == sides and len(x) == len(y)
    if not fits or not (x.is_floating_point() and y.is_floating_point()):
        raise ConfigurationError(
            f"{type(layer).__name__} of {sides[0]} inputs and {sides[1]} outputs: got an input of shape "
            f"{tuple(input.shape)}, {input.dtype}, and an output of shape {tuple(output.shape)}, {output.dtype}; "
            "give what went into it and what came out"
        )
    x, y = x.detach(), y.detach()
    return (x.float() if x.element_size() < 4 else x), (y.float() if y.element_size() < 4 else y)


def _above(x: Tensor, limit: Tensor | float) -> Tensor:
    """`1[x > limit]` in float32, without the booleans in between, which would take most of the time."""
    return torch.gt(x, limit, out=torch.empty_like(x, dtype=torch.float32))


def _limits(x: Tensor, deviations: float) -> Tensor:
    """Mean plus so many standard deviations of each channel, so that it can be compared with `x`."""
    others = [dim for dim in range(x.dim()) if dim != 1]
    std, mean = torch.std_mean(x, others, correction=0, keepdim=True)
    return mean + deviations * std


def _standardized(x: Tensor) -> Tensor:
    """Every element in units of its standard deviation over dim 0, from its mean; 0 where it does not vary."""
    moved = x - x[:1]  # exact for what hardly varies, whose mean in floating point might differ from all of it
    moved = moved / moved.abs().amax(0, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny)
    moved = moved - moved.mean(0, keepdim=True)
    deviation = moved.square().mean(0, keepdim=True).sqrt_()
    return torch.where(deviation > 0, moved / deviation, 0.0).float()


def _padding(layer: nn.modules.conv._ConvNd) -> list[tuple[int, int]]:
    """How much is put before and after the input, along each dimension."""
    if layer.transposed or layer.padding == "valid":
        return [(0, 0)] * len(layer.kernel_size)
    if layer.padding == "same":
        both = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [(each // 2, each - each // 2) for each in both]
    return [(int(each), int(each)) for each in layer.padding]


def _pad(layer: Layer, x: Tensor, value: float) -> Tensor:
    """The input of a convolution with its padding, which is `value` where the layer pads with zeros."""
    if isinstance(layer, nn.Linear) or not any(map(sum, pads := _padding(layer))):
        return x
    reversed_pads = [side for pad in reversed(pads) for side in pad]
    if layer.padding_mode == "zeros":
        return F.pad(x, reversed_pads, value=value)
    return F.pad(x, reversed_pads, mode=layer.padding_mode)


def _weight_gradient(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of the weight for an input that is padded already, and a gradient of the output."""
    if isinstance(layer, nn.Linear):
        return y.t() @ x
    inputs, outputs = layer.in_channels, layer.out_channels
    first, second = (inputs, outputs) if layer.transposed else (outputs, inputs)
    shape = (first, second // layer.groups, *layer.kernel_size)
    padding = list(layer.padding) if layer.transposed else [0] * len(layer.kernel_size)
    found: Tensor = torch.ops.aten.convolution_backward(
        y,
        x,
        x.new_empty(1).expand(shape),
        None,
        layer.stride,
        padding,
        layer.dilation,
        layer.transposed,
        layer.output_padding,
        layer.groups,
        [False, True, False],
    )[1]
    return found


def _absolute(layer: nn.modules.conv._ConvNd, x: Tensor, y: Tensor) -> Tensor:
    """`Σ_p |Σ_n x·y|` over the positions p and samples n that each weight brings together, in the weight's shape."""
    g, kernel = layer.groups, layer.kernel_size
    if layer.transposed:  # which is a convolution of the output, with the input as what comes out
        pads = [(int(each), int(each)) for each in layer.padding]
        x, y = F.pad(y, [side for pad in reversed(pads) for side in pad]), x
    count = y.shape[2:]
    # (groups, positions, channels, samples) and (groups, positions, samples, channels)
    fixed = y.reshape(len(y), g, -1, count.numel()).permute(1, 3, 2, 0)
    found = y.new_zeros(y.shape[1], x.shape[1] // g, prod(kernel))
    step = max(1, _CHUNK // (found.numel() // found.shape[2]))
    for place, taps in enumerate(torch.cartesian_prod(*map(torch.arange, kernel)).view(-1, len(kernel)).tolist()):
        part = x
        for dim, (tap, n, s, d) in enumerate(zip(taps, count, layer.stride, layer.dilation, strict=True), start=2):
            part = part.narrow(dim, tap * d, (n - 1) * s + 1)
            part = part[(slice(None),) * dim + (slice(None, None, s),)]
        moving = part.reshape(len(x), g, -1, count.numel()).permute(1, 3, 0, 2)
        for begin in range(0, count.numel(), step):
            products = fixed[:, begin : begin + step] @ moving[:, begin : begin + step]
            found[:, :, place] += products.abs_().sum(1).flatten(0, 1)
    return found.view(*found.shape[:2], *kernel)
