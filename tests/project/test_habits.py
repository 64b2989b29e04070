"""What is written down in two places is the same in both."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from ..helpers.fresh_interpreter import run as run_alone

HOUSE = Path(__file__).parents[2]
CI = (HOUSE / ".github" / "workflows" / "ci.yml").read_text()


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("matrix", HOUSE / ".ci" / "matrix.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matrix", module)
        spec.loader.exec_module(module)
    return module


def test_the_floors_are_the_oldest_versions_that_are_run(matrix: ModuleType) -> None:
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    floors = dict(line.partition(";")[0].split(">=") for line in required if ">=" in line)
    oldest = matrix.CORNERS["oldest"].versions
    assert {package: oldest[package].removesuffix(".0") for package in floors} == floors


def test_who_has_no_diffusers_is_told_the_oldest_that_is_run() -> None:
    extras = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (floor,) = (line.removeprefix("diffusers>=") for line in extras["diffusers"] if line.startswith("diffusers>="))
    printed = run_alone(
        """
        import ipa_kernels
        try:
            ipa_kernels.enable(torch.nn.Linear(2, 2))
        except ImportError as error:
            print(error)
        """,
        "diffusers",
    )
    assert f"older than {floor}, the oldest that was run: pip install" in printed


def test_the_constraints_of_a_corner(matrix: ModuleType) -> None:
    corner = matrix.Corner({"torch": "2.11.0"})
    assert matrix.constraints(corner, "# torch==1.0\ntorch==2.13.0\nnumpy==2.4.6\n") == "torch==2.11.0\nnumpy==2.4.6\n"
    with pytest.raises(KeyError):
        matrix.constraints(matrix.Corner({"torhc": "2.11.0"}), "torch==2.13.0\n")


def test_corners_name_tests_that_are_there(matrix: ModuleType) -> None:
    for corner in matrix.CORNERS.values():
        for name in corner.tests:
            file, _, test = name.partition("::")
            assert f"def {test}(" in (HOUSE / "tests" / file).read_text() if test else (HOUSE / "tests" / file).exists()


def test_ci_runs_every_corner_and_the_documentation_has_it(matrix: ModuleType) -> None:
    versions = (HOUSE / "docs" / "versions.md").read_text()
    for name, corner in matrix.CORNERS.items():
        assert re.search(rf"corner: \[.*\b{name}\b.*\]|matrix\.py {name}\b", CI)
        assert f"`{name}`" in versions
        assert all(version in versions for version in corner.versions.values())


def test_pre_commit_runs_the_lines_of_make_check() -> None:
    hooks = re.findall(r"entry: (\S+) ?(.*)", (HOUSE / ".pre-commit-config.yaml").read_text())
    recipe = (HOUSE / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    for tool, options in hooks:
        assert f"$(BIN)/{Path(tool).name} {options}".strip() in recipe


def test_every_decision_is_in_the_index() -> None:
    folder = HOUSE / "docs" / "decisions"
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| [")]
    records = sorted(folder.glob("0*.md"))
    assert len(lines) == len(records)
    for line, record in zip(lines, records, strict=True):
        number, _, title = record.read_text().splitlines()[0].removeprefix("# ").partition(". ")
        assert line.startswith(f"| [{number}]({record.name}) | {title} |")


def test_actions_are_pinned_to_one_commit_each() -> None:
    uses = {line for file in (HOUSE / ".github").rglob("*.yml") for line in re.findall(r"uses: (.*)", file.read_text())}
    assert uses
    for line in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)
    assert len({line.partition("@")[0] for line in uses}) == len(uses)
