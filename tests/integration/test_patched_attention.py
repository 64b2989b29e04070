"""Attention that a user has replaced in torch or diffusers (SageAttention, attention maps): it runs, and the report says so."""

import importlib
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models import attention, attention_processor, embeddings
from torch import Tensor, nn

import ipa_kernels
from ipa_kernels import UnsupportedError

from ..helpers.controls import Control, binary
from ..helpers.generate import generate
from ..helpers.patch import STEPS, Patch, impls, run
from ..helpers.pipelines import build
from ..helpers.recorder import Recorder

ATTENTION = "scaled_dot_product_attention"
MASKED = Control(masks=lambda n, rows: [binary(seed=i) for i in range(n)])


@pytest.fixture
def on_a_gpu() -> Iterator[None]:
    """`impl="auto"` is the kernel, as on a GPU, in Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patching:
        for name in ("integration.processors.unet", "ops.dispatch"):
            patching.setattr(importlib.import_module(f"ipa_kernels.{name}"), "automatic_reasons", lambda device, dtype: [])
        yield


def class_patched(pipe: Any, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_processor.Attention, "get_attention_scores", function)


def instance_patched(pipe: Any, function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in pipe.unet.modules():
        if isinstance(module, attention_processor.Attention):
            monkeypatch.setattr(module, "get_attention_scores", types.MethodType(function, module), raising=False)


def with_scores(pipe: Any) -> Any:
    """Processors of the class that computes attention maps."""
    kind = attention_processor.IPAdapterAttnProcessor
    processors = dict(pipe.unet.attn_processors)
    for name, processor in processors.items():
        if hasattr(processor, "to_k_ip"):
            processors[name] = kind(processor.hidden_size, processor.cross_attention_dim, processor.num_tokens, processor.scale)
            processors[name].load_state_dict(processor.state_dict())
    pipe.unet.set_attn_processor(processors)
    return pipe


@pytest.mark.parametrize("patched", [class_patched, instance_patched])
def test_get_attention_scores_replaced(patched: Callable[..., None], on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As who captures attention maps does."""
    own = attention_processor.Attention.get_attention_scores
    pipe, twin = with_scores(build("sd", ("base",))), with_scores(build("sd", ("base",)))
    ipa_kernels.enable(pipe)
    unpatched = generate(pipe, ("base",), steps=STEPS)
    assert impls(pipe) == {"triton"}
    maps: list[Tensor] = []

    def capture(self: Any, *arguments: Any) -> Tensor:
        maps.append(own(self, *arguments))
        return maps[-1]

    patched(twin, capture, monkeypatch)
    expected = generate(twin, ("base",), steps=STEPS)
    count = len(maps)
    assert count > 0
    monkeypatch.undo()
    maps.clear()
    patched(pipe, capture, monkeypatch)
    with pytest.warns(ipa_kernels.FallbackWarning, match="get_attention_scores: replaced"):
        assert torch.equal(generate(pipe, ("base",), steps=STEPS), expected)
    assert len(maps) == count
    report = ipa_kernels.explain(pipe)
    assert {layer.impl for layer in report.layers} == {"stock"}
    assert "get_attention_scores" in report.layers[0].reason
    monkeypatch.undo()
    assert torch.equal(generate(pipe, ("base",), steps=STEPS), unpatched)
    assert impls(pipe) == {"triton"}


@pytest.mark.parametrize(("impl", "masked"), [("auto", False), ("eager", True)])
def test_sdpa_replaced(impl: str, masked: bool, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SageAttention is put in its place: called as often as in stock, with stock's result; the kernel after that."""
    control = MASKED if masked else Control()
    pipe, twin = build("sd", ("base", "plus")), build("sd", ("base", "plus"))
    ipa_kernels.enable(pipe, impl=impl)
    patch = Patch(F, ATTENTION, monkeypatch)
    unpatched = generate(pipe, ("base", "plus"), control, steps=STEPS)
    assert impls(pipe) == {"triton" if impl == "auto" else "eager"}
    patch.put()
    expected, calls = run(twin, patch, ("base", "plus"), control)
    found, ours = run(pipe, patch, ("base", "plus"), control)
    assert torch.equal(found, expected)
    assert ours == calls
    report = ipa_kernels.explain(pipe)
    assert {layer.impl for layer in report.layers} == {"stock"}
    assert f"torch.nn.functional.{ATTENTION}: replaced" in report.layers[0].reason
    patch.remove()
    assert torch.equal(generate(pipe, ("base", "plus"), control, steps=STEPS), unpatched)
    assert impls(pipe) == {"triton" if impl == "auto" else "eager"}


def test_sdpa_replaced_is_warned_about_once(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    Patch(F, ATTENTION, monkeypatch).put()
    with pytest.warns(ipa_kernels.FallbackWarning, match=f"{ATTENTION}: replaced") as caught:
        generate(pipe, ("base",))
    assert len(caught) == 1


def test_sdpa_replaced_in_the_middle_of_a_generation(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put after the first step and removed after the second."""
    pipe, twin = build("sd", ("base",)), build("sd", ("base",))
    ipa_kernels.enable(pipe)
    patch = Patch(F, ATTENTION, monkeypatch)
    seen: list[set[str | None]] = []

    def switch(one: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(impls(one))
        patch.step = step
        (patch.remove if step == 2 else patch.put)()
        return tensors

    counts = []
    for one in (twin, pipe):
        seen.clear()
        patch.calls = Counter()
        outcome = generate(one, ("base",), steps=4, callback_on_step_end=switch)
        patch.remove()
        counts.append((patch.calls, outcome))
    assert counts[0][0] == counts[1][0]
    torch.testing.assert_close(counts[1][1], counts[0][1], rtol=1e-4, atol=1e-5)
    assert seen == [{"triton"}, {"stock"}, {"stock"}, {"triton"}]


def test_the_kernel_is_demanded_where_sdpa_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`impl="triton"` never falls back: at once, or in the step that follows."""
    pipe = build("sd", ("base",))
    patch = Patch(F, ATTENTION, monkeypatch)
    patch.put()
    with pytest.raises(UnsupportedError, match=f"{ATTENTION}: replaced"):
        ipa_kernels.enable(pipe, impl="triton")
    patch.remove()
    ipa_kernels.enable(pipe, impl="triton")
    generate(pipe, ("base",))
    patch.put()
    with pytest.raises(UnsupportedError, match=f"{ATTENTION}: replaced"):
        generate(pipe, ("base",))


def test_explain_foresees_what_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("sd", ("base",))
    for place, name in ((F, ATTENTION), (attention_processor.IPAdapterAttnProcessor2_0, "__call__")):
        with monkeypatch.context() as patching:
            Patch(place, name, patching).put()
            report = ipa_kernels.enable(pipe)
            assert {layer.planned for layer in report.layers} == {"stock"}
            assert "replaced" in report.layers[0].reason
        assert {layer.planned for layer in ipa_kernels.explain(pipe).layers} == {"eager"}


def test_downsampling_of_masks_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """For masks of other proportions than the picture."""
    control = MASKED
    pipe, twin = build("sd", ("base",)), build("sd", ("base",))
    ipa_kernels.enable(pipe)
    plain = generate(pipe, ("base",), control, steps=STEPS)
    patch = Patch(IPAdapterMaskProcessor, "downsample", monkeypatch)
    patch.put()
    expected, calls = run(twin, patch, ("base",), control)
    found, ours = run(pipe, patch, ("base",), control)
    assert torch.equal(found, expected)
    assert ours == calls
    assert not torch.equal(expected, plain)
    assert "downsample: replaced" in ipa_kernels.explain(pipe).layers[0].reason
    generate(pipe, ("base",))
    assert impls(pipe) == {"eager"}, "a step without masks does not call it"


GRAPHED: dict[str, tuple[Any, str]] = {
    "sdpa": (F, ATTENTION),
    "the processor": (attention_processor.IPAdapterAttnProcessor2_0, "__call__"),
    "self-attention": (attention_processor.AttnProcessor2_0, "__call__"),
    "a block": (attention.BasicTransformerBlock, "forward"),
    "the projection": (embeddings.MultiIPAdapterImageProjection, "forward"),
    "a method that a class inherits": (nn.Linear, "__call__"),
    "the masks": (IPAdapterMaskProcessor, "downsample"),
}


def patch_name(place: str) -> str:
    owner, name = GRAPHED[place]
    return f"{owner.__name__}.{name}"


@pytest.mark.parametrize("place", GRAPHED)
def test_a_graph_is_not_replayed_where_something_is_replaced(
    place: str, recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replacement may be there to see what it is called with: a replay would not call it."""
    pipe, twin = build("sd", ("base",)), build("sd", ("base",))
    patch = Patch(*GRAPHED[place], monkeypatch)
    control = MASKED if place == "the masks" else Control()
    ipa_kernels.graphed(pipe)
    before = generate(pipe, ("base",), control, steps=3)
    replays = ipa_kernels.explain(pipe).graphs.replays
    assert replays > 0
    patch.put()
    expected, calls = run(twin, patch, ("base",), control, 3)
    assert not torch.equal(expected, before), "proves nothing"
    found, ours = run(pipe, patch, ("base",), control, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert ours >= calls, "buffers are filled before a step too"
    report = ipa_kernels.explain(pipe).graphs
    assert report.replays == replays
    # what is on the way to a layer is said to be in the way of the buffers
    assert "replaced" in report.reason or f"{patch_name(place)}, which is not torch's" in report.reason
    patch.remove()
    for _ in range(2):
        torch.testing.assert_close(generate(pipe, ("base",), control, steps=3), before, rtol=1e-4, atol=1e-5)
    assert ipa_kernels.explain(pipe).graphs.replays > replays
    assert ipa_kernels.explain(pipe).graphs.reason == ""


COMPILED: dict[str, tuple[Any, str]] = {
    "sdpa": (F, ATTENTION),
    "the processor": (attention_processor.IPAdapterAttnProcessor2_0, "__call__"),
    "the masks": (IPAdapterMaskProcessor, "downsample"),
}


@pytest.mark.parametrize("place", ["sdpa", "the processor", pytest.param("the masks", marks=pytest.mark.slow)])
def test_what_is_replaced_around_a_compiled_unet(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler looks at what it traced: it compiles anew when that is replaced, and again when it is put back."""
    torch._dynamo.reset()
    owner, name = COMPILED[place]
    own = getattr(owner, name)

    def patch(*arguments: Any, **options: Any) -> Tensor:
        return own(*arguments, **options) * 1.5

    compiled, twin = build("sd", ("base",)), build("sd", ("base",))
    control = MASKED if place == "the masks" else Control()
    ipa_kernels.enable(compiled)
    compiled.unet = torch.compile(compiled.unet, backend="eager", fullgraph=place != "the masks")
    outcomes = []
    for patched in (False, True, False):
        with monkeypatch.context() as patching:
            if patched:
                patching.setattr(owner, name, staticmethod(patch) if place == "the masks" else patch)
            expected, found = generate(twin, ("base",), control), generate(compiled, ("base",), control)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            outcomes.append(expected)
    assert not torch.equal(outcomes[0], outcomes[1]), "proves nothing"
    torch._dynamo.reset()
