"""Something on the way from a UNet to a layer is neither torch's nor diffusers' own, and changes what the layer is given.

StaticStorage of `prepare` are not read then, neither by compiled nor by captured steps; `explain` says what it is.
"""

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from peft import LoraConfig
from torch import nn

import ipa_kernels
from ipa_kernels.integration import hooks

from ..helpers.compiled import close, prepare
from ..helpers.generate import generate
from ..helpers.pipelines import build
from ..helpers.recorder import Recorder

NAMES = ("base",)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def changed(options: dict[str, Any]) -> dict[str, Any]:
    """Another prompt, in whatever form it is passed on there."""
    states = options.get("encoder_hidden_states")
    if states is None:
        return options
    other = (states[0] * 1.5, states[1]) if isinstance(states, tuple) else states * 1.5
    return options | {"encoder_hidden_states": other}


def other_prompt(inner: Callable[..., Any], owner: type) -> Callable[..., Any]:
    """A function in the place of `inner` that changes the prompt for calls of an `owner`."""

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(self, owner):
            return inner(self, *arguments, **options)
        return inner(self, *arguments, **changed(options))

    return run


class Place(NamedTuple):
    """name: of a function of a class that is called with the prompt; of instances of `owner` alone."""

    kind: type
    name: str
    owner: type

    def patch(self, monkeypatch: pytest.MonkeyPatch, *pipes: Any) -> None:
        """On the class."""
        monkeypatch.setattr(self.kind, self.name, other_prompt(getattr(self.kind, self.name), self.owner))

    def subclass(self, monkeypatch: pytest.MonkeyPatch, *pipes: Any) -> None:
        """Of one module of each pipeline."""
        for pipe in pipes:
            # the last: the first attention is no cross-attention
            module = [module for module in pipe.unet.modules() if type(module) is self.kind][-1]
            run = other_prompt(getattr(self.kind, self.name), self.kind)
            module.__class__ = type(self.kind.__name__, (self.kind,), {self.name: run})


def processor(place: Place, monkeypatch: pytest.MonkeyPatch, *pipes: Any) -> None:
    """A subclass of the processor of one layer, ours or stock's."""
    for pipe in pipes:
        found = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor
        kind = type(found)
        found.__class__ = type(kind.__name__, (kind,), {"__call__": other_prompt(kind.__call__, kind)})


def instance(place: Place, monkeypatch: pytest.MonkeyPatch, *pipes: Any) -> None:
    """On one module of each pipeline, as an attribute."""
    for pipe in pipes:
        module = [module for module in pipe.unet.modules() if type(module) is place.kind][-1]
        run = other_prompt(getattr(place.kind, place.name), place.kind)
        monkeypatch.setattr(module, place.name, types.MethodType(run, module))


def compiled(place: Place, monkeypatch: pytest.MonkeyPatch, *pipes: Any) -> None:
    """In the place where torch puts what `module.compile()` made."""
    for pipe in pipes:
        module = [module for module in pipe.unet.modules() if type(module) is place.kind][-1]
        run = other_prompt(place.kind._call_impl, place.kind)
        monkeypatch.setattr(module, "_compiled_call_impl", types.MethodType(run, module))


KINDS = UNet2DConditionModel, CrossAttnDownBlock2D, Transformer2DModel, BasicTransformerBlock, Attention
SUBCLASSED = [(Place(kind, "forward", kind), Place.subclass) for kind in KINDS]
PATCHED = [(Place(kind, "forward", kind), Place.patch) for kind in KINDS]
CALLS = [
    (Place(nn.Module, "__call__", Attention), Place.patch),
    (Place(nn.Module, "_call_impl", BasicTransformerBlock), Place.patch),
    (Place(Attention, "__call__", Attention), Place.subclass),
    (Place(Attention, "_call_impl", Attention), Place.subclass),
    (Place(UNet2DConditionModel, "process_encoder_hidden_states", UNet2DConditionModel), Place.patch),
    (Place(UNet2DConditionModel, "process_encoder_hidden_states", UNet2DConditionModel), instance),
    (Place(BasicTransformerBlock, "_call_impl", BasicTransformerBlock), instance),
    (Place(BasicTransformerBlock, "_compiled_call_impl", BasicTransformerBlock), compiled),
    (Place(Attention, "processor", Attention), processor),
]
ALL = [
    pytest.param(place, how, id=f"{how.__name__}-{place.kind.__name__}.{place.name}-{place.owner.__name__}")
    for place, how in (*SUBCLASSED, *PATCHED, *CALLS)
]


def pair() -> tuple[Any, Any]:
    pipes = build("sd", NAMES), build("sd", NAMES)
    for pipe in pipes:
        pipe.set_ip_adapter_scale(0.7)
    return pipes


def reads_nothing(pipe: Any) -> None:
    """The buffers are not read; `explain` says why not, and `prepare` refuses."""
    assert not hooks.of(pipe.unet).context.is_prepared
    assert "not torch's or diffusers' own" in ipa_kernels.explain(pipe).prepared_reason
    assert ipa_kernels.explain(pipe).prepared_reason in str(ipa_kernels.explain(pipe))
    ipa_kernels.clear_cache(pipe)
    with pytest.raises(ValueError, match="not torch's or diffusers' own"):
        prepare(pipe, NAMES)


@pytest.mark.parametrize(("place", "how"), ALL)
def test_a_captured_step_sees_it(
    place: Place, how: Callable[..., None], recorded: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patched when a step was captured and replayed."""
    graphed, twin = pair()
    ipa_kernels.graphed(graphed)
    for pipe in (graphed, twin):
        generate(pipe, NAMES, seed=1)
    before = generate(twin, NAMES, seed=2, steps=4)
    close(generate(graphed, NAMES, seed=2, steps=4), before)
    assert len(recorded) == 1
    how(place, monkeypatch, graphed, twin)
    expected = generate(twin, NAMES, seed=2, steps=4)
    assert not torch.allclose(expected, before, rtol=1e-2), "makes no difference: proves nothing"
    close(generate(graphed, NAMES, seed=2, steps=4), expected)
    assert len(recorded) == 1
    assert "not torch's or diffusers' own" in ipa_kernels.explain(graphed).graphs.reason
    reads_nothing(graphed)


@pytest.mark.parametrize(("place", "how"), [pytest.param(*SUBCLASSED[3], id="subclass"), pytest.param(*PATCHED[4], id="patch")])
def test_a_compiled_step_sees_it(place: Place, how: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Patched when it was prepared, before anything was compiled."""
    compiled, twin = pair()
    prepare(compiled, NAMES)
    how(place, monkeypatch, compiled, twin)
    compiled.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    for seed in (1, 2):
        close(generate(compiled, NAMES, seed=seed, steps=3), generate(twin, NAMES, seed=seed, steps=3))
    reads_nothing(compiled)


def test_a_patch_that_was_taken_back() -> None:
    pipe, twin = pair()
    prepare(pipe, NAMES)
    place, monkeypatch = Place(Attention, "forward", Attention), pytest.MonkeyPatch()
    place.patch(monkeypatch)
    generate(pipe, NAMES)
    assert ipa_kernels.explain(pipe).prepared_reason.startswith("got Attention.forward, which is not torch's")
    monkeypatch.undo()
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    close(generate(pipe, NAMES, seed=4), generate(twin, NAMES, seed=4))
    assert ipa_kernels.explain(pipe).prepared_reason == ""


@pytest.mark.parametrize("kind", ["sd", "sdxl", "animatediff", "kolors", "pag", "controlnet", "lcm"])
def test_what_is_torchs_and_diffusers_own_is_no_obstacle(kind: str) -> None:
    """With FreeU, a LoRA of peft and a compiled block."""
    pipe = build(kind, NAMES)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q"]))
    pipe.unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    prepare(pipe, NAMES)
    pipe.unet.mid_block.compile(backend="eager")
    assert hooks.of(pipe.unet).attention_layers.obstacle(pipe.unet) is None


def test_a_subclass_that_changes_nothing_is_no_obstacle() -> None:
    pipe, twin = pair()
    for kind in KINDS:
        for module in pipe.unet.modules():
            if type(module) is kind:
                module.__class__ = type(kind.__name__, (kind,), {"of_a_user": lambda self: None})
    prepare(pipe, NAMES)
    assert torch.equal(generate(pipe, NAMES), generate(twin, NAMES))
    assert ipa_kernels.explain(pipe).prepared_reason == ""


def test_a_hook_on_every_module() -> None:
    """It is given the text of a UNet that is called by position, and may write to it."""
    pipe, twin = pair()
    prepare(pipe, NAMES)
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, arguments: None)
    try:
        assert torch.equal(generate(pipe, NAMES), generate(twin, NAMES))
        assert ipa_kernels.explain(pipe).prepared_reason.startswith("got a hook on every module")
    finally:
        handle.remove()
