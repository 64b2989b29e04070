"""The command line, `ipa-kernels COMMAND`. What a command needs is imported when it runs, so that --help is instant."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from .. import __version__
from . import bench, demo, doctor, generate, verify
from .arguments import USER_ERROR, Parser
from .errors import UserError, why

INTERRUPTED, CLOSED = 130, 141
"""Exit statuses of a shell for what SIGINT and SIGPIPE end."""

_COMMANDS = (demo.add, generate.add, doctor.add, verify.add, bench.add)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: success. 1: a check that failed, of commands that check. 2: a mistake of the user's, which is one line on stderr. 130:
    interrupted. 141: nobody reads the output any more.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a file name that the terminal cannot show is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    values = vars(_parser().parse_args(argv))
    name: str = values.pop("command")
    run: Callable[[dict[str, Any]], int] = values.pop("run")
    try:
        status = run(values)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(name, str(error))
    except KeyboardInterrupt:
        print(f"ipa-kernels {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read the output, as `head` does, has enough; Python would complain once more when it ends
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ENOSPC):
            raise
        return _fail(name, why(error))


def _fail(command: str, message: str) -> int:
    print(f"ipa-kernels {command}: {message}", file=sys.stderr)
    return USER_ERROR


def _parser() -> Parser:
    parser = Parser(prog="ipa-kernels", description="IP-Adapters (image prompts) in diffusers, one kernel per attention layer.")
    parser.add_argument("--version", action="version", version=f"ipa-kernels {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    return parser
