"""Methods that make activations sparse; each is one file, and composes with any method on weights."""

from gossamer.activations.aggregated import ActivationSparsifier
from gossamer.activations.lossy import LossyThreshold

__all__ = ["ActivationSparsifier", "LossyThreshold"]
