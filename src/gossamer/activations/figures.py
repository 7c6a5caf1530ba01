"""Figures of measured activations, by matplotlib, which is imported when the first is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log2
from typing import TYPE_CHECKING, Any

from gossamer.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_LONGEST = 44
"""Characters of a name, which are about as wide as a histogram."""

_DARK, _LIGHT, _MARK = "tab:blue", "lightsteelblue", "tab:red"


def histograms(sites: Sequence[Mapping[str, Any]]) -> Figure:
    """Magnitudes of what each site gives, an axis a site, with its threshold as a line, or the range of several.

    Heights are the fraction of all elements in an octave of magnitude, since bins are not of equal width.
    """
    shown = [row for row in sites if row["elements"]]
    rows = -(-len(shown) // _COLUMNS)
    figure = new_figure(4 * min(_COLUMNS, len(shown)), 2.8 * rows)
    for place, row in enumerate(shown, 1):
        _draw_histogram(figure.add_subplot(rows, min(_COLUMNS, len(shown)), place), row)
    return figure


def zero_fractions(sites: Sequence[Mapping[str, Any]]) -> Figure:
    """The fraction of zeros of each site, of its channels and over samples."""
    shown = [row for row in sites if row["elements"]]
    figure = _rows_figure(shown)
    axes = figure.add_subplot()
    places = range(len(shown))
    axes.barh(places, [row["sparsity"] for row in shown], color=_LIGHT, label="all")
    channels = [(x, y) for y, row in enumerate(shown) for x in row["channel_sparsity"] or ()]
    if channels:
        axes.plot(*zip(*channels, strict=True), "|", color=_DARK, markersize=7, alpha=0.4, label="a channel")
    lows, highs = ([row["samples"][key] for row in shown] for key in ("min", "max"))
    axes.hlines([y + 0.4 for y in places], lows, highs, color=_MARK, linewidth=2, label="range over samples")
    axes.set_yticks(places, [_short(row["name"]) for row in shown])
    axes.set_xlim(-0.01, 1.01)
    axes.margins(y=0.02)
    axes.set_xlabel("fraction of zeros", fontsize=9)
    _finish(axes, figure)
    return figure


def saved_macs(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Multiply-accumulates of each layer, and how many of them have a zero of the input."""
    shown = [row for row in layers if row["macs"]]
    figure = _rows_figure(shown)
    axes = figure.add_subplot()
    places = range(len(shown))
    bars = axes.barh(places, [row["macs"] for row in shown], color=_LIGHT, label="all")
    axes.barh(places, [row["saved_macs"] for row in shown], color=_DARK, label="with a zero")
    axes.bar_label(bars, [f"{100 * row['saved']:.1f} %" for row in shown], padding=3, fontsize=8)
    axes.set_yticks(places, [_short(row["name"]) for row in shown])
    axes.margins(x=0.1, y=0.02)
    axes.set_xlabel("multiply-accumulates over the data", fontsize=9)
    _finish(axes, figure)
    return figure


def _draw_histogram(axes: Axes, row: Mapping[str, Any]) -> None:
    kept = _without_tail(row["histogram"])
    edges = row["histogram"]["edges"][kept:]
    widths = [log2(high / low) if low else 1.0 for low, high in pairwise(edges)]
    for sign, color in (("positive", _DARK), ("negative", "gray")):
        counts = row["histogram"][sign][kept:]
        if any(counts):
            heights = [count / width / row["elements"] for count, width in zip(counts, widths, strict=True)]
            axes.stairs(heights, edges, label=sign, color=color)
    if edges:
        axes.set_xscale("log", base=2)
        axes.legend(fontsize=7, frameon=False, loc="best")
    if len(set(row["thresholds"])) > 1:
        axes.axvspan(min(row["thresholds"]), max(row["thresholds"]), color=_MARK, alpha=0.2)
    elif row["thresholds"] and row["thresholds"][0]:
        axes.axvline(row["thresholds"][0], color=_MARK, linestyle="--", linewidth=1)
    axes.set_title(f"{_short(row['name'])}\n{100 * row['sparsity']:.1f} % zeros", fontsize=9)
    axes.set_xlabel("|x|", fontsize=8)
    axes.set_ylabel("of all, per octave", fontsize=8)
    axes.tick_params(labelsize=7)


def _without_tail(histogram: Mapping[str, Sequence[Any]]) -> int:
    """The first bin with a thousandth of the values up to it: a long row of rare ones would leave others no room."""
    counts = [sum(pair) for pair in zip(histogram["negative"], histogram["positive"], strict=True)]
    below, total = 0, sum(counts)
    for place, count in enumerate(counts):
        below += count
        if below > total / 1000:
            return place
    return 0


def _short(name: str) -> str:
    """A name without its middle where it is long; the end tells layers apart better than the beginning."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 3]}…{name[1 - _LONGEST + _LONGEST // 3 :]}"


def _rows_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """A figure with a bar for each row, as high as they need, and with room for the names beside them."""
    longest = max(len(_short(row["name"])) for row in rows)
    return new_figure(6 + 0.07 * longest, 1.2 + 0.28 * len(rows))


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "figures: need the package matplotlib; install it with: pip install 'gossamer[plots]' "
            "(in a clone: pip install -e '.[plots]')"
        ) from error
    # Not through pyplot, which would keep every figure alive and choose a window system.
    return Figure(figsize=(width, height), layout="constrained")


def _finish(axes: Axes, figure: Figure) -> None:
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
