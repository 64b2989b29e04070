"""The parser of `ipa-kernels bench`."""

import argparse
from typing import Any

from .arguments import add_command, add_machine, whole_number

UNETS = ("sd15", "sdxl", "tiny")
"""Of `unet_models.MODELS`, which takes seconds to import."""


def add(commands: Any) -> None:
    """Add it to the subparsers of the command line."""
    bench = add_command(
        commands,
        "bench",
        extra="diffusers",
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
