"""What a closed step trusts: between two steps it is changed, or something foreign comes that changes it in the middle of one.

A step is closed if nothing but torch's, diffusers' and our own functions can run in it; its layers do not check again what was
checked before it. Each story is played with a stock UNet and with an enabled one, whose pictures are equal bit for bit.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

import ipa_kernels
from ipa_kernels.integration import hooks
from ipa_kernels.testing import tiny_pipelines

from ..helpers.adapters import seeded
from ..helpers.controls import binary
from ..helpers.pipelines import build

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"


class Scene:
    """A UNet of a stock or an enabled twin, and a loop of a user's own that keeps its inputs.

    patches: of classes and modules, undone when the scene ends.
    """

    def __init__(self, patches: pytest.MonkeyPatch) -> None:
        self.unet = build("bare-unet", ("base",)).unet
        self.patches = patches
        self.draw = seeded(2)
        self.sample = self.draw(2, 4, 8, 8)
        self.text = self.draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM)
        self.images = [self.draw(2, 1, tiny_pipelines.IMAGE_EMBED_DIM)]
        self.masks: list[Tensor] | None = None
        self.time = 900
        self.handles: list[Any] = []
        self.kept: Any = None
        self.options: dict[str, Any] = {}

    @torch.no_grad()
    def step(self) -> Tensor:
        self.time -= 10
        attention = self.options if self.masks is None else self.options | {"ip_adapter_masks": self.masks}
        found: Tensor = self.unet(
            self.sample, self.time, self.text, added_cond_kwargs={"image_embeds": self.images},
            cross_attention_kwargs=dict(attention),
        ).sample  # fmt: skip
        return found

    @property
    def attention(self) -> Any:
        return self.unet.get_submodule(LAYER)

    @property
    def before(self) -> Any:
        """What runs right before that layer's block."""
        return self.unet.mid_block.resnets[0]

    @torch.no_grad()
    def edit(self, *arguments: Any) -> None:
        """Weights of the layer; anew in each call."""
        self.attention.to_k.weight.mul_(1.25)
        self.attention.processor.to_v_ip[0].weight.mul_(1.25)


Change = Callable[[Scene], object]

# what may run in a step from then on, and edits weights in the middle of it


def a_hook(scene: Scene) -> None:
    scene.handles.append(scene.before.register_forward_hook(scene.edit))


def a_pre_hook(scene: Scene) -> None:
    scene.handles.append(scene.before.register_forward_pre_hook(scene.edit))


def a_hook_on_an_activation(scene: Scene) -> None:
    scene.handles.append(scene.before.nonlinearity.register_forward_hook(scene.edit))


def a_hook_on_the_attention(scene: Scene) -> None:
    scene.handles.append(scene.attention.register_forward_pre_hook(scene.edit))


def a_hook_on_every_module(scene: Scene) -> None:
    def edit(module: nn.Module, arguments: Any) -> None:
        if module is scene.before:
            scene.edit()

    scene.handles.append(nn.modules.module.register_module_forward_pre_hook(edit))


def a_hook_on_the_unet(scene: Scene) -> None:
    def edit(module: nn.Module, arguments: Any) -> None:
        scene.edit()

    scene.handles.append(scene.unet.register_forward_pre_hook(edit))


def a_hook_put_in_by_hand(scene: Scene) -> None:
    """Without a handle, as who moves hooks from module to module does."""
    scene.before._forward_hooks[-1] = scene.edit


def hooks_replaced(scene: Scene) -> None:
    scene.patches.setattr(scene.before, "_forward_hooks", OrderedDict({-1: scene.edit}))


def a_forward_of_its_own(scene: Scene) -> None:
    forward = scene.before.forward

    def edit(*arguments: Any, **options: Any) -> Any:
        scene.edit()
        return forward(*arguments, **options)

    scene.before.forward = edit


def a_forward_of_the_unet(scene: Scene) -> None:
    forward = scene.unet.forward

    def edit(*arguments: Any, **options: Any) -> Any:
        scene.edit()
        return forward(*arguments, **options)

    scene.unet.forward = edit


def patched(kind: Any, name: str) -> Change:
    """A function of a class."""

    def change(scene: Scene) -> None:
        inner = getattr(kind, name)

        def edit(self: Any, *arguments: Any, **options: Any) -> Any:
            if self is scene.before or kind is not ResnetBlock2D:
                scene.edit()
            return inner(self, *arguments, **options)

        scene.patches.setattr(kind, name, edit)

    change.__name__ = f"{kind.__name__}_{name}"
    return change


def a_subclass(scene: Scene) -> None:
    def forward(self: Any, *arguments: Any) -> Any:
        scene.edit()
        return ResnetBlock2D.forward(self, *arguments)

    scene.before.__class__ = type("Own", (ResnetBlock2D,), {"forward": forward})


def a_module_of_ones_own(scene: Scene) -> None:
    class Own(nn.SiLU):
        def forward(self, states: Tensor) -> Tensor:
            scene.edit()
            return super().forward(states)

    scene.before.nonlinearity = Own()


def what_call_module_calls(scene: Scene) -> None:
    """In the place where torch puts what `module.compile()` made."""
    call = scene.before._call_impl

    def edit(*arguments: Any, **options: Any) -> Any:
        scene.edit()
        return call(*arguments, **options)

    scene.before._compiled_call_impl = edit


def a_processor_of_ones_own(scene: Scene) -> None:
    """For the self-attention before the layer."""

    class Own(AttnProcessor2_0):  # type: ignore[misc]
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            scene.edit()
            return super().__call__(*arguments, **options)

    scene.unet.get_submodule(LAYER.replace("attn2", "attn1")).set_processor(Own())


INTRUDERS: list[Change] = [
    a_hook, a_pre_hook, a_hook_on_an_activation, a_hook_on_the_attention, a_hook_on_every_module, a_hook_on_the_unet,
    a_hook_put_in_by_hand, hooks_replaced, a_forward_of_its_own, a_forward_of_the_unet, patched(ResnetBlock2D, "forward"),
    patched(FeedForward, "forward"), patched(AttnProcessor2_0, "__call__"),
    patched(UNet2DConditionModel, "get_time_embed"), a_subclass, a_module_of_ones_own,
    what_call_module_calls, a_processor_of_ones_own,
]  # fmt: skip

# what is changed between two steps, of which each is closed


def the_processors_replaced(scene: Scene) -> None:
    processors = dict(scene.unet.attn_processors)
    torch.manual_seed(7)
    for name, old in processors.items():
        if hasattr(old, "to_k_ip"):
            processors[name] = IPAdapterAttnProcessor2_0(old.hidden_size, old.cross_attention_dim, old.num_tokens, old.scale)
    scene.unet.set_attn_processor(processors)


def one_processor_taken_from_another_unet(scene: Scene) -> None:
    other = build("bare-unet", ("base",)).unet.get_submodule(LAYER).processor
    with torch.no_grad():
        other.to_k_ip[0].weight.mul_(-1)
        other.to_v_ip[0].weight.mul_(-1)
    scene.attention.set_processor(other)


def heads(scene: Scene) -> None:
    scene.attention.heads = 2


def heads_of_another_kind(scene: Scene) -> None:
    scene.attention.heads = torch.tensor(2)


def the_output_factor(scene: Scene) -> None:
    scene.attention.rescale_output_factor = 2.0


def a_residual_connection(scene: Scene) -> None:
    scene.attention.residual_connection = True


def to_k_exchanged(scene: Scene) -> None:
    torch.manual_seed(7)
    scene.attention.to_k = nn.Linear(tiny_pipelines.CROSS_ATTENTION_DIM, scene.attention.inner_dim, bias=False)


def to_q_exchanged(scene: Scene) -> None:
    torch.manual_seed(7)
    scene.attention.to_q = nn.Linear(scene.attention.query_dim, scene.attention.inner_dim, bias=False)


def to_v_ip_exchanged(scene: Scene) -> None:
    torch.manual_seed(7)
    processor = scene.attention.processor
    processor.to_v_ip[0] = nn.Linear(tiny_pipelines.CROSS_ATTENTION_DIM, scene.attention.inner_dim, bias=False)


def to_v_ip_exchanged_and_kept(scene: Scene) -> None:
    """By the user: that it is gone tells nobody."""
    scene.kept = scene.attention.processor.to_v_ip[0]
    to_v_ip_exchanged(scene)


def all_of_to_k_ip_exchanged(scene: Scene) -> None:
    torch.manual_seed(7)
    keys = nn.Linear(tiny_pipelines.CROSS_ATTENTION_DIM, scene.attention.inner_dim, bias=False)
    scene.attention.processor.to_k_ip = nn.ModuleList([keys])


def a_bias(scene: Scene) -> None:
    scene.attention.to_v.bias = nn.Parameter(seeded(7)(scene.attention.inner_dim))


def a_weight_exchanged(scene: Scene) -> None:
    scene.attention.to_v.weight = nn.Parameter(scene.attention.to_v.weight.detach() * 2)


def data_of_a_weight_exchanged(scene: Scene) -> None:
    weight = scene.attention.processor.to_k_ip[0].weight
    weight.data = weight.data * 2


def a_weight_written_to(scene: Scene) -> None:
    with torch.no_grad():
        scene.attention.processor.to_k_ip[0].weight[1].add_(1)


def a_weight_of_the_image_projection_written_to(scene: Scene) -> None:
    with torch.no_grad():
        scene.unet.encoder_hid_proj.image_projection_layers[0].image_embeds.weight.mul_(2)


def a_norm_of_the_image_projection_written_to(scene: Scene) -> None:
    with torch.no_grad():
        scene.unet.encoder_hid_proj.image_projection_layers[0].norm.weight[3] = 5


def the_image_projection_exchanged(scene: Scene) -> None:
    other = build("bare-unet", ("base",)).unet.encoder_hid_proj.image_projection_layers
    with torch.no_grad():
        other[0].image_embeds.weight.mul_(2)
    scene.unet.encoder_hid_proj.image_projection_layers = other


def a_scale_in_place(scene: Scene) -> None:
    scene.attention.processor.scale[0] = 0.25


def a_scale_of_another_kind(scene: Scene) -> None:
    scene.attention.processor.scale[0] = torch.tensor(0.25)


def the_list_of_scales(scene: Scene) -> None:
    scene.attention.processor.scale = [0.25]


def a_list_of_plain_modules(scene: Scene) -> None:
    processor = scene.attention.processor
    torch.manual_seed(7)
    keys = nn.Linear(tiny_pipelines.CROSS_ATTENTION_DIM, scene.attention.inner_dim, bias=False)
    del processor.to_k_ip
    processor.to_k_ip = [keys]


def to_out_written_to(scene: Scene) -> None:
    with torch.no_grad():
        scene.attention.to_out[0].weight.mul_(2)


def dropout_exchanged(scene: Scene) -> None:
    scene.attention.to_out[1] = nn.LeakyReLU(0.5)


def a_plain_list_in_the_place_of_to_out(scene: Scene) -> None:
    modules = list(scene.attention.to_out)
    del scene.attention.to_out
    scene.attention.to_out = [modules[0], nn.LeakyReLU(0.5)]


def a_hook_on_to_k_by_hand(scene: Scene) -> None:
    scene.attention.to_k._forward_hooks[-1] = lambda module, arguments, result: result * 2


def a_hook_on_to_v_ip_by_hand(scene: Scene) -> None:
    scene.attention.processor.to_v_ip[0]._forward_hooks[-1] = lambda module, arguments, result: result * 2


def text_written_to(scene: Scene) -> None:
    scene.text.mul_(2)


def images_written_to(scene: Scene) -> None:
    scene.images[0].mul_(-1)


def masks(scene: Scene) -> None:
    scene.masks = [binary()]


def autocast(scene: Scene) -> None:
    step = scene.step

    def within() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return step()

    scene.patches.setattr(scene, "step", within)


def everything_through_bfloat16(scene: Scene) -> None:
    scene.unet.to(torch.bfloat16)
    scene.unet.to(torch.float32)


CHANGES: list[Change] = [
    the_processors_replaced, one_processor_taken_from_another_unet, heads, heads_of_another_kind, the_output_factor,
    a_residual_connection, to_k_exchanged, to_q_exchanged, to_v_ip_exchanged, to_v_ip_exchanged_and_kept,
    all_of_to_k_ip_exchanged, a_bias,
    a_weight_exchanged, data_of_a_weight_exchanged, a_weight_written_to,
    a_weight_of_the_image_projection_written_to, a_norm_of_the_image_projection_written_to, the_image_projection_exchanged,
    a_scale_in_place, a_scale_of_another_kind, the_list_of_scales, a_list_of_plain_modules,
    to_out_written_to, dropout_exchanged, a_plain_list_in_the_place_of_to_out, a_hook_on_to_k_by_hand,
    a_hook_on_to_v_ip_by_hand, text_written_to, images_written_to, masks, autocast, everything_through_bfloat16,
    # of all layers at once
    patched(nn.Linear, "forward"), patched(Attention, "forward"),
]  # fmt: skip


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each step of an enabled UNet, whether it was closed."""
    found: list[bool] = []
    condition = hooks.ModelState._condition

    def seen(self: Any, unet: Any, step: Any, *rest: Any) -> None:
        condition(self, unet, step, *rest)
        found.append(step.is_closed)

    monkeypatch.setattr(hooks.ModelState, "_condition", seen)
    return found


def nothing(scene: Scene) -> None:
    pass


def played(change: Change, *, enabled: bool, setup: Change = nothing) -> list[Tensor]:
    """Pictures of two steps before a change, and of three after it. setup: before all of them."""
    with pytest.MonkeyPatch.context() as patches:
        scene = Scene(patches)
        setup(scene)
        if enabled:
            ipa_kernels.enable(scene.unet, impl="eager")
        try:
            pictures = [scene.step(), scene.step()]
            if enabled:
                assert scene.unet._ipa_kernels.guard.foreign == ""
                assert ipa_kernels.explain(scene.unet).cache.hits > 0, "nothing was found, so that this proves nothing"
            change(scene)
            return [*pictures, scene.step(), scene.step(), scene.step()]
        finally:
            for handle in scene.handles:
                handle.remove()


def as_with_stock(change: Change, setup: Change = nothing) -> None:
    expected, unchanged = (played(one, enabled=False, setup=setup) for one in (change, nothing))
    assert torch.equal(expected[1], unchanged[1])
    assert not torch.equal(expected[2], unchanged[2]), "the change makes no difference, so that this proves nothing"
    equal = list(map(torch.equal, played(change, enabled=True, setup=setup), expected))
    assert equal == [True] * 5


@pytest.mark.parametrize("change", INTRUDERS, ids=lambda change: change.__name__)
def test_what_comes_between_two_steps_and_edits_weights_in_the_middle_of_one(change: Change, closed: list[bool]) -> None:
    as_with_stock(change)
    assert closed == [True, True, False, False, False]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_changed_between_two_closed_steps(change: Change, closed: list[bool]) -> None:
    as_with_stock(change)
    assert closed[:2] == [True, True]


def test_a_bias_written_to_between_two_closed_steps(closed: list[bool]) -> None:
    """Such a projection is looked at by itself."""

    def write(scene: Scene) -> None:
        with torch.no_grad():
            scene.attention.to_v.bias.mul_(2)

    as_with_stock(write, setup=a_bias)
    assert closed == [True] * 5


def test_a_step_is_closed_again_when_what_was_foreign_is_gone(closed: list[bool]) -> None:
    def story(scene: Scene) -> None:
        a_hook(scene)
        scene.step()
        scene.handles.pop().remove()

    as_with_stock(story)
    assert closed == [True, True, False, True, True, True]


def test_a_function_replaced_between_two_closed_steps(closed: list[bool]) -> None:
    """One that no class has."""

    def change(scene: Scene) -> None:
        linear = F.linear
        scene.patches.setattr(F, "linear", lambda *arguments: linear(*arguments) * 1.01)

    as_with_stock(change)
    assert closed == [True, True, False, False, False]


def test_a_step_that_scales_loras_is_open(closed: list[bool]) -> None:
    """Its forward scales their weights after they were looked at."""
    with pytest.MonkeyPatch.context() as patches:
        scene = Scene(patches)
        ipa_kernels.enable(scene.unet, impl="eager")
        for scale in (1, 1.0, 0.25, 1):
            scene.options = {"scale": scale}
            scene.step()
    assert closed == [True, True, False, True]
