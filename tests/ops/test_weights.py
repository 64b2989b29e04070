"""Scales on their way to the kernel: remembered, and never what a graph or another stream would find empty or gone."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ipa_kernels import decoupled_attention
from ipa_kernels.ops import weights
from ipa_kernels.ops.validation import Problem, check_arguments


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    weights._remembered.cache_clear()
    yield
    weights._remembered.cache_clear()


def problem(scales: object) -> Problem:
    """With two image branches and a batch of two."""
    query = torch.randn(2, 1, 3, 8)
    return check_arguments(query, query, query, [query] * 2, [query] * 2, scales, None, None, None)  # type: ignore[arg-type]


def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on calls find themselves in the capture of a CUDA graph."""
    monkeypatch.setattr(weights, "_stream", lambda device: None)


def test_a_captured_call_has_the_same_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights.scales_for_kernel(problem((0.6, -1.5)))
    captured(monkeypatch)
    assert torch.equal(weights.scales_for_kernel(problem((0.6, -1.5))), expected)


def test_scales_on_the_cpu_are_not_copied_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that a replay would copy them from is given to others by then."""
    monkeypatch.setattr(weights, "_copied", lambda scales, device: pytest.fail("copied"))
    captured(monkeypatch)
    made = problem(torch.tensor([[0.5, 0.25], [1.0, 0.0]], dtype=torch.float64))
    elsewhere = replace(made, query=made.query.to("meta"))
    written: list[float] = []
    full = Tensor.new_full
    monkeypatch.setattr(Tensor, "new_full", lambda *given, **options: written.append(given[2]) or full(*given, **options))
    found = weights.scales_for_kernel(elsewhere)
    assert (found.shape, found.dtype, found.device.type) == ((2, 2), torch.float32, "meta")
    assert written == [0.5, 0.25, 1.0, 0.0]


def test_every_replay_writes_the_numbers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded reads nothing that was there before, and copies nothing from the host."""
    weights.scales_for_kernel(problem(0.6))
    captured(monkeypatch)
    graph = make_fx(lambda: weights.scales_for_kernel(problem(0.6)))().graph
    operations = {str(node.target) for node in graph.nodes if node.op != "output"}
    assert operations - {"aten.randn.default"} == {"aten.new_full.default", "aten.cat.default"}


def test_what_a_capture_filled_is_not_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first replay there is nothing in it."""
    with monkeypatch.context() as capturing:
        captured(capturing)
        inside = weights.scales_for_kernel(problem(0.6))
        assert weights.scales_for_kernel(problem(0.6)) is not inside
    outside = weights.scales_for_kernel(problem(0.6))
    assert outside is not inside
    assert weights.scales_for_kernel(problem(0.6)) is outside
    captured(monkeypatch)
    assert weights.scales_for_kernel(problem(0.6)) is not outside, "it may be let go of while the graph lives"


def test_a_stream_does_not_read_what_another_is_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for stream in (1, 2, 1):
        monkeypatch.setattr(weights, "_stream", lambda device, stream=stream: stream)
        found.append(weights.scales_for_kernel(problem(0.6)))
    first, other, again = found
    assert first is again
    assert first is not other


def test_scales_are_for_the_device_of_the_query_whatever_the_default() -> None:
    made = problem(0.6)
    with torch.device("meta"):
        scales = weights.scales_for_kernel(made)
    assert torch.equal(scales, torch.full((1, 2), 0.6, device="cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_graph_of_ones_own_outlives_what_is_remembered(on_cpu: bool, device: torch.device) -> None:
    """Captured by a user around the op: the scales of its replays are its own."""
    query = torch.randn(1, 2, 64, 64, device=device, dtype=torch.float16)
    key = torch.randn(1, 2, 16, 64, device=device, dtype=torch.float16)

    def call(scale: float) -> Tensor:
        scales = torch.tensor([scale]) if on_cpu else scale
        return decoupled_attention(query, key, key, [key], [key.flip(2)], image_scales=scales, impl="triton")

    call(0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(0.6)
    expected = call(0.6).clone()
    for i in range(300):
        call(1 + i / 300)
    garbage = [torch.full((1, 2), float("nan"), device=device) for _ in range(1000)]
    graph.replay()
    assert torch.equal(out, expected)
    assert len(garbage) == 1000
