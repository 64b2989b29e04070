"""What is computed once per generation: counts, bytes, time and memory of cross-attention and of a small UNet, beside stock.

    python -m benchmarks.generation [--device cuda] [--model sdxl sd15] [--rounds 10] [--json FILE]

Stock diffusers and enabled run on the same modules in turns. Each result is compared with float64 and with stock's first, and
what is outside the error budget is not timed. "beyond" is the time of a layer less that of its to_q and to_out, as a weighted
sum over the layers of a model. The enabled layer is timed in a step that is not the first of its generation: its keys, values
and masks are remembered.

Bytes are a model, in units of U = batch x queries x channels x bytes per element: an attention reads Q and writes its output
(2 U), a product or a sum reads and writes (2 or 3 U), a mask of stock is repeated to full size, cast and read (8 U).
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # so that the kernel's path can be counted; it is never timed

from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ipa_kernels
from ipa_kernels import reference
from ipa_kernels.benchmarking.machine import machine_facts
from ipa_kernels.benchmarking.timing import interleaved
from ipa_kernels.integration import running_step
from ipa_kernels.integration.conditioning_cache import ConditioningCache
from ipa_kernels.integration.processors import unet as processors
from ipa_kernels.integration.state import ModelContext
from ipa_kernels.report import plural
from ipa_kernels.testing import tiny_pipelines

from .operations import count, peak_memory


@dataclass(frozen=True)
class Shape:
    """The cross-attention layers of one resolution of a model."""

    layers: int
    queries: int
    channels: int
    heads: int


MODELS = {
    "sd15": (2 * 384, [Shape(5, 4096, 320, 8), Shape(5, 1024, 640, 8), Shape(5, 256, 1280, 8), Shape(1, 64, 1280, 8)]),
    "sdxl": (2048, [Shape(10, 4096, 640, 10), Shape(60, 1024, 1280, 20)]),
}

VARIANTS = {"one": (1, 4, False), "one masked": (1, 4, True), "three": (3, 16, False), "three masked": (3, 16, True)}
"""Adapters, image tokens of each, and whether each has a mask."""


class Layer:
    """One cross-attention with its inputs, stock or enabled."""

    def __init__(self, shape: Shape, text_dim: int, variant: str, dtype: torch.dtype, device: torch.device) -> None:
        adapters, tokens, masked = VARIANTS[variant]
        torch.manual_seed(0)
        self.attention = Attention(
            shape.channels, cross_attention_dim=text_dim, heads=shape.heads, dim_head=shape.channels // shape.heads
        )
        processor = IPAdapterAttnProcessor2_0(shape.channels, text_dim, [tokens] * adapters, [0.6] * adapters)
        self.attention.set_processor(processor)
        self.attention.to(device, dtype)
        self.hidden = torch.randn(2, shape.queries, shape.channels).to(device, dtype)
        text = torch.randn(2, 77, text_dim).to(device, dtype)
        images = [torch.randn(2, 1, tokens, text_dim).to(device, dtype) for _ in range(adapters)]
        # masks as diffusers' preprocessing returns them: float32 on the CPU
        masks = [torch.rand(1, 1, 1024, 1024).round() for _ in range(adapters)] if masked else None
        self.options: dict[str, Any] = {"encoder_hidden_states": (text, images), "ip_adapter_masks": masks}

    def __call__(self) -> Tensor:
        return self.attention(self.hidden, **self.options)  # type: ignore[no-any-return]

    def projections(self) -> Tensor:
        """What both have: to_q and to_out."""
        return self.attention.to_out[0](self.attention.to_q(self.hidden))  # type: ignore[no-any-return]

    def in_float64(self) -> Tensor:
        """The truth, by stock's code."""
        text, images = self.options["encoder_hidden_states"]
        self.attention.double()
        try:
            return self.attention(  # type: ignore[no-any-return]
                self.hidden.double(),
                encoder_hidden_states=(text.double(), [image.double() for image in images]),
                ip_adapter_masks=self.options["ip_adapter_masks"],
            )
        finally:
            self.attention.to(self.hidden.dtype)

    @contextmanager
    def enabled(self, impl: str) -> Iterator[ConditioningCache]:
        """In the middle of a generation of an enabled UNet, after its first step; what it remembers."""
        context = ModelContext(impl, cache=True)
        processors.install(self.attention.processor, "layer", context, [])
        text, images = self.options["encoder_hidden_states"]
        step = running_step.Step(context)
        with torch.no_grad():
            step.entry = context.conditioning.open([text, *images, *(self.options["ip_adapter_masks"] or ())], ())
        running_step.enter(step)
        try:
            yield context.conditioning
        finally:
            running_step.leave(step)
            processors.uninstall(self.attention.processor)


def measure_layer(
    shape: Shape, text_dim: int, variant: str, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Any]:
    """One row: operations, bytes by the model, and, once the results have been compared, seconds and memory."""
    layer = Layer(shape, text_dim, variant, dtype, device)
    adapters, _, masked = VARIANTS[variant]
    row: dict[str, Any] = {"shape": asdict(shape), "adapters": variant, "dtype": str(dtype)}
    row["operations"] = {"stock": sum(count(layer).values())}
    for impl in ("eager", "triton"):
        with torch.no_grad(), layer.enabled(impl):
            try:
                count(layer)
                row["operations"][impl] = sum(count(layer).values())
            except ipa_kernels.UnsupportedError as error:
                row["operations"][impl] = str(error)
    unit = layer.hidden.numel() * layer.hidden.element_size()
    row["bytes by the model"] = {
        "stock": unit * (2 + 7 * adapters + 8 * adapters * masked + 2),
        "eager": unit * (2 + 7 * adapters + 2 * adapters * masked),
        "triton": unit * 2,
    }

    def run_enabled() -> Tensor:
        return layer()

    def run_stock() -> Tensor:
        # the same module: its processor is handed its own class again for the time of a call
        processor = layer.attention.processor
        ours, processor.__class__ = processor.__class__, IPAdapterAttnProcessor2_0
        try:
            return layer()
        finally:
            processor.__class__ = ours

    with torch.no_grad():
        truth = layer.in_float64()
        with layer.enabled("auto"):
            actual, expected = run_enabled(), run_stock()
            comparison = reference.compare(actual, expected, truth)
            equal = torch.equal(actual, expected)
            row |= {"within": comparison.within or equal, "equal": equal}
            if row["within"]:
                runs = {"stock": run_stock, "enabled": run_enabled, "to_q and to_out": layer.projections}
                row["seconds"] = {name: asdict(timing) for name, timing in interleaved(runs, device, rounds).items()}
                row["peak memory"] = {name: peak_memory(runs[name], device) for name in ("stock", "enabled")}
    return row


def beyond(rows: list[dict[str, Any]], name: str) -> float:
    """Seconds of all layers of a model beyond to_q and to_out."""
    parts = ((row["shape"]["layers"], row["seconds"][name], row["seconds"]["to_q and to_out"]) for row in rows)
    return float(sum(layers * (seconds["median"] - both["median"]) for layers, seconds, both in parts))


class CallCounter(TorchFunctionMode):
    """Counts what a generation calls, by kind. Neither hooks nor replaced functions: with those nothing would be kept.

    A projection is known by its weight. An image projection counts once for each call of its first layer; a resized mask once
    for each bicubic `interpolate`, which nothing else in a UNet calls.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.calls = dict.fromkeys(("to_k", "to_v", "to_k_ip", "to_v_ip", "image projection", "mask resize"), 0)
        self._kinds: dict[int, str] = {}
        for name, module in unet.named_modules():
            for kind in ("to_k", "to_v", "to_k_ip", "to_v_ip"):
                if isinstance(module, nn.Linear) and "attn2" in name and f".{kind}." in f"{name}.":
                    self._kinds[id(module.weight)] = kind
        for projection in unet.encoder_hid_proj.image_projection_layers:  # type: ignore[union-attr]
            first = next(module for module in projection.modules() if isinstance(module, nn.Linear))
            self._kinds[id(first.weight)] = "image projection"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            kind = self._kinds.get(id(args[1]))
            if kind is not None:
                self.calls[kind] += 1
        self.calls["mask resize"] += func is F.interpolate and (kwargs or {}).get("mode") == "bicubic"
        return func(*args, **(kwargs or {}))


def measure_unet(device: torch.device, dtype: torch.dtype, steps: int, rounds: int) -> dict[str, Any]:
    """A whole small pipeline with a base and a masked Plus adapter: calls per generation, time per step, peak memory."""
    pipe = tiny_pipelines.stable_diffusion().to(device, dtype)
    tiny_pipelines.load(pipe, tiny_pipelines.base_adapter(pipe.unet), tiny_pipelines.plus_adapter(pipe.unet, seed=1))
    pipe.set_ip_adapter_scale([0.6, 0.6])
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    inputs = {
        "prompt_embeds": torch.randn(1, 77, tiny_pipelines.CROSS_ATTENTION_DIM),
        "negative_prompt_embeds": torch.randn(1, 77, tiny_pipelines.CROSS_ATTENTION_DIM),
        "ip_adapter_image_embeds": [
            torch.randn(2, 1, tiny_pipelines.IMAGE_EMBED_DIM).to(device, dtype),
            torch.randn(2, 1, 257, tiny_pipelines.IMAGE_EMBED_DIM).to(device, dtype),
        ],
        "cross_attention_kwargs": {"ip_adapter_masks": [None, torch.rand(1, 1, 256, 256).round()]},
        "latents": torch.randn(1, 4, 32, 32),
    }
    inputs |= {name: tensor.to(device, dtype) for name, tensor in inputs.items() if isinstance(tensor, Tensor)}

    def generate() -> Tensor:
        return pipe(**inputs, num_inference_steps=steps, output_type="latent")[0]  # type: ignore[no-any-return]

    def enabled() -> Tensor:
        with ipa_kernels.accelerated(pipe):
            return generate()

    expected, actual = generate(), enabled()
    row: dict[str, Any] = {"steps": steps, "equal": torch.equal(expected, actual)}
    row["largest difference"] = float((expected.float() - actual.float()).abs().max())
    row["calls per generation"] = {}
    for name, run in {"stock": generate, "enabled": enabled}.items():
        with CallCounter(pipe.unet) as counter:
            run()
        row["calls per generation"][name] = counter.calls
    timings = interleaved({"stock": generate, "enabled": enabled}, device, rounds)
    row["seconds per step"] = {name: timing.median / steps for name, timing in timings.items()}
    row["peak memory"] = {"stock": peak_memory(generate, device), "enabled": peak_memory(enabled, device)}
    return row


def main() -> int:
    """Print tables; 1 if a result is outside its error budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="float16 on a GPU, float32 on a CPU")
    parser.add_argument("--model", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--adapters", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="of a generation of the small pipeline")
    parser.add_argument("--json", type=Path, help="write facts about the machine and every number")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))

    facts = machine_facts(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    small = measure_unet(device, dtype, arguments.steps, arguments.rounds)
    calls = small["calls per generation"]
    print(
        f"\na small UNet, {arguments.steps} step{plural(arguments.steps)}, largest difference {small['largest difference']:.2g}"
    )
    for kind in calls["stock"]:
        print(f"  calls of {kind:17} stock {calls['stock'][kind]:6}   enabled {calls['enabled'][kind]:6}")
    for what, unit, factor in (("seconds per step", "ms", 1e3), ("peak memory", "MB", 1e-6)):
        stock, ours = (small[what][name] * factor for name in ("stock", "enabled"))
        print(f"  {what:26} stock {stock:6.1f}   enabled {ours:6.1f} {unit}   ratio {stock / ours:.2f}")

    models: dict[str, Any] = {}
    for model in arguments.model:
        text_dim, shapes = MODELS[model]
        layers = sum(shape.layers for shape in shapes)
        print(f"\n{model}: cross-attention of {layers} layer{plural(layers)}, batch 2, {dtype}")
        for variant in arguments.adapters:
            rows = [measure_layer(shape, text_dim, variant, dtype, device, arguments.rounds) for shape in shapes]
            models.setdefault(model, {})[variant] = {"rows": rows}
            print(_line(variant, rows, models[model][variant]), flush=True)
    if arguments.json:
        document = {"benchmark": "generation", "machine": facts, "small": small, "models": models}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    rows = [row for variants in models.values() for entry in variants.values() for row in entry["rows"]]
    return 0 if all(row["within"] for row in rows) else 1


def _line(variant: str, rows: list[dict[str, Any]], entry: dict[str, Any]) -> str:
    operations = ", ".join(
        f"{name} {value if isinstance(value, int) else '-'}" for name, value in rows[0]["operations"].items()
    )
    moved = {
        name: sum(row["shape"]["layers"] * row["bytes by the model"][name] for row in rows)
        for name in ("stock", "eager", "triton")
    }
    head = f"  {variant:13} operations per layer: {operations}; GB by the model: " + ", ".join(
        f"{name} {size / 1e9:.2f}" for name, size in moved.items()
    )
    if not all(row["within"] for row in rows):
        return f"{head}; not timed: outside the error budget"
    entry["beyond"] = {name: beyond(rows, name) for name in ("stock", "enabled")}
    entry["ratio"] = entry["beyond"]["stock"] / entry["beyond"]["enabled"]
    times = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in entry["beyond"].items())
    peaks = ", ".join(f"{name} {max(row['peak memory'][name] for row in rows) / 1e6:.0f} MB" for name in ("stock", "enabled"))
    same = "equal" if all(row["equal"] for row in rows) else "within the budget"
    return f"{head}\n  {'':13} beyond to_q and to_out: {times}, ratio {entry['ratio']:.2f} ({same}); peak per layer: {peaks}"


if __name__ == "__main__":
    sys.exit(main())
