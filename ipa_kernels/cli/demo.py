"""`ipa-kernels demo`: one picture stock and one accelerated, from the same seed, and what differs: pixels and time."""

from dataclasses import dataclass
from pathlib import Path

from ..report import plural
from .arguments import PROMPT, SCALE, Commands, add_command, add_machine, add_weights, finite, seed, steps
from .errors import UserError
from .output_files import check_overwriting, writable
from .quiet import importing


@dataclass(frozen=True)
class DemoOptions:
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


def add(commands: Commands) -> None:
    """Add it to the subparsers of the command line."""
    demo = add_command(
        commands,
        "demo",
        DemoOptions,
        run,
        help="run a pipeline stock and accelerated, and compare",
        description="Run a diffusers pipeline with an IP-Adapter, stock and accelerated, with the same seed: print what ran "
        "where and why, the largest difference between the two pictures (of 255) and the time per step, and write them side "
        "by side. Without --model: a small pipeline with random weights, built in code, that needs neither a GPU nor the hub.",
    )
    add_weights(demo)
    picture = demo.add_argument_group("the picture")
    picture.add_argument("--image", metavar="FILE", help="the reference picture (default: one drawn in code)")
    picture.add_argument("--prompt", metavar="TEXT", default=PROMPT, help="default: %(default)s")
    picture.add_argument(
        "--scale", metavar="X", type=finite, default=SCALE, help="strength of the IP-Adapter (default: %(default)s)"
    )
    picture.add_argument(
        "--steps", metavar="N", type=steps, default=20, help="denoising steps, at least 2 (default: %(default)s)"
    )
    picture.add_argument("--seed", metavar="N", type=seed, default=0, help="of both runs (default: %(default)s)")
    picture.add_argument("--output", metavar="FILE", default="demo.png", help="the PNG to write (default: %(default)s)")
    add_machine(demo)


def run(options: DemoOptions) -> int:
    """Run stock, then accelerated; print what ran, what differs and the times; write the pictures side by side.

    Raises UserError, before anything is written, where the options name something that does not exist or does not work.
    """
    with importing("diffusers"):
        import torch

        from ..kernels.dtypes import dtype_name
        from .device import available_device, check_switch, chosen_dtype, threads
        from .loading import Weights, build_pipeline, check_paths, load_pipeline, read_picture
        from .pictures import Panel, compose, draw_reference, save
        from .pipeline_run import Request, compare, enough_memory, print_outcome
        from .quiet import quiet

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
