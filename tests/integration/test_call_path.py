"""How many files of the package a call of a layer passes through: what a reader has to open."""

import sys
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch

import ipa_kernels
from ipa_kernels.integration.processors.fused import Fused
from ipa_kernels.kernels.launch import Launch
from ipa_kernels.testing import tiny_pipelines

from ..helpers.adapters import seeded
from ..helpers.pipelines import build

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"


class Files:
    """The files of the package whose functions run in the processor's call of one layer."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.files: set[str] = set()
        self.functions = 0
        self._call: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code is Fused.__call__.__code__ and frame.f_locals["attn"] is self.attention:
            self._call = frame
        if self._call is not None and event == "call" and "/ipa_kernels/" in frame.f_code.co_filename:
            self.files.add(frame.f_code.co_filename.rpartition("/ipa_kernels/")[2])
            self.functions += 1
        if event == "return" and frame is self._call:
            self._call = None


@pytest.mark.parametrize("masked", [False, True])
def test_the_files_of_a_warm_and_a_cold_call(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    unet = build("bare-unet", ("base",)).unet
    ipa_kernels.enable(unet, impl="triton")
    draw = seeded(2)
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [draw(1, 1, 16, 16)]}} if masked else {}

    def generation(steps: int) -> list[Files]:
        text, images = draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM), [draw(2, 1, tiny_pipelines.IMAGE_EMBED_DIM)]
        found = []
        for step in range(steps):
            files = Files(unet.get_submodule(LAYER))
            sys.setprofile(files)
            try:
                unet(draw(2, 4, 8, 8), step, text, added_cond_kwargs={"image_embeds": images}, **masks)
            finally:
                sys.setprofile(None)
            found.append(files)
        return found

    with torch.no_grad(), mock.patch.object(Launch, "_launch", return_value=None):
        # the first of its shape in a process also specialises the kernel
        generation(1)
        cold, warm, again = generation(3)
    assert unet._ipa_kernels.guard.foreign == "", "another test has left a function of its own in a class"
    assert len(cold.files) <= 9, sorted(cold.files)
    assert len(warm.files) <= 5, sorted(warm.files)
    assert warm.files == again.files
    assert warm.functions <= 16
