"""Forward and backward: of the attention core, and of a whole UNet in a training step of an IP-Adapter. Ours against stock.

    python -m benchmarks.training [--device cuda] [--cases sdxl_1024_64x64 ...] [--models sd15 ...] [--small] [--json FILE]

The UNet is frozen, so an adapter needs the gradients of queries, image keys and image values; "all" has those of the text's
keys and values too, as a LoRA on them does. Gradients are compared first: those of the core with float64 autograd of the
reference, by `ipa_kernels.reference.compare`; those of the UNet's trained parameters with float64 where it fits, else with
stock's, by `ipa_kernels.benchmarking.timing.gate`. What is outside its bounds is reported and not timed. Then all candidates
take turns.

saved  bytes that the forward keeps for the backward, inputs and weights not counted: a fact about the code, the same on every
       machine of a kind, by `torch.autograd.graph.saved_tensors_hooks`
peak   largest number of bytes allocated during forward and backward, beyond what was there before; on a CPU not measured
"""

import argparse
import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

import ipa_kernels
from ipa_kernels import decoupled_attention, reference
from ipa_kernels.benchmarking.machine import machine_facts
from ipa_kernels.benchmarking.timing import first_line, gate, interleaved, peak_bytes
from ipa_kernels.benchmarking.unet_step import in_float64
from ipa_kernels.ops.dispatch import choose
from ipa_kernels.ops.validation import check_arguments
from ipa_kernels.report import plural
from ipa_kernels.testing.layer_cases import CASES, Case
from ipa_kernels.testing.unet_models import MODELS, Model, UNetInputs, build, clone, load

from .peers import sdpa, stock_order

OURS, STOCK = "ipa_kernels", "stock"
WANTED = ("adapter", "all")
DEFAULT_CASES = (
    "sdxl_1024_64x64", "sdxl_1024_32x32", "sdxl_1024_64x64_plus", "sd15_512_head40", "sd15_512_head80", "sd15_512_head160",
)  # fmt: skip

Backward = Callable[[], tuple[Tensor, ...]]
"""Forward and backward once: the gradients."""


class Core:
    """Forward and backward of one case, by ours, stock or the reference, with the same cotangent."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, wanted: str) -> None:
        made = case.inputs(dtype, device)
        self.scales = made.image_scales[0].tolist()
        self.masks = made.image_masks
        images = len(made.image_keys)
        self.tensors = [made.query, *made.image_keys, *made.image_values, made.key, made.value]
        self.images = images
        self.names = ["query", *(f"image key {i}" for i in range(images)), *(f"image value {i}" for i in range(images))]
        if wanted == "all":
            self.names += ["key", "value"]
        for tensor in self.tensors[: len(self.names)]:
            tensor.requires_grad_(True)
        generator = torch.Generator().manual_seed(1)
        batch, heads, queries, head_dim = made.query.shape
        self.cotangent = torch.randn(batch, queries, heads * head_dim, generator=generator).to(device, dtype)

    def double(self) -> "Core":
        """The same values in float64."""
        other = copy.copy(self)
        other.tensors = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in self.tensors]
        other.masks = tuple(mask if mask is None else mask.double() for mask in self.masks)
        other.cotangent = self.cotangent.double()
        return other

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Query, key, value, image keys, image values."""
        n = self.images
        key, value = self.tensors[2 * n + 1 :]
        return self.tensors[0], key, value, self.tensors[1 : n + 1], self.tensors[n + 1 : 2 * n + 1]

    def plan(self, impl: str) -> tuple[str, list[str]]:
        """What ours runs, and why not the kernel."""
        query, key, value, keys, values = self.arguments()
        return choose(check_arguments(query, key, value, keys, values, self.scales, self.masks, None, None), impl)

    def forward(self, name: str, impl: str = "auto") -> Tensor:
        """[B, M, H·D]."""
        query, key, value, keys, values = self.arguments()
        if name == STOCK:
            width = self.cotangent.shape[-1]
            masks = [mask if mask is None else mask[..., None].expand(query.shape[0], -1, width) for mask in self.masks]
            return stock_order(sdpa, query, [key, *keys], [value, *values], self.scales, masks)
        options: dict[str, Any] = {"image_scales": self.scales, "image_masks": self.masks}
        if name == OURS:
            out = decoupled_attention(query, key, value, keys, values, **options, impl=impl)
        else:
            options["image_scales"] = torch.tensor([self.scales] * query.shape[0], dtype=torch.float32, device=query.device)
            out = reference.decoupled_attention(query, key, value, keys, values, **options)
        return out.transpose(1, 2).flatten(2)

    def gradients(self, name: str, impl: str = "auto") -> tuple[Tensor, ...]:
        """Of `names`, in their order."""
        return torch.autograd.grad(self.forward(name, impl), self.tensors[: len(self.names)], self.cotangent)


def measure_core(case: Case, wanted: str, dtype: torch.dtype, device: torch.device, impl: str, rounds: int) -> dict[str, Any]:
    """One row: the gate, then times and memory if it is green."""
    core = Core(case, dtype, device, wanted)
    row: dict[str, Any] = {"case": asdict(case), "wanted": wanted, "query_bytes": _bytes(core.tensors[0])}
    runs: dict[str, Backward] = {OURS: lambda: core.gradients(OURS, impl), STOCK: lambda: core.gradients(STOCK)}
    try:
        row["ran"], row["why not the kernel"] = core.plan(impl)
        ours, stock = runs[OURS](), runs[STOCK]()
    except Exception as error:  # what cannot run is a result
        return row | {"within": False, "reason": first_line(error)}
    truth = core.double().gradients("reference")
    keys = [tensor.detach() for tensor in core.tensors]
    score = reference.largest_score(keys[0], keys[1 : core.images + 1] + keys[-2:-1])
    compared = {
        name: reference.compare(a, b, c, score=score) for name, a, b, c in zip(core.names, ours, stock, truth, strict=True)
    }
    row |= {
        "within": all(comparison.within for comparison in compared.values()),
        "equal": all(map(torch.equal, ours, stock)),
        "gradients": {name: asdict(comparison) for name, comparison in compared.items()},
    }
    if not row["within"]:
        return row | {"reason": "outside the error budget: " + ", ".join(n for n, c in compared.items() if not c.within)}
    forwards = {OURS: lambda: core.forward(OURS, impl), STOCK: lambda: core.forward(STOCK)}
    return row | _measured(runs, forwards, core.tensors, device, rounds)


class Step:
    """Forward and backward of a UNet with one adapter, whose parameters are trained; the rest is frozen."""

    def __init__(
        self, base: Any, inputs: UNetInputs, dtype: torch.dtype, enabled: bool, checkpointing: bool, impl: str
    ) -> None:
        self.unet = clone(base)
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        if enabled:
            ipa_kernels.enable(self.unet, impl=impl)
        self.inputs = inputs
        self.dtype = dtype
        self.trained = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(2)
        self.cotangent = torch.randn(inputs.sample.shape, generator=generator).to(inputs.sample.device)

    def forward(self) -> Tensor:
        """A number whose gradient stands for a loss's; a mean over pixels would underflow in float16."""
        device = self.inputs.sample.device.type
        with torch.autocast(device, self.dtype, enabled=self.dtype in (torch.float16, torch.bfloat16)):
            out = self.inputs.step(self.unet, 0)
        return (out.to(self.cotangent.dtype) * self.cotangent).sum()

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.trained)


def trainable(model: Model, dtype: torch.dtype, device: torch.device) -> Any:
    """A UNet in `dtype` with a base adapter in float32, which alone requires gradients."""
    unet = build(model, dtype, device)
    load(unet, model, 1)
    trained: list[nn.Module] = [unet.encoder_hid_proj]
    trained += [processor for processor in unet.attn_processors.values() if hasattr(processor, "to_k_ip")]
    for module in trained:
        module.float().requires_grad_(True)
    return unet


def measure_model(model: Model, dtype: torch.dtype, device: torch.device, impl: str, rounds: int) -> list[dict[str, Any]]:
    """One row per candidate: the gate, then times and memory of all that passed it, in turns."""
    base = trainable(model, dtype, device)
    inputs = UNetInputs(model, 1, False, dtype, device)
    truth = in_float64(base, inputs, _truth, room=6)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for checkpointing in (False, True):
        expected: Tensor | None = None
        for name in (STOCK, OURS):
            label = f"{name}, checkpointing" if checkpointing else name
            row: dict[str, Any] = {"candidate": name, "checkpointing": checkpointing, "reason": None, "within": True}
            rows[label] = row
            try:
                step = Step(base, inputs, dtype, name == OURS, checkpointing, impl)
                flat = _flat(step())
            except Exception as error:  # what cannot run is a result
                row |= {"reason": first_line(error), "within": False}
                continue
            if name == STOCK:
                expected = flat
            else:
                report = ipa_kernels.explain(step.unet)
                row["layers"] = {"triton": report.triton, "eager": report.eager, "stock": report.stock}
                row["why not the kernel"] = sorted({layer.reason for layer in report.layers if layer.reason})
                row |= {"within": False} if expected is None else gate(flat, expected, truth, dtype)
                if not row["within"]:
                    nothing = row.get("proves nothing")
                    row["reason"] = f"not timed: {'stock proves nothing' if nothing else 'outside the error budget'}"
                    continue
            steps[label] = step
    inside = [*base.parameters(), *base.buffers(), inputs.sample, inputs.text, *_tensors(inputs.added)]
    forwards = {label: step.forward for label, step in steps.items()}
    for label, entry in _measured(dict(steps), forwards, inside, device, rounds)["candidates"].items():
        rows[label] |= entry
    return list(rows.values())


def _truth(unet: Any, inputs: UNetInputs) -> Tensor:
    """The gradients of a UNet in float64, by stock's code."""
    step = Step(unet, inputs, torch.float64, False, False, "auto")
    step.cotangent = step.cotangent.double()
    return _flat(step())


def _measured(
    runs: dict[str, Any],
    forwards: dict[str, Callable[[], Tensor]],
    inside: Iterable[Tensor],
    device: torch.device,
    rounds: int,
) -> dict[str, Any]:
    """The candidates' entries: saved bytes, peak bytes, seconds if there are rounds; and stock's over ours."""
    known = [tensor.untyped_storage().data_ptr() for tensor in inside]
    entries: dict[str, dict[str, Any]] = {}
    for name, forward in forwards.items():
        entries[name] = {"saved_bytes": saved_bytes(forward, known), "peak_bytes": peak_bytes(runs[name], device)}
    for name, found in interleaved(runs, device, rounds).items() if rounds else ():
        entries[name]["seconds"] = asdict(found)
    return {"candidates": entries, "ratios": ratios(entries)}


def ratios(entries: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Stock over ours, of what both have."""
    found = {}
    for name, ours in entries.items():
        stock = entries.get(name.replace(OURS, STOCK))
        if OURS in name and stock is not None:
            suffix = name.removeprefix(OURS)
            if "seconds" in ours:
                found[f"seconds{suffix}"] = stock["seconds"]["median"] / ours["seconds"]["median"]
            for kind in ("saved_bytes", "peak_bytes"):
                if ours[kind] and stock[kind]:
                    found[f"{kind}{suffix}"] = stock[kind] / ours[kind]
    return found


def saved_bytes(forward: Callable[[], Tensor], known: Sequence[int]) -> int:
    """Of all memory that the backward holds on to, each piece counted once, except what is `known` by its address."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # held until the count is done: freed memory would be given out, and counted, again
        out = forward()
    total = sum(size for address, size in kept.items() if address not in set(known))
    del out
    return total


def main() -> int:
    """Print a table per case and model; 1 if a gradient is outside its error budget or cannot be computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="float16 on a GPU, float32 on a CPU")
    parser.add_argument("--impl", choices=["auto", "triton", "eager"], default="auto")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(DEFAULT_CASES), metavar="CASE")
    parser.add_argument("--wanted", nargs="+", choices=WANTED, default=list(WANTED), help="which gradients")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), help="default: sd15 and sdxl on a GPU, tiny on a CPU")
    parser.add_argument("--small", action="store_true", help="two heads and few queries in each case")
    parser.add_argument("--rounds", type=int, default=10, help="0: bytes alone, such as of the kernel in Triton's interpreter")
    parser.add_argument("--json", type=Path, help="write facts about the machine and all rows, after each")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))
    logging.set_verbosity_error()
    # the rows say what ran and why
    warnings.simplefilter("ignore", ipa_kernels.FallbackWarning)
    facts = machine_facts(device)
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    if device.type == "cpu":
        print(
            "a CPU: ours is eager attention there, the same operations as stock: expect ratios near 1; peaks are not measured"
        )
    document: dict[str, Any] = {
        "benchmark": "training",
        "machine": facts,
        "dtype": str(dtype),
        "impl": arguments.impl,
        "rows": [],
        "models": {},
    }

    def write() -> None:
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")

    for name in arguments.cases:
        case = CASES[name].small() if arguments.small else CASES[name]
        for wanted in arguments.wanted:
            row = measure_core(case, wanted, dtype, device, arguments.impl, arguments.rounds)
            document["rows"].append(row)
            print(_core_lines(row), flush=True)
            write()
    models = arguments.models if arguments.models is not None else ["sd15", "sdxl"] if device.type == "cuda" else ["tiny"]
    for name in models:
        rows = measure_model(MODELS[name], dtype, device, arguments.impl, arguments.rounds)
        entries = {_label(row): row for row in rows if "saved_bytes" in row}
        document["models"][name] = {"rows": rows, "ratios": ratios(entries)}
        print(_model_lines(name, document["models"][name]), flush=True)
        write()
    rows = document["rows"] + [row for entry in document["models"].values() for row in entry["rows"]]
    return 0 if all(row["within"] for row in rows) else 1


def _core_lines(row: dict[str, Any]) -> str:
    case, query = row["case"], row["query_bytes"]
    keys = "+".join(map(str, (case["text"], *case["images"])))
    heads = f"{case['heads']} head{plural(case['heads'])} of {case['head_dim']}"
    lines = [f"{case['name']}, gradients {row['wanted']}: {heads}, {keys} keys"]
    if not row["within"]:
        return "\n".join([*lines, f"  not timed: {row['reason']}"])
    for name, entry in row["candidates"].items():
        notes = "; ".join(row["why not the kernel"]) if name == OURS else ""
        lines.append(f"  {name:12} {_figures(entry)}  ({entry['saved_bytes'] / query:.2f} times the query)  {notes}".rstrip())
    return "\n".join([*lines, *_ratio_line(row["ratios"])])


def _model_lines(name: str, entry: dict[str, Any]) -> str:
    lines = [f"{name}: forward and backward of one step, batch 2"]
    for row in entry["rows"]:
        notes = "; ".join(filter(None, [row["reason"], *row.get("why not the kernel", [])]))
        lines.append(f"  {_label(row):28} {_figures(row) if 'saved_bytes' in row else '-'}  {notes}")
    return "\n".join([*lines, *_ratio_line(entry["ratios"])])


def _label(row: dict[str, Any]) -> str:
    return f"{row['candidate']}, checkpointing" if row["checkpointing"] else str(row["candidate"])


def _figures(entry: dict[str, Any]) -> str:
    peak = "not measured" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 1e6:.1f} MB"
    time = f"{1e3 * entry['seconds']['median']:9.2f} ms" if "seconds" in entry else "not timed"
    return f"{time:>12}  saved {entry['saved_bytes'] / 1e6:8.1f} MB  peak {peak}"


def _ratio_line(found: dict[str, float]) -> list[str]:
    """None where there is nothing to compare: the kernel saves 0 bytes."""
    return ["  stock over ours: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items())] if found else []


def _flat(gradients: Iterable[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def _tensors(added: dict[str, Any]) -> list[Tensor]:
    return [tensor for value in added.values() for tensor in (value if isinstance(value, list) else [value])]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


if __name__ == "__main__":
    sys.exit(main())
