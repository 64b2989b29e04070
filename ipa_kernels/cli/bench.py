"""`ipa-kernels bench`: a UNet step and the first image, stock and enabled: compared first, then timed, printed and drawn."""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Commands, add_command, add_machine, whole_number
from .errors import UserError
from .output_files import check_overwriting, json_file, writable, written
from .quiet import importing

if TYPE_CHECKING:
    import torch

IMAGE_STEPS = 20

UNETS = ("sd15", "sdxl", "tiny")
"""Of `unet_models.MODELS`, which takes seconds to import."""


@dataclass(frozen=True)
class BenchOptions:
    """The command line of `ipa-kernels bench`; None stands for what is chosen for the machine."""

    unet: list[str] | None
    size: int | None
    rounds: int | None
    quick: bool
    output: str
    json: str | None
    device: str | None
    dtype: str | None


def add(commands: Commands) -> None:
    """Add it to the subparsers of the command line."""
    bench = add_command(
        commands,
        "bench",
        BenchOptions,
        run,
        help="time a UNet step and the first image, stock against enabled",
        description="Time one step of a UNet with no adapter, with one and with three, masked and not, and the time to the "
        "first image, stock diffusers against enabled, and draw them. Results are compared first: if one is outside its error "
        "budget, no time is shown and the exit status is 1. The UNets have the real architectures and random weights, built in "
        "code: a time does not depend on the values of weights. Your own pipeline is timed by `ipa-kernels demo --model`.",
    )
    bench.add_argument(
        "--unet",
        metavar="NAME",
        nargs="+",
        choices=UNETS,
        help="sd15, sdxl, tiny, one or several; finetunes have the architecture of what they were made from (default: sd15 and "
        "sdxl on a GPU, tiny on a CPU)",
    )
    bench.add_argument(
        "--size",
        metavar="PIXELS",
        type=_size,
        help="side of the picture, a multiple of 64 (default: what each UNet was made for)",
    )
    bench.add_argument(
        "--rounds", metavar="N", type=whole_number(1), help="samples of each time, taken in turns (default: 20, with --quick 3)"
    )
    bench.add_argument(
        "--quick", action="store_true", help="few rounds, without the first image; on a GPU sd15 alone unless --unet is given"
    )
    bench.add_argument("--output", metavar="FILE", default="bench.png", help="the plot, a PNG (default: %(default)s)")
    bench.add_argument("--json", metavar="FILE", help="every number, with facts about the machine")
    add_machine(bench)


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 64 or int(text) % 64:
        raise argparse.ArgumentTypeError(f"needs a multiple of 64 from 64 up, got {text!r}")
    return int(text)


def run(options: BenchOptions) -> int:
    """Compare and time everything, then print the figures, write them as JSON and draw them.

    1, and no figure at all, if a result is outside its error budget. Raises UserError, before anything is measured, where the
    options name something that does not work, and where no UNet fits into memory.
    """
    with importing("diffusers"):
        import torch

        from ..benchmarking.machine import machine_facts
        from ..kernels.dtypes import dtype_name
        from .bench_table import step_table
        from .device import available_device, check_switch, chosen_dtype, threads

    output, file = writable(options.output), json_file(options.json)
    if (options.device or "cpu").partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {options.device}: needs cpu or cuda; of another device it is not known when a step is done")
    device = available_device(options.device)
    check_switch()
    check_overwriting([output], [options.json])
    names = _names(options, device)
    with threads(1 if device.type == "cpu" and names == ["tiny"] else torch.get_num_threads()):
        document: dict[str, Any] = {
            "benchmark": "bench",
            "machine": machine_facts(device),
            "dtype": dtype_name(chosen_dtype(options.dtype, device)),
            "steps of an image": IMAGE_STEPS,
            "models": {},
        }
        print(", ".join(f"{name} {value}" for name, value in document["machine"].items() if value is not None))
        for name in names:
            print(f"{name}: comparing results, then timing", flush=True)
            entry = document["models"][name] = _measure(name, options, document["dtype"], device)
            wrong = _wrong(name, entry)
            if wrong:
                print("\n".join(wrong))
                print("no time is shown: a wrong result has none. Please report this, with the output of `ipa-kernels doctor`")
                return 1
    if not any(entry["rows"] for entry in document["models"].values()):
        raise UserError("; ".join(entry["note"] for entry in document["models"].values()))
    for name in document["models"]:
        print(f"\n{step_table(name, document)}")
    print()
    if file is not None:
        with written("--json", file) as part:
            part.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{file}: every number")
    print(_draw(document, output))
    return 0


def _names(options: BenchOptions, device: torch.device) -> list[str]:
    """The UNets, each once."""
    if options.unet is not None:
        return list(dict.fromkeys(options.unet))
    if device.type == "cpu":
        return ["tiny"]
    return ["sd15"] if options.quick else ["sd15", "sdxl"]


def _measure(name: str, options: BenchOptions, dtype: str, device: torch.device) -> dict[str, Any]:
    """Everything about one UNet; without rows where it does not fit into memory."""
    import torch

    from ..benchmarking.unet_step import measure
    from ..testing.unet_models import MODELS
    from .device import is_about_memory
    from .quiet import quiet

    model = MODELS[name]
    entry: dict[str, Any] = {"side": options.size or model.side, "rows": [], "ratios": {}, "note": "", "first image": []}
    rounds = options.rounds or (3 if options.quick else 20)
    try:
        with torch.no_grad(), quiet():
            entry["rows"] = measure(model, getattr(torch, dtype), device, rounds, options.size)
    except (RuntimeError, MemoryError) as error:
        if not is_about_memory(error):
            raise
        entry["note"] = _too_large(name, entry["side"], dtype, device)
        return entry
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for the processes of the first image
    entry["note"] = _note(entry["rows"])
    entry["ratios"] = _ratios(entry["rows"])
    if not options.quick and not _wrong(name, entry):
        entry["first image"] = _first_images(name, options.size, dtype, device)
    return entry


def _first_images(name: str, size: int | None, dtype: str, device: torch.device) -> list[dict[str, Any]]:
    """Stock and enabled, a process each: on empty compiler caches and, where a kernel is compiled, on full ones."""
    from ..benchmarking.first_image import Job, in_process

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for caches in ("empty", "full") if device.type == "cuda" else ("empty",):
            for way in ("stock", "enabled"):
                job = Job(way, name, IMAGE_STEPS, dtype, str(device), size)
                rows.append({"way": way, "caches": caches, **in_process(job, Path(folder) / way)})
    return rows


def _note(rows: list[dict[str, Any]]) -> str:
    """Whether the kernel ran in the enabled steps, and why not."""
    enabled = [row for row in rows if "layers" in row]
    reasons = "; ".join(sorted({reason for row in enabled for reason in row["why not the kernel"]}))
    if not any(row["layers"]["triton"] for row in enabled):
        return f"the kernel did not run here, and these times say nothing about it: {reasons}"
    counts = (f"{row['variant']} {row['layers']['triton']} of {sum(row['layers'].values())}" for row in enabled)
    return f"layers that ran the kernel: {', '.join(counts)}{f' ({reasons})' if reasons else ''}"


def _ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each variant with adapters, the enabled step's time over that of stock's, with the same adapters and with none."""
    medians = {(row["variant"], row["state"]): row["seconds"]["median"] for row in rows if row["seconds"]}
    return {
        variant: {"stock": seconds / medians[variant, "stock"], "stock with none": seconds / medians["none", "stock"]}
        for (variant, state), seconds in medians.items()
        if state == "enabled"
    }


def _wrong(name: str, entry: dict[str, Any]) -> list[str]:
    """A line for each result that is outside its error budget."""
    lines = [f"{name}, {row['variant']}: {_how_far(row)}" for row in entry["rows"] if not row.get("within", True)]
    for row in entry["first image"]:
        if not row["within"]:
            reason = row.get("reason") or f"differs from stock's by {row['distance']:.2g} of its largest value"
            lines.append(f"{name}, first image, {row['way']}: {reason}")
    return lines


def _how_far(row: dict[str, Any]) -> str:
    from ..benchmarking.timing import SLACK

    if row["reason"]:
        return f"enabled fails where stock runs: {row['reason']}"
    if row["proves nothing"]:
        return "proves nothing: stock's result is not finite, or all zeros"
    if "rms" in row:
        return f"enabled is {row['rms']:.2g} from float64, stock {row['stock_rms']:.2g}; allowed: {SLACK} times stock's"
    return f"enabled differs from stock by {row['relative to stock']:.2g} (relative, rms); allowed: {row['bound']:g}"


def _too_large(name: str, side: int, dtype: str, device: torch.device) -> str:
    helps = "a smaller --size" + (" or --unet sd15" if name == "sdxl" else "")
    return f"not enough memory on {device} for the {name} UNet at {side}x{side} in {dtype}: {helps} needs less"


def _draw(document: dict[str, Any], output: Path) -> str:
    from .quiet import quiet

    try:
        from .bench_chart import draw
    except ImportError as error:
        return f"no plot: {error}; what it needs: pip install 'ipa-kernels[cli]'"
    with quiet(), written("--output", output) as part:
        draw(document).savefig(part, format="png")
    return f"{output}: the plot"
