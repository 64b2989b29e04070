"""A call of a layer that is run again: what changes in between is seen, what does not is not prepared."""

import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import Tensor, nn

from benchmarks import host_step
from ipa_kernels.integration import running_step
from ipa_kernels.integration.processors import fused, unet
from ipa_kernels.integration.state import ModelContext
from ipa_kernels.kernels.launch import Launch

from ..helpers.spies import AtLayers
from ..helpers.steady import no_collection


class Bench:
    """A layer with two adapters in the middle of a generation."""

    def __init__(self, *, masked: bool = False, impl: str = "eager") -> None:
        self.attention = Attention(64, cross_attention_dim=48, heads=2, dim_head=32).eval()
        self.processor = IPAdapterAttnProcessor2_0(64, 48, [4, 4], [0.6, 0.8])
        self.attention.set_processor(self.processor)
        self.hidden = torch.randn(2, 64, 64)
        self.text = torch.randn(2, 7, 48)
        self.images = [torch.randn(2, 1, 4, 48), torch.randn(2, 2, 4, 48)]
        self.options: dict[str, Any] = {}
        if masked:
            self.options["ip_adapter_masks"] = [torch.rand(1, 1, 16, 16), torch.rand(1, 2, 16, 16)]
        self.context = ModelContext(impl, cache=True)
        unet.install(self.processor, "layer", self.context, [])
        self.step = running_step.Step(self.context)
        with torch.no_grad():
            self.step.entry = self.context.conditioning.open(
                [self.text, *self.images, *self.options.get("ip_adapter_masks", ())], ()
            )
        running_step.enter(self.step)

    def __call__(self) -> Tensor:
        return self.attention(self.hidden, encoder_hidden_states=(self.text, self.images), **self.options)

    def stock(self) -> Tensor:
        kind = type(self.attention.processor)
        self.attention.processor.__class__ = unet.STOCK.get(kind, kind)
        try:
            return self()
        finally:
            self.attention.processor.__class__ = kind

    @property
    def ready(self) -> Any:
        """The call that runs again, while what it computed with and its inputs are as they were."""
        guard = self.processor._ipa_layer.guards.get(id(self.attention))
        call = self.step.entry.calls.get(id(self.attention))
        inputs = (self.text, self.images), self.options.get("ip_adapter_masks"), self.processor.scale
        is_same = call is not None and call.guard is guard and guard.check() and call.matches(self.hidden, *inputs)
        return call if is_same else None


@pytest.fixture(params=[False, True], ids=["unmasked", "masked"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(masked=request.param)
    with torch.no_grad():
        assert torch.equal(bench(), bench.stock())
        assert bench.ready is not None
        assert torch.equal(bench(), bench.stock())
        yield bench
    running_step.leave(bench.step)


def test_a_later_call_prepares_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, name in ((fused, "problem_of"), (fused, "choose"), (fused, "stock_reasons")):
        monkeypatch.setattr(place, name, lambda *arguments, name=name: pytest.fail(f"{name} in a later call"))
    before = bench.context.conditioning.misses
    bench.hidden = torch.randn_like(bench.hidden)
    assert torch.equal(bench(), bench.stock())
    assert bench.context.conditioning.misses == before
    assert bench.processor._ipa_layer.calls == 3


def linear_with_hook(bench: Bench) -> None:
    bench.processor.to_v_ip[1].register_forward_hook(lambda module, inputs, output: output * 3)


def linear_with_forward(bench: Bench) -> None:
    bench.attention.to_k.forward = lambda rows: nn.functional.linear(rows, bench.attention.to_k.weight) * 2


def projection_replaced(bench: Bench) -> None:
    bench.processor.to_k_ip[0] = nn.Linear(48, 64, bias=False)


def weight_replaced(bench: Bench) -> None:
    bench.attention.to_v.weight = nn.Parameter(torch.randn(64, 48))


def bias_added(bench: Bench) -> None:
    bench.attention.to_v.bias = nn.Parameter(torch.randn(64))


def images_exchanged(bench: Bench) -> None:
    bench.images = [bench.images[0].clone(), bench.images[1] * 2]


def one_image_written_to(bench: Bench) -> None:
    bench.images[1].mul_(-1)


def class_patched(bench: Bench) -> None:
    kind = type(bench.processor)
    call = unet.STOCK[kind].__call__
    bench.undo = lambda: setattr(unet.STOCK[kind], "__call__", call)
    unet.STOCK[kind].__call__ = lambda self, *arguments, **keywords: call(self, *arguments, **keywords) * 5
    unet.STOCK[kind].__call__.__signature__ = fused.Fused.__call__.__signature__


def replaced(place: Any, name: str) -> Callable[[Bench], None]:
    """A function of torch's or diffusers' that the call runs, or what it remembers was computed with."""

    def change(bench: Bench) -> None:
        own = vars(place).get(name)
        function = getattr(place, name)

        def twice(*arguments: Any, **options: Any) -> Tensor:
            return function(*arguments, **options) * 2

        def undo() -> None:
            if own is None:
                delattr(place, name)
            else:
                setattr(place, name, own)

        bench.undo = undo
        setattr(place, name, staticmethod(twice) if isinstance(own, staticmethod) else twice)

    change.__name__ = f"{place.__name__}.{name}"
    return change


def keys_written_to(bench: Bench) -> None:
    bench.ready.computed[0][0].zero_()


def adapters_replaced(bench: Bench) -> None:
    bench.processor.to_k_ip = nn.ModuleList([nn.Linear(48, 64, bias=False) for _ in range(2)])


def an_adapter_more(bench: Bench) -> None:
    bench.processor.to_k_ip.append(nn.Linear(48, 64, bias=False))


def weight_a_plain_attribute(bench: Bench) -> None:
    del bench.attention.to_k.weight
    bench.attention.to_k.weight = torch.randn(64, 48)


def plain_callable(name: str) -> Callable[[Bench], None]:
    """No module any more: a function with the same result, times two."""

    def change(bench: Bench) -> None:
        linear = getattr(bench.attention, name)
        delattr(bench.attention, name)
        setattr(bench.attention, name, lambda rows: linear(rows) * 2)

    change.__name__ = f"{name} a plain function"
    return change


def a_plain_list_of_adapters(bench: Bench) -> None:
    modules = list(bench.processor.to_k_ip)
    del bench.processor.to_k_ip
    bench.processor.to_k_ip = [nn.Linear(48, 64, bias=False), modules[1]]


def a_third_module_in_to_out(bench: Bench) -> None:
    bench.attention.to_out.append(nn.Linear(64, 64))


def a_scale_set_while_to_q_runs(bench: Bench) -> None:
    scales = iter((0.1, 0.1, 0.2, 0.2))
    bench.attention.to_q.register_forward_pre_hook(lambda *_: bench.processor.scale.__setitem__(0, next(scales)))


def processor_moved_to_another_attention(bench: Bench) -> None:
    bench.attention = Attention(64, cross_attention_dim=48, heads=2, dim_head=32, processor=bench.processor).eval()


def heads_a_property(bench: Bench) -> None:
    heads = bench.attention.__dict__.pop("heads")
    bench.attention.__class__ = type("Own", (Attention,), {"heads": property(lambda self: heads)})


def masks_changed(bench: Bench) -> None:
    if bench.options:
        bench.options["ip_adapter_masks"][1].zero_()
    else:
        bench.options["ip_adapter_masks"] = [torch.rand(1, 1, 16, 16), torch.rand(1, 2, 16, 16)]


def a_mask_left_out(bench: Bench) -> None:
    if bench.options:
        bench.options["ip_adapter_masks"] = [None, bench.options["ip_adapter_masks"][1]]


def changed(name: str, value: Any, how: str = "") -> Callable[[Bench], None]:
    """One attribute of the attention."""

    def change(bench: Bench) -> None:
        setattr(bench.attention, name, value() if callable(value) else value)

    change.__name__ = f"{name} {how}".strip()
    return change


CHANGES: list[Callable[[Bench], None]] = [
    linear_with_hook, linear_with_forward, projection_replaced, weight_replaced, bias_added, images_exchanged,
    one_image_written_to, class_patched, keys_written_to, masks_changed, a_mask_left_out, adapters_replaced, an_adapter_more,
    weight_a_plain_attribute, a_third_module_in_to_out, a_scale_set_while_to_q_runs, processor_moved_to_another_attention,
    heads_a_property, plain_callable("to_q"), plain_callable("to_k"), a_plain_list_of_adapters,
    changed("heads", 4), changed("residual_connection", True), changed("rescale_output_factor", 2.0),
    changed("group_norm", lambda: nn.GroupNorm(4, 64)), changed("to_q", lambda: nn.Linear(64, 64)),
    changed("to_k", lambda: nn.Linear(48, 64)),
    changed("rescale_output_factor", np.float64(2.0), "of numpy"),
    changed("rescale_output_factor", torch.tensor(2.0), "a tensor"),
    changed("rescale_output_factor", lambda: torch.rand(64) + 1, "of each channel"),
    changed("heads", np.int64(4), "of numpy"), changed("heads", torch.tensor(4), "a tensor"),
    changed("scale", torch.tensor(0.5), "a tensor"), changed("scale", torch.ones(2), "two"),
    changed("scale", np.ones(2), "an array"), changed("residual_connection", np.bool_(True), "of numpy"),
    changed("residual_connection", torch.tensor(True), "a tensor"), changed("norm_cross", np.bool_(False), "of numpy"),
    replaced(nn.Linear, "forward"), replaced(nn.Linear, "__call__"), replaced(nn.Module, "__call__"),
    replaced(nn.functional, "linear"), replaced(nn.functional, "scaled_dot_product_attention"),
    replaced(IPAdapterMaskProcessor, "downsample"),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_is_seen(change: Callable[[Bench], None], bench: Bench) -> None:
    bench.undo = lambda: None
    change(bench)
    try:
        assert torch.equal(bench(), bench.stock())
        assert torch.equal(bench(), bench.stock())
    finally:
        bench.undo()


@pytest.mark.parametrize(
    "edit",
    [
        lambda bench: bench.processor.scale.__setitem__(0, 0.1),
        lambda bench: bench.processor.scale.__setitem__(1, 0),
        lambda bench: setattr(bench.processor, "scale", [0.0, 1]),
        lambda bench: bench.processor.scale.__setitem__(0, torch.tensor(0.6)),
        lambda bench: bench.text.mul_(2),
        lambda bench: setattr(bench, "text", bench.text.clone()),
        lambda bench: setattr(bench, "text", torch.randn(2, 9, 48)),
        lambda bench: setattr(bench, "hidden", torch.randn(2, 16, 64)),
        lambda bench: bench.attention.to_k.weight.mul_(2),
        lambda bench: bench.processor.to_v_ip[0].weight.zero_(),
        lambda bench: bench.attention.to_q.weight.mul_(2),
        lambda bench: bench.attention.to_out[0].weight.mul_(2),
        lambda bench: bench.attention.to_out.__setitem__(1, nn.Dropout(0.0)),
        lambda bench: bench.attention.to_q.register_forward_hook(lambda module, inputs, output: output * 2),
    ],
    ids=[
        "a scale", "a scale of 0", "other scales", "a scale that is a tensor", "text written to", "an equal text",
        "longer text", "fewer queries", "to_k", "to_v_ip", "to_q", "to_out", "dropout", "a hook on to_q",
    ],
)  # fmt: skip
def test_what_is_edited_is_seen(edit: Callable[[Bench], object], bench: Bench) -> None:
    edit(bench)
    assert torch.equal(bench(), bench.stock())
    assert torch.equal(bench(), bench.stock())


def test_a_call_is_of_one_kind_shape_dtype_and_device(bench: Bench) -> None:
    """Whatever the query that is computed from it looks like."""
    call, hidden = bench.ready, bench.hidden
    inputs = (bench.text, bench.images), bench.options.get("ip_adapter_masks"), bench.processor.scale
    assert call.matches(torch.randn_like(hidden), *inputs)
    for other in (hidden[:, :16], hidden.double(), hidden.to("meta"), nn.Parameter(hidden), None):
        assert not call.matches(other, *inputs)


@pytest.mark.parametrize("other", [1, True, np.float64(1.0), torch.tensor(1.0)], ids=lambda other: type(other).__name__)
def test_scales_are_told_apart_by_type(other: Any, bench: Bench) -> None:
    """Stock multiplies by each in its own way."""
    bench.processor.scale[0] = 1.0
    bench()
    call, states, masks = bench.ready, (bench.text, bench.images), bench.options.get("ip_adapter_masks")
    assert call.matches(bench.hidden, states, masks, [1.0, 0.8])
    assert not call.matches(bench.hidden, states, masks, [other, 0.8])


@pytest.mark.parametrize("bench", [True], indirect=True, ids=["masked"])
def test_scales_per_image(bench: Bench) -> None:
    bench.processor.scale[1] = [0.5, 0.25]
    assert torch.equal(bench(), bench.stock())
    bench.processor.scale[1][0] = 0.75
    assert torch.equal(bench(), bench.stock())


def test_an_attention_mask_goes_to_stock(bench: Bench) -> None:
    bench.options["attention_mask"] = torch.zeros(2, 1, 7)
    assert torch.equal(bench(), bench.stock())
    assert bench.processor._ipa_layer.impl == "stock"


def test_autocast_in_the_middle(bench: Bench) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bench(), bench.stock())
        assert torch.equal(bench(), bench.stock())
    assert torch.equal(bench(), bench.stock())


def test_gradients_in_the_middle(bench: Bench) -> None:
    with torch.enable_grad():
        bench.hidden.requires_grad_()
        out = bench()
        assert out.requires_grad
        assert torch.equal(out, bench.stock())


def test_gradients_in_the_middle_reach_all_weights(bench: Bench) -> None:
    """Kept keys and values have none."""
    weights = bench.attention.to_k.weight, bench.processor.to_v_ip[1].weight
    with torch.enable_grad():
        found, expected = (torch.autograd.grad(run().square().sum(), weights) for run in (bench, bench.stock))
    assert all(map(torch.equal, found, expected))


def test_a_processor_in_two_attentions(bench: Bench) -> None:
    first, second = bench.attention, Attention(64, cross_attention_dim=48, heads=2, dim_head=32, processor=bench.processor)
    for _ in range(3):
        for bench.attention in (first, second.eval()):
            assert torch.equal(bench(), bench.stock())


def test_two_processors_by_turns_in_one_attention(bench: Bench) -> None:
    """As who perturbs attention puts another there and takes it back, in each step."""
    other = IPAdapterAttnProcessor2_0(64, 48, [4, 4], [0.6, 0.8])
    unet.install(other, "another", bench.context, [])
    for _ in range(3):
        for processor in (bench.processor, other):
            bench.attention.set_processor(processor)
            assert torch.equal(bench(), bench.stock())


def test_another_impl_in_the_middle(bench: Bench) -> None:
    bench.context.impl = "auto"
    assert torch.equal(bench(), bench.stock())
    assert "Triton's interpreter" in bench.processor._ipa_layer.reason


def test_inputs_whose_writes_leave_no_trace(bench: Bench) -> None:
    with torch.inference_mode():
        untraced = torch.randn(2, 2, 4, 48)
    for scale in (0, 0.5):
        bench.processor.scale[1] = scale
        bench.images = [bench.images[0], untraced]
        assert torch.equal(bench(), bench.stock())
        assert torch.equal(bench(), bench.stock())


@pytest.mark.parametrize("what", ["scale", "to_k", "image", "heads"])
def test_a_write_while_the_first_call_computes(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread: here, after everything has been read."""
    bench = Bench()
    writes = {
        "scale": lambda: bench.processor.scale.__setitem__(0, 0.1),
        "to_k": lambda: bench.attention.to_k.weight.mul_(2),
        "image": lambda: bench.images[0].mul_(2),
        "heads": lambda: setattr(bench.attention, "heads", 4),
    }
    choose = fused.choose

    def write_and_choose(*arguments: Any) -> Any:
        monkeypatch.setattr(fused, "choose", choose)
        writes[what]()
        return choose(*arguments)

    monkeypatch.setattr(fused, "choose", write_and_choose)
    with torch.no_grad():
        bench()
        for _ in range(3):
            assert torch.equal(bench(), bench.stock())
    running_step.leave(bench.step)


def test_a_scale_that_is_put_back_after_the_first_call() -> None:
    """By another thread, before anyone compares again: what was computed with the one does not answer for the other."""
    bench = Bench()

    def exchange(name: str) -> None:
        bench.processor.scale[0] = 0.1

    with torch.no_grad():
        with AtLayers(bench.attention, {"to_q"}, before=exchange):
            bench()
        bench.processor.scale[0] = 0.6
        for _ in range(2):
            assert torch.equal(bench(), bench.stock())
    running_step.leave(bench.step)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_a_query_of_another_shape_is_refused_as_by_stock(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(impl=impl)
    with torch.no_grad():
        bench(), bench()
        assert bench.ready is not None
        query = bench.attention.to_q(bench.hidden)
        assert bench.ready.takes(query)
        assert not bench.ready.takes(query[:, :32])
        assert not bench.ready.takes(torch.cat([query, query], 1))
        assert not bench.ready.takes(torch._neg_view(query))
        if impl == "triton":
            for other in (query[:, :32], torch.cat([query, query], 1)):
                with pytest.raises(ValueError, match="that the launch was made for"):
                    bench.ready.attend(other)
    running_step.leave(bench.step)


def test_what_is_ready_keeps_nothing_alive(bench: Bench) -> None:
    """The prompt lives on; its images, masks and layer do not, at once and without a collection of cycles."""
    held = [weakref.ref(tensor) for tensor in bench.ready.computed]
    gone = [weakref.ref(module) for module in (bench.attention, bench.processor, bench.processor.to_k_ip[0])]
    context, text = bench.context, bench.text
    with no_collection():
        bench.images, bench.options = [], {}
        alive = [reference for reference in held if reference() is not None]
        assert len(alive) == 2, "the keys and values of the text"
        assert context.conditioning.bytes == sum(reference().numel() * 4 for reference in alive)
        bench.attention = bench.processor = None
        assert [reference() for reference in gone] == [None] * 3
        assert text is bench.text
        context.conditioning.forget()
        assert all(reference() is None for reference in held)


def test_a_new_session_starts_anew(bench: Bench) -> None:
    context = ModelContext("eager", cache=True)
    unet.install(bench.processor, "layer", context, [])
    assert bench.ready is None
    assert torch.equal(bench(), bench.stock())


def test_what_is_ready_dies_with_the_prompt(bench: Bench) -> None:
    assert bench.context.conditioning.bytes > 0
    bench.text = torch.randn(2, 7, 48)
    bench.images = []
    # masks are the caller's, and live on: a row of 64 queries for each of three images
    assert bench.context.conditioning.bytes == (3 * 64 * 4 if bench.options else 0)
    assert not bench.step.entry.calls


def functions_called(run: Callable[[], object]) -> int:
    """How many functions Python calls in it, those of C too."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    with no_collection():
        sys.setprofile(count)
        try:
            run()
        finally:
            sys.setprofile(None)
    return calls


@pytest.mark.parametrize("masked", [False, True])
def test_what_a_later_call_does_on_the_host(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, since a time depends on the machine: fewer functions than stock calls, and a fraction of those of a first call.

    The launch is left out. Most of a later call's are those of diffusers' `Attention.forward`.
    """
    monkeypatch.undo()
    monkeypatch.setattr(Launch, "_launch", host_step._leave_out)
    bench = Bench(masked=masked, impl="triton")
    with torch.no_grad():
        first = functions_called(bench)
        bench()
        later, stock = functions_called(bench), functions_called(bench.stock)
    running_step.leave(bench.step)
    assert later < stock
    assert later < 0.3 * first, (later, first)
