"""Break what is kept on purpose, one mutation at a time, in a copy of this repository: a test turns red for each.

`python -m tests.mutations.run [NAME ...]`, all by default; exit status 1 if a test stays green.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .table import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
SECONDS = 600
"""After which a test hangs: it is neither red nor green."""
# of pytest
PASSED, FAILED = 0, 1


def copied(folder: Path) -> None:
    """What is in git, or will be, into a folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def run(folder: Path, tests: Iterable[str]) -> int | None:
    """The exit status of pytest in a copy; None where it hangs."""
    # bytecode that is older than a mutation would run in its place
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-q", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode not in (PASSED, FAILED):
        print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
    return done.returncode


def outcome(folder: Path, mutation: Mutation) -> str:
    """ "RED", "STILL GREEN", or what else came of a mutation's test."""
    path = folder / mutation.file
    source = path.read_text()
    path.write_text(source.replace(mutation.old, mutation.new))
    try:
        status = run(folder, [mutation.test])
    finally:
        path.write_text(source)
    words = {FAILED: "RED", PASSED: "STILL GREEN", None: f"HANGS for {SECONDS} s"}
    return words.get(status, f"NO TEST, pytest ended with {status}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations, or parts of such")
    names = parser.parse_args().names
    chosen = [mutation for mutation in MUTATIONS if not names or any(name in mutation.name for name in names)]
    if not chosen:
        parser.error(f"no mutation has one of {names} in its name")
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copied(folder)
        tests = list(dict.fromkeys(mutation.test for mutation in chosen))
        if run(folder, tests) != PASSED:
            print("NOT GREEN: the tests are red without a mutation, or are not there; nothing is proven")
            return 1
        print(f"green: all {len(tests)} tests without a mutation", flush=True)
        for mutation in chosen:
            result = outcome(folder, mutation)
            missed += result != "RED"
            print(f"{result}: {mutation.name} ({mutation.test})", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} turn a test red")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
