"""`ipa-kernels doctor`: what it says of this machine, of other GPUs and of what is broken; and what it never says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ipa_kernels import cli
from ipa_kernels.cli import doctor_devices as devices
from ipa_kernels.cli import doctor_probes as probes
from ipa_kernels.cli.doctor_coverage import DTYPES, HEAD_DIMS, coverage, try_kernel
from ipa_kernels.cli.doctor_diagnosis import PHRASES, Diagnosis, told
from ipa_kernels.integration import api
from ipa_kernels.kernels import launch as kernel
from ipa_kernels.kernels import launch_table, launch_table_backward
from ipa_kernels.ops import dispatch
from ipa_kernels.reference import Comparison

Doctor = Callable[[], tuple[int, dict[str, Any]]]
GPU = Callable[..., torch.device]

COMMAND = "from ipa_kernels.cli import main; raise SystemExit(main())"
GOOD = Comparison(1e-4, 1e-3, 2e-4, 2e-3, 2e-4, 3e-3)
BAD = Comparison(1e-3, 1e-2, 2e-4, 2e-3, 2e-4, 3e-3)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(probes.VARIABLES) - {"TRITON_INTERPRET"}:  # the interpreter reads that again when it runs
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "output_of", lambda *command: None)


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Its exit status, and what it found; the text has to hold every problem and note too."""

    def run() -> tuple[int, dict[str, Any]]:
        statuses, outputs = [], []
        for options in ([], ["--json"]):
            capsys.readouterr()
            statuses.append(cli.main(["doctor", *options]))
            outputs.append(capsys.readouterr().out)
        assert statuses[0] == statuses[1]
        found: dict[str, Any] = json.loads(outputs[1])
        for line in (*found["notes"], *(line for problem in found["problems"] for line in problem.values())):
            assert line in outputs[0].replace("-> ", "")
            assert "\n" not in line
        return statuses[0], found

    return run


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> GPU:
    """As if there were so many GPUs of an architecture, on which the kernel runs well."""

    def install(arch: str, count: int = 1) -> torch.device:
        major, minor = (int(arch[3:-1]), int(arch[-1])) if arch.startswith("sm_") else (9, 4)
        properties = SimpleNamespace(
            name="Some GPU", major=major, minor=minor, gcnArchName=f"{arch}:sramecc+", multi_processor_count=4,
            L2_cache_size=1, total_memory=80 * 2**30,
        )  # fmt: skip
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.version, "hip" if arch.startswith("gfx") else "cuda", "13.0")
        monkeypatch.setattr(torch.version, "cuda" if arch.startswith("gfx") else "hip", None)
        architecture = dispatch.architecture.__wrapped__  # not cached
        for module in (dispatch, devices):
            monkeypatch.setattr(module, "architecture", architecture)
        monkeypatch.setattr(dispatch, "allows_tf32", lambda device: False)
        monkeypatch.setattr(kernel, "INTERPRETED", False)
        monkeypatch.setattr(devices, "try_kernel", lambda device: GOOD)
        return torch.device("cuda", 0)

    return install


def whats(found: dict[str, Any]) -> list[str]:
    return [problem["what"] for problem in found["problems"]]


def test_without_a_gpu_there_is_nothing_to_do(no_gpu: None, doctor: Doctor) -> None:
    status, found = doctor()
    assert status == 0
    assert found["problems"] == []
    assert found["installed"]["torch"].startswith(torch.__version__)
    assert found["installed"]["diffusers"]
    assert len(found["ipa_kernels"]["source"]) == 16
    (cpu,) = found["devices"]
    assert cpu["name"] == "cpu"
    assert {group["impl"] for group in cpu["inference"] + cpu["training"]} == {"eager"}
    assert cpu["launched"] is None


@pytest.mark.parametrize("gradient", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120", "gfx942", "gfx1201"])
def test_what_a_gpu_runs_is_what_the_launch_tables_have(arch: str, gradient: bool, gpu: GPU) -> None:
    """Every dtype and head dim is in one group; the longest image branch is the last that both tables take."""
    device = gpu(arch)

    def refused(head_dim: int, image_keys: int) -> bool:
        backward = launch_table_backward.refusal(arch, 16, head_dim, image_keys) if gradient else None
        return bool(launch_table.refusal(arch, 16, head_dim, image_keys) or backward)

    seen = []
    for group in coverage(device, gradient=gradient):
        assert bool(group.reasons) == (group.impl == "eager" or group.longest_image is not None)
        seen += [(dtype, head_dim) for dtype in group.dtypes for head_dim in group.head_dims]
        if group.dtypes == ("float32",):
            assert group.impl == "eager"
            continue
        assert group.dtypes == ("float16", "bfloat16")
        for head_dim in group.head_dims:
            assert refused(head_dim, 0) == (group.impl == "eager")
            if group.impl == "triton":
                longest = group.longest_image
                assert not refused(head_dim, launch_table.ANY if longest is None else longest)
                assert longest is None or refused(head_dim, longest + 1)
    assert sorted(seen) == sorted((str(dtype).removeprefix("torch."), d) for dtype in DTYPES for d in HEAD_DIMS)


def test_two_gpus(gpu: GPU, doctor: Doctor, capsys: pytest.CaptureFixture[str]) -> None:
    gpu("sm_120", count=2)
    status, found = doctor()
    assert status == 0, whats(found)
    assert [device["name"] for device in found["devices"]] == ["cuda:0", "cuda:1"]
    facts = found["devices"][0]["facts"]
    assert (facts["gpu"], facts["architecture"], facts["memory_bytes"]) == ("Some GPU", "sm_120", 80 * 2**30)
    assert cli.main(["doctor"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "cuda:0, cuda:1: Some GPU, sm_120, 80.0 GiB" in lines
    spills = "image branches of up to 32 tokens; longer ones eager: above 32 the kernel spills registers on sm_120"
    assert f"kernel  float16, bfloat16, head dims 88 to 144: {spills}" in lines
    assert "kernel  float16, bfloat16, head dims 40, 64: image branches of any length" in lines
    assert f"one launch: {GOOD}" in lines
    assert "nothing to do" in lines


def test_tf32_lifts_what_keeps_float32_from_the_kernel(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpu("sm_90")
    before = [group for group in coverage(device, gradient=False) if "float32" in group.dtypes]
    assert all("fp32_precision = 'tf32'" in group.reasons[-1] for group in before)
    monkeypatch.setattr(dispatch, "allows_tf32", lambda device: True)
    after = [group for group in coverage(device, gradient=False) if "float32" in group.dtypes]
    assert after[0].impl == "triton"
    assert max(after[0].head_dims) == 160


def test_a_gpu_that_is_too_old_is_no_problem_of_the_user(gpu: GPU, doctor: Doctor) -> None:
    gpu("sm_75")
    status, found = doctor()
    assert status == 0
    (device,) = found["devices"]
    assert {group["impl"] for group in device["inference"]} == {"eager"}
    assert "sm_75: not in the launch table" in device["inference"][0]["reasons"][0]
    assert device["launched"] is None


def test_the_interpreter_is_in_the_way_of_a_gpu(gpu: GPU, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu("sm_90")
    monkeypatch.setattr(kernel, "INTERPRETED", True)
    status, found = doctor()
    assert status == 1
    assert found["problems"][0]["do"] == "unset TRITON_INTERPRET"
    assert {group["impl"] for group in found["devices"][0]["inference"]} == {"eager"}


@pytest.mark.parametrize(
    ("arch", "system", "status", "do"),
    [
        ("sm_90", "linux", 1, "pip install 'ipa-kernels[triton]'"),
        ("gfx942", "linux", 1, "reinstall torch for ROCm"),
        ("sm_90", "win32", 0, None),
    ],
)
def test_a_gpu_without_triton(
    arch: str, system: str, status: int, do: str | None, gpu: GPU, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(arch)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ipa_kernels.kernels.launch")
    monkeypatch.setattr(sys, "platform", system)
    found_status, found = doctor()
    assert found_status == status
    assert [problem["do"].startswith(do) for problem in found["problems"]] == [True] * status
    # a note where nothing can be done, or else a problem
    assert ("triton is not installed: no kernel, eager attention everywhere" in found["notes"]) == (status == 0)


def test_a_launch_that_fails_or_is_wrong(gpu: GPU, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu("sm_90")

    def fail(device: torch.device) -> Comparison:
        raise RuntimeError("Failed to find C compiler. Please specify via CC")

    monkeypatch.setattr(devices, "try_kernel", fail)
    status, found = doctor()
    assert status == 1
    assert whats(found) == ["cuda:0: the kernel cannot be launched: RuntimeError: Failed to find C compiler"]
    assert "gcc" in found["problems"][0]["do"]
    monkeypatch.setattr(devices, "try_kernel", lambda device: BAD)
    status, found = doctor()
    assert status == 1
    assert "further from float64 than it may be" in whats(found)[0]
    assert "IPA_KERNELS_DISABLE=1" in found["problems"][0]["do"]


def test_the_launch_that_it_tries(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures the kernel, not what it is compared with."""
    assert try_kernel(device).within
    prepare = kernel.Launch.__call__
    monkeypatch.setattr(kernel.Launch, "__call__", lambda self, query: prepare(self, query) * 1.01)
    assert not try_kernel(device).within


def test_a_gpu_that_cannot_be_asked(gpu: GPU, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu("sm_90")

    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA unknown error\nthis may be due to /home/alice/x.so")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    status, found = doctor()
    assert status == 1
    (what,) = whats(found)
    assert what == "cuda:0 cannot be examined: RuntimeError: CUDA unknown error"


def test_a_driver_that_is_too_old(gpu: GPU, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> bool:
        import warnings

        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).", stacklevel=1)
        return False

    gpu("sm_90")
    monkeypatch.setattr(torch.cuda, "is_available", warn)
    status, found = doctor()
    assert status == 1
    assert "driver on your system is too old" in whats(found)[0]
    assert found["problems"][0]["do"].startswith("update the GPU's driver")
    assert found["devices"][0]["name"] == "cpu"


@pytest.mark.parametrize(
    ("cuda", "hidden", "status", "line"),
    [
        (None, None, 1, "torch was built without CUDA and cannot use the GPU that nvidia-smi lists (Some GPU, 550.54)"),
        ("13.0", None, 1, "torch cannot use the GPU that nvidia-smi lists (Some GPU, 550.54)"),
        ("13.0", "-1", 0, "CUDA_VISIBLE_DEVICES hides the GPU that nvidia-smi lists (Some GPU, 550.54)"),
        ("13.0", "", 0, "CUDA_VISIBLE_DEVICES hides the GPU that nvidia-smi lists (Some GPU, 550.54)"),
    ],
)
def test_a_gpu_that_torch_does_not_see(
    cuda: str | None, hidden: str | None, status: int, line: str, no_gpu: None, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "output_of", lambda *command: "Some GPU, 550.54\nSome GPU, 550.54")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found_status, found = doctor()
    assert found_status == status
    assert line in (whats(found) if status else found["notes"])


def test_versions_below_the_floors(no_gpu: None, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    floors = [
        "torch>=2.13",
        "diffusers<9,>=0.42.1; extra == 'diffusers'",
        "diffusers>=0.42.1; extra == 'dev'",
        "peft>=0.21",
        "numpy>=2.4.0",
    ]
    versions = {"torch": "2.13.0+cpu", "diffusers": "0.9.12", "peft": "not a version", "numpy": "2.4"}
    monkeypatch.setattr(probes, "requires", lambda name: floors)
    monkeypatch.setattr(probes, "_version", versions.get)
    status, found = doctor()
    assert status == 1
    assert whats(found) == ["diffusers 0.9.12 is older than 0.42.1, the oldest version that is known to work"]
    assert found["problems"][0]["do"] == "pip install --upgrade 'diffusers>=0.42.1'"
    monkeypatch.setitem(versions, "diffusers", "0.42.10")
    assert doctor()[0] == 0


def test_the_environment(no_gpu: None, doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert api.OFF in probes.VARIABLES
    monkeypatch.setenv("IPA_KERNELS_DISABLE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "GPU-5a1f")
    status, found = doctor()
    assert status == 1
    assert found["problems"] == [
        {"what": "IPA_KERNELS_DISABLE=1: enable(pipe) does nothing", "do": "unset IPA_KERNELS_DISABLE"}
    ]
    assert found["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert found["environment"]["HIP_VISIBLE_DEVICES"] == "set to something else"
    assert found["environment"]["ROCR_VISIBLE_DEVICES"] is None
    monkeypatch.setenv("IPA_KERNELS_DISABLE", "yes")
    assert doctor()[0] == 0


def test_a_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--jsn"], ["everything"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["doctor", *wrong])
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert wrong[0] in line


POISON = {
    "HF_TOKEN": "correct-horse-battery",
    "AWS_SECRET_ACCESS_KEY": "AKIA/xyzzy+plugh",
    "USER": "alicia",
    "LOGNAME": "alicia",
    "HOME": "/home/alicia",
    "HOSTNAME": "wonderland",
    "EDITOR": "teapot",
    "CUDA_VISIBLE_DEVICES": "correct-horse-battery",
}
SAYS = (
    "no /home/alicia/my projects/venv/triton.so, /mnt/share/alicia/x.so nor C:\\Users\\alicia\\y.dll on wonderland "
    "for alicia: correct-horse-battery, "
    "https://bob:hunter22@hub/models?token=sesame, AKIA/xyzzy+plugh, hf_abcdefghijkl, a@wonderland.org"
)
NEVER = (
    "alicia",
    "correct",
    "horse",
    "AKIA",
    "xyzzy",
    "wonderland",
    "teapot",
    "bob",
    "hunter22",
    "sesame",
    "hf_abc",
    "projects",
    "mnt",
)


def broken(folder: Path, error: str, *packages: str) -> None:
    for package in packages:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(f"print('hello')\nraise {error}\n")


def in_a_process(folder: Path, *options: str) -> tuple[int, str]:
    """The doctor, where packages in the folder come before those that are installed."""
    environment = {name: value for name, value in os.environ.items() if name not in probes.VARIABLES}
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), **POISON}
    command = [sys.executable, "-c", COMMAND, "doctor", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize("error", ["OSError", "SystemExit", "ModuleNotFoundError"])
def test_without_torch_it_says_so_and_no_more_than_that(error: str, tmp_path: Path) -> None:
    broken(tmp_path, f"{error}({SAYS!r})", "torch")
    for options in ([], ["--json"]):
        status, out = in_a_process(tmp_path, *options)
        assert status == 1
        assert f"torch cannot be imported: {error}" in out
        assert "reinstall torch for this machine" in out
        assert not [word for word in NEVER if word in out], out


def test_a_broken_triton_and_a_broken_diffusers(tmp_path: Path) -> None:
    """A process of its own: nothing is imported yet. What they say is not there; torch's part of the report is there."""
    broken(tmp_path, f"RuntimeError({SAYS!r})", "triton", "diffusers")
    status, out = in_a_process(tmp_path, "--json")
    assert status == 1
    assert not [word for word in NEVER if word in out], out
    found = json.loads(out)
    assert whats(found) == [
        "triton is installed but cannot be imported: RuntimeError",
        "diffusers is installed but enable(pipe) cannot use it: RuntimeError",
    ]
    assert found["installed"]["torch"].startswith(torch.__version__)
    assert found["environment"]["CUDA_VISIBLE_DEVICES"] == "set to something else"
    (device,) = found["devices"]
    assert "triton: cannot be imported" in device["inference"][0]["reasons"][0]


def test_with_torch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, triton and diffusers that are missing are notes, each with what it means."""
    for package in ("triton", "diffusers", "transformers", "numpy"):
        broken(tmp_path, f"ModuleNotFoundError('no', name={package!r})", package)
    code = f"from ipa_kernels.cli import doctor_probes as probes; probes._version = lambda name: None; {COMMAND}"
    monkeypatch.setattr(sys.modules[__name__], "COMMAND", code)
    status, out = in_a_process(tmp_path)
    assert status == 0, out
    assert "  triton is not installed: no kernel, eager attention everywhere\n" in out
    assert "enable(pipe) needs it (pip install 'ipa-kernels[diffusers]')" in out


def test_what_they_say_is_for_the_user_alone(tmp_path: Path) -> None:
    """In full, on stderr; what is pasted has no word of it, and says where it is."""
    broken(tmp_path, f"RuntimeError({SAYS!r})", "diffusers")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", COMMAND, "doctor", "--messages"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"RuntimeError: {SAYS}" in done.stderr
    assert str(tmp_path) in done.stderr, "with its traceback"
    assert not [word for word in NEVER if word in done.stdout], done.stdout
    assert "ipa-kernels doctor --messages" in done.stdout


class Alicia(RuntimeError):
    """An exception of somebody's own code."""

    __module__ = "alicias_project"


@given(st.text(), st.text(), st.sampled_from([*PHRASES, ""]))
def test_of_a_message_only_known_phrases_are_told(before: str, after: str, phrase: str) -> None:
    message = before + phrase + after
    known = [phrase for phrase in PHRASES if phrase in message]
    for error, kind in (
        (OSError(message), "OSError"),
        (Alicia(message), "RuntimeError"),
        (UserWarning(message), "UserWarning"),
        (ImportError(message, name=f"/{before}"), "ImportError"),
        (ModuleNotFoundError(message, name=f"alicia.{after}"), "ModuleNotFoundError"),
    ):
        assert told(error) in [kind, *(f"{kind}: {phrase}" for phrase in known)]
        assert not known or told(error) != kind


def test_a_module_that_is_missing_is_named() -> None:
    assert told(ModuleNotFoundError("No module named 'triton._C'", name="triton._C")) == "ModuleNotFoundError: triton"
    assert told(ModuleNotFoundError("No module named 'alicia'", name="alicia")) == "ModuleNotFoundError"
    for package in probes.PACKAGES:
        assert told(ModuleNotFoundError(name=package)) == f"ModuleNotFoundError: {package}"


def test_an_exception_that_cannot_be_printed() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError("never")

    def probe() -> None:
        raise Broken

    found = Diagnosis()
    assert found.attempt("this failed", "do that", probe) is None
    assert [problem.what for problem in found.problems] == ["this failed: Exception"]


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("6.8.0-alicia-x86_64", "Linux 6.8.0, "),
        ("5.15.1-microsoft-standard-WSL2", "Linux 5.15.1, WSL, "),
        ("", "Linux"),
    ],
)
def test_the_system(release: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the name of its kernel the number alone."""
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.release", lambda: release)
    assert probes._system().startswith(expected)
    assert "alicia" not in probes._system()
