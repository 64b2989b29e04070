"""Rounds of steps (`benchmarks.host_step`), of this version of the package and of another checkout's, in turns.

What else the machine runs slows a step, and not the next one. So times are scaled to one speed of the machine: what is between
the layers is the same work in every step, of both versions, and its time, against the median of all steps, says how fast the
machine was during that step. "rest" has these times, unscaled: a candidate that leaves less in the caches slows its rest too,
and is shown that much too fast.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import torch

from ipa_kernels.benchmarking.timing import check_rounds, timing

from . import host_step
from .host_step import CANDIDATES, LAYERS, Sample, Step, launch_left_out

WARM_UP = 2
"""Rounds before those that count."""


class Worker:
    """`host_step` in a process of its own, measuring the package of another checkout."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        package = folder.resolve() / "ipa_kernels"
        if not package.is_dir():
            raise FileNotFoundError(
                f"--baseline: expected a checkout of this repository, got {folder}, which has no ipa_kernels"
            )
        path = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-P", host_step.__file__, str(device), str(dtype).removeprefix("torch.")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.commit = self.ask("version")

    def ask(self, *question: Any) -> Any:
        """Its answer. Raises RuntimeError where it ended instead; why stands on stderr."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"--baseline: measuring it ended with status {self.process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.communicate()  # closes its stdin, which ends it


def measure(
    adapters: int, masked: bool, dtype: torch.dtype, device: torch.device, rounds: int, baseline: Worker | None
) -> dict[str, dict[str, Any]]:
    """{"step": ...}, and "baseline" where there is one: each round first here, then there."""
    check_rounds(rounds)
    step = Step(adapters, masked, dtype, device)
    sources: dict[str, Callable[[], Sample]] = {"step": step.sample}
    if baseline is not None:
        baseline.ask("step", adapters, masked)
        sources["baseline"] = lambda: baseline.ask("sample")
    samples: dict[str, list[Sample]] = {name: [] for name in sources}
    with launch_left_out(device):
        for round_ in range(-WARM_UP, rounds):
            for name, sample in sources.items():
                taken = sample()
                if round_ >= 0:
                    samples[name].append(taken)
    rest = median(rest for taken in samples.values() for sample in taken for _, rest in sample.values())
    found = {name: _summary(taken, rest) for name, taken in samples.items()}
    if baseline is not None:
        found["baseline"]["commit"] = baseline.commit
    return found


def _summary(samples: list[Sample], usual: float) -> dict[str, Any]:
    """usual: seconds of the rest of a step, at the speed that times are given for."""
    scaled = {name: [sample[name][0] * usual / sample[name][1] for sample in samples] for name in samples[0]}
    timings = {}
    for name in CANDIDATES:
        timings[name] = timing([(one - empty) / LAYERS for one, empty in zip(scaled[name], scaled["empty"], strict=True)])
    stock, _, later, forward, projections = (timings[name].median for name in CANDIDATES)
    return {
        "layers": LAYERS,
        "seconds": {name: asdict(timings[name]) for name in CANDIDATES},
        "ratio": later / stock,
        "above the floor": (later - forward - projections) / stock,
        "hook": asdict(timing(scaled["hook"])),
        "rest": {name: asdict(timing([sample[name][1] for sample in samples])) for name in ("empty", *CANDIDATES)},
    }
