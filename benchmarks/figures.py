"""Tables (Markdown) and plots (PNG) from the JSON of the drivers, and from nothing else.

    python -m benchmarks.figures FOLDER

Reads every .json of the folder that a driver wrote or `benchmarks.gpu_day` collected; writes report.md and a plot for each kind
of result. What is missing there is "not measured" here.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .plots import plot

NOT_MEASURED = "not measured"
CLOCKS = ("wall", "warm", "cold")
TITLES = {
    "attention": "Attention core",
    "sweep": "Cost as work grows",
    "unet_step": "UNet step",
    "first_image": "Time to the first image",
    "generation": "Once per generation",
    "host": "On the host: one hot layer, called in a loop, and a layer in a step",
    "growth": "Cost as work grows, counted without a GPU",
    "training": "Forward and backward",
}

Document = dict[str, Any]


def documents(folder: Path) -> list[Document]:
    """What the drivers wrote, from single files and collections, in the order of `TITLES`."""
    found: list[Document] = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        each = content["documents"].values() if content.get("benchmark") == "collection" else [content]
        found += [document for document in each if document.get("benchmark") in TITLES]
    return sorted(found, key=lambda document: list(TITLES).index(document["benchmark"]))


def report(found: list[Document]) -> str:
    """Markdown of all documents."""
    parts = ["# Results", "Made by `python -m benchmarks.figures` from the JSON beside it."]
    machines: list[dict[str, Any]] = []
    for document in found:
        if document["machine"] not in machines:
            machines.append(document["machine"])
            parts.append(_table(["machine", ""], [[name, value] for name, value in document["machine"].items()]))
        parts += [f"## {TITLES[document['benchmark']]}", *SECTIONS[document["benchmark"]](document)]
    return "\n\n".join(parts) + "\n"


def attention(document: Document) -> list[str]:
    """The card's rates, a table of ratios, and one of all candidates per case."""
    parts = [_ceilings(document)]
    for clock in CLOCKS:
        rows = []
        for row in document["rows"]:
            ratios = row.get("ratios", {}).get(clock)
            if ratios:
                shown = [_number(ratios.get(name), 2) for name in ("stock", "stock_compiled", "best_sdpa")]
                rows.append([row["case"]["name"], *shown, ratios.get("best_sdpa_is", NOT_MEASURED)])
        if rows:
            parts += [
                f"Times longer than ipa_kernels, {clock} clock:",
                _table(["case", "stock", "stock compiled", "best SDPA", "which"], rows),
            ]
        else:
            parts.append(f"Ratios by the {clock} clock: {NOT_MEASURED}.")
    rows = [line for row in document["rows"] for line in _candidates(row)]
    header = [
        "case",
        "candidate",
        "wall us (p20 to p80)",
        "warm us",
        "cold us",
        "GB/s",
        "of copy",
        "TFLOP/s",
        "of matmul",
        "notes",
    ]
    return [*parts, _table(header, rows)]


def _candidates(row: dict[str, Any]) -> Iterable[list[Any]]:
    name = row["case"]["name"]
    if not row["within"]:
        yield [name, "ipa_kernels", *[NOT_MEASURED] * 7, row.get("reason") or "outside the error budget"]
    for candidate, entry in row["candidates"].items():
        times = [_microseconds(entry.get(clock)) for clock in CLOCKS]
        rates = [
            _number(entry.get("bytes_per_second"), 0, 1e-9),
            _percent(entry.get("of_copy_rate")),
            _number(entry.get("flops_per_second"), 2, 1e-12),
            _percent(entry.get("of_matmul_rate")),
        ]
        notes = entry.get("reason") or ("" if entry.get("within", True) else "outside the error budget")
        yield [name, candidate, *times, *rates, notes]


def sweep(document: Document) -> list[str]:
    """One table per sweep: ours and stock by the clocks that were read."""
    parts = [_ceilings(document)]
    for name in dict.fromkeys(row["sweep"] for row in document["rows"]):
        rows = []
        for row in document["rows"]:
            if row["sweep"] == name:
                entries = [row["candidates"].get(candidate, {}) for candidate in ("ipa_kernels", "stock")]
                times = [_microseconds(entry.get(clock)) for clock in ("wall", "cold") for entry in entries]
                rows.append([row["x"], *times, _percent(entries[0].get("of_copy_rate"))])
        parts.append(_table([name, "ours, wall us", "stock, wall us", "ours, cold us", "stock, cold us", "ours of copy"], rows))
    return parts


def unet_step(document: Document) -> list[str]:
    """Per model, every candidate and the ratios between them."""
    parts = []
    for name, entry in document["models"].items():
        rows = []
        for row in entry["rows"]:
            layers = ", ".join(f"{count} {impl}" for impl, count in row.get("layers", {}).items() if count)
            notes = "; ".join(filter(None, [row["reason"], layers, *row.get("why not the kernel", [])]))
            rows.append([row["variant"], row["state"], row["mode"], _milliseconds(row["seconds"]), notes])
        ratios = [[label, _number(ratio, 3)] for label, ratio in entry["ratios"].items()]
        parts += [f"### {name}, {document['dtype']}", _table(["adapters", "", "mode", "ms (p20 to p80)", "layers"], rows)]
        parts.append(_table(["ratio of times", ""], ratios) if ratios else f"Ratios: {NOT_MEASURED}.")
    return parts


def first_image(document: Document) -> list[str]:
    """Seconds of the first and the second image, each way in a process of its own on empty and on full compiler caches."""
    rows = []
    for row in document["rows"]:
        layers = ", ".join(f"{count} {impl}" for impl, count in row.get("layers", {}).items() if count)
        notes = row.get("reason") or layers + ("" if row["within"] else "; another picture than stock's")
        times = [_number(row.get(turn), 2) for turn in ("first", "second")]
        rows.append([row["way"], row["caches"], *times, notes])
    return [_table(["", "compiler caches", "first image, s", "the next, s", "layers"], rows)]


def training(document: Document) -> list[str]:
    """Forward and backward of the core and of a UNet step: time, bytes saved, peak, and stock's over ours."""
    header = ["candidate", "ms (p20 to p80)", "MB saved for the backward", "peak MB", "notes"]
    rows = []
    for row in document["rows"]:
        entries = row.get("candidates") or {"ipa_kernels": {"reason": row["reason"]}}
        title = f"{row['case']['name']}, {row['wanted']}"
        why = {"ipa_kernels": {"why not the kernel": row.get("why not the kernel", [])}}
        rows += [[title, name, *_figures(why.get(name, {}) | entry)] for name, entry in entries.items()]
    parts = [_table(["case, gradients", *header], rows)] if rows else []
    for name, model in document["models"].items():
        lines = [[_checkpointing(row), row["candidate"], *_figures(row)] for row in model["rows"]]
        parts += [f"### {name}, {document['dtype']}", _table(["", *header], lines)]
        ratios = [[label, _number(ratio, 3)] for label, ratio in model["ratios"].items()]
        parts.append(_table(["stock over ours", ""], ratios) if ratios else f"Ratios: {NOT_MEASURED}.")
    return parts


def _figures(entry: dict[str, Any]) -> list[str]:
    megabytes = [_number(entry.get(kind), 1, 1e-6) for kind in ("saved_bytes", "peak_bytes")]
    notes = "; ".join(filter(None, [entry.get("reason"), *entry.get("why not the kernel", [])]))
    return [_milliseconds(entry.get("seconds")), *megabytes, notes]


def _checkpointing(row: dict[str, Any]) -> str:
    return "checkpointing" if row["checkpointing"] else ""


def generation(document: Document) -> list[str]:
    """Calls per generation, and cross-attention beyond to_q and to_out."""
    calls = document["small"]["calls per generation"]
    parts = [
        _table(["calls per generation", "stock", "enabled"], [[k, v, calls["enabled"][k]] for k, v in calls["stock"].items()])
    ]
    rows = []
    for model, variants in document["models"].items():
        for variant, entry in variants.items():
            beyond = entry.get("beyond", {})
            times = [_number(beyond.get(name), 2, 1e3) for name in ("stock", "enabled")]
            rows.append([model, variant, *times, _number(entry.get("ratio"), 2)])
    if rows:
        parts.append(_table(["model", "adapters", "stock, ms beyond to_q and to_out", "enabled", "ratio"], rows))
    return parts


def host(document: Document) -> list[str]:
    """Microseconds of a call up to the launch, hot and in a step, and the share of stock's; below them another version's."""
    names = ("stock", "first", "later", "forward", "projections")
    header = [*(f"{name}, us" for name in names), "later of stock"]

    def figures(entry: dict[str, Any]) -> list[str]:
        return [*(_microseconds(entry["seconds"][name]) for name in names), _number(entry["ratio"], 2)]

    parts = [
        _table(
            ["hot: adapters", "launch", *header], [[row["adapters"], row["launch"], *figures(row)] for row in document["rows"]]
        )
    ]
    rows = []
    for row in document["rows"]:
        both = (row.get("commit"), row.get("step")), (row.get("baseline", {}).get("commit"), row.get("baseline"))
        for commit, step in both:
            if step:
                floor = _number(step["above the floor"], 3)
                rows.append([row["adapters"], commit, *figures(step), floor, _microseconds(step["hook"])])
    if rows:
        header = ["in a step: adapters", "commit", *header, "above the floor, of stock", "hook, us a step"]
        return [*parts, _table(header, rows)]
    return [*parts, f"In a step: {NOT_MEASURED}."]


def growth(document: Document) -> list[str]:
    """One table per sweep: matrix instructions, launches, bytes."""
    keys = ("mma", "min_mma", "registers", "spill_bytes", "blocks", "launches", "stock launches", "bytes", "stock bytes")
    header = ["mma per 16 queries", "least", *keys[2:]]
    return [f"Compiled for {document['arch']}, float16."] + [
        _table([name, *header], [[row["x"], *(row.get(key, row.get("refused", "")) for key in keys)] for row in rows])
        for name, rows in document["tables"].items()
    ]


SECTIONS = {
    "attention": attention, "sweep": sweep, "unet_step": unet_step, "generation": generation, "host": host, "growth": growth,
    "training": training, "first_image": first_image,
}  # fmt: skip


def _ceilings(document: Document) -> str:
    rows = []
    for name, limit in document["ceilings"].items():
        unit, factor = ("GB/s", 1e-9) if name == "copy" else ("TFLOP/s", 1e-12)
        rows.append([name, f"{limit['rate'] * factor:.1f} {unit}", limit["clock"]])
    table = _table(["this machine, same run", "", "clock"], rows)
    left = document["not run"]
    return f"{table}\n\nNot run, its time was over: {', '.join(left)}." if left else table


def _table(header: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return NOT_MEASURED if value is None else f"{value * factor:.{digits}f}"


def _percent(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.0%}"


def _microseconds(timing: dict[str, Any] | None) -> str:
    return _spread(timing, 1e6, 1)


def _milliseconds(timing: dict[str, Any] | None) -> str:
    return _spread(timing, 1e3, 2)


def _spread(timing: dict[str, Any] | None, factor: float, digits: int) -> str:
    if timing is None:
        return NOT_MEASURED
    median, low, high = (f"{timing[name] * factor:.{digits}f}" for name in ("median", "p20", "p80"))
    return f"{median} ({low} to {high})"


def main() -> int:
    """Print what was written; 1 if the folder holds no result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found = documents(folder)
    if not found:
        print(f"{folder}: no JSON of a driver")
        return 1
    (folder / "report.md").write_text(report(found))
    names = ["report.md", *(path.name for path in plot(found, folder))]
    print(f"{folder}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
