"""The methods of weight masks, one file each."""

from gossamer.method import Method
from gossamer.weights.continuous import ContinuousSparsification
from gossamer.weights.dsr import DSR
from gossamer.weights.gmp import GMP
from gossamer.weights.hard_concrete import HardConcrete
from gossamer.weights.hebbian import Hebbian
from gossamer.weights.imp import IMP
from gossamer.weights.rigl import RigL
from gossamer.weights.set import SET
from gossamer.weights.static import Static
from gossamer.weights.str import STR

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (ContinuousSparsification, DSR, GMP, HardConcrete, Hebbian, IMP, RigL, SET, STR, Static)
}
"""Every one by the name it has in recipes and saved states."""

__all__ = [
    "DSR",
    "GMP",
    "IMP",
    "METHODS",
    "SET",
    "STR",
    "ContinuousSparsification",
    "HardConcrete",
    "Hebbian",
    "RigL",
    "Static",
]
