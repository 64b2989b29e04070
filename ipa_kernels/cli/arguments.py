"""What the commands' parsers share: options that mean the same everywhere, and their defaults. argparse only."""

import argparse
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias, TypeVar

USER_ERROR = 2
"""The exit status of a user's mistake."""

PROMPT = "a lighthouse by the sea at sunset"
SCALE = 0.8
IMAGE_ENCODER = "image_encoder"
WEIGHT_HELP = (
    "the weight file inside --ip-adapter, such as models/ip-adapter-plus_sd15.safetensors (default: the only one in the "
    "folder, else the base adapter for the model, where h94/IP-Adapter has it)"
)


Options = TypeVar("Options")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: argparse alone prints the whole usage before it. Knows -1e3 for a number."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # argparse's own has no exponents, and takes such a number for an option
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message} (--help lists the options)\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""Where a command adds its parser."""

Group: TypeAlias = argparse._ArgumentGroup


def add_command(
    commands: Commands,
    name: str,
    options: Callable[..., Options],
    run: Callable[[Options], int],
    *,
    help: str,
    description: str,
    epilog: str | None = None,
) -> Parser:
    """The parser of a command. `run` is called with `options` made of what was parsed, and returns the exit status."""
    command = commands.add_parser(name, help=help, description=description, epilog=epilog)
    command.set_defaults(command=name, run=lambda values: run(options(**values)))
    return command


def add_weights(command: Parser) -> None:
    """--model, --ip-adapter and what belongs to them, for one adapter; `loading` reads them."""
    weights = add_model(command)
    weights.add_argument("--ip-adapter", metavar="PATH", help="its IP-Adapter: a weight file, a folder or a hub id")
    weights.add_argument("--ip-adapter-weight", metavar="FILE", help=WEIGHT_HELP)


def add_model(command: Parser) -> Group:
    """--model and --image-encoder; returns their group."""
    weights = command.add_argument_group("real weights")
    weights.add_argument("--model", metavar="PATH", help="a text-to-image pipeline with a UNet: a folder or a hub id")
    weights.add_argument(
        "--image-encoder",
        metavar="FOLDER",
        default=IMAGE_ENCODER,
        help="the CLIP image encoder: a folder beside the weight file, or with a slash a folder inside --ip-adapter, such as "
        f"models/image_encoder; only read where the pipeline has none (default: {IMAGE_ENCODER})",
    )
    return weights


def add_machine(command: Parser, *, several: bool = False) -> Group:
    """--device and --dtype, of which there may be several; `device` checks them. Returns their group."""
    machine = command.add_argument_group("the machine")
    machine.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    machine.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        nargs="+" if several else None,
        help=f"default: float32 on the cpu, else float16{' (of named cases, all that the kernel runs in)' * several}",
    )
    return machine


def whole_number(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` up."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"needs a whole number from {least} up, got {text!r}")
        return int(text)

    return read


steps = whole_number(2)
"""At least two: the time of a step is measured from the end of the one before."""


def seed(text: str) -> int:
    """What torch's generators take on every device, and the next few numbers as well."""
    if not text.isdecimal() or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"needs a whole number from 0 to 2**62 - 1, got {text!r}")
    return int(text)


def multiple_of_8(text: str) -> int:
    """The side of a picture: diffusers' pipelines refuse others."""
    if not text.isdecimal() or int(text) < 8 or int(text) % 8:
        raise argparse.ArgumentTypeError(f"needs a multiple of 8 in pixels, got {text!r}")
    return int(text)


def finite(text: str) -> float:
    """A number that leaves a picture a picture."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"needs a finite number, got {text!r}")
    return number
