"""The networks have the sizes that the papers publish, and say which of their weights the papers make sparse."""

import math

import pytest
import torch
from torch import nn

from gossamer import ConfigurationError, zoo
from gossamer.nn import SparseBatchNorm
from gossamer.targets import parameter_count, select

# One line of the published table for WRN-28-2: elements of the two convolutions of each block, stage by stage.
WRN_28_2_SPARSE = [4608, *[9216] * 7, 18432, *[36864] * 7, 73728, *[147456] * 7]


def sparse(model):
    return [target.parameter.numel() for target in select(model, list(model.SPARSE_TARGETS))]


def test_wrn_28_2_has_the_published_parameters_in_sparse_and_dense_tensors():
    model = zoo.cifar_wrn(depth=28, width=2)
    assert sparse(model) == WRN_28_2_SPARSE
    assert sum(sparse(model)) == 1_451_520
    assert parameter_count(model) == 1_467_610
    chosen = {target.name for target in select(model, list(model.SPARSE_TARGETS))}
    assert sum(p.numel() for name, p in model.named_parameters() if name not in chosen) == 16_090


@pytest.mark.parametrize(
    ("depth", "total"),
    # Hand count: stem, per stage the convolutions, two numbers a channel of batch norm, 64 × 10 + 10.
    [
        (
            depth,
            432
            + (2 * n * 2304)
            + (4608 + (2 * n - 1) * 9216)
            + (18432 + (2 * n - 1) * 36864)
            + 2 * (16 + 2 * n * (16 + 32 + 64))
            + 650,
        )
        for depth, n in ((20, 3), (32, 5), (44, 7), (56, 9), (110, 18))
    ],
)
def test_cifar_resnet_has_the_parameters_of_option_a(depth, total):
    assert parameter_count(zoo.cifar_resnet(depth)) == total


@pytest.mark.parametrize("kind", ["structured", "static", "dynamic"])
@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_spatial_bottlenecks_keep_so_many_quarters_of_what_the_first_convolution_of_each_block_gives(kind, quarters):
    torch.manual_seed(0)
    model = zoo.cifar_resnet(20, spatial_bottleneck=kind, quarters=quarters)
    plain = zoo.cifar_resnet(20)
    assert {name for name, _ in plain.named_parameters()} == {name for name, _ in model.named_parameters()}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, SparseBatchNorm)}
    assert len(norms) == 9
    seen = {}
    for name, norm in norms.items():
        norm.register_forward_hook(lambda _, inputs, y, name=name: seen.update({name: (y != 0).any(0).any(0)}))
    masks = []
    for _ in range(2):
        model(torch.randn(8, 3, 32, 32))
        masks.append(dict(seen))
    for name, mask in masks[0].items():
        assert int(mask.sum()) == mask.numel() * quarters // 4
        assert torch.equal(mask, masks[1][name]) == (kind != "dynamic")
        corner = [[1, quarters == 3], [0, quarters > 1]]
        assert kind != "structured" or mask[:2, :2].tolist() == corner
    if kind != "structured":  # each block has positions of its own
        assert not torch.equal(masks[0]["stage1.0.norm1"], masks[0]["stage1.1.norm1"])
    model.eval()
    model(torch.randn(8, 3, 32, 32))
    assert all(bool(mask.all()) == (kind == "dynamic") for mask in seen.values())


@pytest.mark.parametrize("kind", ["structured", "static", "dynamic"])
def test_spatial_bottlenecks_leave_the_weights_as_they_are(kind):
    states = []
    for options in ({}, {"spatial_bottleneck": kind}):
        torch.manual_seed(4)
        states.append(zoo.cifar_resnet(8, **options).state_dict())
    assert all(value.equal(states[1][name]) for name, value in states[0].items())


def test_spatial_bottlenecks_follow_torchs_seed_and_the_size_of_the_images():
    built = []
    for _ in range(2):
        torch.manual_seed(3)
        built.append(zoo.build("cifar_resnet", depth=8, spatial_bottleneck="static", quarters=1, image_size=25))
    assert torch.equal(built[0].stage3[0].norm1.activation.mask, built[1].stage3[0].norm1.activation.mask)
    assert built[0](torch.randn(2, 3, 25, 25)).shape == (2, 10)
    assert zoo.arguments("cifar_resnet", (3, 25, 25), 10)["image_size"] == 25


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"spatial_bottleneck": "random"}, "'random'; allowed are structured, static, dynamic"),
        ({"spatial_bottleneck": "static", "quarters": 4}, "got 4"),
        ({"quarters": 3}, "quarters=3 is of a spatial bottleneck; give spatial_bottleneck='structured'"),
        ({"spatial_bottleneck": "static", "quarters": 1, "image_size": 2}, "image_size=2, .* give larger images"),
    ],
)
def test_impossible_bottlenecks_are_refused(arguments, named):
    with pytest.raises(ConfigurationError, match=f"cifar_resnet: .*{named}"):
        zoo.cifar_resnet(20, **arguments)


def test_resnet_20_has_the_published_number_of_masked_weights():
    assert sum(sparse(zoo.cifar_resnet(20))) == 267_696


def test_resnet_50_has_the_published_parameters_with_stem_and_shortcuts_dense():
    pytest.importorskip("torchvision")
    model = zoo.i1k_resnet(50)
    assert parameter_count(model) == 25_557_032
    blocks = sum(  # 3, 4, 6 and 3 blocks of 1×1, 3×3 and 1×1 convolutions
        (first + (count - 1) * 4 * width) * width + count * 9 * width**2 + count * 4 * width**2
        for count, width, first in ((3, 64, 64), (4, 128, 256), (6, 256, 512), (3, 512, 1024))
    )
    assert sum(sparse(model)) == blocks + 1000 * 2048
    assert len(sparse(model)) == 49


def test_lenet_300_100_and_lenet_5_have_the_published_parameters():
    assert parameter_count(zoo.mnist_mlp()) == 266_610
    assert parameter_count(zoo.lenet(image_size=32)) == 61_706


def test_sparse_targets_are_all_weights_of_the_small_networks():
    for model in (zoo.mnist_mlp(), zoo.lenet()):
        assert sum(sparse(model)) == sum(p.numel() for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("width", [0.3, 1, 1.5])
@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("mnist_mlp", {"in_features": 64, "classes": 7}, (1, 8, 8)),
        ("lenet", {"classes": 7}, (1, 28, 28)),
        ("lenet", {"in_channels": 3, "image_size": 32, "classes": 7}, (3, 32, 32)),
        ("cifar_wrn", {"depth": 10, "classes": 7}, (3, 32, 32)),
        ("cifar_resnet", {"depth": 8, "classes": 7}, (3, 32, 32)),
        ("cifar_resnet", {"depth": 8, "classes": 7, "in_channels": 1}, (1, 28, 28)),
    ],
)
def test_networks_give_logits_and_every_parameter_a_gradient(name, arguments, shape, width):
    model = zoo.build(name, width=width, **arguments)
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_width_scales_hidden_layers_and_leaves_the_wrn_stem():
    assert [p.shape[0] for p in zoo.mnist_mlp(width=0.5).parameters() if p.dim() > 1] == [150, 50, 10]
    wrn = zoo.cifar_wrn(10, width=0.4)
    assert wrn.stem.out_channels == 16
    assert [stage[0].conv1.out_channels for stage in (wrn.stage1, wrn.stage2, wrn.stage3)] == [6, 13, 26]


def test_padded_shortcut_subsamples_and_adds_zero_channels_on_both_sides():
    block = zoo.cifar_resnet(8, width=0.75).stage2[0]
    x = torch.randn(2, 12, 6, 6)
    y = block.shortcut(x)
    assert y.shape == (2, 24, 3, 3)
    assert torch.equal(y[:, 6:18], x[:, :, ::2, ::2])
    assert not y[:, :6].any()
    assert not y[:, 18:].any()


def test_wide_block_is_its_formula():
    torch.manual_seed(0)
    block = zoo.cifar_wrn(10, 1).stage2[0].eval()
    x = torch.randn(2, 16, 8, 8)
    activated = torch.relu(block.norm1(x))
    expected = block.shortcut(activated) + block.conv2(torch.relu(block.norm2(block.conv1(activated))))
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("build", [zoo.cifar_wrn, zoo.cifar_resnet])
def test_residual_networks_start_with_he_values(build):
    torch.manual_seed(0)
    model = build()
    convolution = model.stage3[0].conv1
    assert convolution.in_channels != convolution.out_channels
    expected = math.sqrt(2 / (9 * convolution.out_channels))
    assert convolution.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert not model.classifier.bias.any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: zoo.cifar_wrn(27), r"depth=27; expected 6n \+ 4"),
        (lambda: zoo.cifar_wrn(4), r"depth=4; expected 6n \+ 4"),
        (lambda: zoo.cifar_resnet(18), r"depth=18; expected 6n \+ 2"),
        (lambda: zoo.cifar_resnet(width=0), "cifar_resnet: width=0; expected a positive number"),
        (lambda: zoo.mnist_mlp(width=math.inf), "width=inf"),
        (lambda: zoo.mnist_mlp(width=True), "width=True"),
        (lambda: zoo.mnist_mlp(classes=0), "classes=0; expected a positive integer"),
        (lambda: zoo.i1k_resnet(20), "i1k_resnet: depth=20; expected one of 18, 34, 50, 101, 152"),
        (lambda: zoo.i1k_resnet(classes=0), "i1k_resnet: classes=0; expected a positive integer"),
        (lambda: zoo.lenet(image_size=8), "image_size=8; .* at least 16; use mnist_mlp"),
    ],
)
def test_sizes_that_cannot_be_built_are_refused(build, message):
    with pytest.raises(ConfigurationError, match=message):
        build()


def test_relu_modules_are_called_once_a_forward():
    calls: dict[nn.Module, int] = {}
    model = zoo.cifar_wrn(10, 1)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda module, *_: calls.update({module: calls.get(module, 0) + 1}))
    model(torch.randn(1, 3, 32, 32))
    assert len(calls) == 7
    assert set(calls.values()) == {1}
