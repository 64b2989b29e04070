"""`ipa-kernels doctor`: what is here, what runs in the kernel on it and what not, and what to do about it.

Runs with torch alone, and where torch, triton, diffusers or a driver are broken.
"""

import contextlib
import dataclasses
import json
import sys
from dataclasses import dataclass

from ..cli.doctor_probes import examine
from ..cli.doctor_text import text


@dataclass(frozen=True)
class Options:
    """The command line of `ipa-kernels doctor`."""

    json: bool


def run(options: Options) -> int:
    """Print the diagnosis; 1 where there is something to do, else 0."""
    with contextlib.redirect_stdout(sys.stderr):  # what is imported may print
        found = examine()
    print(json.dumps(dataclasses.asdict(found), indent=1) if options.json else text(found))
    return 1 if found.problems else 0
