"""The measuring core: who takes turns, how long a sample is, what is cold, what a byte and an operation are."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks import attention
from ipa_kernels.benchmarking import device_time, machine, timing
from ipa_kernels.testing.layer_cases import CASES, Case

CPU = torch.device("cpu")


def test_candidates_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = timing.interleaved(calls, CPU, rounds=3)
    assert order == ["a", "b"] * 5
    assert all(timing.calls == 3 and timing.p20 <= timing.median <= timing.p80 for timing in timings.values())
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        timing.interleaved(calls, CPU, rounds=0)


def step(seed: int, dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, torch.Tensor]:
    """(stock's step, its truth): what is between them is one rounding to the dtype."""
    truth = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return truth.to(dtype), truth


def off(expected: torch.Tensor, relative: float) -> torch.Tensor:
    """Every value too large or too small by this share of their root mean square."""
    size = float(expected.double().square().mean().sqrt())
    signs = torch.ones_like(expected, dtype=torch.float64)
    signs.flatten()[::2] = -1
    return (expected.double() + relative * size * signs).to(torch.float64)


def test_the_gate_lets_the_same_bits_pass() -> None:
    expected, truth = step(0)
    for reference_ in (None, truth):
        for exact in (False, True):
            found = timing.gate(expected.clone(), expected, reference_, exact=exact)
            assert found["within"]
            assert found["equal"]


@pytest.mark.parametrize(("relative", "within"), [(0.99, True), (1.01, False)])
@pytest.mark.parametrize("dtype", timing.RELATIVE, ids=str)
def test_the_gate_without_float64_allows_what_the_dtype_allows(dtype: torch.dtype, relative: float, within: bool) -> None:
    _, expected = step(0)
    found = timing.gate(off(expected, relative * timing.RELATIVE[dtype]), expected, None, dtype)
    assert found["within"] == within
    assert not found["equal"]
    assert found["relative to stock"] == pytest.approx(relative * timing.RELATIVE[dtype])
    assert found["bound"] == timing.RELATIVE[dtype]


def test_the_gate_knows_the_dtype_of_the_result() -> None:
    expected = step(0, torch.bfloat16)[0]
    assert timing.gate(off(expected, 5e-2).bfloat16(), expected, None)["within"]
    assert not timing.gate(off(expected, 5e-2).float(), expected.float(), None)["within"]


@pytest.mark.parametrize(("factor", "within"), [(1.24, True), (1.26, False)])
def test_the_gate_with_float64_allows_what_stock_has(factor: float, within: bool) -> None:
    """Not what the dtype allows: far less, where stock is near, and more, where stock is far."""
    _, truth = step(0)
    for distance in (1e-5, 0.5):
        actual, expected = off(truth, factor * distance), off(truth, distance)
        found = timing.gate(actual, expected, truth, torch.float16)
        assert found["within"] == within
        assert found["rms"] == pytest.approx(factor * found["stock_rms"])


@pytest.mark.parametrize("with_truth", [False, True])
def test_the_exact_gate_wants_the_same_bits(with_truth: bool) -> None:
    expected, truth = step(0, torch.float32)
    actual = expected.clone()
    actual[0, 0, 0, 0] = torch.nextafter(actual[0, 0, 0, 0], torch.tensor(9.0))
    assert not timing.gate(actual, expected, truth if with_truth else None, exact=True)["within"]
    assert timing.gate(actual, expected, truth if with_truth else None)["within"]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("with_truth", [False, True])
@pytest.mark.parametrize("what", ["inf in stock", "nan in stock", "nothing but zeros"])
def test_a_step_that_proves_nothing_does_not_pass_the_gate(what: str, with_truth: bool, exact: bool) -> None:
    """Whatever the result, stock's own included."""
    expected, truth = step(0)
    if what == "nothing but zeros":
        expected, truth = torch.zeros_like(expected), torch.zeros_like(truth)
    else:
        expected[0, 0, 0, 0] = float(what[:3])
    for actual in (expected, torch.zeros_like(expected), torch.full_like(expected, 6e4), truth.half()):
        found = timing.gate(actual, expected, truth if with_truth else None, exact=exact)
        assert not found["within"]
        assert found["proves nothing"]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_truth_that_is_not_finite_proves_nothing(value: float) -> None:
    expected, truth = step(0)
    truth[0, 0, 0, 0] = value
    found = timing.gate(off(expected, 1e-3), expected, truth)
    assert not found["within"]
    assert found["proves nothing"]


@pytest.mark.parametrize("with_truth", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_result_that_is_not_finite_does_not_pass_the_gate(value: float, with_truth: bool) -> None:
    expected, truth = step(0)
    actual = expected.clone()
    actual[0, 0, 0, 0] = value
    found = timing.gate(actual, expected, truth if with_truth else None)
    assert not found["within"]
    assert not found["proves nothing"]


def test_the_gate_wants_results_of_one_shape() -> None:
    """One row would be compared with each of two."""
    expected, truth = step(0)
    with pytest.raises(ValueError, match=r"expected the shape of stock's result, \[2, 4, 16, 16\], got \[1, 4, 16, 16\]"):
        timing.gate(expected[:1], expected, None)
    with pytest.raises(ValueError, match=r"truth: expected the shape of stock's result"):
        timing.gate(expected, expected, truth[:1])


class FakeGraph:
    """A graph whose call takes a known time, and that notes who was replayed how often."""

    def __init__(self, name: str, seconds: float, calls: int, log: list[tuple[str, int]]) -> None:
        self.name, self.calls, self.log, self._seconds = name, calls, log, seconds

    def seconds(self, replays: int) -> float:
        self.log.append((self.name, replays))
        return self._seconds


def test_replays_take_turns_and_fill_a_sample() -> None:
    log: list[tuple[str, int]] = []
    graphs = {"short": FakeGraph("short", 1e-6, 20, log), "long": FakeGraph("long", 1e-2, 17, log)}
    timings = device_time.interleaved_replays(graphs, rounds=2)
    least = device_time.LEAST_REPLAYS
    often = math.ceil(device_time.SAMPLE_SECONDS / (20 * 1e-6))
    assert log == [("short", least), ("long", least), *[("short", often), ("long", least)] * 2]
    assert often > least > 1
    assert timings["short"].median == 1e-6
    assert timings["long"] == timing.Timing(1e-2, 1e-2, 1e-2, 2)
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        device_time.interleaved_replays(graphs, rounds=0)


def test_there_is_no_device_time_without_a_gpu() -> None:
    def never() -> None:
        pytest.fail("called")

    assert device_time.device_times({"a": [never]}, CPU) == {"a": "device cpu: has no CUDA graphs"}


@pytest.mark.parametrize("set_bytes", [10, 999, 1000, 1001, 10**9])
def test_a_round_of_cold_inputs_outgrows_the_cache(set_bytes: int) -> None:
    count = device_time.sets_beyond_cache(set_bytes, 1000)
    assert count >= 2
    assert count * set_bytes >= device_time.CACHE_MARGIN * 1000
    assert count == 2 or (count - 1) * set_bytes < device_time.CACHE_MARGIN * 1000, "more sets than it takes"


def test_cold_inputs_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every set has values of its own, every candidate goes over the same sets in the same order, one call for each."""
    case = CASES["sdxl_1024_64x64_three_masked"].small()
    size = case.inputs(torch.float32).bytes
    monkeypatch.setattr(attention, "cache_bytes", lambda device: size)
    sets = attention.input_sets(case, torch.float32, CPU)
    assert len(sets) == device_time.CACHE_MARGIN
    for name in ("query", "key", "value", "image_keys", "image_masks"):
        values = [getattr(inputs, name) for inputs in sets]
        first = [value[0] if isinstance(value, tuple) else value for value in values]
        assert not any(torch.equal(first[0], other) for other in first[1:]), name
    assert all(inputs.image_scales is sets[0].image_scales for inputs in sets), "compiled peers would be compiled for each"
    seen = []
    monkeypatch.setattr(attention, "decoupled_attention", lambda query, *rest, **options: seen.append(query))
    calls, _ = attention.candidates(sets, "auto", [])
    for call in calls[attention.OURS]:
        call()
    assert all(query is inputs.query for query, inputs in zip(seen, sets, strict=True))
    outputs = [call() for call in calls[attention.STOCK]]
    assert len({out.flatten()[0].item() for out in outputs}) == len(sets)


def test_the_models_of_bytes_and_operations() -> None:
    case = Case("counted", heads=3, queries=5, head_dim=8, text=7, images=(2, 4), masked=True, batch=2)
    inputs = case.inputs(torch.float16)
    query, keys_and_values, masks, scales = 2 * 5 * 24 * 2, 2 * 2 * (7 + 2 + 4) * 24 * 2, 2 * 5 * 2, 2 * 2 * 4
    assert inputs.bytes == query + keys_and_values + masks + scales
    assert case.flops == 2 * 3 * 5 * (7 + 2 + 4) * 8 * 2 * 2


def test_ceilings_on_a_cpu_are_by_wall_time() -> None:
    limits = device_time.ceilings(torch.float32, CPU, rounds=2)
    assert set(limits) == {"copy", "matmul"}
    for limit in limits.values():
        assert limit.clock == "wall"
        assert limit.rate == limit.amount / limit.timing.median
        assert limit.to_dict()["timing"]["median"] == limit.timing.median
    assert limits["copy"].amount == 2 * 2**25, "read and written"


def test_facts_name_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert machine.machine_facts(CPU)["interpreter"]
    monkeypatch.delenv("TRITON_INTERPRET")
    facts = machine.machine_facts(CPU)
    assert not facts["interpreter"]
    assert facts["torch"] == torch.__version__
    assert len(facts["source"]) == 16
    assert "gpu" not in facts


def test_what_an_exception_says_fits_in_a_line() -> None:
    assert timing.first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert timing.first_line(ValueError()) == "ValueError: "
    assert len(timing.first_line(ValueError("x" * 1000))) == 200


def test_what_cannot_be_captured_says_why_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, int]] = []
    kept = []

    def capture(calls, device, *, keep):
        if calls == [syncs]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        kept.append(keep)
        return FakeGraph("works", 1e-5, len(calls), log)

    def syncs() -> None:
        pass

    def works() -> None:
        pass

    monkeypatch.setattr(device_time, "Replay", capture)
    candidates = {"syncs": [syncs], "warm": [works] * 3, "cold": [works, syncs]}
    found = device_time.device_times(candidates, torch.device("cuda"), rounds=2)
    assert found["syncs"] == "not captured: RuntimeError: operation not permitted when stream is capturing"
    assert found["warm"] == found["cold"] == timing.Timing(1e-5, 1e-5, 1e-5, 2)
    assert kept == [False, True], "outputs of cold calls lie side by side"


@pytest.mark.parametrize("keep", [False, True])
def test_the_protocol_of_a_replay(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA stubbed: warm up on a side stream, then capture there; replays between two events, in milliseconds."""
    log: list[str] = []

    class Named:
        def __init__(self, name: str = "side", **options: object) -> None:
            self.name = name

        def wait_stream(self, other: "Named") -> None:
            log.append(f"{self.name} waits for {other.name}")

        def replay(self) -> None:
            log.append("replay")

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: object) -> float:
            return 12.0

    @contextmanager
    def on(what: object, stream: object = None) -> Iterator[None]:
        name = "capture" if stream else getattr(what, "name", "device")
        log.append(f"on {name}")
        yield
        log.append(f"off {name}")

    stubs = {"Stream": Named, "current_stream": lambda: Named("current"), "CUDAGraph": Named, "Event": Named}
    for name, stub in {**stubs, "stream": on, "graph": on, "device": on}.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    calls = [lambda i=i: log.append(f"call {i}") or i for i in range(2)]
    graph = device_time.Replay([*calls, calls[0]], torch.device("cuda"), keep=keep)
    warm_up = ["on device", "side waits for current", "on side", "call 0", "call 1", "off side", "current waits for side"]
    assert log == [*warm_up, "on capture", "call 0", "call 1", "call 0", "off capture", "off device"]
    assert graph.outputs == ([0, 1, 0] if keep else [0])
    log.clear()
    assert graph.seconds(4) == pytest.approx(12e-3 / (4 * 3))
    assert log == ["on device", "event", *["replay"] * 4, "event", "wait", "off device"]


@pytest.mark.gpu
def test_a_replay_runs_every_call_on_its_inputs() -> None:
    device = torch.device("cuda")
    sets = [torch.full((1000,), float(i), device=device) for i in range(4)]
    graph = device_time.Replay([lambda tensor=tensor: tensor * 2 for tensor in sets], device, keep=True)
    for tensor in sets:
        tensor.add_(10)
    assert graph.seconds(3) > 0
    for i, out in enumerate(graph.outputs):
        assert isinstance(out, torch.Tensor)
        assert (out == 2 * (i + 10)).all()
    assert graph.calls == 4


@pytest.mark.gpu
def test_device_times_are_of_the_work() -> None:
    """And not of its launch alone: no GPU moves these bytes in less time, whatever else runs on it (10^14 a second)."""
    device = torch.device("cuda")
    tensor = torch.randn(2**26, device=device)

    def times(n: int) -> Callable[[], object]:
        return lambda: [tensor.mul(1.0) for _ in range(n)]

    found = device_time.device_times({"one": [times(1)] * 5, "two": [times(2)] * 5}, device, rounds=5)
    one, two = found["one"], found["two"]
    assert isinstance(one, timing.Timing)
    assert isinstance(two, timing.Timing)
    bytes_moved = 2 * tensor.nbytes
    assert one.p20 > bytes_moved / 1e14
    assert two.p20 > 2 * bytes_moved / 1e14


@pytest.mark.gpu
def test_the_ceilings_of_a_gpu() -> None:
    device = torch.device("cuda")
    limits = device_time.ceilings(torch.float16, device, rounds=5)
    assert {limit.clock for limit in limits.values()} == {"device"}
    assert 0 < limits["copy"].rate < 1e14
    facts = machine.machine_facts(device)
    assert facts["l2_bytes"] == device_time.cache_bytes(device) > 0
    assert facts["multiprocessors"] > 0
    assert facts["memory_bytes"] > 0
