"""Plots of the drivers' JSON: one PNG for each kind of result. Logarithmic where times of different sizes share an axis."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

Document = dict[str, Any]


def plot(documents: list[Document], folder: Path) -> list[Path]:
    """The files that were written; several documents of one kind are drawn side by side."""
    written = []
    for kind, draw in {"attention": _attention, "sweep": _sweep, "unet_step": _unet_step}.items():
        panels = [panel for document in documents if document["benchmark"] == kind for panel in draw(document)]
        if not panels:
            continue
        tallest = max(height for height, _ in panels)
        figure, axes = pyplot.subplots(1, len(panels), figsize=(8 * len(panels), tallest), squeeze=False, layout="constrained")
        for axis, (_, fill) in zip(axes[0], panels, strict=True):
            fill(axis)
        path = folder / f"{kind}.png"
        figure.savefig(path, dpi=100)
        pyplot.close(figure)
        written.append(path)
    return written


def _clock(entries: list[dict[str, Any]]) -> str:
    """The cold clock where it was read, else the wall clock."""
    return "cold" if any(entry.get("cold") for entry in entries) else "wall"


def _microseconds(row: dict[str, Any], name: str, clock: str) -> float | None:
    timing = row["candidates"].get(name, {}).get(clock)
    return None if timing is None else 1e6 * float(timing["median"])


def _attention(document: Document) -> list[tuple[float, Any]]:
    entries = [entry for row in document["rows"] for entry in row["candidates"].values()]
    clock = _clock(entries)
    names = dict.fromkeys(name for row in document["rows"] for name in row["candidates"])
    points = {
        name: [(time, y) for y, row in enumerate(document["rows"]) if (time := _microseconds(row, name, clock))]
        for name in names
    }
    if not any(points.values()):
        return []

    def fill(axis: Axes) -> None:
        for name, found in points.items():
            if found:
                axis.plot(*zip(*found, strict=True), "o" if name == "ipa_kernels" else ".", label=name)
        axis.set_yticks(range(len(document["rows"])), [row["case"]["name"] for row in document["rows"]])
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel=f"microseconds, {clock} clock, {_machine(document)}")
        axis.grid(visible=True, axis="x", alpha=0.3)
        axis.legend(fontsize="small")

    return [(2 + 0.4 * len(document["rows"]), fill)]


def _sweep(document: Document) -> list[tuple[float, Any]]:
    clock = _clock([entry for row in document["rows"] for entry in row["candidates"].values()])
    panels = []
    for sweep in dict.fromkeys(row["sweep"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["sweep"] == sweep]
        lines = {
            name: [
                (row["x"], entry[clock]["median"] * 1e6)
                for row in rows
                if (entry := row["candidates"].get(name, {})).get(clock)
            ]
            for name in dict.fromkeys(name for row in rows for name in row["candidates"])
        }

        def fill(axis: Axes, sweep: str = sweep, lines: Any = lines, rows: Any = rows) -> None:
            for name, found in lines.items():
                if found:
                    axis.plot(*zip(*found, strict=True), ".-", label=name)
            axis.set(xscale="log", yscale="log", xlabel=sweep, ylabel=f"microseconds, {clock} clock, {_machine(document)}")
            ticks = [row["x"] for row in rows]
            axis.set_xticks(ticks, ticks)
            axis.set_xticks([], minor=True)
            axis.grid(visible=True, alpha=0.3)
            axis.legend(fontsize="small")

        if any(lines.values()):
            panels.append((5.0, fill))
    return panels


def _unet_step(document: Document) -> list[tuple[float, Any]]:
    panels = []
    for model, entry in document["models"].items():
        rows = [row for row in entry["rows"] if row["seconds"]]

        def fill(axis: Axes, model: str = model, rows: list[dict[str, Any]] = rows) -> None:
            widths = [1e3 * row["seconds"]["median"] for row in rows]
            colors = ["tab:blue" if row["state"] == "enabled" else "tab:gray" for row in rows]
            bars = axis.barh([f"{row['variant']}, {row['state']}, {row['mode']}" for row in rows], widths, color=colors)
            axis.bar_label(bars, fmt="%.2f", padding=3)
            axis.invert_yaxis()
            axis.set(xlabel=f"milliseconds per step, {_machine(document)}", title=model)
            axis.margins(x=0.15)

        if rows:
            panels.append((2 + 0.35 * len(rows), fill))
    return panels


def _machine(document: Document) -> str:
    return str(document["machine"].get("gpu", "CPU"))
