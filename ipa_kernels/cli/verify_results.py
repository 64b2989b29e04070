"""What `ipa-kernels verify` found in a case or a layer, and what that means. torch only.

The rule is `reference.kept`; on the CPU in float32 eager attention has to equal stock's bit for bit.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..benchmarking.timing import first_line
from ..kernels.dtypes import dtype_name
from ..reference import Comparison, kept
from ..report import plural
from .device import is_about_memory

NAMES = {"triton": "the kernel", "eager": "eager attention", "stock": "diffusers' own code"}


def layer_shape(heads: int, head_dim: int, queries: int, keys: str) -> str:
    """In words; keys: of each branch."""
    return f"{heads} head{plural(heads)} of {head_dim}, {queries} quer{plural(queries, 'ies', 'y')}, {keys} keys"


@dataclass(frozen=True)
class Finding:
    """Of one implementation.

    draws: distances from float64 beside stock's; none where all results equal stock's bit for bit, or where there is an error.
    must_equal: whether equality is asked for. error: why there is nothing to judge, "" where there is.
    """

    draws: tuple[Comparison, ...] = ()
    must_equal: bool = False
    error: str = ""

    @property
    def verdict(self) -> str:
        """In a word or two; in capitals where it is against."""
        if self.error or any(draw.proves_nothing for draw in self.draws):
            return "NOT VERIFIED"
        if not self.draws:
            return "equal"
        if self.must_equal:
            return "DIFFERS"
        return "within" if kept(self.draws) else "OUTSIDE"

    @property
    def passed(self) -> bool:
        return self.verdict in ("equal", "within")

    def why(self) -> str:
        """What speaks against."""
        if self.error:
            return self.error
        figures = "; again: ".join(map(str, self.draws))
        if self.verdict == "DIFFERS":
            return f"differs from stock, which it equals bit for bit on a CPU in float32: {figures}"
        return figures

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, which has no NaN."""
        draws = [{name: x if math.isfinite(x) else str(x) for name, x in asdict(draw).items()} for draw in self.draws]
        return {"verdict": self.verdict, "draws": draws, "error": self.error}


@dataclass(frozen=True)
class Checked:
    """A case or a layer. shape: in words; findings: by implementation; no_kernel: why the kernel did not run, if so."""

    name: str
    shape: str
    dtype: torch.dtype
    findings: dict[str, Finding]
    no_kernel: str = ""

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings.values())

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        findings = {impl: finding.to_dict() for impl, finding in self.findings.items()}
        named = {"name": self.name, "shape": self.shape, "dtype": dtype_name(self.dtype), "passed": self.passed}
        return {**named, **findings, "no_kernel": self.no_kernel}


def failure(error: Exception) -> str:
    """Why something could not be verified."""
    return f"not enough memory: {first_line(error)}" if is_about_memory(error) else first_line(error)


def ratios(draws: Iterable[Comparison]) -> list[str]:
    """The worst rms and the worst largest error, with what is allowed, in units of stock's; "equal" without any."""
    draws = list(draws)
    if not draws:
        return ["equal", "equal"]
    return [
        _ratio(*max(((d.rms, d.allowed_rms, d.stock_rms) for d in draws), key=_badness)),
        _ratio(*max(((d.max, d.allowed_max, d.stock_max) for d in draws), key=_badness)),
    ]


def _badness(figures: tuple[float, float, float]) -> float:
    error, allowed, _ = figures
    return error / allowed if allowed and math.isfinite(error) and math.isfinite(allowed) else math.inf


def _ratio(error: float, allowed: float, stock: float) -> str:
    if not stock or not math.isfinite(stock):
        return f"{error:.1g} of {allowed:.1g}"
    ratio = error / stock
    return f"{ratio:.3f} of {allowed / stock:.2f}" if ratio < 1000 else f"{ratio:.0e} of {allowed / stock:.2f}"
