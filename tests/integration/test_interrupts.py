"""A KeyboardInterrupt inside a step, for which torch runs no hooks: no other thread waits for it, or finds what it left."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ipa_kernels
from ipa_kernels.integration import hooks, steps
from ipa_kernels.integration.static_storage import StaticStorage

from ..helpers.compiled import Stream, blocks, close, in_place, prepare, whole
from ..helpers.generate import generate
from ..helpers.pipelines import build

NAMES = ("base",)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def pair() -> tuple[Any, Any]:
    pipes = build("sd", NAMES), build("sd", NAMES)
    for pipe in pipes:
        pipe.set_ip_adapter_scale(0.7)
    return pipes


def interrupt(pipe: Any) -> None:
    """A step that the main thread is interrupted in."""

    def raises(*arguments: Any) -> None:
        raise KeyboardInterrupt

    # a module that is not on the way to a layer
    handle = pipe.unet.conv_in.register_forward_pre_hook(raises)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, NAMES)
    handle.remove()


def in_another_thread(call: Callable[[], Any]) -> Any:
    """What a call returns in a thread of its own, while this one lives on."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert found, "the other thread waits for a step that is no longer running, or has failed"
    return found[0]


def test_another_thread_draws_after_an_interrupt() -> None:
    pipe, twin = pair()
    prepare(pipe, NAMES)
    interrupt(pipe)
    found = in_another_thread(lambda: generate(pipe, NAMES, seed=3))
    assert torch.equal(found, generate(twin, NAMES, seed=3))


def test_another_thread_clears_after_an_interrupt() -> None:
    pipe, twin = pair()
    prepare(pipe, NAMES)
    interrupt(pipe)
    in_another_thread(lambda: [ipa_kernels.clear_cache(pipe)])
    assert ipa_kernels.explain(pipe).prepared == 0
    assert torch.equal(generate(pipe, NAMES), generate(twin, NAMES))


def test_another_thread_prepares_after_an_interrupt() -> None:
    pipe, twin = pair()
    prepare(pipe, NAMES)
    interrupt(pipe)
    assert in_another_thread(lambda: prepare(pipe, NAMES, seed=2)).prepared > 0
    assert torch.equal(generate(pipe, NAMES), generate(twin, NAMES))


def test_a_thread_that_waits_already_goes_on() -> None:
    pipe, twin = pair()
    prepare(pipe, NAMES)
    # steps with hooks may read what was prepared: they wait for each other
    pipe.unet.conv_out.register_forward_pre_hook(lambda module, arguments: None)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(generate(pipe, NAMES, seed=3)), daemon=True)

    def raises(*arguments: Any) -> None:
        handle.remove()
        thread.start()
        # long enough for it to come to the lock
        thread.join(timeout=1.5)
        assert thread.is_alive(), "waited for nothing, so that this proves nothing"
        raise KeyboardInterrupt

    handle = pipe.unet.conv_in.register_forward_pre_hook(raises)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, NAMES)
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert torch.equal(found[0], generate(twin, NAMES, seed=3))


@pytest.mark.parametrize("when", ["prepared", "not yet prepared"])
def test_a_step_of_another_thread_reads_what_was_prepared(when: str) -> None:
    """Also when the thread that was interrupted comes back in the middle of it."""
    pipe, twin = pair()
    if when == "prepared":
        prepare(pipe, NAMES)
        interrupt(pipe)
    else:
        ipa_kernels.enable(pipe)
        interrupt(pipe)
        in_another_thread(lambda: prepare(pipe, NAMES))
    state = hooks.of(pipe.unet)
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    seen: list[bool] = []
    begun, go_on = threading.Event(), threading.Event()

    def look(*arguments: Any) -> None:
        begun.set()
        go_on.wait(20)
        seen.append(state.context.is_prepared)

    handle = pipe.unet.conv_in.register_forward_hook(look)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(generate(pipe, NAMES, seed=3)), daemon=True)
    thread.start()
    assert begun.wait(30)
    handle.remove()
    # a step of this thread begins: it waits, and may tidy up before that
    threading.Timer(0.5, go_on.set).start()
    beside = copy.copy(pipe)
    beside.scheduler = copy.deepcopy(pipe.scheduler)
    generate(beside, NAMES, steps=1)
    thread.join(timeout=30)
    assert seen == [True]
    close(found[0], generate(twin, NAMES, seed=3))


def test_what_an_interrupted_step_launched_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whoever writes the buffers next, in another thread and on another CUDA stream."""
    pipe, _ = pair()
    current, missing = Stream(0), []
    monkeypatch.setattr(steps, "stream_of", lambda tensor: current)
    prepare(pipe, NAMES)
    fill = StaticStorage._fill

    def checked(self: Any, inputs: Any) -> None:
        missing.append({"of the interrupted step"} - current.through)
        fill(self, inputs)

    monkeypatch.setattr(StaticStorage, "_fill", checked)
    pipe.unet.conv_in.register_forward_pre_hook(lambda *arguments: current.through.add("of the interrupted step"))
    interrupt(pipe)
    missing.clear()
    current = Stream(1)
    in_another_thread(lambda: generate(pipe, NAMES, seed=3))
    assert missing[0] == set()


@pytest.mark.parametrize("how", [whole, in_place, blocks])
def test_a_compiled_step_is_seen_while_it_runs(how: Callable[..., None]) -> None:
    """By others that wait, who would else take its buffers away."""
    pipe, _ = pair()
    prepare(pipe, NAMES)
    state = hooks.of(pipe.unet)
    seen: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        def run(*arguments: Any) -> Any:
            seen.extend(in_another_thread(lambda: [step.is_running for step in state.steps]))
            return graph.forward(*arguments)

        return run

    how(pipe, backend=backend)
    generate(pipe, NAMES)
    assert len(seen) >= 2
    assert all(seen)
