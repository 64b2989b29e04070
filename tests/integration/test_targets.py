"""What users pass to `enable` in the place of a UNet: the error says what to pass."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn

import ipa_kernels

from ..helpers.generate import traces
from ..helpers.pipelines import build

PARALLEL = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compiled in DataParallel": lambda unet: nn.DataParallel(torch.compile(unet)),
    "DataParallel compiled": lambda unet: torch.compile(nn.DataParallel(unet)),
}


@pytest.fixture
def group() -> Iterator[None]:
    """One process that is a group of its own."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("function", ["enable", "explain"])
@pytest.mark.parametrize("place", ["pipe", "unet"])
@pytest.mark.parametrize("name", PARALLEL)
def test_a_wrapped_unet_is_named_with_what_to_pass(name: str, place: str, function: str, group: None) -> None:
    pipe = build("sd", ("base",))
    unet, wrapped = pipe.unet, PARALLEL[name](pipe.unet)
    kind = "DataParallel" if "compiled" in name else name
    # set around the pipeline's check of its modules, as assigning does where it has none
    object.__setattr__(pipe, "unet", wrapped)
    target = pipe if place == "pipe" else wrapped
    with pytest.raises(TypeError, match=rf"target: expected the UNet itself, got it inside a {kind}; pass ") as caught:
        getattr(ipa_kernels, function)(target)
    advice = re.search(r"pass (\S+)", str(caught.value))
    assert advice is not None
    told = advice[1].replace("target", "pipe.unet")
    inside: Any = pipe
    for part in told.split(".")[1:]:
        inside = getattr(inside, part)
    # what it says works
    assert ipa_kernels.enable(inside).layers
    assert traces(unet)


def test_a_pipeline_without_a_unet_says_what_it_has() -> None:
    class Pipeline:
        unet = nn.Linear(2, 2)

    with pytest.raises(TypeError, match=r"got Pipeline with a Linear as its unet"):
        ipa_kernels.enable(Pipeline())
