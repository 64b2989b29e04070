"""A layer in a step: all cross-attentions of SDXL at tiny widths, called in order, with the rest of the step between them.

Used by `benchmarks.host`. What is enabled sees nothing of the clock: a hook, or a `forward` of somebody else's, would make the
package check more. A transformer block compares its `norm_type` last before it calls `norm2` and the layer, and first after the
sum that follows: that string is a `Clock`, which notes when. "empty" is the same UNet whose layers are a function that returns
its input, and what it takes is subtracted, for `norm2`, the sum and the clock are in every candidate.

Each candidate has modules of its own around the same weights. Times are CPU time of this thread, so that nothing else that the
machine runs is in them, and the launches of a GPU are not waited for.

Run as a script, `python -P benchmarks/host_step.py cpu float32`, it measures the package that PYTHONPATH names, round by round,
as `benchmarks.host_rounds.Worker` asks. So it imports nothing of `benchmarks`, and of the package what other versions have too.
"""

import copy
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.utils import logging
from torch import Tensor

import ipa_kernels
from ipa_kernels.benchmarking.machine import machine_facts
from ipa_kernels.kernels.launch import Launch
from ipa_kernels.testing.unet_models import MODELS, Model, UNetInputs, build, clone, load

LAYERS = 70
"""Cross-attentions of SDXL."""

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

CLOCK = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-6 else time.perf_counter
"""Where CPU time is counted in ticks of the system, it is no measure of a layer."""

CANDIDATES = ("stock", "first", "later", "forward", "projections")


Sample = dict[str, tuple[float, float]]
"""By candidate: seconds in the layers of a step, and in the rest of it; by "hook", those of the hooks, and that rest."""


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

    __hash__ = str.__hash__

    def __init__(self, text: str) -> None:
        self.stamps: list[float] = []

    def __eq__(self, other: object) -> bool:
        self.stamps.append(CLOCK())
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
    def sample(self) -> Sample:
        """One step of each candidate."""
        # two steps of a generation, which has 1000
        i = 2 * (next(self.rounds) % 500)
        found: Sample = {}
        for name, candidate in self.candidates.items():
            if name == "first":
                candidate.inputs = _renewed(self.inputs)
            found[name] = self._time(candidate, 0 if name == "first" else i)
            if name == "later":
                found["hook"] = self._hook(candidate, i + 1), found[name][1]
        for name in ("first", "later"):
            _check("layers on the kernel", ipa_kernels.explain(self.candidates[name].unet).triton)
        return found

    def _time(self, candidate: Candidate, i: int) -> tuple[float, float]:
        """Seconds from the last comparison before a layer to the first after it, of all layers; and between these."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        gc.disable()
        try:
            stamps = candidate.step(i)
        finally:
            gc.enable()
        if len(stamps) != self.comparisons:
            raise RuntimeError(f"a step compares {len(stamps)} times, and {self.comparisons} without its cross-attentions")
        inside = sum(stamps[k] - stamps[k - 1] for k in self.before)
        return inside, stamps[-1] - stamps[0] - inside

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
        start = CLOCK()
        for key, hook in list(unet._forward_pre_hooks.items()):
            with_options = key in unet._forward_pre_hooks_with_kwargs
            hook(unet, arguments, options) if with_options else hook(unet, arguments)
        for key, hook in list(unet._forward_hooks.items()):
            with_options = key in unet._forward_hooks_with_kwargs
            hook(unet, arguments, options, out) if with_options else hook(unet, arguments, out)
        return CLOCK() - start


def launch_left_out(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU a launch only takes its arguments meanwhile."""
    return mock.patch.object(Launch, "_launch", _leave_out) if device.type == "cpu" else nullcontext()


def _leave_out(launch: Launch, *arguments: Any) -> None:
    """In the place of a launch: takes its arguments."""


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


def version(device: torch.device) -> str:
    """The commit of the package that is measured, or the digest of its source where it is no clone."""
    facts = machine_facts(device)
    return str(facts["commit"] or facts["source"])


def main() -> int:
    """Answer questions, one a line: ["version"], ["step", adapters, masked], and, of the step made last, ["sample"]."""
    device, dtype = torch.device(sys.argv[1]), getattr(torch, sys.argv[2])
    torch.set_num_threads(1)
    # what a library prints is no answer
    answers, sys.stdout = sys.stdout, sys.stderr
    steps: list[Step] = []
    with launch_left_out(device):
        for line in sys.stdin:
            question, *details = json.loads(line)
            answer: Any = None
            if question == "version":
                answer = version(device)
            elif question == "step":
                adapters, masked = details
                steps = [Step(adapters, masked, dtype, device)]
            else:
                answer = steps[0].sample()
            print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
