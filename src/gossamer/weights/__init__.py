"""The methods of hard weight masks, one file each."""

from gossamer.method import Method
from gossamer.weights.dsr import DSR
from gossamer.weights.gmp import GMP
from gossamer.weights.rigl import RigL
from gossamer.weights.set import SET
from gossamer.weights.static import Static

METHODS: dict[str, type[Method]] = {method.name: method for method in (DSR, GMP, RigL, SET, Static)}
"""Every one by the name it has in recipes and saved states."""

__all__ = ["DSR", "GMP", "METHODS", "SET", "RigL", "Static"]
