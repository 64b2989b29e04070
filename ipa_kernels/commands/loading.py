"""What the user names on a command line: pipelines, adapters, pictures, devices. A mistake is a `UserError` of one line."""

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image, ImageOps

from ..integration import explain
from .errors import UserError, why

_WEIGHTS = {".safetensors", ".bin"}
_BASE_ADAPTERS = {768: "models/ip-adapter_sd15.safetensors", 2048: "sdxl_models/ip-adapter_sdxl.safetensors"}
"""Where h94/IP-Adapter has the base adapter for a UNet, by the width of its text embeddings."""

_DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
"""The argument of `from_pretrained`: of two names each version knows one, or warns of the other."""


def load_pipeline(model: str, adapter: str, weight_name: str | None, image_encoder: str, dtype: torch.dtype) -> Any:
    """The pipeline of --model with the weights of --ip-adapter."""
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model, **{_DTYPE: dtype})
    except Exception as error:  # diffusers, transformers, safetensors, pickle and the hub, each with errors of its own
        raise UserError(f"--model {model}: {_elsewhere(model)}{why(error)}") from error
    _check_kind(model, pipe)
    repository, weight = _adapter_file(adapter, weight_name, pipe.unet.config.cross_attention_dim)
    if getattr(pipe, "image_encoder", None) is None:
        _check_encoder(repository, weight, image_encoder)
    try:
        pipe.load_ip_adapter(
            repository.as_posix(),
            subfolder="" if weight.parent == Path() else weight.parent.as_posix(),
            weight_name=weight.name,
            image_encoder_folder=image_encoder,
        )
    except Exception as error:  # as above
        reason = f"{_elsewhere(adapter)}{why(error)}"
        raise UserError(f"--ip-adapter {adapter}: cannot load {weight} for this model: {reason}") from error
    return pipe


def check_paths(model: Path, adapter: Path) -> None:
    """What is not here has to look like a hub id, owner/name: a typing error need not wait for the network."""
    for flag, path in (("--model", model), ("--ip-adapter", adapter)):
        hub_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path.as_posix()) and path.suffix not in _WEIGHTS
        if not path.exists() and not hub_id:
            raise UserError(f"{flag} {path}: no such file or folder")
    if model.is_file():
        raise UserError(f"--model {model}: a file; needs the folder of a diffusers pipeline")


def writable(path: str) -> Path:
    output = Path(path)
    if output.suffix.lower() != ".png" or not output.parent.is_dir():
        raise UserError(f"--output {path}: needs the name of a .png file in a folder that exists")
    return output


def available_device(device: str | None) -> torch.device:
    """The device, after one number has been there and back."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: not available here: {why(error)}") from error


def read_picture(path: str) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--image {path}: no picture that can be read: {why(error)}") from error


def _check_kind(model: str, pipe: Any) -> None:
    """Raises UserError unless the pipeline makes a picture from a prompt and a reference, in a UNet."""
    inputs = inspect.signature(pipe.__call__).parameters
    try:
        explain(pipe)
    except TypeError as error:
        raise UserError(f"--model {model}: a {type(pipe).__name__} has no UNet that takes IP-Adapters") from error
    if "ip_adapter_image" not in inputs or "image" in inputs:
        raise UserError(f"--model {model}: a {type(pipe).__name__} is no text-to-image pipeline that takes IP-Adapters")


def _adapter_file(adapter: str, named: str | None, width: int) -> tuple[Path, Path]:
    """The folder or hub id of an IP-Adapter, and its weight file inside of it."""
    place = Path(adapter)
    if place.is_file():
        return place.parent, Path(place.name)
    if named is not None:
        return place, Path(named)
    found = [path.name for path in sorted(place.glob("*")) if path.suffix in _WEIGHTS]
    if len(found) > 1:
        raise UserError(f"--ip-adapter {adapter}: choose one with --ip-adapter-weight: {', '.join(found)}")
    if found:
        return place, Path(found[0])
    base = _BASE_ADAPTERS.get(width)
    if base is None or (place.is_dir() and not (place / base).is_file()):
        raise UserError(f"--ip-adapter {adapter}: no weights (.safetensors, .bin) found; --ip-adapter-weight names the file")
    return place, Path(base)


def _check_encoder(repository: Path, weight: Path, encoder: str) -> None:
    """Where a folder has no image encoder either, diffusers complains about a file that nobody has heard of."""
    folder = repository / encoder if "/" in encoder else (repository / weight).parent / encoder
    if repository.is_dir() and not folder.is_dir():
        raise UserError(f"--ip-adapter {repository}: the model has no image encoder; no {folder} either (see --image-encoder)")


def _elsewhere(place: str) -> str:
    return "" if Path(place).exists() else "no such folder here; from the hub: "
