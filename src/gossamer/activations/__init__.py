"""Methods that make activations sparse; each is one file, and composes with any method on weights."""

from gossamer.activations.aggregated import ActivationSparsifier
from gossamer.activations.lossy import LossyThreshold
from gossamer.activations.measure import measure_activations
from gossamer.activations.measurements import ActivationMeasurements

__all__ = ["ActivationMeasurements", "ActivationSparsifier", "LossyThreshold", "measure_activations"]
