"""One picture from a pipeline, accelerated or stock, with the time of a step: what `demo` and `generate` share."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..integration.api import accelerated
from ..report import Report, plural
from .device import is_about_memory, memory_of
from .errors import UserError, why
from .pictures import largest_difference


@dataclass(frozen=True)
class Request:
    """What to generate: `pipe(**arguments)` from a seed. device: where the pipeline computes, which offloading hides."""

    pipe: Any
    device: torch.device
    arguments: dict[str, Any]
    steps: int
    seed: int


class Result(NamedTuple):
    """A picture, and the median time in ms from the end of one step to the end of the next; NaN where there was one step."""

    picture: Image.Image
    step_ms: float


def accelerate(request: Request) -> tuple[Result, Report]:
    """Generate accelerated. Raises UserError where stock diffusers cannot either; what is ours alone is raised as it is."""
    _check_steps(request)
    try:
        with accelerated(request.pipe) as report:
            return _generate(request, "accelerated"), report
    except Exception as error:
        if is_about_memory(error):
            raise
        _stock(request)
        raise


def compare(request: Request) -> tuple[Result, Result, Report]:
    """Generate stock, then accelerated, each after one step to warm up. Raises UserError where stock diffusers cannot."""
    _check_steps(request)
    stock = _stock(request, warm_up=True)
    with accelerated(request.pipe) as report:
        return stock, _generate(request, "accelerated", warm_up=True), report


def print_outcome(report: Report, fused: Result, stock: Result | None = None) -> None:
    """What ran where and why, what differs from stock where that ran too, and the times."""
    print(report)
    if stock:
        print(f"max difference: {largest_difference(stock.picture, fused.picture)}")
    if math.isnan(fused.step_ms):
        print("time per step: not measured in one step")
    elif stock:
        print(f"time per step: stock {stock.step_ms:.1f} ms, accelerated {fused.step_ms:.1f} ms (medians)")
    else:
        print(f"time per step: {fused.step_ms:.1f} ms (median)")
    if not report.triton:
        times = "these two times show no speedup, and are not meant to" if stock else "--compare would show no speedup"
        print(f"the kernel did not run here: {times}")
    if (stock or fused).picture.getcolors(1):
        whose = "stock picture" if stock else "picture"
        print(f"note: the {whose} is a single colour (overflow in this dtype, or the pipeline's safety checker)")


@contextmanager
def enough_memory(device: torch.device, advice: Sequence[str]) -> Iterator[None]:
    """Raises UserError with the advice where memory runs out."""
    try:
        yield
    except Exception as error:
        if not is_about_memory(error):
            raise
        helps = f"what would help: {', '.join(advice)}" if advice else "this needs another device"
        raise UserError(f"--device {device}: not enough memory; {helps} ({why(error)})") from error


def check_size(pipe: Any, device: torch.device, width: int, height: int) -> None:
    """Raises MemoryError where the last layer of the decoder alone, its input and its output, is more than the device has.

    A CPU's allocator promises more than there is; the system then ends the process without a word.
    """
    channels = (getattr(pipe.vae.config, "block_out_channels", None) or (3,))[0]
    needed, there = 2 * width * height * channels * pipe.vae.dtype.itemsize, memory_of(device)
    if there is not None and needed > there:
        raise MemoryError(f"a picture of {width}x{height} takes {needed / 1e9:.0f} GB to decode; there are {there / 1e9:.0f}")


def _check_steps(request: Request) -> None:
    """Raises UserError for more steps than the scheduler was trained with: each scheduler has an error of its own for that."""
    most = getattr(request.pipe.scheduler.config, "num_train_timesteps", None)
    if most is not None and request.steps > most:
        raise UserError(f"--steps {request.steps}: the scheduler has only {most} step{plural(most)}; use fewer")


def _stock(request: Request, *, warm_up: bool = False) -> Result:
    try:
        return _generate(request, "stock", warm_up=warm_up)
    except Exception as error:  # a model that loads may still lack anything, and says so in its own way
        if is_about_memory(error):
            raise
        raise UserError(f"stock diffusers cannot run this model, adapter and picture: {why(error)}") from error


def _generate(request: Request, label: str, *, warm_up: bool = False) -> Result:
    pipe, ends = request.pipe, list[float]()

    def step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if request.device.type == "cuda":
            torch.cuda.synchronize(request.device)  # else the clock is read before the step is done
        ends.append(time.perf_counter())
        return tensors

    def call(steps: int) -> Image.Image:
        generator = torch.Generator().manual_seed(request.seed)
        result = pipe(**request.arguments, num_inference_steps=steps, generator=generator, callback_on_step_end=step_end)
        picture: Image.Image = result.images[0]
        return picture

    if warm_up:
        pipe.set_progress_bar_config(disable=True)
        call(1)
        ends.clear()
    pipe.set_progress_bar_config(desc=f"{label:11}")
    picture = call(request.steps)
    intervals = [end - start for start, end in pairwise(ends)]
    return Result(picture, 1e3 * statistics.median(intervals) if intervals else math.nan)
