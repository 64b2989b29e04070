"""What is distributed: built, installed into an empty environment, and used there by a stranger and by his type checker."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NAME = f"ipa_kernels-{VERSION}"
SOURCES = {str(path.relative_to(ROOT)) for path in (ROOT / "ipa_kernels").rglob("*.py")} | {"ipa_kernels/py.typed"}
INSTALLED = Path(sysconfig.get_path("purelib"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of this tree."""
    return build(ROOT, tmp_path_factory.mktemp("built"), "wheel", "sdist")


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with our wheel, torch and what torch needs, and nothing else; in a stranger's repository."""
    folder = tmp_path_factory.mktemp("stranger")
    run("git", "init", "--quiet", folder)
    run("git", "-C", folder, "-c", "user.name=a", "-c", "user.email=b", "commit", "--quiet", "--allow-empty", "-m", "theirs")
    programs = empty_environment(folder / ".venv")
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", built / f"{NAME}-py3-none-any.whl")
    linked = folder / "torch-alone"
    link(linked, {part for package in needs("torch") - {"triton"} for part in parts(package)})
    run(programs / "python", "-c", f"import site; open(site.getsitepackages()[0] + '/torch.pth', 'w').write({str(linked)!r})")
    return programs


def build(source: Path, out: Path, *kinds: str) -> Path:
    run(
        sys.executable, "-m", "hatchling", "build", *(word for kind in kinds for word in ("-t", kind)), "-d", out, folder=source
    )
    return out


def empty_environment(folder: Path) -> Path:
    venv.create(folder, symlinks=True)
    return folder / "bin"


def needs(package: str) -> set[str]:
    """A package and all that it requires here, by canonical names."""
    found: set[str] = set()
    waiting = [package]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            wanted = (Requirement(text) for text in distribution(name).requires or [])
            waiting += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def parts(package: str) -> set[str]:
    """What a package has in site-packages."""
    return {file.parts[0] for file in distribution(package).files or [] if file.parts[0] not in ("..", "__pycache__")}


def link(folder: Path, names: set[str]) -> None:
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(INSTALLED / name)


def run(*command: object, folder: Path | None = None, status: int = 0, **variables: str) -> str:
    """What a program prints, on both streams, without the Python environment of the tests."""
    unset = ("PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | variables
    if sys.executable in command:
        environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == status, done.stdout
    return done.stdout


def members(archive: Path) -> dict[str, bytes]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(archive) as sdist:
        return {member.name: sdist.extractfile(member).read() for member in sdist if member.isfile()}  # type: ignore[union-attr]


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    (path,) = built.glob("*.whl")
    assert path.name == f"{NAME}-py3-none-any.whl"
    wheel = members(path)
    about = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}
    assert set(wheel) == SOURCES | {f"{NAME}.dist-info/{name}" for name in about}
    assert all(wheel[name] == (ROOT / name).read_bytes() for name in SOURCES)
    assert wheel[f"{NAME}.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    metadata = message_from_bytes(wheel[f"{NAME}.dist-info/METADATA"])
    wanted = metadata.get_all("Requires-Dist") or []
    assert [Requirement(text).name for text in wanted if "extra ==" not in text] == ["torch"]
    extras = {
        extra: {Requirement(text).name for text in wanted if f"'{extra}'" in text} for extra in ("diffusers", "triton", "cli")
    }
    assert extras["diffusers"] == {"diffusers", "transformers", "pillow"}
    assert extras["triton"] == {"triton"}
    assert extras["cli"] == extras["diffusers"] | {"matplotlib"}
    outside_linux = {"platform_system": "Windows"}
    for text in wanted:
        triton = Requirement(text)
        if triton.name == "triton" and triton.marker:
            assert not any(triton.marker.evaluate({**outside_linux, "extra": extra}) for extra in ("triton", "dev")), text


def test_the_sdist_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    sdist = members(path)
    beside = {".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert set(sdist) == {f"{NAME}/{name}" for name in SOURCES | beside}
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    build(tmp_path / NAME, tmp_path / "again", "wheel")
    (again,) = (tmp_path / "again").glob("*.whl")
    assert members(again) == members(next(built.glob("*.whl")))


USE = """
import importlib.util, sys, warnings
import torch  # warns that numpy is missing

warnings.simplefilter("error")
import ipa_kernels

assert ipa_kernels.__file__.startswith(sys.prefix), ipa_kernels.__file__
for absent in ("diffusers", "triton", "transformers", "PIL", "matplotlib", "numpy"):
    assert importlib.util.find_spec(absent) is None, absent

from ipa_kernels.testing.layer_cases import CASES
inputs = CASES["sdxl_1024_64x64_three_masked"].small().inputs(torch.float32)
positional, named = inputs.arguments()
out = ipa_kernels.decoupled_attention(*positional, **named)
positional, named = inputs.to(torch.float64).arguments()
truth = ipa_kernels.reference.decoupled_attention(*positional, **named)
torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
assert not torch.allclose(truth, ipa_kernels.reference.decoupled_attention(*positional, image_scales=1.0), atol=1e-2)

try:
    ipa_kernels.enable(torch.nn.Linear(1, 1))
except ImportError as error:
    print(error)

from ipa_kernels.benchmarking.machine import machine_facts
print(machine_facts(torch.device("cpu"))["commit"])
"""


def test_with_torch_alone(environment: Path, tmp_path: Path) -> None:
    switch, commit = run(environment / "python", "-W", "ignore", "-c", USE, folder=tmp_path).splitlines()
    assert "pip install 'ipa-kernels[diffusers]'" in switch
    assert commit == "None", "the commit of the repository around the environment is not ours"
    assert run(environment / "ipa-kernels", "--version", folder=tmp_path) == f"ipa-kernels {VERSION}\n"
    assert "doctor" in run(environment / "ipa-kernels", "--help", folder=tmp_path)
    doctor = run(environment / "ipa-kernels", "doctor", folder=tmp_path, CUDA_VISIBLE_DEVICES="-1", HIP_VISIBLE_DEVICES="-1")
    assert doctor.startswith(f"ipa-kernels {VERSION}\n")
    assert f"  torch         {version('torch')} (" in doctor
    assert "diffusers is not installed: decoupled_attention runs, enable(pipe) needs it" in doctor
    demo = run(environment / "ipa-kernels", "demo", folder=tmp_path, status=2)
    expected = r"ipa-kernels demo: No module named '(PIL|diffusers)'; what it needs: pip install 'ipa-kernels\[diffusers\]'\n"
    assert re.fullmatch(expected, demo)
    assert not list(tmp_path.iterdir())


def test_the_demo_with_everything_but_the_source_tree(environment: Path, tmp_path: Path) -> None:
    everything = {path.name for path in INSTALLED.iterdir() if path.suffix != ".pth" and "ipa_kernels" not in path.name}
    link(tmp_path / "everything", everything)
    (tmp_path / "empty").mkdir()
    command = (environment / "ipa-kernels", "demo", "--steps", "2", "--device", "cpu")
    out = run(*command, folder=tmp_path / "empty", PYTHONPATH=str(tmp_path / "everything"), OMP_NUM_THREADS="1")
    assert "\nmax difference: 0\n" in out
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["demo.png"]


def test_a_strict_type_checker_sees_every_public_name(
    environment: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Of the installed package, with a configuration of the user's; `typed_user` has mistakes in it that must be found."""
    (tmp_path / "mypy.ini").write_text("[mypy]\n")
    (tmp_path / "user.py").write_text((ROOT / "tests" / "project" / "typed_user.py").read_text())
    assert request.config.cache is not None
    options = ("--strict", "--config-file", "mypy.ini", "--cache-dir", request.config.cache.mkdir("mypy"))
    found = run(
        sys.executable, "-m", "mypy", *options, "--python-executable", environment / "python", "user.py", folder=tmp_path
    )
    assert found == "Success: no issues found in 1 source file\n"


def test_a_source_tree_that_is_not_installed_has_a_version(tmp_path: Path) -> None:
    """-S: without site-packages there is no metadata, as on a machine where the tree was copied to."""
    use = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ipa_kernels.cli import main; raise SystemExit(main())"
    command = (Path(sys.base_prefix) / "bin" / "python3", "-S", "-c", use)
    assert run(*command, "--version", folder=tmp_path) == "ipa-kernels 0+uninstalled\n"
    doctor = run(*command, "doctor", folder=tmp_path, status=1)
    assert "ipa-kernels runs from a source tree that is not installed: versions are not checked" in doctor
    assert "torch cannot be imported: ModuleNotFoundError: torch\n" in doctor


@pytest.mark.slow
def test_pip_installs_it_with_torch_into_a_really_empty_environment(built: Path, tmp_path: Path) -> None:
    """Downloads torch from the package index that pip is set up for."""
    programs = empty_environment(tmp_path / ".venv")
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, "--constraint", ROOT / "constraints.txt", built / f"{NAME}-py3-none-any.whl")
    use = (
        "import torch, ipa_kernels; q = torch.ones(1, 1, 3, 8); print(ipa_kernels.decoupled_attention(q, q, q, [q], [q]).sum())"
    )
    assert "tensor(48.)" in run(programs / "python", "-c", use, folder=tmp_path)
    assert "torch" in run(programs / "ipa-kernels", "doctor", folder=tmp_path, CUDA_VISIBLE_DEVICES="-1")
