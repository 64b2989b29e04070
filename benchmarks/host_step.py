"""A layer in a step: all cross-attentions of SDXL at tiny widths, called in order, with the rest of the step between them.

Used by `benchmarks.host`. What is enabled sees nothing of the clock: a hook, or a `forward` of somebody else's, would make the
package check more. A transformer block compares its `norm_type` last before it calls `norm2` and the layer, and first after the
sum that follows: that string is a `Clock`, which notes when. "empty" is the same UNet whose layers are a function that returns
its input, and what it takes is subtracted in each round, for `norm2`, the sum and the clock are in every candidate.

Each candidate has modules of its own around the same weights, and takes its step twice in a row: the second is timed, for in a
generation a step of the same UNet runs before it too. Host time: no launch is waited for.

Run as a script, `python -P benchmarks/host_step.py`, it is a `Worker`: it measures the package that PYTHONPATH names, round by
round as it is asked. So it imports nothing of `benchmarks`, and of the package what other versions have too.
"""

import argparse
import copy
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.utils import logging
from torch import Tensor

import ipa_kernels
from ipa_kernels.benchmarking.machine import machine_facts
from ipa_kernels.benchmarking.timing import check_rounds, timing
from ipa_kernels.kernels.launch import Launch
from ipa_kernels.testing.unet_models import MODELS, Model, UNetInputs, build, clone, load

LAYERS = 70
"""Cross-attentions of SDXL."""

WARM_UP = 2
"""Rounds before those that count."""

LATENTS = 8
"""On the side: 16 and 4 queries in a layer. Masks are those of a picture of 1024 pixels, which is what stock resizes."""

TINY_SDXL = Model(
    MODELS["sdxl"].config
    | {
        "block_out_channels": (32, 32, 64),
        "attention_head_dim": (2, 2, 4),
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
    image_dims=(32, 32),
    resampler=64,
)

CANDIDATES = ("stock", "first", "later", "forward", "projections")


class Nothing:
    """A processor that returns its input."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        return hidden_states


class Clock(str):
    """A string that notes when it is compared."""

    __slots__ = ("stamps",)
    __hash__ = str.__hash__

    def __init__(self, text: str) -> None:
        self.stamps: list[float] = []

    def __eq__(self, other: object) -> bool:
        self.stamps.append(time.perf_counter())
        return str.__eq__(self, other)


class Candidate:
    """A UNet with a clock in it, and the inputs of its steps."""

    def __init__(self, base: Any, inputs: UNetInputs) -> None:
        self.unet = clone(base)
        self.inputs = inputs
        self.blocks: list[Any] = [module for module in self.unet.modules() if isinstance(module, BasicTransformerBlock)]
        self.clock = Clock(self.blocks[0].norm_type)
        for block in self.blocks:
            block.norm_type = self.clock

    def replace(self, layer: Callable[[Any], Callable[..., Tensor]]) -> None:
        """Let each block call a function in the place of its cross-attention."""
        for block in self.blocks:
            attention = block.attn2
            del block.attn2
            block.attn2 = layer(attention)

    def step(self, i: int) -> list[float]:
        """When the blocks compared their kind."""
        stamps = self.clock.stamps
        stamps.clear()
        self.inputs.step(self.unet, i)
        return stamps


class Step:
    """The candidates of one variant; `sample` is one round of them."""

    def __init__(self, adapters: int, masked: bool, dtype: torch.dtype, device: torch.device) -> None:
        logging.set_verbosity_error()
        self.device = device
        base = build(TINY_SDXL, dtype, device)
        load(base, TINY_SDXL, adapters)
        _check("IP-Adapter processors", sum(type(p) is IPAdapterAttnProcessor2_0 for p in base.attn_processors.values()))
        self.inputs = UNetInputs(TINY_SDXL, adapters, masked, dtype, device, side=1024)
        self.inputs.sample = self.inputs.sample[..., :LATENTS, :LATENTS].contiguous()
        self.candidates = {name: Candidate(base, self.inputs) for name in ("empty", *CANDIDATES)}
        for name in ("first", "later"):
            ipa_kernels.enable(self.candidates[name].unet, impl="triton")
        for block in self.candidates["forward"].blocks:
            block.attn2.set_processor(Nothing())
        self.candidates["projections"].replace(_projections)
        self.before, self.comparisons = self._places(self.candidates["empty"])
        self.candidates["empty"].replace(lambda attention: _nothing)
        self.rounds = itertools.count()

    @staticmethod
    @torch.no_grad()
    def _places(candidate: Candidate) -> tuple[list[int], int]:
        """How many comparisons come before each layer, and in a whole step."""
        before: list[int] = []

        def note(hidden_states: Tensor, **options: Any) -> Tensor:
            before.append(len(candidate.clock.stamps))
            return hidden_states

        candidate.replace(lambda attention: note)
        stamps = candidate.step(0)
        _check("calls of cross-attentions", len(before))
        return before, len(stamps)

    @torch.no_grad()
    def sample(self) -> dict[str, float]:
        """Seconds of a layer, by candidate, and "hook", of a step."""
        # three steps of a generation, which has 1000
        i = 3 * (next(self.rounds) % 333)
        spans, hook = {}, 0.0
        for name, candidate in self.candidates.items():
            for turn in range(2):
                if name == "first":
                    candidate.inputs = _renewed(self.inputs)
                spans[name] = self._span(candidate, 0 if name == "first" else i + turn)
            if name == "later":
                hook = self._hook(candidate, i + 2)
        for name in ("first", "later"):
            _check("layers on the kernel", ipa_kernels.explain(self.candidates[name].unet).triton)
        return {name: (spans[name] - spans["empty"]) / LAYERS for name in CANDIDATES} | {"hook": hook}

    def _span(self, candidate: Candidate, i: int) -> float:
        """Seconds from the last comparison before a layer to the first after it, of all layers."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        gc.disable()
        try:
            stamps = candidate.step(i)
        finally:
            gc.enable()
        if len(stamps) != self.comparisons:
            raise RuntimeError(f"a step compares {len(stamps)} times, and {self.comparisons} without its cross-attentions")
        return sum(stamps[k] - stamps[k - 1] for k in self.before)

    def _hook(self, candidate: Candidate, i: int) -> float:
        """Seconds of what the package does before and after a step, called as torch calls it, in the next step's place."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        out = (self.inputs.sample,)

        def note(*arguments: Any, **options: Any) -> tuple[Tensor]:
            calls.append((arguments, options))
            return out

        unet: Any = note
        self.inputs.step(unet, i)
        unet = candidate.unet
        ((arguments, options),) = calls
        start = time.perf_counter()
        for key, hook in list(unet._forward_pre_hooks.items()):
            with_options = key in unet._forward_pre_hooks_with_kwargs
            hook(unet, arguments, options) if with_options else hook(unet, arguments)
        for key, hook in list(unet._forward_hooks.items()):
            with_options = key in unet._forward_hooks_with_kwargs
            hook(unet, arguments, options, out) if with_options else hook(unet, arguments, out)
        return time.perf_counter() - start


class Worker:
    """This file in a process of its own, measuring the package of another checkout."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        path = [str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-P", __file__, "--device", str(device), "--dtype", str(dtype).removeprefix("torch.")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        facts = self.ask({})
        self.commit = facts["commit"]
        if Path(facts["package"]).parent != folder.resolve():
            self.process.kill()
            raise RuntimeError(f"--baseline {folder}: has no ipa_kernels; {facts['package']} was found instead")

    def ask(self, question: dict[str, Any]) -> Any:
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
    sources: dict[str, Callable[[], dict[str, float]]] = {"step": step.sample}
    if baseline is not None:
        baseline.ask({"adapters": adapters, "masked": masked})
        sources["baseline"] = lambda: baseline.ask({})  # type: ignore[no-any-return]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
    with launch_left_out(device):
        for round_ in range(-WARM_UP, rounds):
            for name, sample in sources.items():
                taken = sample()
                if round_ >= 0:
                    samples[name].append(taken)
    found = {name: _summary(taken) for name, taken in samples.items()}
    if baseline is not None:
        found["baseline"]["commit"] = baseline.commit
    return found


def launch_left_out(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU a launch only takes its arguments meanwhile."""
    return mock.patch.object(Launch, "_launch", _leave_out) if device.type == "cpu" else nullcontext()


def _leave_out(launch: Launch, *arguments: Any) -> None:
    """In the place of a launch: takes its arguments."""


def _summary(samples: list[dict[str, float]]) -> dict[str, Any]:
    timings = {name: timing([sample[name] for sample in samples]) for name in (*CANDIDATES, "hook")}
    stock, _, later, forward, projections = (timings[name].median for name in CANDIDATES)
    return {
        "layers": LAYERS,
        "seconds": {name: asdict(timings[name]) for name in CANDIDATES},
        "ratio": later / stock,
        "above the floor": (later - forward - projections) / stock,
        "hook": asdict(timings["hook"]),
    }


def _nothing(hidden_states: Tensor, **options: Any) -> Tensor:
    return hidden_states


def _projections(attn: Any) -> Callable[..., Tensor]:
    def project(hidden_states: Tensor, **options: Any) -> Tensor:
        return attn.to_out[1](attn.to_out[0](attn.to_q(hidden_states)))  # type: ignore[no-any-return]

    return project


def _renewed(inputs: UNetInputs) -> UNetInputs:
    """The same values in new tensors, as another generation has them."""
    other = copy.copy(inputs)
    other.text = inputs.text.clone()
    other.added = {
        name: [one.clone() for one in value] if isinstance(value, list) else value.clone()
        for name, value in inputs.added.items()
    }
    other.masks = None if inputs.masks is None else [mask.clone() for mask in inputs.masks]
    return other


def _check(what: str, count: int) -> None:
    if count != LAYERS:
        raise RuntimeError(f"expected {LAYERS} {what}, got {count}: another model would be measured")


def main() -> int:
    """Answer one question a line: {} before the first step is who, {"adapters", "masked"} makes a step, {} samples it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.set_num_threads(1)
    # what a library prints is no answer
    answers, sys.stdout = sys.stdout, sys.stderr
    step: Step | None = None
    with launch_left_out(device):
        for line in sys.stdin:
            question = json.loads(line)
            answer: dict[str, Any] = {}
            if question:
                step = Step(question["adapters"], question["masked"], dtype, device)
            elif step is not None:
                answer = dict(step.sample())
            else:
                answer = {"package": str(Path(ipa_kernels.__file__).resolve().parent), "commit": machine_facts(device)["commit"]}
            print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
