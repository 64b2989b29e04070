"""Time to the first image: from a pipeline in memory to its latents, with empty compiler caches (cold) and full ones (warm).

    python -m benchmarks.first_image [--device cuda] [--ways stock enabled prepared graphed compiled] [--json FILE]

Each way is a process of its own, twice in turn on caches of its own: Triton's and Inductor's. "first" is what a user waits for
once: the first generation, with `prepare`, `graphed` or the compilation before it; "second" is the generation after that. The
pipeline is a small one with random weights (`ipa_kernels.tiny`) and SD-like layers: on a GPU the time is that of compilers and
launches, hardly of arithmetic. That enabled and stock give the same picture is checked in each process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import ipa_kernels
from ipa_kernels.measure import machine_facts

WAYS = ("stock", "enabled", "prepared", "graphed", "compiled")
"""compiled: `prepare`, then torch.compile of the UNet's repeated blocks."""

STEPS = 4
TOLERANCE = {torch.float16: 2e-2, torch.float32: 1e-4}


def pipeline(device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A pipeline with an IP-Adapter, and the arguments of a generation."""
    from diffusers.utils import logging

    from ipa_kernels import tiny

    logging.set_verbosity_error()
    pipe = tiny.stable_diffusion()
    tiny.load(pipe, tiny.base_adapter(pipe.unet))
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device, dtype)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    arguments = {
        "prompt_embeds": draw(1, 77, tiny.CROSS_ATTENTION_DIM),
        "negative_prompt_embeds": draw(1, 77, tiny.CROSS_ATTENTION_DIM),
        "ip_adapter_image_embeds": [draw(2, 1, tiny.IMAGE_EMBED_DIM)],
        "latents": draw(1, 4, 16, 16),
        "height": 32,
        "width": 32,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }
    return pipe, arguments


def run(way: str, device: torch.device) -> dict[str, Any]:
    """In this process: seconds of the first and of the second generation, and the distance to stock's picture."""
    warnings.simplefilter("ignore", ipa_kernels.FallbackWarning)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipe, arguments = pipeline(device, dtype)
    seconds = []
    for turn in range(2):
        start = time.perf_counter()
        if turn == 0 and way != "stock":
            switch_on(way, pipe, arguments)
        found = pipe(**arguments)[0]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    stock, arguments = pipeline(device, dtype)
    expected = stock(**arguments)[0]
    distance = float((found - expected).abs().max() / expected.abs().max())
    report = ipa_kernels.explain(pipe)
    layers = {"triton": report.triton, "eager": report.eager, "stock": report.stock}
    return {
        "first": seconds[0],
        "second": seconds[1],
        "distance": distance,
        "within": distance <= TOLERANCE[dtype],
        "layers": layers,
    }


def switch_on(way: str, pipe: Any, arguments: dict[str, Any]) -> None:
    """What a user writes before the first generation."""
    ipa_kernels.enable(pipe)
    if way == "graphed":
        ipa_kernels.graphed(pipe)
    if way in ("prepared", "compiled"):
        ipa_kernels.prepare(pipe, **arguments)
    if way == "compiled":
        pipe.unet.compile_repeated_blocks(fullgraph=True)


def in_process(way: str, device: str, caches: Path) -> dict[str, Any]:
    """`run` in a process of its own."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(caches / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor")}
    command = [sys.executable, "-m", "benchmarks.first_image", "--device", device, "--child", way]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"reason": (done.stderr.strip().splitlines() or ["no word"])[-1][:200], "within": False}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> int:
    """Print a line per way; 1 if one gave another picture or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write facts about the machine and every number")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run(arguments.child, torch.device(arguments.device))))
        return 0
    facts = machine_facts(torch.device(arguments.device))
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    rows = []
    for way in arguments.ways:
        with tempfile.TemporaryDirectory() as folder:
            for caches in ("cold", "warm"):
                row = {"way": way, "caches": caches, **in_process(way, arguments.device, Path(folder))}
                rows.append(row)
                seconds = f"first {row['first']:7.2f} s, second {row['second']:7.3f} s" if "first" in row else row["reason"]
                print(f"{way:9} {caches:5} {seconds}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"benchmark": "first_image", "machine": facts, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
