"""`ipa-kernels generate`: one picture with IP-Adapters, accelerated, from the user's own weights and pictures."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..dtypes import dtype_name
from ..report import plural
from .errors import UserError
from .files import check_overwriting, writable
from .generation import Request, Result, accelerate, check_size, compare, enough_memory, print_outcome
from .loading import (
    TINY_ADAPTERS,
    Weights,
    build_pipeline,
    check_paths,
    load_pipeline,
    place,
    read_picture,
)
from .machine import available_device, check_switch, chosen_dtype, threads
from .pairing import Adapter, check
from .pictures import save
from .quiet import quiet
from .record import Inputs, settings, sheet
from .regions import check_layout, mask_tensor, read_mask


@dataclass(frozen=True)
class Options:
    """The command line of `ipa-kernels generate`; None stands for what was not given."""

    model: str | None
    adapters: list[Adapter] | None
    image_encoder: str
    prompt: str
    negative_prompt: str | None
    guidance: float | None
    steps: int
    seed: int
    width: int | None
    height: int | None
    output: str
    compare: bool
    device: str | None
    dtype: str | None
    offload: str


def run(options: Options) -> int:
    """Generate; print what ran and the time per step; write the picture, and on request the comparison with stock.

    Raises UserError, before anything is written, where the options name something that does not exist or does not work.
    """
    adapters = options.adapters or [Adapter()]
    check(adapters)
    _check_names(options.model, adapters)
    output = writable(options.output)
    compared = output.with_name(f"{output.stem}-compare.png")
    outputs = [output, writable(str(compared))] if options.compare else [output]
    check_overwriting(outputs, (path for adapter in adapters for path in (*adapter.images, *adapter.masks)))
    if options.compare:
        check_switch()
    device = available_device(options.device)
    if options.offload != "none" and device.type == "cpu":
        raise UserError(f"--offload {options.offload}: moves models between a GPU and the CPU; --device is {device}")
    dtype = chosen_dtype(options.dtype, device)
    inputs = [Inputs(a, [read_picture(path) for path in a.images], [read_mask(path) for path in a.masks]) for a in adapters]
    advice = _memory_advice(options, device, dtype)
    with quiet(), threads(torch.get_num_threads() if options.model else 1), enough_memory(device, advice):
        if options.model is None:
            pipe = build_pipeline(dtype, [adapter.name for adapter in adapters])
        else:
            weights = [Weights(str(adapter.path), adapter.weight) for adapter in adapters]
            pipe = load_pipeline(options.model, weights, options.image_encoder, dtype)
        arguments = _arguments(pipe, options, inputs, device)
        place(pipe, device, options.offload)
        pipe.set_ip_adapter_scale([adapter.scale for adapter in adapters])
        request = Request(pipe, device, arguments, options.steps, options.seed)
        _print_request(request, options, dtype, inputs)
        stock: Result | None = None
        if options.compare:
            stock, fused, report = compare(request)
        else:
            fused, report = accelerate(request)
    save(fused.picture, output, settings(request, options.model, adapters, dtype))
    if stock is not None:
        save(sheet(inputs, stock, fused, report), compared)
    print_outcome(report, fused, stock)
    print(f"{output}: the picture, its settings in its text")
    if stock is not None:
        print(f"{compared}: {'images, masks' if any(i.masks for i in inputs) else 'images'}, stock, accelerated, difference")
    return 0


def _check_names(model: str | None, adapters: list[Adapter]) -> None:
    """Raises UserError where --model and --ip-adapter do not go together, or name nothing."""
    if model is not None:
        if adapters[0].path is None:
            raise UserError("--model and --ip-adapter go together: give both, or neither for the pipeline built in code")
        check_paths(Path(model), *(Path(str(adapter.path)) for adapter in adapters))
        return
    for adapter in adapters:
        if adapter.path not in (None, *TINY_ADAPTERS):
            raise UserError(f"--ip-adapter {adapter.path}: needs --model; without it: {' or '.join(TINY_ADAPTERS)}")
        if adapter.weights:
            raise UserError(f"--ip-adapter-weight {adapter.weight}: needs --model")


def _memory_advice(options: Options, device: torch.device, dtype: torch.dtype) -> list[str]:
    advice = ["a smaller --width and --height"]
    if device.type != "cpu":
        advice += ["--dtype float16"] if dtype == torch.float32 else []
        advice += {"none": ["--offload model"], "model": ["--offload sequential"]}.get(options.offload, [])
    return advice


def _arguments(pipe: Any, options: Options, inputs: list[Inputs], device: torch.device) -> dict[str, Any]:
    """The arguments of pipe(...). Raises UserError for those that it does not take, and for masks of another shape, and
    MemoryError for a picture that is too large.
    """
    sample = pipe.unet.config.sample_size
    rows, columns = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    width, height = options.width or columns * pipe.vae_scale_factor, options.height or rows * pipe.vae_scale_factor
    check_size(pipe, device, width, height)
    arguments: dict[str, Any] = {
        "prompt": options.prompt,
        "ip_adapter_image": [adapter.images for adapter in inputs],
        "width": width,
        "height": height,
    }
    if options.negative_prompt is not None:
        arguments["negative_prompt"] = options.negative_prompt
    if options.guidance is not None:
        arguments["guidance_scale"] = options.guidance
    if any(adapter.masks for adapter in inputs):
        masks = [mask_tensor(i.masks, i.adapter.masks, width, height) if i.masks else None for i in inputs]
        check_layout(pipe, width, height)
        arguments["cross_attention_kwargs"] = {"ip_adapter_masks": masks}
    unknown = arguments.keys() - inspect.signature(pipe.__call__).parameters.keys()
    if unknown:
        raise UserError(f"--model {options.model}: a {type(pipe).__name__} takes no {', '.join(sorted(unknown))}")
    return arguments


def _print_request(request: Request, options: Options, dtype: torch.dtype, inputs: list[Inputs]) -> None:
    pipe, arguments = request.pipe, request.arguments
    what = options.model or "built in code, random weights, 1 CPU thread"
    offload = f", offloading: {options.offload}" if options.offload != "none" else ""
    print(f"{type(pipe).__name__} ({what}) on {request.device} in {dtype_name(dtype)}{offload}")
    for each in inputs:
        images, scale = ", ".join(each.adapter.images), each.adapter.scale
        where = f" where {', '.join(each.adapter.masks)} are light" if each.masks else ""
        print(f"{each.adapter.name}: {images}{where}, scale {scale}")
    warm_up = " after one to warm up" if options.compare else ""
    size = f"{arguments['width']}x{arguments['height']}"
    print(f"{size}, {options.steps} step{plural(options.steps)}{warm_up}, seed {options.seed}", flush=True)
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is not None and len(tokenizer(options.prompt).input_ids) > tokenizer.model_max_length:
        print(f"note: the pipeline reads the first {tokenizer.model_max_length} tokens of the prompt, not all of it")
