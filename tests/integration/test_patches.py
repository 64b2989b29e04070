"""Functions that compute what is remembered, replaced by a user: they run in every step, nothing is kept, and it is said."""

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention, attention_processor, embeddings
from torch import nn

import ipa_kernels

from ..helpers.adapters import load
from ..helpers.generate import generate
from ..helpers.patch import STEPS, Patch, run
from ..helpers.pipelines import build

BEFORE_THE_FIRST_IMPORT = """
    import sys, torch
    from diffusers.models import attention_processor, embeddings
    from ipa_kernels.testing import tiny_pipelines as tiny

    kind = {kind}
    own = kind.{name}
    def patch(self, *arguments, **options):
        out = own(self, *arguments, **options)
        return [tensor * 3 for tensor in out] if isinstance(out, list) else out * 3
    assert "ipa_kernels.integration.processors.unet" not in sys.modules
    kind.{name} = patch

    import ipa_kernels
    pipe = tiny.stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    tiny.load(pipe, tiny.base_adapter(pipe.unet))
    images = [torch.randn(2, 1, tiny.IMAGE_EMBED_DIM)]
    given = dict(prompt_embeds=torch.randn(1, 7, 64), negative_prompt_embeds=torch.randn(1, 7, 64), output_type="latent",
                 latents=torch.randn(1, 4, 8, 8), num_inference_steps=2, ip_adapter_image_embeds=images)
    expected = pipe(**given)[0]
    ipa_kernels.enable(pipe)
    assert torch.equal(pipe(**given)[0], expected), "the patch was dropped"
    print(ipa_kernels.explain(pipe))
    kind.{name} = own
    stock = pipe(**given)[0]
    assert not torch.equal(stock, expected), "the patch makes no difference: proves nothing"
    print("REMOVED")
    print(ipa_kernels.explain(pipe))
    ipa_kernels.disable(pipe)
    assert torch.equal(pipe(**given)[0], stock)
"""


@pytest.mark.parametrize(
    "place",
    [
        ("attention_processor.IPAdapterAttnProcessor2_0", "__call__"),
        ("embeddings.MultiIPAdapterImageProjection", "forward"),
    ],
    ids=lambda place: place[1],
)
def test_a_class_patched_before_the_first_enable(place: tuple[str, str]) -> None:
    script = textwrap.dedent(BEFORE_THE_FIRST_IMPORT.format(kind=place[0], name=place[1]))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    patched, removed = done.stdout.split("REMOVED")
    assert "replaced" in patched
    assert "replaced" not in removed
    assert " eager, 0 stock" in removed


PLACES: dict[str, tuple[Any, str, str, tuple[str, ...]]] = {
    "MultiIPAdapterImageProjection.forward": (embeddings.MultiIPAdapterImageProjection, "forward", "sd", ("base",)),
    "ImageProjection.forward": (embeddings.ImageProjection, "forward", "sd", ("base",)),
    "IPAdapterPlusImageProjection.forward": (embeddings.IPAdapterPlusImageProjection, "forward", "sd", ("plus",)),
    "IPAdapterPlusImageProjectionBlock.forward": (embeddings.IPAdapterPlusImageProjectionBlock, "forward", "sd", ("plus",)),
    "IPAdapterFaceIDPlusImageProjection.forward": (
        embeddings.IPAdapterFaceIDPlusImageProjection, "forward", "sd", ("faceid-plus",)),
    "Attention.forward": (attention_processor.Attention, "forward", "sd", ("plus",)),
    "AttnProcessor2_0.__call__": (attention_processor.AttnProcessor2_0, "__call__", "sd", ("plus",)),
    "FeedForward.forward": (attention.FeedForward, "forward", "sd", ("plus",)),
    "LayerNorm.forward": (nn.LayerNorm, "forward", "sd", ("base",)),
    "Linear.forward": (nn.Linear, "forward", "sd", ("base",)),
    "Linear.forward, of Kolors": (nn.Linear, "forward", "kolors", ("base",)),
    "MultiIPAdapterImageProjection.forward, of AnimateDiff": (
        embeddings.MultiIPAdapterImageProjection, "forward", "animatediff", ("base",)),
    "Module.__call__": (nn.Module, "__call__", "sd", ("base",)),
    "functional.linear": (F, "linear", "sd", ("base",)),
    "functional.layer_norm": (F, "layer_norm", "sd", ("base",)),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_computes_a_remembered_value_is_replaced(place: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The replacement changes from step to step: nothing that it computes may be kept."""
    owner, name, kind, names = PLACES[place]
    pipe, twin = build(kind, names), build(kind, names)
    patch = Patch(owner, name, monkeypatch)
    expected = generate(twin, names, steps=STEPS)
    if when == "after":
        ipa_kernels.enable(pipe)
        assert torch.equal(generate(pipe, names, steps=STEPS), expected)
    patch.put()
    if when == "before":
        ipa_kernels.enable(pipe)
    stock, calls = run(twin, patch, names)
    assert not torch.equal(stock, expected), "the patch makes no difference: proves nothing"
    found, ours = run(pipe, patch, names)
    assert torch.equal(found, stock)
    assert ours == calls
    assert f"{place.split(',')[0]}: replaced" in ipa_kernels.explain(pipe).note
    patch.remove()
    ipa_kernels.clear_cache(pipe)
    assert torch.equal(generate(pipe, names, steps=STEPS), expected)
    report = ipa_kernels.explain(pipe)
    assert report.cache.hits > 0
    assert report.note == ""


def test_a_projection_replaced_in_the_middle_of_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is called again compares with what it was called with: the class of its projections too."""
    pipe, twin = build("sd", ("base",)), build("sd", ("base",))
    ipa_kernels.enable(pipe)
    patch = Patch(nn.Linear, "forward", monkeypatch)

    def put(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        patch.step = 1
        if step == 1:
            patch.put()
        return tensors

    outcomes = []
    for one in (twin, pipe):
        outcomes.append(generate(one, ("base",), steps=4, callback_on_step_end=put))
        patch.remove()
    assert torch.equal(*outcomes)


def test_a_lora_linear_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's Linear is known, as long as its forward is peft's."""
    layer = pytest.importorskip("peft.tuners.lora.layer")
    pipe, twin = build("sd"), build("sd")
    for one in (pipe, twin):
        load(one, "faceid")
    ipa_kernels.enable(pipe)
    generate(pipe, ("faceid",), steps=STEPS)
    patch = Patch(layer.Linear, "forward", monkeypatch)
    patch.put()
    expected, calls = run(twin, patch, ("faceid",))
    found, ours = run(pipe, patch, ("faceid",))
    assert torch.equal(found, expected)
    assert ours == calls
    assert calls.total() > 0, "proves nothing"
