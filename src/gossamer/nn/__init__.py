"""Modules that methods and users place in a model."""

from gossamer.nn.hashed import HashedWeight, hash_weight

__all__ = ["HashedWeight", "hash_weight"]
