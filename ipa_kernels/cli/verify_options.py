"""The command line of `ipa-kernels verify`, and which of its options go together. Needs nothing but Python."""

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class VerifyOptions:
    """The command line of `ipa-kernels verify`; None stands for what is chosen for the machine, or for all.

    model: None for the named cases, True for the pipeline built in code.
    """

    model: str | bool | None
    ip_adapter: str | None
    ip_adapter_weight: str | None
    image_encoder: str | None
    image: str | None
    prompt: str | None
    scale: float | None
    case: Sequence[str] | None
    quick: bool
    seed: int | None
    impl: str | None
    device: str | None
    dtype: Sequence[str] | None
    json: str | None


def check_options(options: VerifyOptions) -> None:
    """Raises UserError where options do not go together."""
    if isinstance(options.model, str) != (options.ip_adapter is not None):
        raise UserError(
            "--pipeline PATH and --ip-adapter go together: give both, or --pipeline alone for the one built in code"
        )
    if options.model is not None and (options.case or options.quick):
        raise UserError("--case and --quick: they are about the named cases; with --pipeline leave them out")
    for option, given, instead in (
        ("--image", options.image, "random inputs"),
        ("--prompt", options.prompt, "random inputs"),
        ("--scale", options.scale, "random inputs"),
        ("--ip-adapter-weight", options.ip_adapter_weight, "no weights"),
        ("--image-encoder", options.image_encoder, "no weights"),
    ):
        if options.model is None and given is not None:
            raise UserError(f"{option} {given}: it is for --pipeline; the named cases have {instead}")
