"""The waterfall: one step from left to right, each part with what its limit would allow."""

from __future__ import annotations

from pathlib import Path

from tools.profiling.measure import Profile, Stage

_COLOURS = {"data": "#4c78a8", "step": "#9ecae9", "whole": "#79706e", "bound": "#e45756"}


def draw(profile: Profile, picture: Path, title: str) -> None:
    """Write ``picture`` (a PNG)."""
    from matplotlib.figure import Figure

    bound = profile.bottleneck
    rows: list[tuple[Stage, float, str]] = [(stage, 0.0, "data") for stage in profile.data]
    begin = 0.0
    for stage in profile.step:
        rows.append((stage, begin, "bound" if stage.name == bound else "step"))
        begin += stage.seconds
    rows.append((Stage("step on resident data", profile.step_seconds), 0.0, "whole"))
    rows.append((Stage("all, with the loader", profile.whole_seconds), 0.0, "bound" if bound == "data" else "whole"))
    figure = Figure(figsize=(10, 1.2 + 0.36 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    longest = max(start + stage.seconds for stage, start, _ in rows)
    for place, (stage, start, kind) in enumerate(rows):
        axes.barh(place, 1000 * stage.seconds, left=1000 * start, color=_COLOURS[kind], height=0.62)
        if stage.floor is not None:
            axes.barh(
                place, 1000 * min(stage.floor, stage.seconds), left=1000 * start, color="none", edgecolor="black",
                hatch="////", linewidth=0.8, height=0.62,
            )  # fmt: skip
        rate = profile.rate(stage.seconds) if stage.seconds else float("inf")
        reached = "" if stage.reached is None else f"  ({stage.reached:.0%} of its limit)"
        text = f"{_milliseconds(stage.seconds)} ms   {rate:,.0f} images/s{reached}" if stage.seconds else "0 ms"
        axes.text(1000 * (start + stage.seconds) + 8 * longest, place, text, va="center", fontsize=8)
    names = [f"{stage.name} alone" if kind == "data" else stage.name for stage, _, kind in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.axhline(len(profile.data) - 0.5, color="0.8", linewidth=0.8)
    axes.axhline(len(rows) - 2.5, color="0.8", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1000 * longest * 1.45)
    axes.set_xlabel(
        "milliseconds of one step; hatched: what the limit of the device would allow; red: what bounds the run"
    )
    axes.set_title(title, fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(picture)


def _milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
