"""The weight files of IP-Adapters: where they are, and whether they fit the model, said before diffusers tries to load them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open

from ..report import plural
from .errors import UserError, elsewhere, why

WEIGHTS = {".safetensors", ".bin"}
_BASE_ADAPTERS = {768: "models/ip-adapter_sd15.safetensors", 2048: "sdxl_models/ip-adapter_sdxl.safetensors"}
"""Where h94/IP-Adapter has the base adapter for a UNet, by the width of its text embeddings."""


@dataclass(frozen=True)
class AdapterFile:
    """adapter: as the user named it. repository: its folder or hub id; weight: the file inside. shapes: of its tensors."""

    adapter: str
    repository: Path
    weight: Path
    shapes: dict[str, tuple[int, ...]]


def find_adapter(adapter: str, named: str | None, unet: Any) -> AdapterFile:
    """The weight file of an IP-Adapter, after a look at its shapes; one on the hub is downloaded into diffusers' cache.

    Raises UserError where there is none, or where it is for another UNet or needs embeddings of faces.
    """
    repository, weight = _folder_and_file(adapter, named, unet.config.cross_attention_dim)
    path = _local(adapter, repository, weight)
    try:
        shapes = _shapes(path)
    except Exception as error:  # safetensors, pickle and zip, each with errors of its own
        raise UserError(f"--ip-adapter {adapter}: cannot load {weight} for this model: {why(error)}") from error
    problem = _problem(shapes, unet)
    if problem:
        raise UserError(f"--ip-adapter {adapter}: cannot load {weight} for this model: {problem}")
    return AdapterFile(adapter, repository, weight, shapes)


def check_encoder_folder(file: AdapterFile, encoder: str) -> None:
    """Where a folder has no image encoder either, diffusers complains about a file that nobody has heard of."""
    folder = file.repository / encoder if "/" in encoder else (file.repository / file.weight).parent / encoder
    if file.repository.is_dir() and not folder.is_dir():
        raise UserError(
            f"--ip-adapter {file.adapter}: the model has no image encoder; no {folder} either (see --image-encoder)"
        )


def check_encoder(file: AdapterFile, encoder: Any) -> None:
    """Raises UserError unless the image encoder gives embeddings of the width that the adapter reads."""
    pooled = file.shapes.get("image_proj.proj.weight")
    hidden = file.shapes.get("image_proj.proj.0.weight") or file.shapes.get("image_proj.proj_in.weight")
    reads, gives = (pooled, "projection_dim") if pooled else (hidden, "hidden_size")
    width = getattr(encoder.config, gives, None)
    if reads and width and reads[-1] != width:
        raise UserError(
            f"--ip-adapter {file.adapter}: {file.weight} reads image embeddings {reads[-1]} wide, the image encoder gives "
            f"{width} (--image-encoder names another; all adapters share it)"
        )


def _folder_and_file(adapter: str, named: str | None, width: int) -> tuple[Path, Path]:
    """The folder or hub id of an IP-Adapter, and its weight file inside of it."""
    place = Path(adapter)
    if place.is_file():
        return place.parent, Path(place.name)
    if named is not None:
        return place, Path(named)
    found = [path.name for path in sorted(place.glob("*")) if path.suffix in WEIGHTS]
    if len(found) > 1:
        raise UserError(f"--ip-adapter {adapter}: choose one with --ip-adapter-weight: {', '.join(found)}")
    if found:
        return place, Path(found[0])
    base = _BASE_ADAPTERS.get(width)
    if base is None or (place.is_dir() and not (place / base).is_file()):
        raise UserError(f"--ip-adapter {adapter}: no weights (.safetensors, .bin) found; --ip-adapter-weight names the file")
    return place, Path(base)


def _local(adapter: str, repository: Path, weight: Path) -> Path:
    if repository.is_dir():
        if not (repository / weight).is_file():
            raise UserError(f"--ip-adapter {adapter}: no {weight} in it")
        return repository / weight
    try:
        return Path(hf_hub_download(repository.as_posix(), weight.as_posix()))
    except Exception as error:  # the hub's, the network's and the cache's
        raise UserError(f"--ip-adapter {adapter}: {elsewhere(adapter)}{why(error)}") from error


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """By the flat names of .safetensors, such as ip_adapter.1.to_k_ip.weight; no weights are read."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
    parts = torch.load(path, map_location="meta", weights_only=True)
    if not isinstance(parts, dict) or not all(isinstance(tensors, dict) for tensors in parts.values()):
        return {}
    return {f"{part}.{name}": tuple(tensor.shape) for part, tensors in parts.items() for name, tensor in tensors.items()}


def _problem(shapes: dict[str, tuple[int, ...]], unet: Any) -> str:
    """Why these are not weights for the UNet and pictures, "" where they are."""
    keys = [shape for name, shape in shapes.items() if name.endswith(".to_k_ip.weight")]
    projection = {name.removeprefix("image_proj.") for name in shapes if name.startswith("image_proj.")}
    if not keys or not projection or any(len(shape) != 2 for shape in keys):
        return "it is no IP-Adapter (which has image_proj and ip_adapter weights)"
    pictures = {"proj.weight", "proj.3.weight", "latents"} & projection
    if not pictures or "perceiver_resampler.proj_in.weight" in projection:
        return "it is a FaceID adapter, which reads embeddings of faces and not pictures; from Python: ip_adapter_image_embeds"
    layers = sum(not name.endswith("attn1.processor") for name in unet.attn_processors)
    width = unet.config.cross_attention_dim
    if (len(keys), keys[0][-1]) != (layers, width):
        ours, theirs = f"{layers} layer{plural(layers)}", f"{len(keys)} layer{plural(len(keys))}"
        return f"it is for {theirs} and text {keys[0][-1]} wide, the UNet has {ours} and text {width} wide"
    return ""
