"""What a generated picture was made of and with: as JSON in its PNG, and as captions on the sheet that compares."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .. import __version__
from ..kernels.dtypes import dtype_name
from ..report import Report
from .adapter_options import Adapter
from .pictures import Panel, compose
from .pipeline_run import Request, Result


@dataclass(frozen=True)
class AdapterPictures:
    """One adapter, and its pictures."""

    adapter: Adapter
    images: list[Image.Image]
    masks: list[Image.Image]


def settings(request: Request, model: str | None, adapters: list[Adapter], dtype: torch.dtype) -> str:
    """JSON; of files the names only: folders are nobody else's business. model None: the pipeline built in code."""
    used = [
        {
            "ip_adapter": _name(adapter.name),
            "weight": adapter.weight,
            "images": [Path(path).name for path in adapter.images],
            "masks": [Path(path).name for path in adapter.masks],
            "scale": adapter.scale,
        }
        for adapter in adapters
    ]
    return (
        json.dumps(
            {
                "ipa_kernels": __version__,
                "model": _name(model) if model else None,
                "adapters": used,
                **{name: value for name, value in request.arguments.items() if isinstance(value, (str, int, float))},
                "steps": request.steps,
                "seed": request.seed,
                "device": str(request.device),
                "dtype": dtype_name(dtype),
            },
            ensure_ascii=False,
        )
        .encode("utf-8", "backslashreplace")
        .decode()
    )  # a file name may hold bytes that are no text


def comparison_sheet(inputs: list[AdapterPictures], stock: Result, fused: Result, report: Report) -> Image.Image:
    """Every image with its scale and mask, then both pictures with their times, and the difference."""
    panels = []
    for each in inputs:
        scale = each.adapter.scale
        scales = scale if isinstance(scale, list) else [scale] * len(each.images)
        for i, (path, image) in enumerate(zip(each.adapter.images, each.images, strict=True)):
            panels.append(Panel(f"{Path(path).name}\n{_name(each.adapter.name)}, scale {scales[i]:g}", image))
            if each.masks:
                names = f"mask of {Path(path).name}\n{Path(each.adapter.masks[i]).name}"
                panels.append(Panel(names, each.masks[i].convert("RGB")))
    counts = {"kernel": report.triton, "eager": report.eager, "stock": report.stock}
    layers = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    remark = "" if report.triton else ", no kernel here"
    before = Panel(f"stock ({stock.picture.width}x{stock.picture.height})\n{_time(stock)}", stock.picture)
    return compose(panels, before, Panel(f"accelerated (layers: {layers})\n{_time(fused)}{remark}", fused.picture))


def _name(place: str) -> str:
    """A hub id as it is; of what is on this machine the last part."""
    return Path(place).resolve().name if Path(place).exists() else place


def _time(result: Result) -> str:
    return "one step" if math.isnan(result.step_ms) else f"{result.step_ms:.1f} ms per step"
