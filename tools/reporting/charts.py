"""Charts as SVG inside the page: they take its colours, light or dark, and scale with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

from tools.reporting.html import Html, tag

COLOURS = 8  # --c0 … --c7 of page.css
SHAPES = 3  # of points: after eight classes the shape changes
WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40
MOST_NAMES = 12  # on a map, where more would cover the points
MOST_POINTS = 500  # of a line; what is more is averaged


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    number: int  # colour and dashes
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Frame:
    """Axes: data to pixels."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> str:
        return f"{self.left(x):.1f},{self.top(y):.1f}"

    def left(self, x: float) -> float:
        low, high = self.x
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def top(self, y: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def line_chart(lines: Sequence[Line], *, title: str, x_label: str, from_zero: bool = False) -> Html:
    """Lines over a shared x; a pointer shows their values."""
    short = [_thinned(line) for line in lines]
    x, y = (np.concatenate([getattr(line, axis) for line in short]) for axis in "xy")
    frame = Frame(_range(x, 0.0), _range(np.append(y, 0.0) if from_zero else y, 0.06))
    if from_zero and y.min() >= 0:
        frame = Frame(frame.x, (0.0, frame.y[1]))
    shapes = []
    for line in short:
        pairs = list(zip(line.x, line.y, strict=True))
        look = f"c{line.number % COLOURS} d{line.number // COLOURS % 3}"
        shapes.append(tag("polyline", points=" ".join(frame.at(*pair) for pair in pairs), class_=f"line {look}"))
        if len(pairs) <= 30:
            dots = [tag("circle", cx=f"{frame.left(a):.1f}", cy=f"{frame.top(b):.1f}", r=2.6) for a, b in pairs]
            shapes.append(tag("g", dots, class_=f"dots {look}"))
    told = [
        {"name": line.name, "colour": line.number % COLOURS, "x": _rounded(line.x), "y": _rounded(line.y)}
        for line in short
    ]
    label = f"{title}: " + "; ".join(f"{line.name} ends at {line.y[-1]:.4g}" for line in short)
    hover = {"x_label": x_label, "x": frame.x, "box": [LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM], "lines": told}
    return _svg(_axes(frame, x_label), shapes, label=label, data_hover=json.dumps(hover))


def cosine_histogram(groups: Sequence[tuple[str, np.ndarray]], *, title: str, x_label: str, bins: int = 30) -> Html:
    """Outlines of the shares of several sets of cosines, in the same bins, which end at 1."""
    lowest = min(float(values.min()) for _, values in groups)
    edges = np.linspace(max(-1.0, min(0.9, np.floor(10 * lowest) / 10)), 1, bins + 1)
    groups = [(name, values.clip(-1, 1)) for name, values in groups]  # rounding may lead beyond
    shares = [np.histogram(values, edges)[0] / len(values) for _, values in groups]
    frame = Frame((edges[0], edges[-1]), (0.0, 1.06 * max(share.max() for share in shares)))
    shapes = []
    for number, share in enumerate(shares):
        corners = [frame.at(edges[0], 0)]
        for low, high, height in zip(edges[:-1], edges[1:], share, strict=True):
            corners += [frame.at(low, height), frame.at(high, height)]
        corners.append(frame.at(edges[-1], 0))
        shapes.append(tag("polygon", points=" ".join(corners), class_=f"area c{number} d{number}"))
    label = f"{title}: " + "; ".join(f"mean of {name} {values.mean():.3f}" for name, values in groups)
    return _svg(_axes(frame, x_label, percent=True), shapes, label=label)


def scatter(points: np.ndarray, groups: Sequence[tuple[str, np.ndarray, int | None]], *, title: str) -> Html:
    """Points [N, 2] without axes; ``groups``: name, which points [n], number (colour and shape; None: grey).

    Of a few groups the name stands at the median of the points.
    """
    low, high = points.min(0), points.max(0)
    side, rim = 400, 16
    places = rim + (points - low) / np.maximum(high - low, 1e-12) * (side - 2 * rim)
    dots, names = [], []
    for name, chosen, number in groups:
        if not len(chosen):
            continue
        drawn = "".join(f"M{a:.1f} {b:.1f}{_shape(number)}" for a, b in places[chosen])
        dots.append(tag("path", tag("title", name), d=drawn, class_=_look(number)))
        if number is not None and len(groups) <= MOST_NAMES:
            across, down = np.median(places[chosen], axis=0)
            room = min(side / 2, 4.5 * len(_short(name)) + 4)  # half the text's width
            across = min(max(across, room), side - room)
            names.append(tag("text", _short(name), x=f"{across:.1f}", y=f"{down:.1f}", class_="name"))
    frame = tag("rect", x=1, y=1, width=side - 2, height=side - 2, class_="frame")
    return tag("svg", frame, dots, names, viewBox=f"0 0 {side} {side}", role="img", aria_label=title, class_="map")


def line_swatch(number: int, dashes: int | None = None) -> Html:
    """The mark of a line in a legend."""
    look = f"line c{number % COLOURS} d{number // COLOURS % 3 if dashes is None else dashes}"
    drawn = tag("path", d="M1 6H29", class_=look)
    return tag("svg", drawn, viewBox="0 0 30 12", class_="swatch wide-swatch", aria_hidden="true")


def point_swatch(number: int | None) -> Html:
    """The mark of a point in a legend."""
    drawn = tag("path", d=f"M6 6{_shape(number)}", class_=_look(number))
    return tag("svg", drawn, viewBox="0 0 12 12", class_="swatch", aria_hidden="true")


def _shape(number: int | None) -> str:
    """A path from the middle of a point: a disc (a short line with round ends), a cross or a triangle."""
    return ("h.01", "m-2.5 -2.5l5 5m0 -5l-5 5", "m0 -3l3 5h-6z")[_kind(number)]


def _look(number: int | None) -> str:
    colour = "grey" if number is None else f"c{number % COLOURS}"
    return f"points {colour} disc" if _kind(number) == 0 else f"points {colour}"


def _kind(number: int | None) -> int:
    return 0 if number is None else number // COLOURS % SHAPES


def _axes(frame: Frame, x_label: str, *, percent: bool = False) -> list[Html]:
    parts = []
    for value in _ticks(frame.y):
        height = f"{frame.top(value):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=height, y2=height, class_="grid"))
        text = f"{100 * value:.3g} %" if percent else f"{value:.4g}"
        parts.append(tag("text", text, x=LEFT - 6, y=height, dy="0.35em", class_="end"))
    for value in _ticks(frame.x):
        place = f"{frame.left(value):.1f}"
        parts.append(tag("line", x1=place, x2=place, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="axis"))
        parts.append(tag("text", f"{value:.4g}", x=place, y=HEIGHT - BOTTOM + 17, class_="middle"))
    parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    parts.append(tag("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, class_="middle"))
    return parts


def _svg(axes: list[Html], shapes: list[Html], *, label: str, data_hover: str | None = None) -> Html:
    size = f"0 0 {WIDTH} {HEIGHT}"
    return tag("svg", axes, shapes, viewBox=size, role="img", aria_label=label, class_="chart", data_hover=data_hover)


def _ticks(bounds: tuple[float, float]) -> list[float]:
    low, high = bounds
    slack = 1e-9 * (high - low)
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in ticks if low - slack <= tick <= high + slack]


def _range(values: np.ndarray, margin: float) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: it gets some room, to lie in the middle
        room = 0.1 * abs(low) or 0.5
        return low - room, high + room
    return low - margin * (high - low), high + margin * (high - low)


def _thinned(line: Line) -> Line:
    """At most ``MOST_POINTS`` points, each the mean of as many neighbours."""
    if len(line.x) <= MOST_POINTS:
        return line
    parts = [np.array_split(np.asarray(values, dtype=float), MOST_POINTS) for values in (line.x, line.y)]
    x, y = ([float(part.mean()) for part in axis] for axis in parts)
    return Line(line.name, line.number, x, y)


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"
