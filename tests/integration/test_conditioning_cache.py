"""What is remembered during a generation is never stale: scenes of two steps and more, stock against enabled, bit for bit."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionImg2ImgPipeline
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import ipa_kernels
from ipa_kernels.integration import running_step, steps
from ipa_kernels.testing import tiny_pipelines

from ..helpers.adapters import FACE_DIM, HIDDEN_TOKENS, seeded, set_face_embeddings
from ..helpers.controls import CONTROLS, Control, binary
from ..helpers.functions import SeenFunctions
from ..helpers.generate import FRAMES, generate, target
from ..helpers.life import OPERATIONS, Life
from ..helpers.pipelines import BUILDERS, KOLORS_TEXT_DIM, build
from ..helpers.steady import no_collection, others_set_aside

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"


class Scene:
    """A bare UNet with an adapter and its inputs, which a scene changes between steps."""

    def __init__(self, name: str = "base") -> None:
        self.pipe = build("bare-unet", (name,))
        self.unet = self.pipe.unet
        self.names = (name,)
        self.draw = seeded(2)
        shape = {"base": (tiny_pipelines.IMAGE_EMBED_DIM,), "faceid": (FACE_DIM,), "faceid-plus": (FACE_DIM,)}.get(
            name, (HIDDEN_TOKENS, tiny_pipelines.IMAGE_EMBED_DIM)
        )
        self.sample = self.draw(2, 4, 8, 8)
        self.text = self.draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM)
        self.embeds = [self.draw(2, 1, *shape)]
        self.masks: list[Tensor] | None = None
        self.options: dict[str, Any] = {}
        self.times: Iterator[int] = iter(range(900, 0, -10))
        self.pictures: list[Tensor] = []

    def step(self, **options: Any) -> None:
        """The next step of a generation."""
        attention = {} if self.masks is None else {"ip_adapter_masks": self.masks}
        attention |= self.options
        with torch.no_grad():
            picture = self.unet(
                self.sample, next(self.times), self.text, added_cond_kwargs={"image_embeds": self.embeds},
                cross_attention_kwargs=attention or None, **options,
            ).sample  # fmt: skip
        self.pictures.append(picture)

    def attention(self) -> Any:
        return self.unet.get_submodule(LAYER)

    def image_keys(self) -> nn.Linear:
        return self.attention().processor.to_k_ip[0]


def replace_text(scene: Scene) -> None:
    scene.text = scene.draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM)


def refill_text(scene: Scene) -> None:
    scene.text.copy_(scene.draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM))


def refill_text_through_a_view(scene: Scene) -> None:
    scene.text[1, 5:].mul_(2)


def text_data(scene: Scene) -> None:
    scene.text.data = scene.draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM)


def replace_images(scene: Scene) -> None:
    scene.embeds = [scene.draw(2, 1, tiny_pipelines.IMAGE_EMBED_DIM)]


def replace_images_in_the_list(scene: Scene) -> None:
    scene.embeds[0] = scene.draw(2, 1, tiny_pipelines.IMAGE_EMBED_DIM)


def refill_images(scene: Scene) -> None:
    scene.embeds[0].mul_(-1)


def more_images(scene: Scene) -> None:
    scene.embeds = [scene.draw(2, 3, tiny_pipelines.IMAGE_EMBED_DIM)]


def edit_text_weight(scene: Scene) -> None:
    with torch.no_grad():
        scene.attention().to_k.weight.mul_(1.5)


def edit_image_weight(scene: Scene) -> None:
    with torch.no_grad():
        scene.image_keys().weight[3].add_(0.5)


def replace_image_weight(scene: Scene) -> None:
    scene.image_keys().weight = nn.Parameter(scene.image_keys().weight.detach() * 2)


def replace_weight_data(scene: Scene) -> None:
    weight = scene.attention().to_v.weight
    weight.data = weight.data * 2


def replace_projection(scene: Scene) -> None:
    torch.manual_seed(0)
    scene.attention().to_v = nn.Linear(tiny_pipelines.CROSS_ATTENTION_DIM, scene.attention().inner_dim, bias=True)


def optimizer_step(scene: Scene) -> None:
    parameters = [scene.image_keys().weight, *scene.unet.encoder_hid_proj.parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()


def load_weights(scene: Scene) -> None:
    state = {name: tensor * 1.25 for name, tensor in scene.unet.state_dict().items() if "_ip." in name}
    scene.unet.load_state_dict(state, strict=False)


def hook_on_a_projection(scene: Scene) -> None:
    scene.attention().to_k.register_forward_hook(lambda module, arguments, result: result + 1)


def hook_on_the_image_projection(scene: Scene) -> None:
    layer = scene.unet.encoder_hid_proj.image_projection_layers[0]
    layer.norm.register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1,))


def forward_of_ones_own(scene: Scene) -> None:
    linear = scene.image_keys()
    linear.forward = lambda states: 2 * nn.functional.linear(states, linear.weight)


def edit_image_projection(scene: Scene) -> None:
    with torch.no_grad():
        scene.unet.encoder_hid_proj.image_projection_layers[0].norm.bias.add_(0.3)


def to_float64_and_back(scene: Scene) -> None:
    scene.unet.to(torch.bfloat16)
    scene.unet.to(torch.float32)


def scales(scene: Scene) -> None:
    scene.attention().processor.scale[0] = -0.4


def add_masks(scene: Scene) -> None:
    scene.masks = [binary()]


def other_heads(scene: Scene) -> None:
    scene.attention().heads = 2


def a_numpy_number_as_the_factor(scene: Scene) -> None:
    scene.attention().rescale_output_factor = np.float64(2.0)


def a_factor_for_each_channel(scene: Scene) -> None:
    scene.attention().rescale_output_factor = torch.linspace(1, 2, scene.attention().to_out[0].out_features)


CHANGES = [
    replace_text, refill_text, refill_text_through_a_view, text_data, replace_images, replace_images_in_the_list, refill_images,
    more_images, edit_text_weight, edit_image_weight, replace_image_weight, replace_weight_data, replace_projection,
    optimizer_step, load_weights, hook_on_a_projection, hook_on_the_image_projection, forward_of_ones_own,
    edit_image_projection, to_float64_and_back, scales, add_masks, other_heads,
    a_numpy_number_as_the_factor, a_factor_for_each_channel,
]  # fmt: skip


def play(scene: Scene, play: Callable[[Scene], None], *, enabled: bool) -> Scene:
    if enabled:
        ipa_kernels.enable(scene.unet)
    play(scene)
    return scene


def as_with_stock(story: Callable[[Scene], None], name: str = "base") -> Any:
    """Play a scene twice; the report of the enabled one, in which something was remembered."""
    stock, ours = play(Scene(name), story, enabled=False), play(Scene(name), story, enabled=True)
    for step, (actual, expected) in enumerate(zip(ours.pictures, stock.pictures, strict=True)):
        assert torch.equal(actual, expected), f"step {step} differs"
    report = ipa_kernels.explain(ours.unet)
    assert report.cache.hits > 0, "nothing was remembered, so that this proves nothing"
    return report


def nothing(scene: Scene) -> None:
    pass


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_in_the_middle_of_a_generation(change: Callable[[Scene], None]) -> None:
    def story(scene: Scene, change: Callable[[Scene], None] = change) -> None:
        scene.step()
        scene.step()
        change(scene)
        scene.step()
        scene.step()

    unchanged, changed = Scene(), Scene()
    story(unchanged, nothing)
    story(changed)
    assert torch.equal(unchanged.pictures[1], changed.pictures[1])
    assert not torch.equal(unchanged.pictures[2], changed.pictures[2]), "the change makes no difference"
    as_with_stock(story)


MASK_CHANGES = {
    "in place": lambda scene: scene.masks[0].copy_(1 - scene.masks[0]),
    "replaced in the list": lambda scene: scene.masks.__setitem__(0, binary(seed=9)),
    "another list": lambda scene: setattr(scene, "masks", [binary(seed=9)]),
    "none": lambda scene: setattr(scene, "masks", None),
    "a list of None": lambda scene: setattr(scene, "masks", [None]),
    "another dtype": lambda scene: setattr(scene, "masks", [binary(seed=9).double()]),
}


@pytest.mark.parametrize("name", MASK_CHANGES)
def test_masks_that_change(name: str) -> None:
    def story(scene: Scene) -> None:
        scene.masks = [binary()]
        scene.step()
        scene.step()
        MASK_CHANGES[name](scene)
        scene.step()
        scene.step()
        assert not torch.equal(scene.pictures[1], scene.pictures[2])

    as_with_stock(story)


def test_masked_images_of_one_adapter_are_told_apart() -> None:
    def story(scene: Scene) -> None:
        scene.embeds = [scene.draw(2, 2, tiny_pipelines.IMAGE_EMBED_DIM)]
        scene.masks = [binary(2)]
        for _ in range(3):
            scene.step()
        scene.masks = None
        scene.step()

    as_with_stock(story)


FACES = {
    "clip_embeds replaced": lambda layer, draw: setattr(layer, "clip_embeds", draw(*layer.clip_embeds.shape)),
    "clip_embeds in place": lambda layer, draw: layer.clip_embeds.neg_(),
    "shortcut": lambda layer, draw: setattr(layer, "shortcut", not layer.shortcut),
    "shortcut_scale": lambda layer, draw: setattr(layer, "shortcut_scale", 0.1),
}


@pytest.mark.parametrize("name", FACES)
def test_the_attributes_of_faceid_plus(name: str) -> None:
    def story(scene: Scene) -> None:
        layer = scene.unet.encoder_hid_proj.image_projection_layers[0]
        set_face_embeddings(scene, scene.draw, 2, 1)
        scene.step()
        scene.step()
        FACES[name](layer, scene.draw)
        scene.step()
        scene.step()
        assert not torch.equal(scene.pictures[1], scene.pictures[2])

    as_with_stock(story, "faceid-plus")


def test_autocast_on_and_off() -> None:
    def story(scene: Scene) -> None:
        for dtype in (None, torch.bfloat16, None, torch.float16, torch.bfloat16):
            for _ in range(2):
                with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                    scene.step()

    as_with_stock(story)


def test_weight_data_edited_between_two_generations() -> None:
    """No version shows it, but each generation of a pipeline has tensors of its own."""

    def story(scene: Scene) -> None:
        for _ in range(2):
            scene.text, scene.embeds = scene.text.clone(), [embeds.clone() for embeds in scene.embeds]
            for _ in range(3):
                scene.step()
            scene.attention().to_k.weight.data.mul_(2)
            scene.image_keys().weight.data.neg_()
            scene.unet.encoder_hid_proj.image_projection_layers[0].norm.bias.data.add_(1)
        assert not torch.equal(scene.pictures[0], scene.pictures[3])

    as_with_stock(story)


def test_weights_edited_between_two_runs_with_the_same_tensors() -> None:
    """In a way that torch sees: whatever the timesteps are."""

    def story(scene: Scene) -> None:
        for weight in (scene.attention().to_k.weight, scene.image_keys().weight, scene.attention().to_v.weight):
            scene.times = iter((900, 500, 900))
            for _ in range(3):
                scene.step()
            with torch.no_grad():
                weight.mul_(2)
        scene.times = iter((900,))
        scene.step()

    as_with_stock(story)


def new_at(memory: Any, address: int) -> Tensor:
    """A new tensor on the memory of an array, as a Python object at an address that was just freed.

    An object that lies elsewhere is kept while the next is made: the free places of its size come to an end, and the one that
    is looked for is among them.
    """
    elsewhere = []
    for _ in range(100_000):
        tensor = torch.from_numpy(memory)
        if id(tensor) == address:
            return tensor
        elsewhere.append(tensor)
    raise AssertionError(f"no tensor was made at {address:#x}")


def test_recycled_memory() -> None:
    """Another prompt and other images are where the last ones were, the objects and their numbers."""

    def story(scene: Scene) -> None:
        # tensors that own the memory: what is written through them leaves no trace in those that are made on it
        owners = scene.text.clone(), scene.embeds[0].clone()
        text, embeds = (owner.numpy() for owner in owners)
        scene.text, scene.embeds = torch.from_numpy(text), [torch.from_numpy(embeds)]
        scene.step()
        for _ in range(5):
            places = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in (scene.text, scene.embeds[0])]
            del scene.text
            scene.text = new_at(text, places[0][0])
            del scene.embeds[0]
            scene.embeds.append(new_at(embeds, places[1][0]))
            assert places == [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in (scene.text, scene.embeds[0])]
            for owner in owners:
                owner.copy_(scene.draw(*owner.shape))
            scene.step()
            scene.step()

    as_with_stock(story)


def test_alternating_conditions_are_all_remembered() -> None:
    def story(scene: Scene) -> None:
        texts = [scene.draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM) for _ in range(4)]
        times = list(range(900, 500, -100))
        for time in times:
            for scene.text in texts:
                scene.times = iter([time])
                scene.step()

    report = as_with_stock(story)
    layers = len(report.layers)
    # a prompt and layer once, the images once
    assert report.cache.misses == 4 * layers + layers + 1
    assert report.cache.bytes > 0


LORAS = {
    "base": ["load LoRA", "scale LoRA", "fuse LoRA", "unfuse LoRA", "disable LoRA", "enable LoRA", "unload LoRA"],
    "faceid": ["scale the LoRA of FaceID", "fuse LoRA", "unfuse LoRA", "disable LoRA", "enable LoRA", "unload LoRA"],
}


@pytest.mark.parametrize("adapter", LORAS)
def test_loras(adapter: str) -> None:
    """Loaded, scaled, fused, unfused, switched off and on and unloaded in the middle of a generation, and scaled per call."""

    def story(scene: Scene) -> None:
        for operation in LORAS[adapter]:
            for scene.options in ({}, {"scale": 0.25}, {}):
                scene.step()
                scene.step()
            if operation == "scale the LoRA of FaceID":
                scene.pipe.set_adapters(["faceid_0"], [0.4])
            else:
                OPERATIONS[operation](scene)
        scene.step()

    report = as_with_stock(story, adapter)
    # LoRA layers are remembered too: every other step changes nothing
    assert report.cache.hits >= report.cache.misses / 2


def test_a_lora_fused_and_unloaded_between_generations_leaves_other_weights() -> None:
    def pictures(enabled: bool) -> list[Tensor]:
        life = Life()
        life.load("base")
        if enabled:
            ipa_kernels.enable(life.pipe)
        results = [life.picture()]
        for operation in ("load LoRA", "fuse LoRA", "unload LoRA"):
            life.do(operation)
            results.append(life.picture())
        return results

    expected = pictures(False)
    assert all(map(torch.equal, pictures(True), expected))
    assert not torch.equal(expected[0], expected[-1])


@pytest.mark.parametrize("what", ["prompt", "prompt in place"])
def test_a_prompt_changed_by_a_callback(what: str) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1:
            embeds = tensors["prompt_embeds"]
            tensors["prompt_embeds"] = embeds.mul_(-1) if "place" in what else embeds.roll(1, dims=1)
        return tensors

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"], "steps": 4}
    pipe = build("sd", ("plus",))
    expected = generate(pipe, ("plus",), **options)
    ipa_kernels.enable(pipe)
    assert torch.equal(generate(pipe, ("plus",), **options), expected)
    assert not torch.equal(generate(pipe, ("plus",), steps=4), expected)
    assert ipa_kernels.explain(pipe).cache.hits > 0


def count(pipe: Any, kinds: tuple[str, ...], calls: dict[str, int]) -> SeenFunctions:
    """Counts the calls of linear layers by a part of their name."""
    linears = ((name, module) for name, module in pipe.unet.named_modules() if isinstance(module, nn.Linear))
    names = {id(module.weight): kind for name, module in linears for kind in kinds if kind in f".{name}."}
    calls |= dict.fromkeys(kinds, 0)

    def see(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if function is F.linear and id(arguments[1]) in names:
            calls[names[id(arguments[1])]] += 1

    return SeenFunctions(see)


# the guider of modular-pag repeats each step with the same inputs, which is taken for a new generation
@pytest.mark.parametrize("kind", [kind for kind in BUILDERS if kind != "modular-pag"])
def test_everything_is_computed_once_per_generation(kind: str) -> None:
    """However many steps: the keys and values of each layer, and the image tokens."""
    steps, conditions = 5, 2 if kind == "modular" else 1
    pipe = build(kind, ("base", "plus"))
    ipa_kernels.enable(target(pipe))
    calls: dict[str, int] = {}
    with count(pipe, (".attn2.to_k.", ".attn2.to_v.", ".to_k_ip.", ".to_v_ip.", ".image_projection_layers.0."), calls):
        generate(pipe, ("base", "plus"), Control(masks=CONTROLS["mask for the last alone"].masks), steps=steps)
    layers = len(ipa_kernels.explain(target(pipe)).layers)
    motion = sum("motion_modules" in name and name.endswith("attn2.processor") for name in pipe.unet.attn_processors)
    text = layers * conditions + motion * steps
    images = 2 * layers * conditions
    assert list(calls.values()) == [text, text, images, images, conditions]


def test_masks_are_resized_once_per_resolution() -> None:
    sizes = []

    def see(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        # the UNet resizes too, in another mode
        if function is F.interpolate and options["mode"] == "bicubic":
            height, width = options["size"]
            sizes.append(height * width)

    pipe = build("sd", ("base",))
    with SeenFunctions(see):
        generate(pipe, ("base",), CONTROLS["masks for two images"], steps=5)
    assert len(sizes) == 2 * 4 * 5
    sizes.clear()
    ipa_kernels.enable(pipe)
    with SeenFunctions(see):
        generate(pipe, ("base",), CONTROLS["masks for two images"], steps=5)
    assert sorted(sizes) == [16, 16, 64, 64]


@others_set_aside()
def test_nothing_is_left_of_a_hundred_generations() -> None:
    pipe = build("sd", ("base", "plus"))
    ipa_kernels.enable(pipe)
    left = []
    for i in range(100):
        control = CONTROLS[("one scale", "masks for two images", "three images in one softmax", "two prompts")[i % 4]]
        generate(pipe, ("base", "plus"), control, size=(8, 12)[i % 2], seed=i)
        # the pipeline itself keeps the masks of its last call
        assert (ipa_kernels.explain(pipe).cache.bytes > 0) == (control.masks is not None)
        assert len(pipe.unet._ipa_kernels.context.conditioning._sources) <= 2
        if i % 20 == 19:
            gc.collect()
            left.append(sum(type(thing) is Tensor for thing in gc.get_objects()))
    assert left[0] == left[-1]
    assert ipa_kernels.explain(pipe).cache.hits > 1000


def test_clear_cache_and_disable_drop_what_a_loop_keeps_alive() -> None:
    scene = Scene()
    ipa_kernels.enable(scene.unet)
    scene.step()
    assert ipa_kernels.explain(scene.unet).cache.bytes > 0
    ipa_kernels.clear_cache(scene.unet)
    assert tuple(ipa_kernels.explain(scene.unet).cache) == (0, 0, 0)
    scene.step()
    assert ipa_kernels.explain(scene.unet).cache.misses > 0
    memory = scene.unet._ipa_kernels.context.conditioning
    ipa_kernels.disable(scene.unet)
    assert memory.bytes == 0


@pytest.mark.parametrize("function", [ipa_kernels.clear_cache, ipa_kernels.enable, ipa_kernels.disable])
def test_what_is_dropped_is_freed_at_once(function: Callable[[nn.Module], object]) -> None:
    """And not when a cycle is collected; the prompt that it was computed from lives on."""
    scene = Scene()
    ipa_kernels.enable(scene.unet)
    scene.step()
    scene.step()
    sources = scene.unet._ipa_kernels.context.conditioning._sources.values()
    values = [weakref.ref(tensor) for source in sources for value in source.values.values() for tensor in value.tensors()]
    assert len(values) > 2
    del sources
    with no_collection():
        function(scene.unet)
        assert not any(value() is not None for value in values)


def test_cache_false_remembers_nothing() -> None:
    scene = Scene()
    ipa_kernels.enable(scene.unet, cache=False)
    scene.step()
    scene.step()
    assert tuple(ipa_kernels.explain(scene.unet).cache) == (0, 0, 0)
    ipa_kernels.enable(scene.unet)
    scene.step()
    assert ipa_kernels.explain(scene.unet).cache.misses > 0
    ipa_kernels.enable(scene.unet, cache=False)
    assert ipa_kernels.explain(scene.unet).cache.bytes == 0


def test_gradients_and_inference_mode_are_not_remembered() -> None:
    scene = Scene()
    ipa_kernels.enable(scene.unet, impl="eager")
    with torch.inference_mode():
        text, embeds = scene.text.clone(), [scene.embeds[0].clone()]
        for time in (5, 4):
            scene.unet(scene.sample, time, text, added_cond_kwargs={"image_embeds": embeds})
    assert ipa_kernels.explain(scene.unet).cache.hits == 0
    for time in (3, 2):
        scene.unet(scene.sample, time, scene.text, added_cond_kwargs={"image_embeds": scene.embeds}).sample.sum().backward()
    assert ipa_kernels.explain(scene.unet).cache.hits == 0
    assert scene.image_keys().weight.grad is not None


def test_a_step_that_raises_leaves_the_memory_closed() -> None:
    scene = Scene()
    ipa_kernels.enable(scene.unet)
    scene.step()
    with pytest.raises(RuntimeError, match="on purpose"):
        fail_once(scene)
    assert running_step.THREAD.step is None
    scene.step()


def fail_once(scene: Scene) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("on purpose")

    handle = scene.unet.mid_block.register_forward_pre_hook(fail)
    try:
        scene.step()
    finally:
        handle.remove()


def test_a_direct_call_of_a_layer_remembers_nothing() -> None:
    scene = Scene()
    ipa_kernels.enable(scene.unet)
    scene.step()
    before = ipa_kernels.explain(scene.unet).cache
    states = scene.text, [scene.draw(2, 1, 4, tiny_pipelines.CROSS_ATTENTION_DIM)]
    with torch.no_grad():
        for _ in range(2):
            scene.attention()(scene.draw(2, 16, 64), encoder_hidden_states=states)
    assert ipa_kernels.explain(scene.unet).cache == before


def one_step(unet: Any, timestep: int, text: Tensor, images: list[Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = unet(seeded(3)(2, 4, 8, 8), timestep, text, added_cond_kwargs={"image_embeds": images}).sample
    return found


def test_an_interrupted_step_leaves_no_memory_to_the_next() -> None:
    """torch runs no hooks for a KeyboardInterrupt."""
    unet = build("bare-unet", ("base",)).unet
    ipa_kernels.enable(unet)
    inputs = seeded(2)(2, 77, 64), [seeded(4)(2, 1, 32)]
    seen: list[object] = []

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    handle = unet.up_blocks[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        one_step(unet, 900, *inputs)
    handle.remove()
    ipa_kernels.enable(unet, cache=False)
    unet.mid_block.register_forward_pre_hook(lambda *arguments: seen.append(running_step.THREAD.step.entry))
    one_step(unet, 800, *inputs)
    assert seen == [None]
    assert ipa_kernels.explain(unet).cache == (0, 0, 0)


def test_what_was_computed_on_another_stream_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It might not be there yet."""
    unet = build("bare-unet", ("base",)).unet
    ipa_kernels.enable(unet)
    inputs = seeded(2)(2, 77, 64), [seeded(4)(2, 1, 32)]
    hits = []
    for timestep, stream in [(900, 1), (800, 2), (700, 1), (600, None)]:
        current = None if stream is None else SimpleNamespace(cuda_stream=stream)
        monkeypatch.setattr(steps, "stream_of", lambda tensor, current=current: current)
        before = ipa_kernels.explain(unet).cache.hits
        one_step(unet, timestep, *inputs)
        hits.append(ipa_kernels.explain(unet).cache.hits > before)
    assert hits == [False, False, True, False]


def test_two_pipelines_on_one_unet() -> None:
    pipe = build("sd", ("base",))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    expected = [generate(pipe, ("base",), seed=1), generate(other, ("base",), seed=2)]
    ipa_kernels.enable(pipe)
    for _ in range(2):
        assert torch.equal(generate(pipe, ("base",), seed=1), expected[0])
        assert torch.equal(generate(other, ("base",), seed=2), expected[1])
    assert ipa_kernels.explain(pipe).cache.hits > 0


def test_a_generation_within_a_generation() -> None:
    """A callback that draws a preview with the same UNet."""
    pipe = build("sd", ("base",))

    def preview(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 1:
            scheduler = pipe.scheduler
            pipe.scheduler = scheduler.from_config(scheduler.config)
            previews.append(generate(pipe, ("base",), seed=9))
            pipe.scheduler = scheduler
        return tensors

    previews: list[Tensor] = []
    expected = generate(pipe, ("base",), steps=4, callback_on_step_end=preview)
    ipa_kernels.enable(pipe)
    assert torch.equal(generate(pipe, ("base",), steps=4, callback_on_step_end=preview), expected)
    assert torch.equal(*previews)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_a_row_that_is_visibly_repeated_is_projected_once_for_the_kernel(impl: str) -> None:
    rows = []

    def see(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if function is F.linear and arguments[1] is scene.attention().to_k.weight:
            rows.append(arguments[0].shape[0])

    scene = Scene()
    scene.text = scene.draw(1, 77, tiny_pipelines.CROSS_ATTENTION_DIM).expand(2, -1, -1)
    scene.step()
    ipa_kernels.enable(scene.unet, impl=impl)
    scene.times = iter([900, 900])
    with SeenFunctions(see):
        scene.step()
        scene.step()
    assert rows == ([2] if impl == "eager" else [1])
    stock, _, again = scene.pictures
    if impl == "eager":
        assert torch.equal(again, stock)
    else:
        torch.testing.assert_close(again, stock, rtol=1e-4, atol=1e-5)


def test_a_hook_that_writes_to_the_image_tokens() -> None:
    """What stock computes anew in every step, a hook may write to."""

    def story(scene: Scene) -> None:
        def halve(module: nn.Module, arguments: Any, options: dict[str, Any]) -> None:
            options["encoder_hidden_states"][1][0].mul_(0.5)

        scene.step()
        handle = scene.attention().register_forward_pre_hook(halve, with_kwargs=True)
        for _ in range(3):
            scene.step()
        handle.remove()
        scene.step()
        scene.step()

    as_with_stock(story)


def test_a_recorded_step_holds_no_remembered_values() -> None:
    scene = Scene()
    scene.unet.requires_grad_(False)
    ipa_kernels.enable(scene.unet)
    other = scene.draw(2, 77, tiny_pipelines.CROSS_ATTENTION_DIM)

    def step(text: Tensor) -> Tensor:
        return scene.unet(scene.sample, time, text, added_cond_kwargs={"image_embeds": scene.embeds}).sample

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # each time later in the schedule, so that the step before is remembered
        for time, record in ((900, make_fx(step)), (700, lambda text: torch.jit.trace(step, text, check_trace=False))):
            step(scene.text)
            time -= 100
            recorded = record(scene.text)
            expected = step(other)
            assert not torch.allclose(expected, step(scene.text))
            torch.testing.assert_close(recorded(other), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "kolors", "animatediff"])
def test_a_step_without_data(kind: str) -> None:
    """On the meta device, as counters of operations and planners of memory run a model."""
    pipe = build(kind, ("base",))
    unet = pipe.unet.to("meta")
    rows = 2 * (FRAMES if kind == "animatediff" else 1)
    frames = (FRAMES,) if kind == "animatediff" else ()
    width = KOLORS_TEXT_DIM if kind == "kolors" else tiny_pipelines.CROSS_ATTENTION_DIM
    added = {"image_embeds": [torch.empty(2, 1, tiny_pipelines.IMAGE_EMBED_DIM, device="meta")]}
    if kind == "kolors":
        added |= {
            "text_embeds": torch.empty(2, tiny_pipelines.IMAGE_EMBED_DIM, device="meta"),
            "time_ids": torch.empty(2, 6, device="meta"),
        }
    ipa_kernels.enable(unet)
    for time in (5, 4):
        with torch.no_grad():
            sample = torch.empty(2, 4, *frames, 8, 8, device="meta")
            text = torch.empty(rows, 77, width, device="meta")
            assert unet(sample, time, text, added_cond_kwargs=added).sample.shape == sample.shape
    assert ipa_kernels.explain(unet).cache.hits == 0
