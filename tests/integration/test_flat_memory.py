"""Two hundred generations with other prompts, sizes and images: what is kept, and what Python holds, does not grow."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import ipa_kernels
from ipa_kernels.testing import tiny_pipelines

from ..helpers.adapters import load, seeded
from ..helpers.controls import binary
from ..helpers.own import OwnLoop
from ..helpers.pipelines import ddim, unet
from ..helpers.steady import others_set_aside

GENERATIONS = 200
TIMES = torch.tensor([900, 300])
CONDITIONS = 8
"""As many as may be kept of the user's own tensors that live on."""


def model() -> Any:
    """As small as one with two layers gets."""
    pipe = OwnLoop(
        unet(
            block_out_channels=(16,), norm_num_groups=4, attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
        ),
        ddim(),
    )  # fmt: skip
    load(pipe, "base")
    ipa_kernels.enable(pipe.unet, impl="eager")
    return pipe.unet


LARGEST = 39
"""The first `Generation` with two rows, five images, masks and the larger size."""


class Generation:
    """The i-th: of five numbers of images, two sizes, with a mask or without, for one row or two."""

    def __init__(self, i: int) -> None:
        self.draw = seeded(int(torch.randint(2**31, ())))
        self.rows, self.size, images = 1 + i % 2, (4, 6)[i // 2 % 2], 1 + i % 5
        self.text = self.draw(self.rows, 7, tiny_pipelines.CROSS_ATTENTION_DIM)
        self.images = self.draw(self.rows, images, tiny_pipelines.IMAGE_EMBED_DIM)
        self.masks = [binary(images, seed=i)] if i % 3 == 0 else None

    @torch.no_grad()
    def run(self, unet: Any) -> None:
        for timestep in TIMES:
            unet(
                self.draw(self.rows, 4, self.size, self.size), timestep, self.text,
                added_cond_kwargs={"image_embeds": [self.images]},
                cross_attention_kwargs=None if self.masks is None else {"ip_adapter_masks": self.masks},
            )  # fmt: skip


def held() -> tuple[int, Counter[str]]:
    """(tensors that live, objects of this package's classes by class), of those that are younger than the test."""
    gc.collect()
    found = gc.get_objects()
    kinds = Counter(type(thing).__qualname__ for thing in found if type(thing).__module__.startswith("ipa_kernels"))
    return sum(isinstance(thing, Tensor) for thing in found), kinds


def generations(unet: Any, kept: list[Generation] | None = None) -> Iterator[int]:
    """Runs all of them, and says after each how many there were. kept: where a user keeps them alive."""
    for i in range(GENERATIONS):
        generation = Generation(i)
        generation.run(unet)
        if kept is not None:
            kept.append(generation)
        del generation
        yield i + 1


def bytes_of(unet: Any) -> int:
    return ipa_kernels.explain(unet).cache.bytes


@others_set_aside()
def test_nothing_grows() -> None:
    """The same after each twenty: sixty generations are one of each kind."""
    unet = model()
    found = []
    for count in generations(unet):
        if count % 10 == 0:
            assert bytes_of(unet) == 0, "the prompt is gone"
        if count % 60 == 20:
            found.append(held())
    assert ipa_kernels.explain(unet).cache.hits > GENERATIONS
    assert len(found) == 4
    assert all(one == found[0] for one in found)


@others_set_aside()
def test_what_a_user_keeps_alive_is_kept_for_the_last_conditions_alone() -> None:
    unet = model()
    generation = Generation(LARGEST)
    generation.run(unet)
    largest = bytes_of(unet)
    assert largest > 0, "nothing was kept, so that this proves nothing"
    del generation
    kept: list[Generation] = []
    found = []
    for count in generations(unet, kept):
        if count % 10 == 0:
            assert 0 < bytes_of(unet) <= CONDITIONS * largest
        if count % 60 == 20:
            tensors, kinds = held()
            own = sum(2 + (generation.masks is not None) for generation in kept)
            found.append((tensors - own, kinds))
    assert len(found) == 4
    assert all(one == found[0] for one in found)
    kept.clear()
    gc.collect()
    assert bytes_of(unet) == 0


@others_set_aside()
def test_what_a_user_comes_back_to_is_bounded_too() -> None:
    """Twenty conditions by turns, a step of each: more than are kept, and all alive."""
    unet = model()
    turns = [Generation(4) for _ in range(20)]
    turns[0].run(unet)
    one = bytes_of(unet)
    for i in range(GENERATIONS // 2):
        turns[i % len(turns)].run(unet)
        if i % 5 == 0:
            assert 0 < bytes_of(unet) <= CONDITIONS * one


@others_set_aside()
def test_one_prompt_for_two_hundred_pictures() -> None:
    """With a timestep of each step's own."""
    unet = model()
    generation = Generation(0)
    found: list[Any] = []
    with torch.no_grad():
        for i in range(GENERATIONS):
            for sigma in (9.5, 1.0):
                timestep = torch.full((generation.rows,), sigma)
                unet(
                    generation.draw(generation.rows, 4, 4, 4), timestep, generation.text,
                    added_cond_kwargs={"image_embeds": [generation.images]},
                    cross_attention_kwargs={"ip_adapter_masks": generation.masks},
                )  # fmt: skip
            if i % 60 == 20:
                found.append((bytes_of(unet), held()))
    assert found[0][0] > 0
    assert all(one == found[0] for one in found)


@others_set_aside()
def test_the_tensors_of_a_generation_die_with_it() -> None:
    """Nothing that is kept keeps an input alive, or is kept alive without it."""
    unet = model()
    for i in range(10):
        generation = Generation(3 * i)
        assert generation.masks is not None
        inputs = [weakref.ref(tensor) for tensor in (generation.text, generation.images, *generation.masks)]
        generation.run(unet)
        assert bytes_of(unet) > 0
        del generation
        assert [tensor() for tensor in inputs] == [None] * 3
        assert bytes_of(unet) == 0


@others_set_aside()
def test_weights_that_are_edited_in_every_step() -> None:
    """Of one prompt: what the weights before computed is replaced, not kept beside the new."""
    unet = model()
    generation = Generation(0)
    found: list[Any] = []
    with torch.no_grad():
        for i in range(30):
            for name, module in unet.named_modules():
                if name.endswith(("attn2.to_v", "to_k_ip.0")):
                    module.weight.mul_(1.01)
            generation.run(unet)
            if i % 9 == 1:
                found.append((bytes_of(unet), held()))
    assert found[0][0] > 0
    assert all(one == found[0] for one in found)
