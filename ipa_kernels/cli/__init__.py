"""The command line, `ipa-kernels COMMAND`. What a command needs is imported when it runs, so that --help is instant."""

import importlib
import sys

from .. import __version__
from ..commands.errors import UserError
from ..commands.imports import quiet_imports
from . import bench, demo, doctor, generate, verify
from .arguments import USER_ERROR, Parser

_COMMANDS = (demo, generate, doctor, verify, bench)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: success. 1: a check that failed, of commands that check. 2: a mistake of the user's, which is one line on stderr.
    """
    options = vars(_parser().parse_args(argv))
    name, extra = options.pop("command"), options.pop("extra")
    try:
        with quiet_imports():
            command = importlib.import_module(f"ipa_kernels.commands.{name}")
    except ModuleNotFoundError as error:
        return _fail(name, f"{error}; what it needs: pip install 'ipa-kernels[{extra}]'")
    try:
        return int(command.run(command.Options(**options)))
    except UserError as error:
        return _fail(name, str(error))


def _fail(command: str, message: str) -> int:
    print(f"ipa-kernels {command}: {message}", file=sys.stderr)
    return USER_ERROR


def _parser() -> Parser:
    parser = Parser(prog="ipa-kernels", description="Image prompts (IP-Adapters) in diffusers at no cost.")
    parser.add_argument("--version", action="version", version=f"ipa-kernels {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return parser
