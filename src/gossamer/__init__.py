"""gossamer: PyTorch networks made sparse while they train."""

from importlib.metadata import version

from gossamer import nn, penalties, schedule, scores
from gossamer.activations import ActivationMeasurements, ActivationSparsifier, LossyThreshold, measure_activations
from gossamer.attach import Sparsity, attach
from gossamer.compat.cs import MaskedNet, SoftMaskedConv2d, SoftMaskedLinear
from gossamer.compat.dst import DSModel
from gossamer.compat.lossy import SparseLoss
from gossamer.errors import (
    ConfigurationError,
    DataError,
    GossamerError,
    NonFiniteError,
    OrderError,
    StateError,
)
from gossamer.method import Change, MaskUpdate, Method, Proposal
from gossamer.nn import LossyHardSparsifier, LossySparsifier
from gossamer.prune import import_torch_masks, prune
from gossamer.storage import load, save
from gossamer.structure import ISS, NM, Block, Element
from gossamer.summary import Summary
from gossamer.weights import DSR, GMP, IMP, SET, STR, ContinuousSparsification, HardConcrete, Hebbian, RigL, Static

__version__ = version("gossamer")

__all__ = [
    "DSR",
    "GMP",
    "IMP",
    "ISS",
    "NM",
    "SET",
    "STR",
    "ActivationMeasurements",
    "ActivationSparsifier",
    "Block",
    "Change",
    "ConfigurationError",
    "ContinuousSparsification",
    "DSModel",
    "DataError",
    "Element",
    "GossamerError",
    "HardConcrete",
    "Hebbian",
    "LossyHardSparsifier",
    "LossySparsifier",
    "LossyThreshold",
    "MaskUpdate",
    "MaskedNet",
    "Method",
    "NonFiniteError",
    "OrderError",
    "Proposal",
    "RigL",
    "SoftMaskedConv2d",
    "SoftMaskedLinear",
    "SparseLoss",
    "Sparsity",
    "StateError",
    "Static",
    "Summary",
    "attach",
    "import_torch_masks",
    "load",
    "measure_activations",
    "nn",
    "penalties",
    "prune",
    "save",
    "schedule",
    "scores",
]
