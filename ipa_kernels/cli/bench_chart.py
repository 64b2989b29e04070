"""The plot of `ipa-kernels bench`, from its JSON. Stock is light and hatched, enabled dark: they differ in grey too."""

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..benchmarking.unet_step import VARIANTS

STYLES: dict[str, dict[str, Any]] = {
    "stock": {"color": "#d4d4d4", "edgecolor": "#555555", "hatch": "///", "label": "stock diffusers"},
    "enabled": {"color": "#3f7cac", "edgecolor": "#1f4e79", "label": "ipa_kernels enabled"},
}
WIDTH = 0.4
"""Of a bar; groups are 1 apart."""

TITLE = "What an IP-Adapter costs"
YARDSTICK = "stock diffusers with no adapter"


def draw(document: dict[str, Any]) -> Figure:
    """A row for each UNet that was measured: its steps on the left, its first image, if any, on the right."""
    models = {name: entry for name, entry in document["models"].items() if entry["rows"]}
    images = any(entry["first image"] for entry in models.values())
    figure = Figure(figsize=(12 if images else 8, 1.6 + 3.6 * len(models)), dpi=120, layout="constrained")
    axes = figure.subplots(len(models), 1 + images, squeeze=False, width_ratios=(5, 3) if images else None)
    for row, (name, entry) in zip(axes, models.items(), strict=True):
        side = entry["side"]
        _steps(row[0], entry)
        kernel = any(step.get("layers", {}).get("triton") for step in entry["rows"])
        title = f"{name} UNet, {side}x{side} pixels, {document['dtype']}: one step"
        row[0].set_title(title if kernel else f"{title} (the kernel did not run)", fontsize="medium")
        if images:
            _first_image(row[1], entry)
            row[1].set_title(f"{name}: time to the first image", fontsize="medium")
    handles, labels = axes[0][0].get_legend_handles_labels()
    legend = {"ncols": len(labels), "fontsize": "small", "frameon": False}
    figure.legend(handles, labels, loc="outside upper center", title=TITLE, title_fontsize="large", **legend)
    figure.supxlabel(_caption(document, models, 215 if images else 140), fontsize=7, ha="left", x=0.01, color="#333333")
    return figure


def _steps(axis: Axes, entry: dict[str, Any]) -> None:
    rows = {(row["variant"], row["state"]): row["seconds"] for row in entry["rows"]}
    axis.axhline(1e3 * rows["none", "stock"]["median"], color="black", linestyle="--", linewidth=1, zorder=1.5, label=YARDSTICK)
    for state, shift in (("stock", -WIDTH / 2), ("enabled", WIDTH / 2)):
        # alone in its group, a bar stands in the middle
        found = [
            (x + (shift if (variant, "enabled") in rows else 0), rows[variant, state])
            for x, variant in enumerate(VARIANTS)
            if (variant, state) in rows
        ]
        medians = [1e3 * seconds["median"] for _, seconds in found]
        low, high = ([1e3 * abs(seconds[name] - seconds["median"]) for _, seconds in found] for name in ("p20", "p80"))
        _bars(axis, state, [x for x, _ in found], medians, [low, high])
    axis.set_xticks(range(len(VARIANTS)), _labels(list(VARIANTS)))
    axis.set_ylabel("ms per step (median, 20th to 80th percentile)", fontsize="small")


def _labels(variants: list[str]) -> list[str]:
    names = {"none": "no adapter", "one": "one adapter", "three": "three adapters"}
    return [names[variant.split()[0]] + ("\nmasked" if "masked" in variant else "") for variant in variants]


def _first_image(axis: Axes, entry: dict[str, Any]) -> None:
    rows = entry["first image"]
    caches = list(dict.fromkeys(row["caches"] for row in rows))
    for state, shift in (("stock", -WIDTH / 2), ("enabled", WIDTH / 2)):
        mine = [row for row in rows if row["way"] == state]
        seconds = [*(row["first"] for row in mine), *(row["second"] for row in mine[-1:])]
        _bars(axis, state, [x + shift for x in range(len(seconds))], seconds)
    ticks = [*(f"first, {name}\ncompiler caches" for name in caches), "the next"] if rows else []
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set_ylabel("seconds (one process each)", fontsize="small")


def _bars(axis: Axes, state: str, x: list[float], heights: list[float], spread: list[list[float]] | None = None) -> None:
    error = {"elinewidth": 1, "capsize": 2, "ecolor": "black"}
    bars = axis.bar(x, heights, WIDTH, yerr=spread, error_kw=error, linewidth=0.8, **STYLES[state])
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # the yardstick does not cross a number
    axis.bar_label(bars, [_short(height) for height in heights], padding=3, fontsize=8, bbox=behind)
    axis.margins(y=0.15)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _caption(document: dict[str, Any], models: dict[str, Any], width: int) -> str:
    """The machine and the code, what was measured, and whether the kernel ran."""
    facts = document["machine"]
    commit = str(facts["commit"] or facts["source"])
    where = facts.get("gpu") or f"{facts['device']} ({facts['processor']}, threads: {facts['threads']})"
    versions = ", ".join(f"{name} {facts[name]}" for name in ("ipa_kernels", "torch", "triton", "diffusers"))
    what = "Random weights, batch 2 (one picture with guidance). One adapter has 4 image tokens, each of three 16."
    paragraphs = [
        f"{where}, {document['dtype']}; {versions}; code {commit[:12]}{'-dirty' if commit.endswith('-dirty') else ''}. {what}",
        *(f"{name}: {entry['note']}." for name, entry in models.items()),
    ]
    return "\n".join(textwrap.fill(paragraph, width) for paragraph in paragraphs)
