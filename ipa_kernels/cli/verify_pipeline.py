"""The pipeline of `ipa-kernels verify --pipeline`: loaded or built, and run while its layers are compared."""

from pathlib import Path
from typing import Any

import torch

from ..kernels.dtypes import dtype_name
from ..ops import UnsupportedError
from .arguments import IMAGE_ENCODER, PROMPT, SCALE
from .errors import UserError, why
from .loading import Weights, build_pipeline, check_paths, load_pipeline, read_picture
from .pictures import draw_reference
from .quiet import quiet
from .verify_layers import verify_layers
from .verify_options import VerifyOptions
from .verify_results import Checked


def verify_pipeline(
    options: VerifyOptions, dtype: torch.dtype, device: torch.device, impl: str, seed: int
) -> tuple[list[Checked], str]:
    """Every layer that has an IP-Adapter, and the report of the run.

    Raises UserError where a file is missing or does not fit, or where diffusers cannot run the pipeline.
    """
    picture = draw_reference() if options.image is None else read_picture(options.image)
    with quiet():
        pipe = _pipeline(options, dtype)
        try:
            pipe.to(device)
        except torch.OutOfMemoryError as error:
            raise UserError(f"--device {device}: not enough memory for the pipeline in {dtype}: {why(error)}") from error
        pipe.set_ip_adapter_scale(SCALE if options.scale is None else options.scale)
        pipe.set_progress_bar_config(disable=True)

        def generate(steps: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            pipe(
                PROMPT if options.prompt is None else options.prompt,
                ip_adapter_image=picture,
                num_inference_steps=steps,
                generator=generator,
                output_type="latent",
            )

        try:
            checked, report = verify_layers(pipe, impl, generate)
        except UnsupportedError as error:
            raise UserError(f"--impl {impl}: {why(error)}") from error
        except Exception as error:  # a model that loads may still lack anything, and says so in its own way
            raise UserError(f"diffusers cannot run this model, adapter and picture: {why(error)}") from error
    return checked, f"{dtype_name(dtype)}: {report}"


def _pipeline(options: VerifyOptions, dtype: torch.dtype) -> Any:
    if isinstance(options.model, str) and options.ip_adapter is not None:
        encoder = IMAGE_ENCODER if options.image_encoder is None else options.image_encoder
        try:
            check_paths(Path(options.model), Path(options.ip_adapter))
            adapter = Weights(options.ip_adapter, options.ip_adapter_weight)
            return load_pipeline(options.model, [adapter], encoder, dtype)
        except UserError as error:
            raise UserError(str(error).replace("--model", "--pipeline", 1)) from error
    return build_pipeline(dtype)
