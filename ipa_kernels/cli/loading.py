"""What the user names on a command line: pipelines, adapters, pictures. A mistake is a `UserError` of one line."""

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from PIL import Image, ImageOps

from ..integration.api import explain
from ..testing import tiny_pipelines
from .adapter_files import WEIGHTS, check_encoder, check_encoder_folder, find_adapter
from .errors import UserError, elsewhere, why

TINY_ADAPTERS: dict[str, Callable[..., Any]] = {"base": tiny_pipelines.base_adapter, "plus": tiny_pipelines.plus_adapter}
"""What --ip-adapter names where there is no --model."""

_DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
"""The argument of `from_pretrained`: of two names each version knows one, or warns of the other."""


class Weights(NamedTuple):
    """An IP-Adapter as the user names it, and the weight file in it, where that is named too."""

    adapter: str
    weight: str | None = None


def load_pipeline(model: str, adapters: Sequence[Weights], image_encoder: str, dtype: torch.dtype) -> Any:
    """The pipeline of --model with the weights of each --ip-adapter."""
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, **{_DTYPE: dtype})
    except Exception as error:  # diffusers, transformers, safetensors, pickle and the hub, each with errors of its own
        raise UserError(f"--model {model}: {elsewhere(model)}{why(error)}") from error
    _check_kind(model, pipe)
    files = [find_adapter(adapter, weight, pipe.unet) for adapter, weight in adapters]
    if getattr(pipe, "image_encoder", None) is None:
        check_encoder_folder(files[0], image_encoder)
    try:
        pipe.load_ip_adapter(
            [file.repository.as_posix() for file in files],
            subfolder=["" if file.weight.parent == Path() else file.weight.parent.as_posix() for file in files],
            weight_name=[file.weight.name for file in files],
            image_encoder_folder=image_encoder,
        )
    except Exception as error:  # as above
        names, weights = (", ".join(map(str, column)) for column in zip(*((f.adapter, f.weight) for f in files), strict=True))
        reason = f"{elsewhere(files[0].adapter)}{why(error)}"
        raise UserError(f"--ip-adapter {names}: cannot load {weights} for this model: {reason}") from error
    for file in files:
        check_encoder(file, pipe.image_encoder)
    return pipe


def build_pipeline(dtype: torch.dtype, adapters: Sequence[str] = ("base",)) -> Any:
    """The small pipeline with CLIP encoders and one or more of `TINY_ADAPTERS`, all weights random."""
    pipe = tiny_pipelines.stable_diffusion(encoders=True)
    tiny_pipelines.load(pipe, *(TINY_ADAPTERS[name](pipe.unet, seed=i) for i, name in enumerate(adapters)))
    return pipe.to(dtype=dtype)


def check_paths(model: Path, *adapters: Path) -> None:
    """What is not here has to look like a hub id, owner/name: a typing error need not wait for the network."""
    for flag, path in (("--model", model), *(("--ip-adapter", adapter) for adapter in adapters)):
        hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path.as_posix()) and path.suffix not in WEIGHTS
        if not path.exists() and not hub_id:
            raise UserError(f"{flag} {path}: no such file or folder")
    if model.is_file():
        raise UserError(f"--model {model}: a file; needs the folder of a diffusers pipeline")


def move_to_device(pipe: Any, device: torch.device, offload: str) -> None:
    """Put the pipeline where it computes; "model" and "sequential" keep on the device only what runs."""
    try:
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            pipe.to(device)
    except ImportError as error:
        raise UserError(f"--offload {offload}: needs accelerate: pip install accelerate") from error


def read_picture(path: str, flag: str = "--image", mode: str = "RGB") -> Image.Image:
    """The picture in a file, the way up that its camera says."""
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{flag} {path}: no picture that can be read: {why(error)}") from error


def _check_kind(model: str, pipe: Any) -> None:
    """Raises UserError unless the pipeline makes a picture from a prompt and a reference, in a UNet."""
    inputs = inspect.signature(pipe.__call__).parameters
    try:
        explain(pipe)
    except TypeError as error:
        raise UserError(f"--model {model}: a {type(pipe).__name__} has no UNet that takes IP-Adapters") from error
    if "ip_adapter_image" not in inputs or {"image", "num_frames"} & set(inputs):
        raise UserError(f"--model {model}: a {type(pipe).__name__} is no text-to-image pipeline that takes IP-Adapters")
