"""`ipa-kernels doctor`: what is here, what runs in the kernel on it and what not, and what to do about it.

Runs with torch alone, and where torch, triton, diffusers or a driver are broken.
"""

import contextlib
import dataclasses
import json
import sys
from dataclasses import dataclass

from .arguments import Commands, add_command


@dataclass(frozen=True)
class DoctorOptions:
    """The command line of `ipa-kernels doctor`."""

    json: bool
    messages: bool


def add(commands: Commands) -> None:
    """Add it to the subparsers of the command line."""
    doctor = add_command(
        commands,
        "doctor",
        DoctorOptions,
        run,
        help="say what is installed, what runs in the kernel here, and what to do",
        description="Say what is installed and which GPUs there are, what runs in the kernel on each, what does not and why, "
        "and what to do about it. Made for bug reports: no names of users or machines, no paths, no secrets. Needs torch "
        "alone, and says so where that is broken.",
        epilog="Exit status: 0 where there is nothing to do (no GPU, or one that the kernel does not support, is fine: eager "
        "attention runs there), 1 where something is in the way that can be changed, 2 for a wrong option.",
    )
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    doctor.add_argument(
        "--messages",
        action="store_true",
        help="write to stderr, too, what libraries said in full. For your own eyes: it may name users, paths and secrets",
    )


def run(options: DoctorOptions) -> int:
    """Print the diagnosis; 1 where there is something to do, else 0."""
    from .doctor_probes import examine
    from .doctor_text import text

    with contextlib.redirect_stdout(sys.stderr):  # what is imported may print
        found = examine()
    print(json.dumps(dataclasses.asdict(found), indent=1) if options.json else text(found))
    if options.messages:
        sys.stderr.writelines(found.messages)
    return 1 if found.problems else 0
