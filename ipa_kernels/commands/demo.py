"""`ipa-kernels demo`: one picture stock and one accelerated, from the same seed, and what differs: pixels and time."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops

from .. import tiny
from ..integration import accelerated
from .errors import UserError, why
from .loading import check_paths, load_pipeline, read_picture, writable
from .machine import available_device
from .pictures import compose, draw_reference
from .quiet import quiet


@dataclass(frozen=True)
class Options:
    """The command line of `ipa-kernels demo`; None stands for what is built in code or chosen for the machine."""

    model: str | None
    ip_adapter: str | None
    ip_adapter_weight: str | None
    image_encoder: str
    image: str | None
    prompt: str
    scale: float
    steps: int
    seed: int
    output: str
    device: str | None
    dtype: str | None


def run(options: Options) -> int:
    """Run stock, then accelerated; print what ran, what differs and the times; write the pictures side by side.

    Raises UserError, before anything is written, where the options name something that does not exist or does not work.
    """
    if (options.model is None) != (options.ip_adapter is None):
        raise UserError("--model and --ip-adapter go together: give both, or neither for the pipeline built in code")
    if options.model is not None and options.ip_adapter is not None:
        check_paths(Path(options.model), Path(options.ip_adapter))
    output = writable(options.output)
    device = available_device(options.device)
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "float16"))
    reference = draw_reference() if options.image is None else read_picture(options.image)
    with quiet(), _threads(1 if options.model is None else torch.get_num_threads()):
        pipe = _build(dtype) if options.model is None else _load(options, dtype)
        pipe.to(device)
        pipe.set_ip_adapter_scale(options.scale)
        what = f"{options.model} with {options.ip_adapter}" if options.model else "built in code, random weights, 1 CPU thread"
        print(f"{type(pipe).__name__} ({what}) on {device} in {str(dtype).removeprefix('torch.')}")
        print(f"{options.steps} steps after one to warm up, seed {options.seed}, IP-Adapter scale {options.scale}", flush=True)
        try:
            stock, stock_ms = _generate(pipe, options, reference, "stock")
        except Exception as error:  # a model that loads may still lack anything, and says so in its own way
            raise UserError(f"stock diffusers cannot run this model, adapter and picture: {why(error)}") from error
        with accelerated(pipe) as report:
            fused, fused_ms = _generate(pipe, options, reference, "accelerated")
    difference = ImageChops.difference(stock, fused)
    largest = max(difference.tobytes())
    print(report)
    print(f"max difference: {largest}")
    print(f"time per step: stock {stock_ms:.1f} ms, accelerated {fused_ms:.1f} ms (medians)")
    if not report.triton:
        print("the kernel did not run here: these two times show no speedup, and are not meant to")
    if stock.getcolors(1):
        print("note: the stock picture is a single colour (overflow in this dtype, or the pipeline's safety checker)")
    try:
        compose(reference, stock, fused, difference, largest).save(output)
    except OSError as error:
        raise UserError(f"--output {output}: {why(error)}") from error
    print(f"{output}: reference, stock, accelerated, difference")
    return 0


def _generate(pipe: Any, options: Options, reference: Image.Image, label: str) -> tuple[Image.Image, float]:
    """The picture, and the median time in milliseconds from the end of one step to the end of the next."""
    ends: list[float] = []

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if pipe.device.type == "cuda":
            torch.cuda.synchronize(pipe.device)  # else the clock is read before the step is done
        ends.append(time.perf_counter())
        return tensors

    def call(steps: int) -> Image.Image:
        generator = torch.Generator().manual_seed(options.seed)
        result = pipe(
            options.prompt,
            ip_adapter_image=reference,
            num_inference_steps=steps,
            generator=generator,
            callback_on_step_end=step_end,
        )
        picture: Image.Image = result.images[0]
        return picture

    pipe.set_progress_bar_config(disable=True)
    call(1)
    ends.clear()
    pipe.set_progress_bar_config(desc=f"{label:11}")
    picture = call(options.steps)
    return picture, 1e3 * statistics.median(end - start for start, end in pairwise(ends))


def _build(dtype: torch.dtype) -> Any:
    """The small pipeline with its IP-Adapter and CLIP encoders, all weights random."""
    pipe = tiny.stable_diffusion(encoders=True)
    tiny.load(pipe, tiny.base_adapter(pipe.unet))
    pipe.to(dtype=dtype)
    return pipe


def _load(options: Options, dtype: torch.dtype) -> Any:
    """The pipeline of --model with the weights of --ip-adapter."""
    return load_pipeline(str(options.model), str(options.ip_adapter), options.ip_adapter_weight, options.image_encoder, dtype)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The small pipeline computes too little for several threads, which stall each other where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
