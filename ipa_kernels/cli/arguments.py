"""What the commands' parsers share: options that mean the same everywhere. argparse only."""

import argparse
from typing import Any, NoReturn

USER_ERROR = 2


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: argparse alone prints the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message} (--help lists the options)\n")


def add_command(commands: Any, name: str, *, extra: str, help: str, description: str) -> Any:
    """The parser of the command whose work is `ipa_kernels.commands.NAME`; `extra` installs what it imports."""
    command = commands.add_parser(name, help=help, description=description)
    command.set_defaults(command=name, extra=extra)
    return command


def add_weights(command: Any) -> None:
    """--model, --ip-adapter and what belongs to them; `commands.loading` reads them."""
    weights = command.add_argument_group("real weights")
    weights.add_argument("--model", metavar="PATH", help="a text-to-image pipeline with a UNet: a folder or a hub id")
    weights.add_argument("--ip-adapter", metavar="PATH", help="its IP-Adapter: a weight file, a folder or a hub id")
    weights.add_argument(
        "--ip-adapter-weight",
        metavar="FILE",
        help="the weight file inside --ip-adapter, such as models/ip-adapter-plus_sd15.safetensors (default: the only one in "
        "the folder, else the base adapter for the model, where h94/IP-Adapter has it)",
    )
    weights.add_argument(
        "--image-encoder",
        metavar="FOLDER",
        default="image_encoder",
        help="the CLIP image encoder: a folder beside the weight file, or with a slash a folder inside --ip-adapter, such as "
        "models/image_encoder; only read where the pipeline has none (default: %(default)s)",
    )


def add_machine(command: Any, *, several: bool = False) -> None:
    """--device and --dtype, of which there may be several; `commands.machine` checks them."""
    machine = command.add_argument_group("the machine")
    machine.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    machine.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        nargs="+" if several else None,
        help=f"default: float32 on the cpu, else float16{' (of named cases, all that the kernel runs in)' * several}",
    )


def steps(text: str) -> int:
    """At least two: the time of a step is measured from the end of the one before."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"needs a whole number from 2 up, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """What torch's generators take on every device, and the next two numbers as well."""
    if not text.isdecimal() or int(text) >= 2**62:
        raise argparse.ArgumentTypeError(f"needs a whole number from 0 to 2**62 - 1, got {text!r}")
    return int(text)
