"""gossamer: PyTorch networks made sparse while they train."""

from importlib.metadata import version

from gossamer import schedule, scores
from gossamer.attach import Sparsity, attach
from gossamer.errors import (
    ConfigurationError,
    DataError,
    GossamerError,
    NonFiniteError,
    OrderError,
    StateError,
)
from gossamer.method import MaskUpdate, Method
from gossamer.structure import NM, Block, Element
from gossamer.summary import Summary
from gossamer.weights import DSR, GMP, SET, RigL, Static
from gossamer.weights.prune import import_torch_masks, prune

__version__ = version("gossamer")

__all__ = [
    "DSR",
    "GMP",
    "NM",
    "SET",
    "Block",
    "ConfigurationError",
    "DataError",
    "Element",
    "GossamerError",
    "MaskUpdate",
    "Method",
    "NonFiniteError",
    "OrderError",
    "RigL",
    "Sparsity",
    "StateError",
    "Static",
    "Summary",
    "attach",
    "import_torch_masks",
    "prune",
    "schedule",
    "scores",
]
