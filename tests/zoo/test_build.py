"""Networks by name: own ones, torchvision's and timm's, and what is said when a name cannot be built."""

import importlib
import importlib.util
import re
import sys

import pytest
import torch

from gossamer import ConfigurationError, zoo
from gossamer.targets import parameter_count

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed (gossamer[vision])"
)
needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None, reason="timm is not installed (gossamer[vision])"
)


def test_own_networks_are_built_with_their_arguments():
    assert zoo.names() == ["char_rnn", "cifar_resnet", "cifar_wrn", "i1k_resnet", "lenet", "mnist_mlp"]
    model = zoo.build("mnist_mlp", width=0.5, in_features=64)
    assert [p.shape for p in model.parameters() if p.dim() > 1] == [(150, 64), (50, 150), (10, 50)]


def test_unknown_names_list_the_nearest():
    with pytest.raises(ConfigurationError, match=r"no network 'mnist_mpl'; did you mean mnist_mlp"):
        zoo.build("mnist_mpl")
    with pytest.raises(ConfigurationError, match=r"no network 'zzz'; known: char_rnn, cifar_resnet, cifar_wrn"):
        zoo.build("zzz")
    with pytest.raises(ConfigurationError, match="unknown library 'hub'; models come from timm and torchvision"):
        zoo.build("hub:resnet50")


def test_unknown_arguments_are_named_with_those_there_are():
    with pytest.raises(ConfigurationError, match="cifar_wrn has no argument 'widen'; it takes depth, width"):
        zoo.build("cifar_wrn", widen=2)


@needs_torchvision
def test_torchvision_models_are_built_by_name():
    model = zoo.build("torchvision:resnet50")
    assert parameter_count(model) == 25_557_032
    small = zoo.build("torchvision:resnet18", **zoo.arguments("torchvision:resnet18", (3, 32, 32), 10))
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@needs_torchvision
def test_unknown_torchvision_names_and_arguments_are_refused():
    with pytest.raises(ConfigurationError, match="did you mean torchvision:resnet"):
        zoo.build("torchvision:resnet51")
    with pytest.raises(ConfigurationError, match="no network 'torchvision:deeplabv3_resnet50'"):
        zoo.build("torchvision:deeplabv3_resnet50")


@needs_timm
@needs_torchvision
@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("torchvision:resnet18", {"depth": 3}, "unexpected keyword argument 'depth'"),
        ("torchvision:resnet18", {"weights": "nope"}, "KeyError: 'nope'"),
        ("torchvision:resnet18", {"width_per_group": 1e30}, ""),
        ("timm:resnet18", {"checkpoint_path": "/etc/passwd"}, ""),
        ("timm:resnet18", {"checkpoint_path": "/nope"}, "FileNotFoundError; the file or the network that it asks for"),
    ],
)
def test_arguments_that_a_library_refuses_in_its_own_way_are_one_line(name, arguments, said):
    with pytest.raises(ConfigurationError) as caught:
        zoo.build(name, **arguments)
    assert str(caught.value).startswith(f"zoo: '{name}' cannot be built with {arguments}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_timm
@needs_torchvision
def test_timm_models_are_built_by_name():
    model = zoo.build("timm:resnet18", **zoo.arguments("timm:resnet18", (1, 28, 28), 10))
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ConfigurationError, match="did you mean timm:resnet18"):
        zoo.build("timm:resnet18x")


HOW = "pip install 'gossamer[vision]' (in a clone: pip install -e '.[vision]')"


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigurationError, match=rf"needs the package {package}; .* {re.escape(HOW)}$"):
        zoo.build(f"{package}:resnet18")


def test_arguments_fit_the_data():
    assert zoo.arguments("mnist_mlp", (1, 8, 8), 10) == {"in_features": 64, "classes": 10}
    assert zoo.arguments("lenet", (3, 32, 32), 100) == {"in_channels": 3, "image_size": 32, "classes": 100}
    assert zoo.arguments("cifar_wrn", (1, 28, 28), 10) == {"in_channels": 1, "classes": 10}
    with pytest.raises(ConfigurationError, match="lenet takes square images, the data have 28×20"):
        zoo.arguments("lenet", (1, 28, 20), 10)
    with pytest.raises(ConfigurationError, match="takes images of three channels, the data have 1"):
        zoo.arguments("torchvision:resnet18", (1, 28, 28), 10)
    assert zoo.arguments("i1k_resnet", (3, 224, 224), 1000) == {"classes": 1000}
    with pytest.raises(ConfigurationError, match="i1k_resnet takes images of three channels, the data have 1"):
        zoo.arguments("i1k_resnet", (1, 28, 28), 10)
    with pytest.raises(ConfigurationError, match="did you mean lenet"):
        zoo.arguments("lennet", (1, 28, 28), 10)
    assert zoo.arguments("char_rnn", (), 84) == {"symbols": 84}
    with pytest.raises(ConfigurationError, match=r"char_rnn takes text, the data are images; .* are cifar_r"):
        zoo.arguments("char_rnn", (1, 28, 28), 10)
    for name in ("lenet", "i1k_resnet", "timm:resnet18", "torchvision:resnet18"):
        with pytest.raises(ConfigurationError, match=f"{name} takes images, the data are text; .* char_rnn$"):
            zoo.arguments(name, (), 84)
    with pytest.raises(ConfigurationError, match="did you mean char_rnn"):
        zoo.arguments("chr_rnn", (), 84)


class Broken:
    """A module loader that fails as torchvision does beside a torch without its operators, until they exist."""

    def __init__(self, message):
        self.message = message
        self.attempts = 0

    def __call__(self, name):
        self.attempts += 1
        if self.attempts == 1:
            raise RuntimeError(self.message)
        return sys


def test_operator_schemas_are_defined_only_where_the_import_asks_for_them(monkeypatch):
    from gossamer.zoo import _vision

    defined = []

    class Library:
        def __init__(self, *arguments):
            pass

        def define(self, schema):
            defined.append(schema)

    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(_vision, "_schemas", [])
    monkeypatch.setattr(_vision.sys, "modules", dict(sys.modules))
    monkeypatch.setattr(_vision.importlib, "import_module", Broken("operator torchvision::nms does not exist"))
    assert _vision.import_torchvision() is sys
    assert [schema.partition("(")[0] for schema in defined] == ["nms", "qnms"]

    monkeypatch.setattr(_vision.importlib, "import_module", Broken("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        _vision.import_torchvision()
    assert len(defined) == 2
