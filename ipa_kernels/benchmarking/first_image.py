"""Time to the first image: from a pipeline in memory to its latents, in a process of its own, on compiler caches of its own.

`python -m ipa_kernels.benchmarking.first_image JOB` is that process: JOB is a `Job` as JSON, the last line that it prints is
`run`'s result.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..graphs.cuda_graphs import graphed
from ..integration.api import enable, explain
from ..integration.prepare_pipeline import prepare
from ..report import FallbackWarning
from ..testing import tiny_pipelines
from ..testing.unet_models import MODELS, VAE_FACTOR, build, clone, load

WAYS = ("stock", "enabled", "prepared", "graphed", "compiled")
"""compiled: `prepare`, then torch.compile of the UNet's repeated blocks."""

TOLERANCE = {"float16": 2e-2, "bfloat16": 1.6e-1, "float32": 1e-4}
"""Of the largest value of stock's latents."""


@dataclass(frozen=True)
class Job:
    """What one process does: a picture in one way, twice.

    model: of `unet_models.MODELS`, with random weights and one adapter; steps: of a generation; side: of the picture in
    pixels, None for what the model was made for.
    """

    way: str
    model: str
    steps: int
    dtype: str
    device: str
    side: int | None = None


def in_process(job: Job, caches: Path) -> dict[str, Any]:
    """`run` in a process of its own, on as many threads, with Triton's and Inductor's caches in a folder.

    "reason" if it failed.
    """
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-m", "ipa_kernels.benchmarking.first_image", json.dumps(asdict(job))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or ["no word"])[-1][:200], "within": False}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def run(job: Job) -> dict[str, Any]:
    """In this process: seconds of the first and of the second picture, and the distance to stock's.

    "first" has what a user waits for once: `enable`, and `prepare`, `graphed` or the compilation before it. On a CPU in float32
    only the same bits will do, where nothing is compiled.
    """
    warnings.simplefilter("ignore", FallbackWarning)
    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    model = MODELS[job.model]
    unet = build(model, dtype, device)
    load(unet, model, 1)
    stock, pipe = _pipeline(clone(unet)), _pipeline(unet)
    arguments = _arguments(job, dtype, device)
    seconds = []
    for turn in range(2):
        start = time.perf_counter()
        if turn == 0 and job.way != "stock":
            _switch_on(job.way, pipe, arguments)
        found = pipe(**arguments)[0]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    expected = stock(**arguments)[0]
    distance = float((found - expected).abs().max() / expected.abs().max())
    exact = device.type == "cpu" and dtype == torch.float32 and job.way in ("stock", "enabled")
    report = explain(pipe)
    return {
        "first": seconds[0],
        "second": seconds[1],
        "distance": distance,
        "within": distance <= (0 if exact else TOLERANCE[job.dtype]),
        "layers": {"triton": report.triton, "eager": report.eager, "stock": report.stock},
    }


def _pipeline(unet: Any) -> Any:
    """Around the UNet, without encoders; its VAE is never run."""
    pipe = (
        tiny_pipelines.stable_diffusion_xl()
        if unet.config.addition_embed_type == "text_time"
        else tiny_pipelines.stable_diffusion()
    )
    pipe.register_modules(unet=unet)
    pipe.vae_scale_factor = VAE_FACTOR
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _arguments(job: Job, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Of `pipe(...)`: embeddings of text and image, and latents, all random."""
    model = MODELS[job.model]
    config = model.config
    side = job.side or model.side
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    arguments = {
        "prompt_embeds": draw(1, 77, config["cross_attention_dim"]),
        "negative_prompt_embeds": draw(1, 77, config["cross_attention_dim"]),
        "ip_adapter_image_embeds": [draw(2, 1, model.image_dims[0])],
        "latents": draw(1, 4, side // VAE_FACTOR, side // VAE_FACTOR),
        "height": side,
        "width": side,
        "num_inference_steps": job.steps,
        "output_type": "latent",
    }
    if model.pooled:
        arguments |= {name: draw(1, model.pooled) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    return arguments


def _switch_on(way: str, pipe: Any, arguments: dict[str, Any]) -> None:
    """What a user writes before the first generation."""
    enable(pipe)
    if way == "graphed":
        graphed(pipe)
    if way in ("prepared", "compiled"):
        prepare(pipe, **arguments)
    if way == "compiled":
        pipe.unet.compile_repeated_blocks(fullgraph=True)


if __name__ == "__main__":
    from diffusers.utils import logging

    logging.set_verbosity_error()
    print(json.dumps(run(Job(**json.loads(sys.argv[1])))))
