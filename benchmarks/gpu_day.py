"""One command for a day with a GPU: the tests that need one, then every driver, tables and plots. No network.

    python -m benchmarks.gpu_day --out FOLDER [--device cuda]        (`make gpu OUT=FOLDER`)

Each step is a process with a time limit. One that fails or runs out of time is recorded, keeps what it has written so far, and
the next still runs; the exit status is 1 if any did not pass. On a GPU all of them share 540 seconds: what is short of time is
cut, and what would begin after them is not run. On a CPU the same steps run at small sizes: a rehearsal, the times of which say
nothing about a GPU.

FOLDER gets results.json (every driver's JSON), report.md, a PNG for each kind of plot, summary.json and log.txt.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUDGET = {"cuda": 540.0, "cpu": 480.0}
"""Seconds for everything."""

REPORT_SECONDS = 30.0
"""Of these, kept for tables and plots."""

WORKERS = 8
"""Processes that run tests on a GPU, where pytest-xdist is installed: most of their time is the compiler's, on the CPU."""

CASES = (
    "sdxl_1024_64x64", "sdxl_1024_64x64_three", "sdxl_1024_64x64_three_masked", "sdxl_1024_32x32", "sdxl_1024_64x64_masked",
    "sd15_512_head40", "sd15_512_head80", "sd15_512_head160", "sdxl_1024_64x64_plus", "sdxl_1024_64x64_text_only",
    "sdxl_1024_64x64_full", "sd15_512_mid", "kolors_1024_64x64", "hunyuandit_1024",
)  # fmt: skip
"""The first are what the promises are about: if time runs out, the last are missing."""

COMPILED = ("stock_compiled", "flex_compiled")


@dataclass(frozen=True)
class Step:
    """A process: the arguments of `python -m`, its time limit in seconds, and whether `--json FILE` is added."""

    name: str
    arguments: tuple[str, ...]
    limit: float
    has_json: bool = True


def steps(device: str) -> list[Step]:
    """In the order of the run: correctness, the promises, then the rest."""
    graphed = ("--modes", "eager", "graphed")
    prepared = ("--modes", "compiled", "prepared")
    if device == "cpu":
        compiled: tuple[str, ...] = ("--adapters", "one", "--rounds", "3", *prepared)
        return [
            _tests("gpu_tests", 60, 0, "-m", "gpu", *_gpu_files()),
            _tests("kernel_tests", 60, 0, "tests/kernels/test_forward.py", "-k", "softmax_scale or two_branches"),
            _driver("attention", 90, device, "attention", "--small", "--rounds", "3", "--cases", *CASES[:3]),
            _driver("attention_interpreted", 60, device, "attention", "--small", "--impl", "triton", "--cases", *CASES[:3]),
            _driver("attention_compiled", 120, device, "attention", "--small", "--cases", CASES[0], "--peers", *COMPILED),
            _driver("sweep", 60, device, "attention", "--sweep", "--rounds", "3"),
            _driver("unet_step", 60, device, "unet_step", "--rounds", "3", *graphed),
            _driver("generation", 60, device, "generation", "--rounds", "1", "--steps", "3", "--model"),
            _driver("host", 60, device, "host", "--rounds", "3", "--adapters", "one"),
            _driver("first_image", 90, device, "first_image", "--ways", "stock", "enabled"),
            _driver("training", 60, device, "training", "--small", "--rounds", "3"),
            _driver("unet_step_compiled", 300, device, "unet_step", *compiled),
        ]
    compiled = ("--model", "sd15", "--adapters", "none", "one", "--compile-seconds", "60", *prepared)
    return [
        _tests("gpu_tests", 90, WORKERS, "-m", "gpu", *_gpu_files()),
        _tests("kernel_tests", 90, WORKERS, "-m", "not gpu", "tests/kernels/test_forward.py"),
        _driver("attention", 140, device, "attention", "--seconds", "100", "--cases", *CASES),
        _driver("unet_step_sdxl", 110, device, "unet_step", "--model", "sdxl", "--rounds", "5", *graphed),
        _driver("unet_step_sd15", 60, device, "unet_step", "--model", "sd15", *graphed),
        _driver("sweep", 60, device, "attention", "--sweep", "--rounds", "10", "--seconds", "40"),
        _driver("host", 60, device, "host", "--rounds", "5"),
        _driver("generation", 60, device, "generation", "--rounds", "5", "--adapters", "one", "three masked"),
        _driver("first_image", 60, device, "first_image", "--ways", "stock", "enabled", "graphed"),
        _driver("training", 90, device, "training", "--models", "sd15", "--rounds", "10"),
        _driver("unet_step_compiled", 110, device, "unet_step", *compiled),
    ]


def _driver(name: str, limit: float, device: str, driver: str, *arguments: str) -> Step:
    return Step(name, (f"benchmarks.{driver}", "--device", device, *arguments), limit)


def _tests(name: str, limit: float, workers: int, *arguments: str) -> Step:
    # warnings that are new with other versions of torch or Python are no failures here
    calm = [part for kind in ("Deprecation", "PendingDeprecation", "Future") for part in ("-W", f"default::{kind}Warning")]
    parallel = [f"--numprocesses={workers}"] if workers and importlib.util.find_spec("xdist") else []
    return Step(name, ("pytest", "-q", *calm, *parallel, *arguments), limit, has_json=False)


def _gpu_files() -> list[str]:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text()]


def run(todo: Sequence[Step], out: Path, budget: float, environment: dict[str, str]) -> list[dict[str, Any]]:
    """One summary per step: its result ("passed", "failed", "out of time", "not run: ..."), seconds and limit.

    After each step results.json and summary.json hold all that there is so far.
    """
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    summaries: list[dict[str, Any]] = []
    documents: dict[str, Any] = {}
    with (out / "log.txt").open("w") as log, tempfile.TemporaryDirectory() as folder:
        for step in todo:
            limit = min(step.limit, budget - (time.monotonic() - began))
            file = Path(folder) / f"{step.name}.json"
            if limit < 1:
                summary: dict[str, Any] = {"step": step.name, "result": "not run: no time is left", "seconds": 0.0}
            else:
                command = [sys.executable, "-m", *step.arguments, *(["--json", str(file)] if step.has_json else [])]
                summary = {"step": step.name, **_run(command, limit, log, environment)}
            summaries.append(summary)
            if file.exists():
                try:
                    documents[step.name] = json.loads(file.read_text())
                except json.JSONDecodeError:
                    summary["result"] += ", its JSON is cut"
            print(f"{step.name:22} {summary['result']:12} {summary['seconds']:6.1f} s", flush=True)
            _write(out / "results.json", {"benchmark": "collection", "documents": documents})
            _write(out / "summary.json", {"budget": budget, "steps": summaries})
    return summaries


def _run(command: list[str], limit: float, log: Any, environment: dict[str, str]) -> dict[str, Any]:
    log.write(f"\n== {' '.join(command)}\n")
    log.flush()
    start = time.monotonic()
    # a session of its own, so that what it started ends with it
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(timeout=limit)
        result = "passed" if status == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        status, result = process.wait(), "out of time"
    except BaseException:
        os.killpg(process.pid, 9)
        raise
    return {"result": result, "status": status, "seconds": time.monotonic() - start, "limit": limit}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def environment_of(device: str) -> dict[str, str]:
    """For the steps. A rehearsal on a CPU sees no GPU, may interpret the kernel (which is never timed), and has one thread:
    more would wait for each other on tiny tensors."""
    environment = {**os.environ, "DIFFUSERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        environment |= {
            "CUDA_VISIBLE_DEVICES": "-1",
            "HIP_VISIBLE_DEVICES": "-1",
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
        }
    return environment


def main() -> int:
    """Print one line per step; 1 if one did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder; it is made if need be")
    parser.add_argument("--device", choices=list(BUDGET), default="cuda")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run some of the steps, by their names")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    todo = [step for step in steps(arguments.device) if arguments.only is None or step.name in arguments.only]
    environment = environment_of(arguments.device)
    summaries = run(todo, out, BUDGET[arguments.device] - REPORT_SECONDS, environment)
    figures = subprocess.run([sys.executable, "-m", "benchmarks.figures", str(out)], cwd=ROOT, env=environment, check=False)
    passed = all(summary["result"] == "passed" for summary in summaries) and figures.returncode == 0
    print(f"{out}: {'all passed' if passed else 'NOT all passed: see log.txt'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
