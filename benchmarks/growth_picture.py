"""The curves as small multiples: a panel for each group and unit, logarithmic axes, the fit beside the points."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, NullLocator

from benchmarks.growth_fit import Growth

UNITS = {"CPU s": ("CPU time", "s"), "bytes": ("memory", "B"), "FLOP": ("operations", "FLOP")}
COLUMNS = 3


def draw(found: list[Growth], path: Path) -> None:
    panels: dict[tuple[str, str], list[Growth]] = {}
    for growth in found:
        kind = growth.name.split(":")[0] if growth.group in ("data", "ranks") else ""
        panels.setdefault((" ".join([growth.group, kind]).strip(), growth.unit), []).append(growth)
    rows = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(5.2 * COLUMNS, 4.3 * rows), squeeze=False, layout="constrained")
    for (title, unit), axis in zip(panels, axes.flat, strict=False):
        _panel(axis, title, panels[title, unit])
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Axes, title: str, curves: list[Growth]) -> None:
    what, unit = UNITS[curves[0].unit]
    if curves[0].group == "ranks" and unit == "B":
        what = "bytes of a rank"
    for number, growth in enumerate(curves):
        colour = f"C{number}"
        values = [max(value, growth.floor) for value in growth.values]
        name = growth.name.split(": ", 1)[-1] if growth.group in ("data", "ranks") else growth.name
        late = "" if growth.verdict == "as expected" else f", {growth.verdict}"
        label = f"{name}: {growth.fitted:.2f} ({growth.expected.exponent:g}{late})"
        axis.plot(growth.sizes, values, "o-", markersize=4, linewidth=1.2, color=colour, label=label)
        # Of the expected slope, through the first point of the fit.
        start = growth.sizes.index(growth.fitted_from)
        fitted = growth.sizes[start:]
        line = [values[start] * (size / fitted[0]) ** growth.expected.exponent for size in fitted]
        axis.plot(fitted, line, ":", color=colour, linewidth=1.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high / low < 100:  # what is flat shall look flat
        axis.set_ylim(low / 10, high * 10)
    axis.set_xlabel(curves[0].along)
    axis.set_title(f"{title}: {what}", fontsize=11)
    axis.xaxis.set_major_formatter(EngFormatter(places=0, sep=""))
    axis.yaxis.set_major_formatter(EngFormatter(unit))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(curves[0].sizes[:: max(1, len(curves[0].sizes) // 5)])
    axis.grid(alpha=0.25)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** (0.09 * len(curves)))  # room for the legend
    axis.legend(fontsize=7.5, loc="upper left", title="exponent, fitted (expected)", title_fontsize=7.5, framealpha=0.7)
