"""Pictures of filters: what each dot says, what is left out, and what is refused."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import ConfigurationError
from gossamer.filters import Snapshot, filters_figure


def snapshots(*shape: int, count: int = 1, low: float = 0.0, name: str = "conv.weight") -> list[Snapshot]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(count):
        strength = torch.rand(shape, generator=generator) + low
        found.append((10 * step, {name: strength}, {name: torch.rand(shape, generator=generator) < 0.4}))
    return found


def pictures(figure) -> list[np.ndarray]:
    return [np.ma.filled(axes.images[0].get_array(), np.nan) for axes in figure.axes[:-1]]


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (3, 7, 3, 2), (2, 9), (4, 2, 3), (2, 2, 2, 3, 2), (1, 1, 1, 1)])
def test_every_connection_is_a_square_of_its_strength_and_small_where_it_is_pruned(shape):
    (snapshot,) = snapshots(*shape)
    _, strengths, masks = snapshot
    (picture,) = pictures(filters_figure([snapshot], "conv.weight"))
    strength, mask = (each["conv.weight"].flatten().tolist() for each in (strengths, masks))
    assert {*np.unique(picture[~np.isnan(picture)]).tolist()} == {*strength}
    for value, alive in zip(strength, mask, strict=True):
        sides = [int(places.max() - places.min()) + 1 for places in np.nonzero(picture == value)]
        assert sides == ([7, 7] if alive else [3, 3])
        assert (picture == value).sum() == sides[0] * sides[1]


def test_kernels_are_upright_in_the_order_of_inputs_and_filters():
    def place(strength: Tensor, index: tuple[int, ...]) -> tuple[int, int]:
        (picture,) = pictures(filters_figure([(0, {"w": strength}, {"w": torch.ones_like(strength)})], "w"))
        rows, columns = np.nonzero(picture == strength[index].item())
        return int(rows.min()), int(columns.min())

    strength = torch.rand(2, 6, 3, 3, generator=torch.Generator().manual_seed(1))  # two rows of three kernels
    row, column = place(strength, (0, 0, 0, 0))
    assert (row, column) == (0, 0)
    right, down = place(strength, (0, 0, 0, 1)), place(strength, (0, 0, 1, 0))
    assert right[0] == down[1] == 0
    side = right[1]
    assert down[0] == side
    second, fourth = place(strength, (0, 1, 0, 0)), place(strength, (0, 3, 0, 0))
    assert second == (0, fourth[0])
    assert fourth[1] == 0
    assert fourth[0] > 3 * side
    assert place(strength, (1, 0, 0, 0)) > (0, 3 * second[1])


def test_rows_are_the_first_the_last_and_some_between_on_one_scale():
    taken = snapshots(6, 3, 5, 5, count=11)
    figure = filters_figure(taken, "conv.weight")
    labels = [axes.get_ylabel() for axes in figure.axes[:-1]]
    assert [label.split("\n")[0] for label in labels] == [f"step {step}" for step in (0, 20, 40, 60, 80, 100)]
    pruned = 1 - taken[0][2]["conv.weight"].float().mean().item()
    assert labels[0].endswith(f"\n{100 * pruned:.1f} % pruned")
    limits = {axes.images[0].get_clim() for axes in figure.axes[:-1]}
    shown = torch.stack([strengths["conv.weight"] for _, strengths, _ in taken[::2]])
    assert limits == {(shown.min().item(), shown.max().item())}
    assert len(figure.axes[-2].get_xticks()) == 6


def test_what_is_negative_has_a_scale_around_nothing():
    figure = filters_figure(snapshots(2, 2, 3, 3, low=-0.3), "conv.weight")
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high
    assert figure.axes[0].images[0].get_cmap().name == "coolwarm"


@pytest.mark.parametrize(
    ("shape", "filters", "title"),
    [
        ((64, 3, 3, 3), "(the first 12 of 64)", ""),
        ((16, 128, 3, 3), "(the first 5 of 16)", ", the first 64 of 128 inputs"),
        ((10, 5000), "(the first 2 of 10)", ", the first 4096 of 5000 inputs"),
        ((2, 64, 31, 31), "(the first 1 of 2)", ""),
        ((6, 4, 5, 5), "", ""),
    ],
)
def test_what_is_too_much_is_left_out_and_labels_say_so(shape, filters, title):
    figure = filters_figure(snapshots(*shape), "conv.weight")
    assert figure.axes[0].get_xlabel() == f"filter {filters}".strip()
    assert figure.get_suptitle() == f"conv.weight{title}; small squares are pruned"


@pytest.mark.parametrize(
    ("shape", "count"), [((6, 3, 5, 5), 6), ((16, 6, 5, 5), 6), ((120, 400), 6), ((6, 3, 5, 5), 1)]
)
def test_labels_have_room(shape, count):
    figure = filters_figure(snapshots(*shape, count=count), "conv.weight")
    figure.draw_without_rendering()
    for axes in figure.axes[:-1]:
        box = axes.yaxis.label.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= axes.get_window_extent().x0
    labels = [axes.yaxis.label.get_window_extent() for axes in figure.axes[:-1]]
    assert all(above.y0 >= below.y1 for above, below in pairwise(labels))
    assert figure.axes[-1].yaxis.label.get_window_extent().x1 <= figure.bbox.x1


def test_snapshots_of_a_training_are_pictures_of_its_masks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsity = gs.attach(net, gs.Hebbian(0.5, every=2, count_every=1, targets="0.weight"), optimizer)
    taken: list[Snapshot] = []
    sparsity.on_update(lambda update: taken.append((update.step, sparsity.methods[0].strengths(), sparsity.masks())))
    for _ in range(6):
        net(torch.randn(8, 2, 6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    figure = filters_figure(taken, "0.weight")
    assert len(taken) > 1
    assert len(figure.axes) == len(taken) + 1
    assert all(axes.get_ylabel().endswith("\n50.0 % pruned") for axes in figure.axes[:-1])


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(ConfigurationError, match=r"conv1: there are no snapshots"):
        filters_figure([], "conv1")
    taken = snapshots(2, 2, 3, 3, count=2, name="conv1.weight")
    with pytest.raises(
        ConfigurationError, match=r"conv\.weight: the snapshot of step 0 .* did you mean 'conv1\.weight'"
    ):
        filters_figure(taken, "conv.weight")
    with pytest.raises(ConfigurationError, match=r"bias: has shape \(4,\); filters are of weights \(filters, inputs"):
        filters_figure(snapshots(4, name="bias"), "bias")
    taken[1][2]["conv1.weight"] = torch.ones(2, 2, 3)
    with pytest.raises(ConfigurationError, match=r"conv1\.weight: the snapshot of step 10 has no strengths and mask"):
        filters_figure(taken, "conv1.weight")


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match="matplotlib; install it with"):
        filters_figure(snapshots(2, 2, 3, 3), "conv.weight")
