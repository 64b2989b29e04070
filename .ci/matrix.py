"""Run the tests with other versions of what this package stands on: one corner of the matrix, in an environment of its own.

    python .ci/matrix.py CORNER [--all] [TEST ...]      make matrix CORNER=oldest [TESTS=--all] [PYTHON=python3.12]

Without TEST, those that touch every library at every seam run (minutes on one core); --all runs what `make test` runs. The
environment is made anew, in .venv-CORNER, from constraints.txt with the versions below in place of its own. docs/versions.md
says when and where each corner was run last; the workflow `ci` runs them all.
"""

import argparse
import os
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

HOUSE = Path(__file__).parents[1]
SEAMS = (
    "ops/test_validation.py",
    "cli/test_demo.py",
    "ops/test_eager.py",
    "project/test_imports.py",
    "integration/test_api.py",
    "kernels/test_forward.py::test_named_cases",
    "kernels/test_backward.py::test_only_what_is_asked_for_is_computed",
    "kernels/test_backward.py::test_checkpointing",
    "kernels/test_launch.py",
    "integration/test_pipelines.py",
    "ops/test_torch_library.py",
    "integration/test_upstream.py",
)
"""Below tests/: what asks torch, triton and diffusers for something that another version may answer otherwise."""
WITHOUT_TRITON = ("cli/test_demo.py", "ops/test_eager.py", "project/test_imports.py", "integration/test_upstream.py")
TOOLS = ("accelerate", "hypothesis", "peft", "pytest", "pytest-xdist", "sentencepiece")


@dataclass(frozen=True)
class Corner:
    """versions: instead of those of constraints.txt. extras: what is installed. tests: what runs without --all."""

    versions: dict[str, str] = field(default_factory=dict)
    extras: str = "dev"
    tests: tuple[str, ...] = SEAMS


CORNERS = {
    # the floors of pyproject.toml; the interpreter of triton 3.6 does not run on numpy 2.4
    "oldest": Corner({"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.3.5", "diffusers": "0.35.2", "transformers": "4.57.6"}),
    # each torch requires one triton: this pair is the newest of both
    "newest": Corner({"torch": "2.15.0", "triton": "3.9.0"}),
    # as on Windows and macOS, where there is no triton
    "eager": Corner(extras="diffusers", tests=WITHOUT_TRITON),
}


def constraints(corner: Corner, text: str) -> str:
    """The lines of constraints.txt, with the corner's versions in them. Raises KeyError for a package that they do not have."""
    pins = dict(line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))
    for package, version in corner.versions.items():
        pins[package], _ = version, pins[package]
    return "".join(f"{package}=={version}\n" for package, version in pins.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corner", choices=CORNERS)
    parser.add_argument("--all", action="store_true", help="every test that `make test` runs")
    parser.add_argument("tests", nargs="*", metavar="TEST", help="instead of the corner's: what pytest takes")
    options = parser.parse_args()
    corner = CORNERS[options.corner]
    os.chdir(HOUSE)

    folder = Path(f".venv-{options.corner}")
    venv.create(folder, clear=True, with_pip=True)
    python = str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))
    pins = folder / "constraints.txt"
    pins.write_text(constraints(corner, Path("constraints.txt").read_text()))
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--constraint", str(pins), "-e", f".[{corner.extras}]", *TOOLS], check=True)
    subprocess.run([python, "--version"], check=True)
    subprocess.run([*pip, "list", "--exclude-editable", "--format", "freeze"], check=True)

    quick = [f"tests/{name}" for name in corner.tests]
    tests = options.tests or (["--numprocesses=2"] if options.all else quick)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}
    return subprocess.run([python, "-m", "pytest", "-m", "not slow", *tests], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
