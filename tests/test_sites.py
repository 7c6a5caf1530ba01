"""Sites are the modules that globs, types and predicates name, and nothing is chosen silently."""

import pytest
from torch import nn

from gossamer import ConfigurationError
from gossamer.sites import select_sites


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.relu0 = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)


def names(selection, **options):
    return [site.name for site in select_sites(Net(), selection, **options)]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, ["stem", "layers.0.conv", "layers.1.conv"]),
        ("layers.*", ["layers.0.conv", "layers.1.conv"]),
        ("*relu*", ["relu0", "layers.0.relu1", "layers.1.relu1"]),
        (["layers.*", "*relu0"], ["relu0", "layers.0.conv", "layers.1.conv"]),
        ("!stem", ["layers.0.conv", "layers.1.conv"]),
        (["*relu*", "!relu0"], ["layers.0.relu1", "layers.1.relu1"]),
        (nn.BatchNorm2d, ["layers.0.norm", "layers.1.norm"]),
        ("layers.1", ["layers.1"]),
        ("head", ["head"]),
        (lambda name, module: name.endswith("norm"), ["layers.0.norm", "layers.1.norm"]),
    ],
)
def test_selections_name_modules(selection, expected):
    assert names(selection) == expected


def test_logits_are_chosen_where_they_are_allowed():
    assert names(None, logits=True)[-1] == "head"
    assert names(["stem", "h*"], logits=True) == ["stem", "head"]


def test_identities_after_the_logits_are_no_activations_and_parametrizations_no_modules():
    net = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.ReLU(), nn.Linear(4, 2), nn.Flatten(), nn.Identity())
    nn.utils.parametrize.register_parametrization(net[3], "weight", nn.Identity())
    assert [site.name for site in select_sites(net)] == ["0", "1"]
    assert [site.name for site in select_sites(net, logits=True)] == ["0", "1", "3", "5"]
    assert [site.name for site in select_sites(nn.Sequential(nn.Identity(), nn.Identity()))] == ["0"]


def test_modules_that_attention_reads_are_no_sites():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    net = nn.Sequential(layer, nn.Linear(8, 2))
    assert [site.name for site in select_sites(net)] == ["0.linear1", "0.linear2"]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("h*", "matches no module but head, which makes the logits; name it exactly"),
        ("layer?", "matches no module that contains no others; within it are layers.0.conv, layers.1.conv"),
        ("lyers.0", "matches no module; did you mean 'layers.0'"),
        (nn.GELU, "the model calls no GELU"),
        ([], r"none in Net with sites=\[\]"),
        (["stem", "!stem"], "none in Net"),
        (3, "expected globs, module types or predicates, got 3"),
    ],
)
def test_what_chooses_nothing_is_refused_with_a_remedy(selection, message):
    with pytest.raises(ConfigurationError, match=message):
        names(selection)


def test_a_model_without_modules_has_no_sites():
    with pytest.raises(ConfigurationError, match=r"sites: Linear has no modules within it.*torch\.nn\.Sequential"):
        select_sites(nn.Linear(2, 2))
