"""The parser of `ipa-kernels doctor`."""

from typing import Any

from .arguments import add_command


def add(commands: Any) -> None:
    """Add it to the subparsers of the command line."""
    doctor = add_command(
        commands,
        "doctor",
        extra="diffusers",
        help="say what is installed, what runs in the kernel here, and what to do",
        description="Say what is installed and which GPUs there are, what runs in the kernel on each, what does not and why, "
        "and what to do about it. Made for bug reports: no names of users or machines, no paths, no secrets. Needs torch "
        "alone, and says so where that is broken.",
        epilog="Exit status: 0 where there is nothing to do (no GPU, or one that the kernel does not support, is fine: eager "
        "attention runs there), 1 where something is in the way that can be changed, 2 for a wrong option.",
    )
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
