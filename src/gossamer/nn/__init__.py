"""Modules that methods and users place in a model."""

from gossamer.nn.hashed import HashedWeight, hash_weight
from gossamer.nn.kwinners import KWinners
from gossamer.nn.lossy import FATReLU, LossyHardSparsifier, LossySparsifier, hard_threshold, lossy_threshold
from gossamer.nn.masked import SparseActivation, SparseBatchNorm, SparseSyncBatchNorm, checkerboard

__all__ = [
    "FATReLU",
    "HashedWeight",
    "KWinners",
    "LossyHardSparsifier",
    "LossySparsifier",
    "SparseActivation",
    "SparseBatchNorm",
    "SparseSyncBatchNorm",
    "checkerboard",
    "hard_threshold",
    "hash_weight",
    "lossy_threshold",
]
