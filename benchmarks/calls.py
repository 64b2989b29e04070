"""Calls that are too short to be timed one by one."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ipa_kernels.benchmarking.timing import Timing


def many(call: Callable[[], object], calls: int) -> Callable[[], None]:
    """So many calls, to be timed together."""

    def run() -> None:
        for _ in range(calls):
            call()

    return run


def of_one(timing: Timing, calls: int) -> dict[str, Any]:
    """Seconds of one of so many calls, ready for JSON; how many samples there are stays."""
    return {part: value if part == "calls" else value / calls for part, value in asdict(timing).items()}
