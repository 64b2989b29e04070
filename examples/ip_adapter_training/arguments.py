"""The command line of `train_ip_adapter.py`, and what of it a checkpoint remembers."""

import argparse
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """A mistake in the command line or in what it names, said in a way that tells what to do."""


MAY_CHANGE = {
    "output", "resume", "steps", "checkpoint_every", "keep_checkpoints", "log_every", "validate_every", "validation_samples",
    "validation_prompt", "validation_image", "validation_inference_steps", "workers", "accelerated", "impl", "cpu",
    "gradient_checkpointing", "gradient_accumulation_steps",
}  # fmt: skip
"""What a run that goes on from a checkpoint may choose anew: it changes a result by rounding, or not at all. (With the cosine
schedule `steps` is none of these: see `remembered`.)"""


def parse(argv: list[str] | None, description: str) -> argparse.Namespace:
    """The command line; numbers are in range, and what belongs together is there."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", help="Stable Diffusion 1.5, 2.1 or XL: a folder that diffusers saved, or a hub id")
    which.add_argument("--tiny", choices=["sd15", "sdxl"], help="a small model with random weights, made in code: no network")
    group.add_argument(
        "--image-encoder", default="h94/IP-Adapter", help="folder or hub id, where the model has none of its own"
    )
    group.add_argument("--image-encoder-subfolder", default="models/image_encoder", help="inside of it; '' for none")
    group.add_argument(
        "--adapter", choices=["base", "plus"], default="base", help="base: 4 tokens of the pooled image embedding"
    )
    group.add_argument("--tokens", type=positive, default=16, help="image tokens of --adapter plus (default: %(default)s)")
    group.add_argument("--init-adapter", type=Path, help="start from this IP-Adapter file (.safetensors, .bin)")

    group = parser.add_argument_group("data")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data",
        type=Path,
        help="a folder of images with captions: picture.png beside picture.txt, or a metadata.jsonl with file_name and text",
    )
    source.add_argument("--dataset", help="a dataset that `datasets` loads: a hub id, or a folder that it saved or can read")
    group.add_argument("--image-column", default="image", help="of --dataset (default: %(default)s)")
    group.add_argument("--caption-column", default="text", help="of --dataset (default: %(default)s)")
    group.add_argument("--resolution", type=positive, help="side of the square crops (default: what the UNet was made for)")
    group.add_argument("--random-crop", action="store_true", help="instead of the middle of the picture")
    group.add_argument("--random-flip", action="store_true", help="mirror half of the pictures")
    group.add_argument("--drop-image", type=fraction, default=0.05, help="of the examples go without image (default: 0.05)")
    group.add_argument("--drop-text", type=fraction, default=0.05, help="without caption (default: 0.05)")
    group.add_argument("--drop-both", type=fraction, default=0.05, help="without either (default: 0.05)")
    group.add_argument("--workers", type=natural, default=0, help="processes that read pictures, for each training process")

    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=positive, default=100_000, help="of the optimizer (default: %(default)s)")
    group.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        help="examples of one optimizer step, over all processes and accumulation steps together (default: %(default)s)",
    )
    group.add_argument(
        "--gradient-accumulation-steps", type=positive, default=1, help="parts in which a process goes through its share"
    )
    group.add_argument("--learning-rate", type=float, default=1e-4, help="of AdamW (default: %(default)s)")
    group.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="cosine ends at 0")
    group.add_argument("--warmup-steps", type=natural, default=0, help="in which the learning rate rises to its value")
    group.add_argument("--weight-decay", type=float, default=1e-2, help="of AdamW (default: %(default)s)")
    group.add_argument("--max-grad-norm", type=float, default=1.0, help="longer gradients are shortened to it (default: 1)")
    group.add_argument("--ema-decay", type=fraction, help="keep a moving average of the weights, 0.999 say; off by default")
    group.add_argument("--seed", type=int, default=0, help="of weights, order, noise and drops (default: %(default)s)")

    group = parser.add_argument_group("speed and memory")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument("--accelerated", dest="accelerated", action="store_true", default=True, help="with ipa_kernels (default)")
    kind.add_argument("--stock", dest="accelerated", action="store_false", help="with diffusers' own attention")
    group.add_argument(
        "--impl", choices=["auto", "triton", "eager"], default="auto", help="of ipa_kernels (default: %(default)s)"
    )
    group.add_argument("--mixed-precision", choices=["no", "fp16", "bf16"], help="default: what `accelerate launch` was told")
    group.add_argument("--cpu", action="store_true", help="leave GPUs alone; several processes need this where there is no GPU")
    group.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice, keep few")

    group = parser.add_argument_group("output")
    group.add_argument("--output", type=Path, required=True, help="folder of checkpoints, metrics, pictures, the adapter")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output, if there is one")
    group.add_argument("--checkpoint-every", type=positive, default=1000, help="steps (default: %(default)s)")
    group.add_argument("--keep-checkpoints", type=positive, default=3, help="the last ones (default: %(default)s)")
    group.add_argument(
        "--log-every", type=positive, default=10, help="steps; every step's loss is written (default: %(default)s)"
    )
    group.add_argument("--validate-every", type=positive, default=1000, help="steps (default: %(default)s)")
    group.add_argument(
        "--validation-samples", type=natural, default=16, help="in the validation loss; 0 for none (default: 16)"
    )
    group.add_argument("--validation-prompt", default="", help="of the pictures")
    group.add_argument("--validation-image", type=Path, action="append", default=[], help="a picture for each; may be repeated")
    group.add_argument("--validation-inference-steps", type=positive, default=30, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.drop_image + arguments.drop_text + arguments.drop_both > 1:
        parser.error("--drop-image, --drop-text and --drop-both are shares of the same examples: their sum is above 1")
    if arguments.schedule == "cosine" and arguments.warmup_steps >= arguments.steps:
        parser.error(f"--warmup-steps {arguments.warmup_steps}: not below --steps {arguments.steps}")
    return arguments


def share_of(arguments: argparse.Namespace, processes: int) -> int:
    """Examples that a process takes at once. Raises UsageError where the batch does not divide."""
    parts = processes * arguments.gradient_accumulation_steps
    if arguments.batch_size % parts:
        accumulation = arguments.gradient_accumulation_steps
        raise UsageError(
            f"--batch-size {arguments.batch_size}: examples of all processes together; not a multiple of {parts}: {processes} "
            f"processes with {accumulation} accumulation steps each"
        )
    share: int = arguments.batch_size // parts
    return share


def remembered(arguments: argparse.Namespace, data: str) -> dict[str, Any]:
    """What a checkpoint belongs to: the arguments that decide what is computed, and the fingerprint of the data."""
    chosen = {name: value for name, value in vars(arguments).items() if name not in MAY_CHANGE}
    if arguments.schedule == "cosine":
        chosen["steps"] = arguments.steps
    return {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()} | {
        "contents of data": data
    }


def check_same(before: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    """Raise UsageError, which lists what differs, unless a run goes on with what it began with."""
    names = [name for name in before | now if before.get(name) != now.get(name)]
    # a folder may have moved, as long as the same files are in it
    names = [name for name in names if name not in ("data", "dataset") or "contents of data" in names]
    if names:
        lines = [f"  {name.replace('_', '-')}: {before.get(name)!r} then, {now.get(name)!r} now" for name in names]
        raise UsageError(f"{checkpoint} belongs to a run with other arguments:\n" + "\n".join(lines))


def positive(text: str) -> int:
    """An integer above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def natural(text: str) -> int:
    """An integer, 0 or above."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {value}")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {value}")
    return value
