"""The parser of `ipa-kernels demo`."""

from typing import Any

from .arguments import add_command, add_machine, add_weights, finite, seed, steps
from .defaults import PROMPT, SCALE


def add(commands: Any) -> None:
    """Add it to the subparsers of the command line."""
    demo = add_command(
        commands,
        "demo",
        extra="diffusers",
        help="run a pipeline stock and accelerated, and compare",
        description="Run a diffusers pipeline with an IP-Adapter, stock and accelerated, with the same seed: print what ran "
        "where and why, the largest difference between the two pictures (of 255) and the time per step, and write them side "
        "by side. Without --model: a small pipeline with random weights, built in code, that needs neither a GPU nor the hub.",
    )
    add_weights(demo)
    picture = demo.add_argument_group("the picture")
    picture.add_argument("--image", metavar="FILE", help="the reference picture (default: one drawn in code)")
    picture.add_argument("--prompt", metavar="TEXT", default=PROMPT, help="default: %(default)s")
    picture.add_argument(
        "--scale", metavar="X", type=finite, default=SCALE, help="strength of the IP-Adapter (default: %(default)s)"
    )
    picture.add_argument(
        "--steps", metavar="N", type=steps, default=20, help="denoising steps, at least 2 (default: %(default)s)"
    )
    picture.add_argument("--seed", metavar="N", type=seed, default=0, help="of both runs (default: %(default)s)")
    picture.add_argument("--output", metavar="FILE", default="demo.png", help="the PNG to write (default: %(default)s)")
    add_machine(demo)
