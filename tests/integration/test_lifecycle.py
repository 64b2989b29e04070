"""The life of a pipeline around `enable`: after every operation the picture is stock's, and `disable` is exact."""

import copy
import gc
import importlib.util
import io
import pickle
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, product
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionImg2ImgPipeline, UNet3DConditionModel
from diffusers.models import attention_processor as stock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ipa_kernels
from ipa_kernels import UnsupportedError
from ipa_kernels.ops import eager
from ipa_kernels.report import FallbackWarning
from ipa_kernels.testing import tiny_pipelines

from ..helpers.adapters import load
from ..helpers.controls import CONTROLS, Control, binary
from ..helpers.generate import classes, generate, outcome, same, traces
from ..helpers.life import LOADS, OPERATIONS, Life
from ..helpers.pipelines import build
from ..helpers.steady import no_collection


def kinds(life: Life) -> dict[str, type]:
    return {name: type(processor) for name, processor in life.pipe.unet.attn_processors.items()}


def tells_everything(life: Life) -> None:
    """Every adapter layer has a line in the report, with a reason wherever it is not the kernel."""
    report = ipa_kernels.explain(life.pipe)
    cross = [name for name in kinds(life) if name.endswith("attn2.processor")]
    loaded = life.pipe.unet.config.encoder_hid_dim_type == "ip_image_proj"
    adapters = [name for name in cross if loaded or issubclass(kinds(life)[name], stock.IPAdapterAttnProcessor2_0)]
    assert [layer.name for layer in report.layers] == [name.removesuffix(".processor") for name in modules(life, adapters)]
    for layer in report.layers:
        assert layer.impl in (None, "eager", "stock")
        assert layer.reason
        if not issubclass(kinds(life)[f"{layer.name}.processor"], stock.IPAdapterAttnProcessor2_0):
            assert (layer.planned, layer.impl, layer.calls) == ("stock", None, 0)
    assert ("no IP-Adapter is loaded" in report.note) == (report.enabled and not adapters)


def modules(life: Life, names: list[str]) -> list[str]:
    """Names of processors in the order of the modules, which is not that of `attn_processors`."""
    return [f"{name}.processor" for name, _ in life.pipe.unet.named_modules() if f"{name}.processor" in names]


def restores(life: Life, twin: Life) -> None:
    """`disable` leaves the classes that a stock twin has, on the same objects with the same parameters, and nothing else."""
    # held, so that no new object can have the identity of an old one
    objects, parameters = list(life.pipe.unet.attn_processors.values()), dict(life.pipe.unet.named_parameters())
    ipa_kernels.disable(life.pipe)
    assert not traces(life.pipe.unet)
    assert kinds(life) == kinds(twin)
    assert all(one is other for one, other in zip(life.pipe.unet.attn_processors.values(), objects, strict=True))
    found = dict(life.pipe.unet.named_parameters())
    assert found.keys() == parameters.keys()
    assert all(found[name] is parameter for name, parameter in parameters.items())


STORIES = {
    **{name: ["load base", "picture", name, "picture"] for name in OPERATIONS},
    "load after a picture without": ["picture", "load base", "picture"],
    "load twice": ["load base", "picture", "load base", "picture"],
    "unload, then load": ["load plus", "picture", "unload", "picture", "load two", "picture"],
    "copies put back": ["load base", "copies of processors aside", "picture", "processors back", "picture"],
    "processors put back after another load": ["load base", "processors aside", "load plus", "processors back", "picture"],
    "slicing on and off": ["load base", "slicing on", "picture", "slicing off", "picture"],
    "fused and unfused": ["load base", "fuse QKV", "picture", "unfuse QKV", "picture"],
    "the life of a LoRA": [
        "load base", "load LoRA", "picture", "scale LoRA", "picture", "fuse LoRA", "picture", "unfuse LoRA", "picture",
        "disable LoRA", "picture", "enable LoRA", "unload LoRA", "picture",
    ],
    "a LoRA fused before the adapter": ["load LoRA", "fuse LoRA", "load base", "picture", "unload LoRA", "picture"],
    "there and back in dtype": ["load plus", "to float64", "picture", "to float32", "picture"],
    "casting layer by layer to fp8": ["load plus", "layerwise casting", "picture", "scale", "picture"],
    "group offload, then a new adapter": ["load plus", "group offload", "picture", "load base", "picture"],
    "default processors, then a new adapter": ["load base", "default processors", "picture", "load base", "picture"],
    "several pipelines on one UNet": [
        "load base", "image to image on the same UNet", "PAG on the same UNet", "AnimateDiff of this UNet", "scale", "picture",
    ],
}  # fmt: skip


def beginnings() -> Iterator[Any]:
    """Each story, enabled before it and after its first step. `make test-slow` has one of the two of each single operation: the
    operation comes after a picture, when both are alike.
    """
    for (i, name), (j, enabled) in product(enumerate(STORIES), enumerate(("first", "after the first step of the story"))):
        marks = pytest.mark.slow if name in OPERATIONS and (i + j) % 2 else ()
        yield pytest.param(enabled, name, marks=marks, id=f"{enabled}-{name}")


@pytest.mark.parametrize(("enabled", "name"), list(beginnings()))
def test_a_story_ends_as_with_stock(name: str, enabled: str) -> None:
    ours, twin = Life(), Life()
    if enabled == "first":
        ipa_kernels.enable(ours.pipe)
    for step, operation in enumerate(STORIES[name]):
        if operation == "picture":
            assert same(ours.picture(), twin.picture()), f"another picture after {STORIES[name][:step]}"
            tells_everything(ours)
        else:
            assert same(ours.do(operation), twin.do(operation)), f"{operation} did something else"
        if step == 0 and enabled != "first":
            ipa_kernels.enable(ours.pipe)
    restores(ours, twin)
    assert same(ours.picture(), twin.picture())


def accelerated(life: Life) -> None:
    with ipa_kernels.accelerated(life.pipe):
        life.picture()


SWITCHES = {
    "enable": lambda life: ipa_kernels.enable(life.pipe),
    "accelerated": accelerated,
    "enable eager": lambda life: ipa_kernels.enable(life.pipe, impl="eager", cache=False),
    "disable": lambda life: ipa_kernels.disable(life.pipe),
    "clear the cache": lambda life: ipa_kernels.clear_cache(life.pipe),
}

steps = st.one_of(st.sampled_from(list(LOADS)), st.sampled_from(list(SWITCHES)), st.sampled_from(list(OPERATIONS)))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(steps, st.booleans()), max_size=10))
def test_any_sequence_of_operations_is_as_with_stock(sequence: list[tuple[str, bool]]) -> None:
    check_sequence(sequence)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(steps, st.booleans()), max_size=10))
def test_many_sequences_of_operations_are_as_with_stock(sequence: list[tuple[str, bool]]) -> None:
    check_sequence(sequence)


def check_sequence(sequence: list[tuple[str, bool]]) -> None:
    """After each operation the picture is stock's; where it is drawn so, `disable` restores, and the story goes on enabled."""
    ours, twin = Life(), Life()
    for life in (ours, twin):
        life.load("base")
    ipa_kernels.enable(ours.pipe)
    for operation, is_disabled in sequence:
        if operation in SWITCHES:
            SWITCHES[operation](ours)
        else:
            assert same(ours.do(operation), twin.do(operation)), f"{operation} did something else"
        assert same(ours.picture(), twin.picture()), f"another picture after {operation}"
        tells_everything(ours)
        if is_disabled:
            restores(ours, twin)
            assert same(ours.picture(), twin.picture()), f"another picture after {operation} and disable"
            ipa_kernels.enable(ours.pipe)
    restores(ours, twin)
    assert same(ours.picture(), twin.picture())


def test_diffusers_sees_its_own_class_names() -> None:
    pipe = build("sd", ("base",))
    description, names = repr(pipe.unet), [type(p).__name__ for p in pipe.unet.attn_processors.values()]
    ipa_kernels.enable(pipe)
    assert repr(pipe.unet) == description
    assert [type(p).__name__ for p in pipe.unet.attn_processors.values()] == names


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_processor_is_diffusers_own(protocol: int) -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    generate(pipe, ("base",))
    pickled = pickle.dumps(pipe.unet.attn_processors, protocol=protocol)
    assert b"ipa_kernels" not in pickled
    for name, processor in pickle.loads(pickled).items():
        ours = pipe.unet.attn_processors[name]
        assert type(processor).__module__.startswith("diffusers")
        assert vars(processor).keys() == vars(ours).keys() - {"_ipa_layer"}
        if hasattr(ours, "to_k_ip"):
            assert all(torch.equal(a, b) for a, b in zip(processor.parameters(), ours.parameters(), strict=True))


def test_a_whole_unet_through_torch_save() -> None:
    pipe = build("sd", ("base",))
    expected = generate(pipe, ("base",))
    ipa_kernels.enable(pipe, impl="eager")
    buffer = io.BytesIO()
    torch.save(pipe.unet, buffer)
    buffer.seek(0)
    pipe.unet = torch.load(buffer, weights_only=False)
    assert torch.equal(generate(pipe, ("base",)), expected)
    assert ipa_kernels.explain(pipe).impl == "eager"
    ipa_kernels.disable(pipe)
    assert not traces(pipe.unet)


def test_weights_that_are_away_between_calls() -> None:
    """What sequential offload does: accelerate keeps every weight on the meta device until its module is called."""
    pipe = build("bare-unet", ("base", "plus"))
    expected = generate(pipe, ("base", "plus"))
    ipa_kernels.enable(pipe.unet)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.0").weight.is_meta
    assert torch.equal(generate(pipe, ("base", "plus")), expected)
    report = ipa_kernels.explain(pipe.unet)
    assert report.eager == len(report.layers) > 0
    ipa_kernels.disable(pipe.unet)
    assert torch.equal(generate(pipe, ("base", "plus")), expected)


def test_pipelines_that_share_a_unet_are_switched_together() -> None:
    pipe = build("sd", ("base",))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    expected = generate(pipe, ("base",)), generate(other, ("base",))
    ipa_kernels.enable(other)
    assert ipa_kernels.explain(pipe).enabled
    assert torch.equal(generate(pipe, ("base",)), expected[0])
    assert {layer.calls for layer in ipa_kernels.explain(other).layers} == {2}
    load(other, "plus")
    assert all("loaded after enable()" in layer.reason for layer in ipa_kernels.explain(pipe).layers)
    generate(pipe, ("plus",))
    assert ipa_kernels.explain(other).eager == len(ipa_kernels.explain(other).layers)
    load(pipe, "base")
    ipa_kernels.disable(pipe)
    assert not traces(other.unet)
    assert torch.equal(generate(other, ("base",)), expected[1])


def in_threads(*tasks: Callable[[], Any]) -> list[Any]:
    """The results of tasks that start together."""
    results: list[Any] = [None] * len(tasks)
    start = threading.Barrier(len(tasks))

    def work(i: int) -> None:
        start.wait()
        results[i] = tasks[i]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_pipelines_in_two_threads() -> None:
    pipes = [build("sd", ("base",)), build("sdxl", ("plus",))]
    names = [("base",), ("plus",)]
    seeds = range(4)
    expected = [[generate(pipe, name, seed=seed) for seed in seeds] for pipe, name in zip(pipes, names, strict=True)]
    for pipe in pipes:
        ipa_kernels.enable(pipe)
    actual = in_threads(
        *(
            lambda pipe=pipe, name=name: [generate(pipe, name, seed=seed) for seed in seeds]
            for pipe, name in zip(pipes, names, strict=True)
        )
    )
    assert all(map(same, chain(*actual), chain(*expected)))


def test_two_threads_on_one_unet_and_a_new_adapter_for_both() -> None:
    pipe = build("sd", ("base",))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    masks = CONTROLS["mask"]
    for loads in range(3):
        load(pipe, "plus", seed=loads)
        ipa_kernels.disable(pipe)
        expected = [generate(pipe, ("plus",), seed=1), generate(other, ("plus",), masks, seed=2)]
        load(pipe, "base")
        ipa_kernels.enable(pipe)
        load(pipe, "plus", seed=loads)
        actual = in_threads(
            lambda: generate(pipe, ("plus",), seed=1), lambda: generate(other, ("plus",), masks, seed=2)
        )  # fmt: skip
        assert all(map(same, actual, expected))
        assert {layer.calls for layer in ipa_kernels.explain(pipe).layers} == {4}


def test_an_abandoned_pipeline_is_freed_as_soon_as_a_stock_one() -> None:
    def alive(enabled: bool) -> bool:
        pipe = build("sd", ("base",))
        if enabled:
            ipa_kernels.enable(pipe)
        generate(pipe, ("base",))
        unet = weakref.ref(pipe.unet)
        del pipe
        return unet() is not None

    with no_collection():
        assert alive(enabled=True) == alive(enabled=False)


class OfTheUser(stock.IPAdapterAttnProcessor2_0):
    """A processor that a user derived from diffusers' own."""

    def __call__(self, *arguments: Any, **options: Any) -> torch.Tensor:
        return 2 * super().__call__(*arguments, **options)


def with_a_processor_of_the_user() -> Any:
    pipe = build("sd", ("base",))
    attention = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    processor = OfTheUser(attention.processor.hidden_size, attention.processor.cross_attention_dim, (4,), 0.7)
    processor.load_state_dict(attention.processor.state_dict())
    attention.set_processor(processor)
    return pipe


def test_a_processor_of_the_user_runs_itself_and_is_told_once() -> None:
    pipe = with_a_processor_of_the_user()
    expected = generate(pipe, ("base",))
    with pytest.warns(FallbackWarning, match="processor OfTheUser"):
        ipa_kernels.enable(pipe)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*OfTheUser")
        assert torch.equal(generate(pipe, ("base",)), expected)
    report = ipa_kernels.explain(pipe)
    assert [layer.planned for layer in report.layers].count("stock") == 1
    assert "OfTheUser" in str(report)
    ipa_kernels.disable(pipe)
    assert not traces(pipe.unet)


def test_a_processor_of_the_user_is_refused_where_the_kernel_is_demanded() -> None:
    pipe = with_a_processor_of_the_user()
    with pytest.raises(UnsupportedError, match="processor OfTheUser"):
        ipa_kernels.enable(pipe, impl="triton")
    assert not traces(pipe.unet)
    enabled = build("sd", ("base",))
    ipa_kernels.enable(enabled, impl="triton")
    enabled.unet.set_attn_processor(pipe.unet.attn_processors)
    with pytest.raises(UnsupportedError, match=r"mid_block.*processor OfTheUser"):
        generate(enabled, ("base",))


def without_images(attn: Any, hidden_states: Any, states: Any, attention_mask: Any) -> torch.Tensor:
    text = states[0] if isinstance(states, tuple) else states
    return stock.AttnProcessor2_0()(attn, hidden_states, text, attention_mask)


@dataclass
class Compared:
    """A processor that compares by value, and so has no hash."""

    weight: float = 1.0

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        ip_adapter_masks: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        return self.weight * without_images(attn, hidden_states, encoder_hidden_states, attention_mask)


class Slotted:
    """A processor without a dictionary of attributes."""

    __slots__ = ("weight",)

    def __init__(self) -> None:
        self.weight = 0.5

    __call__ = Compared.__call__


@pytest.mark.parametrize("kind", [Compared, Slotted])
@pytest.mark.parametrize("place", ["attn1", "attn2"])
def test_a_processor_without_hash_or_dictionary(kind: type, place: str) -> None:
    pipe = build("sd", ("base",))
    block = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0")
    block.get_submodule(place).set_processor(kind())
    before, expected = classes(pipe.unet), generate(pipe, ("base",))
    ipa_kernels.enable(pipe)
    assert torch.equal(generate(pipe, ("base",)), expected)
    planned = [layer.planned for layer in ipa_kernels.explain(pipe).layers]
    assert planned.count("stock") == (place == "attn2")
    assert planned.count("eager") == 4 - (place == "attn2")
    ipa_kernels.disable(pipe)
    assert not traces(pipe.unet)
    assert classes(pipe.unet) == before
    assert torch.equal(generate(pipe, ("base",)), expected)


@pytest.mark.parametrize("change", ["enable", "disable", "enable and load", "load"])
def test_a_switch_thrown_in_the_middle_of_a_generation(change: str) -> None:
    def throw(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step == 0 and "load" in change:
            load(pipe, "base", seed=3)
        if step == 0 and "enable" in change and switched:
            ipa_kernels.enable(pipe)
        if step == 0 and change == "disable":
            ipa_kernels.disable(pipe)
        return tensors

    switched = False
    pipe = build("sd", ("base",))
    expected = generate(pipe, ("base",), steps=3, callback_on_step_end=throw)
    load(pipe, "base")
    switched = True
    if "enable" not in change:
        ipa_kernels.enable(pipe)
    assert torch.equal(generate(pipe, ("base",), steps=3, callback_on_step_end=throw), expected)
    layers = ipa_kernels.explain(pipe).layers
    assert {layer.calls for layer in layers} == {0 if change == "disable" else 2}


def with_tensor_scales(pipe: Any) -> None:
    for processor in pipe.unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [torch.tensor([0.5])]


def with_a_scale_too_many(pipe: Any) -> None:
    for processor in pipe.unet.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [0.5, 0.5]


def with_attention_mask(pipe: Any, control: Control) -> torch.Tensor:
    embeds = [torch.randn(1, 1, tiny_pipelines.IMAGE_EMBED_DIM, generator=torch.Generator().manual_seed(0))]
    text = torch.randn(1, 7, tiny_pipelines.CROSS_ATTENTION_DIM, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 1]])
    with torch.no_grad():
        return pipe.unet(
            torch.ones(1, 4, 8, 8), 5, text, encoder_attention_mask=mask, added_cond_kwargs={"image_embeds": embeds}
        ).sample


def ordinary(pipe: Any, control: Control) -> torch.Tensor:
    return generate(pipe, ("base",), control)


def nothing(pipe: Any) -> None:
    pass


UNUSUAL = {
    "attention_mask": (nothing, Control(), with_attention_mask),
    "batch sizes of queries, text and images": (nothing, CONTROLS["guidance cut off"], ordinary),
    "adapter scale": (with_tensor_scales, Control(), ordinary),
    "image inputs": (with_a_scale_too_many, Control(), ordinary),
    "ip_adapter_masks": (nothing, Control(masks=lambda n, rows: binary()), ordinary),
}


@pytest.mark.parametrize("reason", UNUSUAL)
def test_each_reason_for_stock_is_told_once_with_what_to_do(reason: str) -> None:
    prepare, control, run = UNUSUAL[reason]
    pipe = build("sd", ("base",))
    prepare(pipe)
    expected = run(pipe, control)
    ipa_kernels.enable(pipe)
    with pytest.warns(FallbackWarning, match=f"diffusers' own code runs instead. Why: {reason}: ") as caught:
        actual = run(pipe, control)
    assert same(actual, expected)
    (told,) = (str(warning.message) for warning in caught if reason in str(warning.message))
    assert "\n" not in told
    assert re.search(r"; (leave|cut|set|give|pass) [^;]+\. print\(", told), "what to do comes last"
    report = ipa_kernels.explain(pipe)
    assert report.stock == len(report.layers) > 0
    assert all(layer.reason.startswith(reason) for layer in report.layers)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=FallbackWarning)
        run(pipe, control)
    with pytest.raises(UnsupportedError, match=reason), ipa_kernels.accelerated(pipe, impl="triton"):
        run(pipe, control)


def on_gpu(life: Life) -> Life:
    life.pipe.to("cuda", torch.float16)
    return life


ON_A_GPU = {
    "nothing": [],
    "xFormers on": ["xFormers on"],
    "xFormers on and off": ["xFormers on", "xFormers off"],
    "xFormers on, then another adapter": ["xFormers on", "load plus"],
    "model offload": ["model offload"],
    "sequential offload": ["sequential offload"],
    "group offload": ["group offload to a GPU"],
    "a LoRA": ["load LoRA", "fuse LoRA"],
    "another adapter": ["load two"],
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_story_on_a_gpu(name: str) -> None:
    if "xFormers" in name and importlib.util.find_spec("xformers") is None:
        pytest.skip("needs xformers: pip install xformers==0.0.35 --no-deps")
    ours, twin = on_gpu(Life()), on_gpu(Life())
    for life in (ours, twin):
        life.load("plus")
    ipa_kernels.enable(ours.pipe)
    for operation in ON_A_GPU[name]:
        assert same(ours.do(operation), twin.do(operation)), f"{operation} did something else"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=FallbackWarning)
        actual, expected = ours.picture(), twin.picture()
    assert isinstance(actual, torch.Tensor), actual
    report = ipa_kernels.explain(ours.pipe)
    assert report.triton == len(report.layers) > 0, str(report)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert not torch.equal(actual, expected), "the kernel did not run"
    restores(ours, twin)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_masks_on_the_cpu_and_on_the_gpu(where: str) -> None:
    control = Control(masks=lambda n, rows: [binary().to(where)] * n)
    pipe = build("sd", ("plus",)).to("cuda", torch.float16)
    expected = generate(pipe, ("plus",), control)
    with ipa_kernels.accelerated(pipe) as report:
        actual = generate(pipe, ("plus",), control)
    assert report.triton == len(report.layers) > 0, str(report)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def often(*tasks: Callable[[], Any], rounds: int = 30) -> list[list[Any]]:
    """The results of tasks that start together, with threads that switch as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        return [in_threads(*tasks) for _ in range(rounds)]
    finally:
        sys.setswitchinterval(interval)


def test_two_threads_that_enable_leave_what_one_disable_removes() -> None:
    pipe = build("sd", ("base",))

    def enable() -> None:
        ipa_kernels.enable(pipe)

    for _ in range(40):
        often(enable, enable, rounds=1)
        assert len(pipe.unet._forward_pre_hooks) == 1
        ipa_kernels.disable(pipe)
        assert not traces(pipe.unet)


def test_blocks_in_two_threads_leave_nothing() -> None:
    pipe = build("sd", ("base",))
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    expected = [generate(pipe, ("base",)), generate(other, ("base",))]

    def accelerated(pipe: Any) -> torch.Tensor:
        with ipa_kernels.accelerated(pipe):
            return generate(pipe, ("base",))

    for pictures in often(lambda: accelerated(pipe), lambda: accelerated(other), rounds=15):
        assert all(map(same, pictures, expected))
    assert not traces(pipe.unet)


def test_a_thread_that_switches_while_another_draws() -> None:
    pipe = build("sd", ("base",))
    expected = generate(pipe, ("base",))

    def toggle() -> None:
        for _ in range(10):
            ipa_kernels.enable(pipe)
            ipa_kernels.disable(pipe)

    for picture, _ in often(lambda: generate(pipe, ("base",)), toggle, rounds=15):
        assert torch.equal(picture, expected)
    assert not traces(pipe.unet)


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_out.0"])
def test_a_disable_in_the_middle_of_a_call(name: str) -> None:
    pipe = build("sd", ("base",))
    expected = generate(pipe, ("base",))
    ipa_kernels.enable(pipe)
    hooked = pipe.unet.get_submodule(f"mid_block.attentions.0.transformer_blocks.0.attn2.{name}")
    hooked.register_forward_hook(lambda *arguments: ipa_kernels.disable(pipe))
    assert torch.equal(generate(pipe, ("base",)), expected)
    assert not traces(pipe.unet)


def test_blocks_that_overlap() -> None:
    pipe = build("sd", ("base",))
    first, second = ipa_kernels.accelerated(pipe), ipa_kernels.accelerated(pipe, impl="eager", cache=False)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert ipa_kernels.explain(pipe).impl == "eager"
    assert not pipe.unet._ipa_kernels.context.cache
    second.__exit__(None, None, None)
    assert not traces(pipe.unet)
    ipa_kernels.enable(pipe, impl="eager", cache=False)
    with ipa_kernels.accelerated(pipe):
        pass
    assert not pipe.unet._ipa_kernels.context.cache, "the options come back"


def test_a_block_that_is_replaced_is_taken_over_and_the_old_one_is_freed() -> None:
    pipe = build("sd", ("base",))
    expected = generate(pipe, ("base",))
    ipa_kernels.enable(pipe, impl="eager")
    old = weakref.ref(pipe.unet.mid_block)
    pipe.unet.mid_block = copy.deepcopy(pipe.unet.mid_block)
    assert torch.equal(generate(pipe, ("base",)), expected)
    assert {(layer.impl, layer.calls) for layer in ipa_kernels.explain(pipe).layers} == {("eager", 2)}
    gc.collect()
    assert old() is None
    ipa_kernels.disable(pipe)
    assert not traces(pipe.unet)


def test_hooks_that_someone_else_removed_are_put_back_by_enable() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    pipe.unet._forward_pre_hooks.clear()
    ipa_kernels.enable(pipe)
    load(pipe, "plus")
    generate(pipe, ("plus",))
    assert {layer.impl for layer in ipa_kernels.explain(pipe).layers} == {"eager"}
    ipa_kernels.disable(pipe)
    assert not traces(pipe.unet)


def test_a_class_that_someone_patched_runs_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = stock.IPAdapterAttnProcessor2_0.__call__

    def halved(
        self: Any, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        temb: Any = None, scale: float = 1.0, ip_adapter_masks: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        return 0.5 * original(self, attn, hidden_states, encoder_hidden_states, attention_mask, temb, scale, ip_adapter_masks)

    pipe = build("sd", ("base",))
    monkeypatch.setattr(stock.IPAdapterAttnProcessor2_0, "__call__", halved)
    expected = generate(pipe, ("base",))
    with ipa_kernels.accelerated(pipe) as report:
        assert torch.equal(generate(pipe, ("base",)), expected)
    assert {layer.impl for layer in report.layers} == {"stock"}
    assert "IPAdapterAttnProcessor2_0.__call__: replaced" in report.layers[0].reason


def test_sdpa_replaced_by_a_function_with_stocks_keywords_only(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = torch.nn.functional.scaled_dot_product_attention
    shapes: list[torch.Size] = []

    def recording(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False
    ) -> Any:
        shapes.append(query.shape)
        return attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)

    pipe = build("sd", ("base",))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    expected = generate(pipe, ("base",))
    of_stock = shapes.copy()
    shapes.clear()
    ipa_kernels.enable(pipe)
    assert torch.equal(generate(pipe, ("base",)), expected)
    assert shapes == of_stock


class Wrapper:
    """A processor around another one, as recorders of attention maps are."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, attention_mask: Any = None,
        ip_adapter_masks: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, ip_adapter_masks=ip_adapter_masks)


def test_a_wrapped_processor_runs_and_is_named() -> None:
    pipe = build("sd", ("base",))
    expected = generate(pipe, ("base",))
    attention = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    attention.set_processor(Wrapper(attention.processor))
    with pytest.warns(FallbackWarning, match="processor Wrapper"):
        ipa_kernels.enable(pipe)
    assert torch.equal(generate(pipe, ("base",)), expected)
    report = ipa_kernels.explain(pipe)
    assert [layer.planned for layer in report.layers].count("stock") == 1
    assert len(report.layers) == 4
    with pytest.raises(UnsupportedError, match="processor Wrapper"):
        ipa_kernels.enable(pipe, impl="triton")


def test_reasons_that_begin_alike_are_told_apart() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    for masks, told in (
        (binary(), "a list with an entry"),
        ([binary(2)], "an entry is no tensor"),
        ([binary(rows=3)], "pass one row, or one for each"),
    ):
        with pytest.warns(FallbackWarning, match=told):
            outcome(pipe, ("base",), Control(masks=lambda n, rows, masks=masks: masks))


@pytest.mark.parametrize(
    "part", ["group_norm", "residual_connection", "rescale_output_factor", "norm_cross", "four dimensions"]
)
def test_what_no_unet_has_runs_diffusers_code(part: str) -> None:
    pipe = build("sd", ("base",))
    attention = pipe.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    torch.manual_seed(0)
    hidden = torch.randn(2, 16, 64)
    if part == "group_norm":
        attention.group_norm = torch.nn.GroupNorm(8, 64)
    elif part == "norm_cross":
        attention.norm_cross = torch.nn.LayerNorm(tiny_pipelines.CROSS_ATTENTION_DIM)
    elif part == "four dimensions":
        hidden = torch.randn(2, 64, 4, 4)
    else:
        setattr(attention, part, 2.0 if part == "rescale_output_factor" else True)
    states = torch.randn(2, 7, tiny_pipelines.CROSS_ATTENTION_DIM), [torch.randn(2, 1, 4, tiny_pipelines.CROSS_ATTENTION_DIM)]
    with torch.no_grad():
        expected = attention(hidden, encoder_hidden_states=states)
        ipa_kernels.enable(pipe)
        with pytest.warns(FallbackWarning, match="diffusers' own code runs"):
            assert torch.equal(attention(hidden, encoder_hidden_states=states), expected)
    assert attention.processor._ipa_layer.impl == "stock"


@pytest.mark.parametrize("kind", ["sd", "sdxl", "kolors", "animatediff"])
def test_default_processors_on_every_kind_of_unet(kind: str) -> None:
    ours, twin = build(kind, ("base",)), build(kind, ("base",))
    ipa_kernels.enable(ours)
    for pipe in (ours, twin):
        pipe.unet.set_default_attn_processor()
    assert same(outcome(ours, ("base",)), outcome(twin, ("base",)))
    for pipe in (ours, twin):
        load(pipe, "plus")
    assert same(outcome(ours, ("plus",)), outcome(twin, ("plus",)))
    for pipe in (ours, twin):
        pipe.unload_ip_adapter()
    assert same(outcome(ours), outcome(twin))
    ipa_kernels.disable(ours)
    assert not traces(ours.unet)


def test_the_eager_path_runs_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    calls = []
    original = eager.decoupled_attention
    monkeypatch.setattr(eager, "decoupled_attention", lambda problem: calls.append(problem) or original(problem))
    generate(pipe, ("base",))
    assert len(calls) == 2 * 4


def test_an_interrupt_anywhere_in_enable_leaves_nothing() -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe)
    ipa_kernels.disable(pipe)

    def interrupting(at: int) -> Callable[..., Any]:
        lines = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            if "ipa_kernels" not in frame.f_code.co_filename:
                return None
            lines += event == "line"
            if lines == at:
                raise KeyboardInterrupt
            return trace

        return trace

    interrupted = 0
    # a collection in `enable` would run our callbacks for objects of other tests, and an error in a callback goes nowhere
    with no_collection():
        for at in range(1, 600, 7):
            sys.settrace(interrupting(at))
            try:
                ipa_kernels.enable(pipe)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                sys.settrace(None)
            ipa_kernels.disable(pipe)
            assert not traces(pipe.unet), f"interrupted at line {at}"
    assert interrupted > 50


def test_a_unet_that_takes_no_ip_adapters_is_refused_by_name() -> None:
    unet = UNet3DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    for function in (ipa_kernels.enable, ipa_kernels.explain):
        with pytest.raises(TypeError, match=r"UNet2DConditionModel, UNetMotionModel.*got UNet3DConditionModel"):
            function(unet)
