"""What was measured of a model's activations: tables, plain values and figures."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from gossamer.activations import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ActivationMeasurements:
    """Zeros in activations, and the multiply-accumulates that they save.

    A fraction is `None` where there is nothing it would be a fraction of.

    Attributes:
        sites: For each site, a row:

            - `name`; `type` of the module; `calls`, 0 where it was never called; `elements` and `zeros` of its outputs,
              and `sparsity`, the fraction of zeros; `l0`, the number that are not zero.
            - `l1`, the sum of `|x|` over finite values, and `mean_magnitude`, `l1` per element; `non_finite`, how many
              are infinite or NaN.
            - `channels`, their number; `dead_channels`, those that are zero at every sample; `channel_sparsity`, the
              fraction of zeros of each. `None` where calls differ in their number of channels.
            - `samples`: over samples, each at each call, `count`, and of their fractions of zeros `mean`, `std` (of
              the population), `min`, `max`, and `histogram`, counts in bins of equal width from 0 to 1.
            - `thresholds`: where the site is a learned threshold `|eps|`, one or one for each channel, else empty.
            - `histogram`: `edges` of magnitudes in single precision, four to an octave, from the first bin that has a
              value to the last, with those between; and how many values are from one edge on and below the next,
              `negative` and `positive`. Zeros and what is not finite are not among them; what is beyond single
              precision is in the outermost bins.
        layers: For each layer that is counted, a row of what entered it: `name`, `type`, `calls`, `elements`,
            `zeros`, `sparsity`; `macs`, its multiply-accumulates with elements of the input; `saved_macs`,
            those with a zero, and `saved`, the fraction; `padding_macs`, those with padded zeros or cropped, not among
            the others.
        totals: `batches`; `hard`, and `smoothed_thresholds`, how many learned thresholds were not; `elements`, `zeros`
            and `sparsity` over sites; `input_elements`, `input_zeros`, `input_sparsity`, `macs`, `saved_macs`, `saved`
            and `padding_macs` over layers; `uncounted`, `name` and `type` of each module with products of its own that
            are not among them, such as `torch.nn.MultiheadAttention` and recurrent ones. Products without a module,
            such as attention's of queries and keys, are not among them either.
    """

    sites: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    totals: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Sites, layers and totals as JSON values; `None` for infinity and NaN, which JSON lacks."""
        return {key: _json(getattr(self, key)) for key in ("sites", "layers", "totals")}

    def table(self) -> Table:
        """Zeros of the sites' outputs as a rich table."""
        smoothed = self.totals["smoothed_thresholds"]
        note = "Learned thresholds are smoothed, and give no exact zeros: hard=True measures the hard ones."
        table = Table(title="Activations", show_footer=True, caption=note if smoothed else None)
        table.add_column("site", footer="in all", overflow="fold")
        table.add_column("type")
        table.add_column("calls", justify="right")
        table.add_column("elements", justify="right", footer=f"{self.totals['elements']:,}")
        table.add_column("sparsity", justify="right", footer=_fraction(self.totals["sparsity"]))
        table.add_column("of samples", justify="right")
        table.add_column("dead channels", justify="right")
        table.add_column("mean |x|", justify="right")
        if unsound := any(row["non_finite"] for row in self.sites):
            table.add_column("not finite", justify="right")
        for row in self.sites:
            if not row["calls"]:
                table.add_row(row["name"], row["type"], "never called")
                continue
            samples, dead = row["samples"], row["dead_channels"]
            table.add_row(
                row["name"],
                row["type"],
                f"{row['calls']:,}",
                f"{row['elements']:,}",
                _fraction(row["sparsity"]),
                f"{_fraction(samples['min'])}–{_fraction(samples['max'])}",
                "" if dead is None else f"{len(dead)} of {row['channels']}",
                "" if row["mean_magnitude"] is None else f"{row['mean_magnitude']:.4g}",
                *([f"{row['non_finite']:,}"] if unsound else []),
            )
        return table

    def layer_table(self) -> Table:
        """Multiply-accumulates with zeros of the layers' inputs as a rich table."""
        totals = self.totals
        table = Table(title="Multiply-accumulates (MACs) on zeros", show_footer=True)
        if types := Counter(each["type"] for each in totals["uncounted"]):
            names = ", ".join(f"{count} {name}" for name, count in types.items())
            table.caption = f"Not counted: {names}."
        table.add_column("layer", footer="in all", overflow="fold")
        table.add_column("type")
        table.add_column("calls", justify="right")
        table.add_column("input sparsity", justify="right", footer=_fraction(totals["input_sparsity"]))
        table.add_column("MACs", justify="right", footer=f"{totals['macs']:,}")
        table.add_column("saved", justify="right", footer=f"{totals['saved_macs']:,}")
        table.add_column("fraction", justify="right", footer=_fraction(totals["saved"]))
        for row in self.layers:
            if not row["calls"]:
                table.add_row(row["name"], row["type"], "never called")
                continue
            table.add_row(
                row["name"],
                row["type"],
                f"{row['calls']:,}",
                _fraction(row["sparsity"]),
                f"{row['macs']:,}",
                f"{row['saved_macs']:,}",
                _fraction(row["saved"]),
            )
        return table

    def figures(self) -> dict[str, Figure]:
        """Matplotlib figures, those for which there are rows: `"histograms"`, `"zeros"` and `"macs"`.

        Raises:
            ConfigurationError: matplotlib is not installed.
        """
        found = {}
        if any(row["elements"] for row in self.sites):
            found = {"histograms": figures.histograms(self.sites), "zeros": figures.zero_fractions(self.sites)}
        if any(row["macs"] for row in self.layers):
            found["macs"] = figures.saved_macs(self.layers)
        return found

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=120)
        for table, rows in ((self.table(), self.sites), (self.layer_table(), self.layers)):
            if rows:
                console.print(table)
        return text.getvalue().rstrip()


def fraction(part: float, whole: float) -> float | None:
    """A fraction, `None` of nothing."""
    return part / whole if whole else None


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_json(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _fraction(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
