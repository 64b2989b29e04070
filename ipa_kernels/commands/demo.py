"""`ipa-kernels demo`: one picture stock and one accelerated, from the same seed, and what differs: pixels and time."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..dtypes import dtype_name
from ..report import plural
from .errors import UserError
from .files import check_overwriting, writable
from .generation import Request, compare, enough_memory, print_outcome
from .loading import Weights, build_pipeline, check_paths, load_pipeline, read_picture
from .machine import available_device, check_switch, chosen_dtype, threads
from .pictures import Panel, compose, draw_reference, save
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
    check_switch()
    output = writable(options.output)
    check_overwriting([output], [options.image])
    device = available_device(options.device)
    dtype = chosen_dtype(options.dtype, device)
    reference = draw_reference() if options.image is None else read_picture(options.image)
    advice = ["--dtype float16"] if device.type != "cpu" and dtype == torch.float32 else []
    with quiet(), threads(1 if options.model is None else torch.get_num_threads()), enough_memory(device, advice):
        if options.model is None or options.ip_adapter is None:
            pipe, what = build_pipeline(dtype), "built in code, random weights, 1 CPU thread"
        else:
            adapter = Weights(options.ip_adapter, options.ip_adapter_weight)
            pipe = load_pipeline(options.model, [adapter], options.image_encoder, dtype)
            what = f"{options.model} with {options.ip_adapter}"
        pipe.to(device)
        pipe.set_ip_adapter_scale(options.scale)
        print(f"{type(pipe).__name__} ({what}) on {device} in {dtype_name(dtype)}")
        steps = f"{options.steps} step{plural(options.steps)} after one to warm up"
        print(f"{steps}, seed {options.seed}, IP-Adapter scale {options.scale}", flush=True)
        arguments = {"prompt": options.prompt, "ip_adapter_image": reference}
        stock, fused, report = compare(Request(pipe, device, arguments, options.steps, options.seed))
    size = f"{stock.picture.width}x{stock.picture.height}"
    sheet = compose(
        [Panel("reference", reference)], Panel(f"stock ({size})", stock.picture), Panel("accelerated", fused.picture)
    )
    save(sheet, output)
    print_outcome(report, fused, stock)
    print(f"{output}: reference, stock, accelerated, difference")
    return 0
