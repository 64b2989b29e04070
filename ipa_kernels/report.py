"""What the user is told: which layer ran what, and why not the kernel."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


def plural(number: int, several: str = "s", one: str = "") -> str:
    """What the noun after this number ends with."""
    return one if number == 1 else several


class FallbackWarning(UserWarning):
    """Something ran without the kernel; the text says what, why, and what to do. Once for each reason."""


class CacheReport(NamedTuple):
    """What the caches did since the last `enable` or `clear_cache`."""

    hits: int = 0
    misses: int = 0
    bytes: int = 0


class GraphReport(NamedTuple):
    """Of `graphed`: shapes of steps that were captured, steps that were replayed, and why the last one was not, if so."""

    captured: int = 0
    replays: int = 0
    reason: str = ""


@dataclass(frozen=True)
class LayerReport:
    """One attention layer that has an IP-Adapter.

    planned: what `enable` expects to run; impl: what the last call ran, None before the first; both are "triton", "eager" or
    "stock" (handed to diffusers' own code). reason: why not the kernel, "" where it is the kernel. calls: so far.
    """

    name: str
    planned: str
    impl: str | None
    reason: str
    calls: int


@dataclass
class Report:
    """A snapshot of what runs where. The counts take what a layer ran last, before its first call what is planned.

    prepared: bytes of what `prepare` keeps in place for compiled and captured steps. graphs: None where `graphed` is off.
    cache_reason: why values were not kept in the last step, "" where all were.
    prepared_reason: why the last step did not read what was prepared, "" where it did.
    """

    target: str
    enabled: bool
    impl: str | None = None
    note: str = ""
    layers: list[LayerReport] = field(default_factory=list)
    cache: CacheReport = field(default_factory=CacheReport)
    prepared: int = 0
    graphs: GraphReport | None = None
    cache_reason: str = ""
    prepared_reason: str = ""

    @property
    def triton(self) -> int:
        """The number of layers that run the kernel."""
        return self._count("triton")

    @property
    def eager(self) -> int:
        """The number of layers that run one attention per branch."""
        return self._count("eager")

    @property
    def stock(self) -> int:
        """The number of layers that diffusers' own code runs."""
        return self._count("stock")

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        counts = {"triton": self.triton, "eager": self.eager, "stock": self.stock}
        graphs = None if self.graphs is None else self.graphs._asdict()
        return {**asdict(self), "cache": self.cache._asdict(), "graphs": graphs, **counts}

    def __str__(self) -> str:
        state = f"enabled, impl={self.impl!r}" if self.enabled else "not enabled"
        head = f"{self.target}: {state}; {len(self.layers)} IP-Adapter layer{plural(len(self.layers))}"
        lines = [f"{head}: {self.triton} triton, {self.eager} eager, {self.stock} stock" if self.layers else head]
        if self.note:
            lines.append(f"  {self.note}")
        groups = Counter((layer.impl or layer.planned, layer.impl is None, layer.calls, layer.reason) for layer in self.layers)
        for (impl, planned, calls, reason), layers in groups.items():
            what = "planned" if planned else f"{calls} call{plural(calls)} each"
            lines.append(f"  {layers:>4} x {impl:6} {what}{': ' + reason if reason else ''}")
        if any(self.cache) or self.cache_reason:
            why = f"; not kept: {self.cache_reason}" if self.cache_reason else ""
            hits, misses, size = self.cache
            found = f"{hits} hit{plural(hits)}, {misses} miss{plural(misses, 'es')}, {size} byte{plural(size)}"
            lines.append(f"  cache: {found}{why}")
        if self.prepared:
            why = f"; last step did not read them: {self.prepared_reason}" if self.prepared_reason else ""
            lines.append(f"  prepared: {self.prepared} byte{plural(self.prepared)}{why}")
        if self.graphs is not None:
            why = f"; last step not replayed: {self.graphs.reason}" if self.graphs.reason else ""
            replays = self.graphs.replays
            lines.append(f"  graphs: {self.graphs.captured} captured, {replays} replay{plural(replays)}{why}")
        return "\n".join(lines)

    def _count(self, impl: str) -> int:
        return sum((layer.impl or layer.planned) == impl for layer in self.layers)
