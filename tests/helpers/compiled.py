"""Pipelines that are compiled or prepared, beside a twin that is neither."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import ipa_kernels

from .controls import Control, binary
from .generate import arguments, generate

STYLE = {"down": {"block_0": [0.0]}, "up": {"block_1": [0.4, 0.9]}}

PLAIN = [
    Control(),
    Control(scales=lambda n: [0.0] * n),
    Control(scales=lambda n: [1] * n),
    Control(scales=lambda n: [-0.3 - i for i in range(n)]),
    Control(scales=lambda n: [0] * n),
    Control(scales=lambda n: [1.0, *[0.0] * (n - 1)]),
    Control(scales=lambda n: [STYLE] * n),
    Control(),
]

MASKED = [
    Control(masks=lambda n, rows: [binary(seed=i) for i in range(n)]),
    Control(masks=lambda n, rows: [binary(seed=7 + i) for i in range(n)], scales=lambda n: [[0.25]] * n),
    Control(masks=lambda n, rows: [binary(seed=i) for i in range(n)], scales=lambda n: [0.0] * n),
    Control(masks=lambda n, rows: [binary(seed=7 + i) for i in range(n)], scales=lambda n: [[0]] * n),
    Control(masks=lambda n, rows: [binary(seed=1 + i) for i in range(n)], scales=lambda n: [1] * n),
]

BOTH = ("base", "plus")


def whole(pipe: Any, **options: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, **options)


def in_place(pipe: Any, **options: Any) -> None:
    pipe.unet.compile(fullgraph=True, **options)


def blocks(pipe: Any, **options: Any) -> None:
    pipe.unet.compile_repeated_blocks(fullgraph=True, **options)


def as_stock(compiled: Any, twin: Any, names: tuple[str, ...], control: Control, seed: int = 1, size: int = 8) -> None:
    """One generation of both; the twin is never enabled or compiled."""
    outcomes = []
    for pipe in (twin, compiled):
        if names:
            pipe.set_ip_adapter_scale(control.scales(len(names)))
        outcomes.append(generate(pipe, names, control, seed=seed, size=size))
    close(outcomes[1], outcomes[0])


def close(result: Tensor, expected: Tensor) -> None:
    """Within the error of float32 through two steps of a UNet."""
    error = (result - expected).abs().max() / expected.abs().max()
    assert error < 2e-5, f"relative error {error}"


def prepare(pipe: Any, names: tuple[str, ...] = BOTH, control: Control | None = None, **options: Any) -> ipa_kernels.Report:
    return ipa_kernels.prepare(pipe, **arguments(pipe, names, control, **options))


def step_with_loras(pipe: Any, scale: float) -> Tensor:
    """A step of the UNet alone: the pipeline would look for LoRAs of a text encoder."""
    random = torch.Generator().manual_seed(0)
    noise, text = (torch.randn(shape, generator=random) for shape in ((2, 4, 8, 8), (2, 77, 64)))
    options = {
        "added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 32, generator=random)]},
        "cross_attention_kwargs": {"scale": scale},
    }
    with torch.no_grad():
        return pipe.unet(noise, 5, text, **options).sample


class Stream:
    """A CUDA stream, as what it knows to be through."""

    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.through: set[Any] = set()

    def wait_event(self, event: Any) -> None:
        self.through |= event.through

    def record_event(self) -> Any:
        return SimpleNamespace(through=set(self.through), synchronize=lambda: None)
