"""What `ipa-kernels verify` says at the end: what was verified, what was not and why, and what speaks against. torch only."""

from collections import Counter
from collections.abc import Sequence

from ..kernels.dtypes import dtype_name
from .verify_results import NAMES, Checked

_SHOWN = 8
"""Of what speaks against: more is in the file of --json."""


def summary(checked: Sequence[Checked], what: str, *, interpreted: bool) -> list[str]:
    """Lines for each implementation, then the verdict. what: "cases" or "layers"."""
    lines = []
    found = {impl: [c.findings[impl] for c in checked if impl in c.findings] for impl in NAMES}
    if found["triton"]:
        within = sum(finding.passed for finding in found["triton"])
        where = ", in Triton's interpreter: the same source, not what a GPU compiles of it" if interpreted else ""
        lines.append(f"kernel: within the rule in {within} of {len(found['triton'])} {what}{where}")
    for impl in ("eager", "stock"):
        if found[impl]:
            equal = sum(finding.verdict == "equal" for finding in found[impl])
            lines.append(f"{NAMES[impl]}: equal to stock's result, bit for bit, in {equal} of {len(found[impl])} {what}")
    without = Counter((dtype_name(c.dtype), c.no_kernel) for c in checked if "triton" not in c.findings)
    for (dtype, reason), count in without.items():
        lines.append(f"kernel: NOT verified in {count} of {len(checked)} {what} ({dtype}), where it does not run: {reason}")
    return [*lines, *_verdict(checked, what, [impl for impl in NAMES if found[impl]], interpreted)]


def _verdict(checked: Sequence[Checked], what: str, ran: Sequence[str], interpreted: bool) -> list[str]:
    where = {"triton": " in Triton's interpreter"} if interpreted else {}
    names = " and ".join(f"{NAMES[impl]}{where.get(impl, '')}" for impl in ran)
    if not checked:
        return [f"verdict: FAILED: there are no {what} to verify"]
    against = [
        f"{c.name}, {dtype_name(c.dtype)}, {NAMES[impl]}: {finding.verdict}: {finding.why()}"
        for c in checked
        for impl, finding in c.findings.items()
        if not finding.passed
    ]
    if against:
        failed = sum(not c.passed for c in checked)
        more = [f"and {len(against) - _SHOWN} more"] if len(against) > _SHOWN else []
        return [f"verdict: FAILED in {failed} of {len(checked)} {what}", *against[:_SHOWN], *more]
    if "triton" in ran:
        fused = sum("triton" in c.findings for c in checked)
        partly = f"; the kernel runs in {fused} of {len(checked)} {what}" if fused < len(checked) else ""
        return [f"verdict: PASSED: {names}{partly}"]
    return [f"verdict: PASSED for {names} alone. Nothing was fused: this says nothing of the kernel"]
