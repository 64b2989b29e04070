"""The figures of `ipa-kernels bench` as text, from its JSON."""

from typing import Any

from ..benchmarking.unet_step import VARIANTS
from ..report import plural
from .tables import table, wrapped

HEAD = ["adapters", "stock", "enabled", "enabled / stock", "enabled / stock with none"]


def step_table(name: str, document: dict[str, Any]) -> str:
    """What was measured of one UNet."""
    entry = document["models"][name]
    head = f"{name} UNet, {entry['side']}x{entry['side']} pixels, batch 2 (one picture with guidance), {document['dtype']}"
    if not entry["rows"]:
        return f"{head}: not measured\n{wrapped(entry['note'])}"
    rows = {(row["variant"], row["state"]): row for row in entry["rows"]}
    lines = [list(HEAD)]
    for variant in VARIANTS:
        ratios = entry["ratios"].get(variant, {})
        times = [_milliseconds(rows.get((variant, state))) for state in ("stock", "enabled")]
        lines.append([variant, *times, *(f"{ratios[base]:.2f}" if ratios else "" for base in ("stock", "stock with none"))])
    if rows["none", "stock"]["peak_bytes"] is not None:
        lines[0].append("peak MB of a step, stock and enabled")
        for line in lines[1:]:
            line.append(_peaks(rows, line[0]))
    parts = [
        head,
        wrapped(f"checked first: {_checked(entry['rows'])}"),
        wrapped(entry["note"]),
        f"ms per step, median (20th to 80th percentile) of {rows['none', 'stock']['seconds']['calls']}, taken in turns:",
        table(lines),
    ]
    if entry["first image"]:
        count = document["steps of an image"]
        steps = f"{count} step{plural(count)}"
        parts += [
            f"s to an image, one adapter, {steps}, from a pipeline in memory to its latents, a process each:",
            _first_image(entry["first image"]),
        ]
    return "\n".join(parts)


def _checked(rows: list[dict[str, Any]]) -> str:
    enabled = [row for row in rows if row["state"] == "enabled"]
    if all(row["equal"] for row in enabled):
        return f"{len(enabled)} of {len(enabled)} enabled steps equal stock's bit for bit"
    return f"{len(enabled)} of {len(enabled)} enabled steps are within their error budget"


def _milliseconds(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    median, low, high = (1e3 * row["seconds"][name] for name in ("median", "p20", "p80"))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _peaks(rows: dict[tuple[str, str], dict[str, Any]], variant: str) -> str:
    found = (rows[variant, state]["peak_bytes"] for state in ("stock", "enabled") if (variant, state) in rows)
    return ", ".join(f"{peak / 1e6:.0f}" for peak in found)


def _first_image(rows: list[dict[str, Any]]) -> str:
    lines = [["compiler caches", "", "first image", "the next"]]
    lines += [[row["caches"], row["way"], f"{row['first']:.2f}", f"{row['second']:.2f}"] for row in rows]
    return table(lines)
