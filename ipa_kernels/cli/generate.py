"""The parser of `ipa-kernels generate`."""

import argparse
from typing import Any

from .adapter_options import Adapter
from .arguments import WEIGHT_HELP, add_command, add_machine, add_model, finite, multiple_of_8, seed, whole_number
from .defaults import SCALE

_DESCRIPTION = """Generate one picture with IP-Adapters, accelerated: print what ran where and why and the time per step.
--compare runs stock diffusers too, from the same seed. Without --model: a small pipeline with random weights, built in code,
that needs neither a GPU nor the hub and draws noise; its adapters are called base and plus."""

_PAIRING = """--image, --mask, --scale and --ip-adapter-weight belong to the --ip-adapter before them; with one adapter the
order does not matter. Without masks an adapter attends to all of its images at once, with one scale; with masks to each alone,
with a scale each."""


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


def add(commands: Any) -> None:
    """Add it to the subparsers of the command line."""
    generate = add_command(
        commands,
        "generate",
        extra="diffusers",
        help="generate a picture with IP-Adapters, accelerated; --compare: and stock",
        description=_DESCRIPTION,
    )
    add_model(generate)
    of_adapter = {"dest": "adapters", "action": _OfAdapter}
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
