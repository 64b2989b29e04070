"""Device time by replay of CUDA graphs, and what the card reaches at most. torch only.

Device time is that of the kernels alone, back to back in a replayed graph: what is left when launches cost nothing. Where there
is no CUDA it is not measured, and nothing stands in for it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from .timing import Timing, check_rounds, first_line, interleaved, timing

SAMPLE_SECONDS = 4e-3
"""The least that lies between two CUDA events, whose resolution is half a microsecond."""

LEAST_REPLAYS = 3
CACHE_MARGIN = 3
"""Inputs are cold when one round over all sets of them reads this many times the L2 cache."""


@dataclass(frozen=True)
class Ceiling:
    """One large simple job: `amount` bytes or floating-point operations in `timing`, by the "device" or the "wall" clock."""

    amount: int
    timing: Timing
    clock: str

    @property
    def rate(self) -> float:
        """Bytes or floating-point operations per second."""
        return self.amount / self.timing.median

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "rate": self.rate}


class Replayable(Protocol):
    """Calls that are run again as one piece: how many, and the seconds of one call over a number of replays."""

    calls: int

    def seconds(self, replays: int) -> float: ...


class Replay:
    """A sequence of calls, captured into one CUDA graph after each has run once on a side stream.

    keep: whether the outputs of the calls live side by side, or each takes the memory of the one before.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], device: torch.device, *, keep: bool) -> None:
        self.calls = len(calls)
        self.device = device
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for call in dict.fromkeys(calls):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            self.outputs: list[object] = []
            with torch.cuda.graph(self.graph, stream=stream):
                for call in calls:
                    if not keep:
                        self.outputs.clear()
                    self.outputs.append(call())

    def seconds(self, replays: int) -> float:
        """Of one call, over `replays` replays between two events."""
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(replays):
                self.graph.replay()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / (replays * self.calls)


def interleaved_replays(graphs: Mapping[str, Replayable], rounds: int) -> dict[str, Timing]:
    """Each graph once per round, in turns, replayed until its sample is long enough; a first, short one warms it up."""
    check_rounds(rounds)
    replays = {}
    for name, graph in graphs.items():
        once = graph.seconds(LEAST_REPLAYS) * graph.calls
        replays[name] = max(LEAST_REPLAYS, math.ceil(SAMPLE_SECONDS / once))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(graph.seconds(replays[name]))
    return {name: timing(seconds) for name, seconds in times.items()}


def device_times(
    candidates: Mapping[str, Sequence[Callable[[], object]]], device: torch.device, rounds: int = 20
) -> dict[str, Timing | str]:
    """Device time of one call of each candidate, or why there is none.

    A candidate is a sequence of calls, which its graph runs in this order: the same one repeated for warm inputs, one for each
    set of inputs for cold ones (`sets_beyond_cache`), whose outputs then lie side by side too.
    """
    if device.type != "cuda":
        return dict.fromkeys(candidates, f"device {device.type}: has no CUDA graphs")
    found: dict[str, Timing | str] = {}
    graphs: dict[str, Replay] = {}
    for name, calls in candidates.items():
        try:
            graphs[name] = Replay(calls, device, keep=len(set(calls)) > 1)
        except Exception as error:  # whatever a peer raises while it is captured is its result
            found[name] = f"not captured: {first_line(error)}"
    return found | interleaved_replays(graphs, rounds)


def sets_beyond_cache(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs make every call of a round over them read from memory: at least 2."""
    return max(2, math.ceil(CACHE_MARGIN * cache_bytes / set_bytes))


def cache_bytes(device: torch.device) -> int | None:
    """The size of the L2 cache of a GPU; None on a CPU."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else None


def ceilings(dtype: torch.dtype, device: torch.device, rounds: int = 20) -> dict[str, Ceiling]:
    """What this machine reaches now: "copy" in bytes, read and written, "matmul" in operations of `dtype`, on random values.

    On a GPU a copy of 1 GiB and a product of 8192x8192 matrices by device time, on a CPU smaller ones by wall time.
    """
    cuda = device.type == "cuda"
    size, side = (2**30, 8192) if cuda else (2**25, 512)
    source = torch.randint(-128, 128, (size,), dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.zeros_like(left)
    jobs: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2 * size, lambda: target.copy_(source)),
        "matmul": (2 * side**3, lambda: torch.mm(left, right, out=product)),
    }
    calls = {name: call for name, (_, call) in jobs.items()}
    wall = interleaved(calls, device, rounds)
    replayed = device_times({name: [call] for name, call in calls.items()}, device, rounds)
    found = {}
    for name, (amount, _) in jobs.items():
        device_time = replayed[name]
        if isinstance(device_time, str):
            found[name] = Ceiling(amount, wall[name], "wall")
        else:
            found[name] = Ceiling(amount, device_time, "device")
    return found
