"""The parser of `ipa-kernels verify`."""

from typing import Any

from .arguments import add_command, add_machine, add_weights, finite, seed
from .defaults import PROMPT, SCALE


def add(commands: Any) -> None:
    """Add it to the subparsers of the command line."""
    verify = add_command(
        commands,
        "verify",
        extra="diffusers",
        help="compare what runs on this machine with stock and float64",
        description="Run every named layer shape on random inputs on this machine: the kernel, whose distance from float64 may "
        "not exceed stock's in the same dtype, and eager attention, which equals stock's. With --pipeline: every IP-Adapter "
        "layer of a pipeline on what it is given in three steps. Prints errors in units of stock's, a verdict, and what was "
        "not verified because it does not run here. Exit status: 0 all within the rule, 1 not, 2 a mistake in the options.",
    )
    cases = verify.add_argument_group("named cases")
    cases.add_argument(
        "--case", metavar="NAME", nargs="+", help="only these (default: all; a wrong name lists near ones, or all)"
    )
    cases.add_argument(
        "--quick", action="store_true", help="two heads and at most 99 queries of each; always so in Triton's interpreter"
    )
    pipeline = verify.add_argument_group("a pipeline")
    pipeline.add_argument(
        "--pipeline",
        dest="model",
        metavar="PATH",
        nargs="?",
        const=True,
        help="verify this pipeline, with the IP-Adapter of --ip-adapter, layer by layer; without PATH: a small one with random "
        "weights, built in code. The same as --model PATH",
    )
    pipeline.add_argument("--image", metavar="FILE", help="the reference picture (default: one drawn in code)")
    pipeline.add_argument("--prompt", metavar="TEXT", help=f"default: {PROMPT}")
    pipeline.add_argument("--scale", metavar="X", type=finite, help=f"strength of the IP-Adapter (default: {SCALE})")
    add_weights(verify)
    # None where it was not given: the named cases have no use for it
    verify.set_defaults(image_encoder=None)
    verify.add_argument("--seed", metavar="N", type=seed, help="of the random inputs (default: another in every run, printed)")
    verify.add_argument(
        "--impl",
        choices=("triton", "eager"),
        help="verify this one alone; triton: an error where it cannot run (default: both, as far as they run; of a pipeline: "
        "what runs in it)",
    )
    verify.add_argument("--json", metavar="FILE", help="write everything to this file")
    add_machine(verify, several=True)
