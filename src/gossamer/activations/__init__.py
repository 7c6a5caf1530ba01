"""Methods that make activations sparse; each is one file, and composes with any method on weights."""

from gossamer.activations.aggregated import ActivationSparsifier
from gossamer.activations.lossy import LossyThreshold
from gossamer.activations.measure import measure_activations
from gossamer.activations.measurements import ActivationMeasurements
from gossamer.method import Method

METHODS: dict[str, type[Method]] = {method.name: method for method in (LossyThreshold,)}
"""Those that `attach` takes, by the name they have in recipes and saved states."""

__all__ = ["METHODS", "ActivationMeasurements", "ActivationSparsifier", "LossyThreshold", "measure_activations"]
