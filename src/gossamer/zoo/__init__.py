"""The networks of the papers, so that their results can be reproduced, and any torchvision or timm model by name.

Initial values come from torch's global generator, as for every `nn.Module`: call `torch.manual_seed` before building.
Each of these networks has `SPARSE_TARGETS`, the globs over parameter names that select the weights which the papers
make sparse; pass it as a method's `targets`.
"""

from gossamer.zoo.build import arguments, build, names
from gossamer.zoo.char_rnn import CharRNN, char_rnn
from gossamer.zoo.cifar_resnet import CifarResNet, cifar_resnet
from gossamer.zoo.cifar_wrn import WideResNet, cifar_wrn
from gossamer.zoo.i1k_resnet import i1k_resnet
from gossamer.zoo.lenet import LeNet, lenet
from gossamer.zoo.mnist_mlp import MLP, mnist_mlp
from gossamer.zoo.thin import width_for_parameters

__all__ = [
    "MLP",
    "CharRNN",
    "CifarResNet",
    "LeNet",
    "WideResNet",
    "arguments",
    "build",
    "char_rnn",
    "cifar_resnet",
    "cifar_wrn",
    "i1k_resnet",
    "lenet",
    "mnist_mlp",
    "names",
    "width_for_parameters",
]
