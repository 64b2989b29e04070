"""The command line: `ipa-kernels demo`. What a command needs is imported when it runs, so that --help is instant."""

import argparse
import sys
from typing import Any, NoReturn

from . import __version__

_USER_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 is success, 2 a mistake of the user's, which is one line on stderr."""
    options = vars(_parser().parse_args(argv))
    command = options.pop("command")
    return int(command(**options))


def _demo(**options: Any) -> int:
    try:
        from . import demo
        from .loading import UserError
    except ModuleNotFoundError as error:
        return _fail(f"needs diffusers, transformers and pillow: pip install 'ipa-kernels[diffusers]' ({error})")
    try:
        demo.run(demo.Options(**options))
    except UserError as error:
        return _fail(str(error))
    return 0


def _fail(message: str) -> int:
    print(f"ipa-kernels demo: {message}", file=sys.stderr)
    return _USER_ERROR


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: argparse alone prints the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USER_ERROR, f"{self.prog}: {message} (--help lists the options)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ipa-kernels", description="Image prompts (IP-Adapters) in diffusers at no cost.")
    parser.add_argument("--version", action="version", version=f"ipa-kernels {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    return parser


def _add_demo(commands: Any) -> None:
    description = (
        "Run a diffusers pipeline with an IP-Adapter, stock and accelerated, with the same seed: print what ran where and why, "
        "the largest difference between the two pictures (of 255) and the time per step, and write them side by side. "
        "Without --model it is a small pipeline with random weights, built in code, that needs neither a GPU nor the hub."
    )
    demo = commands.add_parser("demo", help="run a pipeline stock and accelerated, and compare", description=description)
    demo.set_defaults(command=_demo)
    weights = demo.add_argument_group("real weights")
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
    picture = demo.add_argument_group("the picture")
    picture.add_argument("--image", metavar="FILE", help="the reference picture (default: one drawn in code)")
    picture.add_argument("--prompt", metavar="TEXT", default="a lighthouse by the sea at sunset", help="default: %(default)s")
    picture.add_argument(
        "--scale", metavar="X", type=float, default=0.8, help="strength of the IP-Adapter (default: %(default)s)"
    )
    picture.add_argument(
        "--steps", metavar="N", type=_steps, default=20, help="denoising steps, at least 2 (default: %(default)s)"
    )
    picture.add_argument("--seed", metavar="N", type=int, default=0, help="of both runs (default: %(default)s)")
    picture.add_argument("--output", metavar="FILE", default="demo.png", help="the PNG to write (default: %(default)s)")
    machine = demo.add_argument_group("the machine")
    machine.add_argument("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    machine.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="default: float32 on the cpu, else float16",
    )


def _steps(text: str) -> int:
    """At least two: the time of a step is measured from the end of the one before."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"needs a whole number from 2 up, got {text!r}")
    return int(text)
