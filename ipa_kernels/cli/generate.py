"""`ipa-kernels generate`: one picture with IP-Adapters, accelerated, from the user's own weights and pictures."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report import plural
from .adapter_options import Adapter, check_adapters
from .arguments import (
    SCALE,
    WEIGHT_HELP,
    Commands,
    add_command,
    add_machine,
    add_model,
    finite,
    multiple_of_8,
    seed,
    whole_number,
)
from .errors import UserError
from .output_files import check_overwriting, writable
from .quiet import importing

if TYPE_CHECKING:
    import torch

    from .picture_metadata import AdapterPictures
    from .pipeline_run import Request

_DESCRIPTION = """Generate one picture with IP-Adapters, accelerated: print what ran where and why and the time per step.
--compare runs stock diffusers too, from the same seed. Without --model: a small pipeline with random weights, built in code,
that needs neither a GPU nor the hub and draws noise; its adapters are called base and plus."""

_PAIRING = """--image, --mask, --scale and --ip-adapter-weight belong to the --ip-adapter before them; with one adapter the
order does not matter. Without masks an adapter attends to all of its images at once, with one scale; with masks to each alone,
with a scale each."""


@dataclass(frozen=True)
class GenerateOptions:
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


class _OfAdapter(argparse.Action):
    """Puts values where they belong: `const` names the list of the adapter that was named last; None: a new adapter."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        adapters = getattr(namespace, self.dest) or [Adapter()]
        setattr(namespace, self.dest, adapters)
        if self.const is not None:
            if adapters[-1].path is None:
                adapters[-1].early.append(option_string)
            getattr(adapters[-1], self.const).extend(values)
        elif adapters[-1].path is None:
            adapters[-1].path = values
        else:
            adapters.append(Adapter(values))


def add(commands: Commands) -> None:
    """Add it to the subparsers of the command line."""
    generate = add_command(
        commands,
        "generate",
        GenerateOptions,
        run,
        help="generate a picture with IP-Adapters, accelerated; --compare: and stock",
        description=_DESCRIPTION,
    )
    add_model(generate)
    of_adapter: dict[str, Any] = {"dest": "adapters", "action": _OfAdapter}
    adapters = generate.add_argument_group("the adapters, each followed by what belongs to it", _PAIRING)
    adapters.add_argument(
        "--ip-adapter",
        metavar="PATH",
        help="an IP-Adapter: a weight file, a folder or a hub id; again for the next one. FaceID adapters need embeddings of "
        "faces and are refused",
        **of_adapter,
    )
    adapters.add_argument("--ip-adapter-weight", metavar="FILE", nargs=1, const="weights", help=WEIGHT_HELP, **of_adapter)
    adapters.add_argument(
        "--image", metavar="FILE", nargs="+", const="images", help="reference pictures, at least one per adapter", **of_adapter
    )
    adapters.add_argument(
        "--mask",
        metavar="FILE",
        nargs="+",
        const="masks",
        help="where in the picture the images apply, one grey picture per image: where it is lighter than middle grey. Of the "
        "picture's aspect ratio, in any size; colours and transparency are refused",
        **of_adapter,
    )
    adapters.add_argument(
        "--scale",
        metavar="X",
        nargs="+",
        type=finite,
        const="scales",
        help=f"strength of the adapter, or of each masked image (default: {SCALE})",
        **of_adapter,
    )
    picture = generate.add_argument_group("the picture")
    picture.add_argument("--prompt", metavar="TEXT", default="", help="default: none, the images alone")
    picture.add_argument("--negative-prompt", metavar="TEXT", help="what should not be in it")
    picture.add_argument("--guidance", metavar="X", type=finite, help="guidance scale (default: the pipeline's)")
    picture.add_argument(
        "--steps", metavar="N", type=whole_number(1), default=30, help="denoising steps (default: %(default)s)"
    )
    picture.add_argument("--seed", metavar="N", type=seed, default=0, help="default: %(default)s")
    picture.add_argument("--width", metavar="N", type=multiple_of_8, help="in pixels (default: the model's)")
    picture.add_argument("--height", metavar="N", type=multiple_of_8, help="in pixels (default: the model's)")
    picture.add_argument(
        "--output",
        metavar="FILE",
        default="generated.png",
        help="the PNG to write, with the settings as text in it; one that is there is replaced (default: %(default)s)",
    )
    picture.add_argument(
        "--compare",
        action="store_true",
        help="run stock diffusers first, print the largest difference (of 255) and both times, and write both pictures and "
        "their difference to FILE-compare.png",
    )
    machine = add_machine(generate)
    machine.add_argument(
        "--offload",
        choices=("none", "model", "sequential"),
        default="none",
        help="keep on the GPU only the model that runs, or only the layer that runs (slower, least memory); needs accelerate "
        "(default: %(default)s)",
    )


def run(options: GenerateOptions) -> int:
    """Generate; print what ran and the time per step; write the picture, and on request the comparison with stock.

    Raises UserError, before anything is written, where the options name something that does not exist or does not work.
    """
    with importing("diffusers"):
        import torch

        from .device import available_device, check_switch, chosen_dtype, threads
        from .loading import Weights, build_pipeline, load_pipeline, move_to_device, read_picture
        from .masks import read_mask
        from .picture_metadata import AdapterPictures, comparison_sheet, settings
        from .pictures import save
        from .pipeline_run import Request, Result, accelerate, compare, enough_memory, print_outcome
        from .quiet import quiet

    adapters = options.adapters or [Adapter()]
    check_adapters(adapters)
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
    inputs = [
        AdapterPictures(a, [read_picture(path) for path in a.images], [read_mask(path) for path in a.masks]) for a in adapters
    ]
    advice = _memory_advice(options, device, dtype)
    with quiet(), threads(torch.get_num_threads() if options.model else 1), enough_memory(device, advice):
        if options.model is None:
            pipe = build_pipeline(dtype, [adapter.name for adapter in adapters])
        else:
            weights = [Weights(str(adapter.path), adapter.weight) for adapter in adapters]
            pipe = load_pipeline(options.model, weights, options.image_encoder, dtype)
        arguments = _arguments(pipe, options, inputs, device)
        move_to_device(pipe, device, options.offload)
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
        save(comparison_sheet(inputs, stock, fused, report), compared)
    print_outcome(report, fused, stock)
    print(f"{output}: the picture, its settings in its text")
    if stock is not None:
        print(f"{compared}: {'images, masks' if any(i.masks for i in inputs) else 'images'}, stock, accelerated, difference")
    return 0


def _check_names(model: str | None, adapters: list[Adapter]) -> None:
    """Raises UserError where --model and --ip-adapter do not go together, or name nothing."""
    from .loading import TINY_ADAPTERS, check_paths

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


def _memory_advice(options: GenerateOptions, device: torch.device, dtype: torch.dtype) -> list[str]:
    import torch

    advice = ["a smaller --width and --height"]
    if device.type != "cpu":
        advice += ["--dtype float16"] if dtype == torch.float32 else []
        advice += {"none": ["--offload model"], "model": ["--offload sequential"]}.get(options.offload, [])
    return advice


def _arguments(pipe: Any, options: GenerateOptions, inputs: list[AdapterPictures], device: torch.device) -> dict[str, Any]:
    """The arguments of pipe(...). Raises UserError for those that it does not take, and for masks of another shape, and
    MemoryError for a picture that is too large.
    """
    from .masks import check_layout, mask_tensor
    from .pipeline_run import check_size

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


def _print_request(request: Request, options: GenerateOptions, dtype: torch.dtype, inputs: list[AdapterPictures]) -> None:
    from ..kernels.dtypes import dtype_name

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
