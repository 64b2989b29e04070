"""`ipa-kernels verify`: whether what runs on this machine is as close to float64 as promised, in named cases or a pipeline."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .arguments import PROMPT, SCALE, Commands, add_command, add_machine, add_weights, finite, seed
from .errors import UserError
from .output_files import json_file, written
from .progress import progress
from .quiet import importing
from .tables import table, wrapped
from .verify_options import VerifyOptions, check_options

if TYPE_CHECKING:
    import torch

    from ..testing.layer_cases import Case
    from .verify_results import Checked, Finding

_HEAD_DIM = 64
"""One that the kernel has on every device that it runs on."""

_SLOW = ", which is what Triton's interpreter can run"


def add(commands: Commands) -> None:
    """Add it to the subparsers of the command line."""
    verify = add_command(
        commands,
        "verify",
        VerifyOptions,
        run,
        help="compare what runs on this machine with stock and float64",
        description="Run every named layer shape on random inputs on this machine: the kernel, whose distance from float64 may "
        "not exceed stock's in the same dtype, and eager attention, which equals stock's. With --pipeline: every IP-Adapter "
        "layer of a pipeline on what it is given in three steps. Prints errors in units of stock's, a verdict, and what was "
        "not verified because it does not run here. Exit status: 0 all within the rule, 1 not, 2 a mistake in the options.",
    )
    cases = verify.add_argument_group("named cases")
    cases.add_argument(
        "--case", metavar="NAME", nargs="+", help="only these (default: all; a wrong name lists near ones, or all)"
    )
    cases.add_argument(
        "--quick", action="store_true", help="two heads and at most 99 queries of each; always so in Triton's interpreter"
    )
    pipeline = verify.add_argument_group("a pipeline")
    pipeline.add_argument(
        "--pipeline",
        dest="model",
        metavar="PATH",
        nargs="?",
        const=True,
        help="verify this pipeline, with the IP-Adapter of --ip-adapter, layer by layer; without PATH: a small one with random "
        "weights, built in code. The same as --model PATH",
    )
    pipeline.add_argument("--image", metavar="FILE", help="the reference picture (default: one drawn in code)")
    pipeline.add_argument("--prompt", metavar="TEXT", help=f"default: {PROMPT}")
    pipeline.add_argument("--scale", metavar="X", type=finite, help=f"strength of the IP-Adapter (default: {SCALE})")
    add_weights(verify)
    # None where it was not given: the named cases have no use for it
    verify.set_defaults(image_encoder=None)
    verify.add_argument("--seed", metavar="N", type=seed, help="of the random inputs (default: another in every run, printed)")
    verify.add_argument(
        "--impl",
        choices=("triton", "eager"),
        help="verify this one alone; triton: an error where it cannot run (default: both, as far as they run; of a pipeline: "
        "what runs in it)",
    )
    verify.add_argument("--json", metavar="FILE", help="write everything to this file")
    add_machine(verify, several=True)


def run(options: VerifyOptions) -> int:
    """Print a table of errors, what was and what was not verified, and the verdict; 0 if all is within the rule, else 1.

    Raises UserError, before anything is computed, where the options do not go together or name something that does not work.
    """
    with importing("diffusers"):
        from ..benchmarking.machine import machine_facts
        from .device import available_device, check_switch
        from .verify_cases import chosen_cases
        from .verify_summary import summary

    check_options(options)
    if options.model is not None:
        check_switch()
    file = json_file(options.json)
    cases = chosen_cases(options.case)
    device = available_device(options.device)
    dtypes = _dtypes(options, device)
    interpreted = _is_interpreted()
    _check_kernel(options, device, dtypes)
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    facts = machine_facts(device)
    versions = ", ".join(f"{part} {facts[part]}" for part in ("torch", "triton", "diffusers") if facts[part])
    machine = f"on {device} ({facts.get('gpu', facts['processor'])}), {versions}, --seed {seed}"
    if options.model is None:
        print(machine, flush=True)
        if options.quick or (interpreted and options.impl != "eager"):
            print(f"every case shrunk to two heads and at most 99 queries{'' if options.quick else _SLOW}")
            cases = [replace(case.small(), name=case.name) for case in cases]
        checked, what = _named(cases, dtypes, device, options.impl, seed), "cases"
    else:
        checked, reports = _pipeline(options, dtypes, device, seed)
        what = "layers"
        print(machine, *reports, sep="\n")
        print("what it has is verified: one adapter, no masks, one scale. The named cases (without --pipeline) have the others")
    print("rms, max: the error against float64, of the error that is allowed, both in units of stock's in the same dtype\n")
    print(table(_case_rows(checked) if options.model is None else _layer_rows(checked)), end="\n\n")
    for line in summary(checked, what, interpreted=interpreted):
        print(wrapped(line))
    passed = bool(checked) and all(c.passed for c in checked)
    if file is not None:
        verified = any("triton" in c.findings for c in checked)
        document = {
            "command": "verify",
            "passed": passed,
            "kernel_verified": passed and verified and not interpreted,
            "interpreted": interpreted,
        }
        document |= {"machine": facts, "seed": seed, what: [c.to_dict() for c in checked]}
        with written("--json", file) as part:
            part.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if passed else 1


def _named(
    cases: Sequence[Case], dtypes: Sequence[torch.dtype], device: torch.device, impl: str | None, seed: int
) -> list[Checked]:
    from ..kernels.dtypes import dtype_name
    from .verify_cases import verify_case

    with progress(len(cases) * len(dtypes)) as step:
        checked = []
        for dtype in dtypes:
            for case in cases:
                step(f"{case.name} {dtype_name(dtype)}")
                checked.append(verify_case(case, dtype, device, impl, seed))
    return checked


def _pipeline(
    options: VerifyOptions, dtypes: Sequence[torch.dtype], device: torch.device, seed: int
) -> tuple[list[Checked], list[str]]:
    with importing("diffusers", "--pipeline"):
        from .verify_pipeline import verify_pipeline

    impl = options.impl or ("triton" if _is_interpreted() else "auto")
    runs = [verify_pipeline(options, dtype, device, impl, seed) for dtype in dtypes]
    return [layer for checked, _ in runs for layer in checked], [report for _, report in runs]


def _case_rows(checked: Sequence[Checked]) -> list[list[str]]:
    from ..kernels.dtypes import dtype_name
    from .verify_results import ratios

    rows = [["case", "dtype", "kernel: rms", "max", "eager", "verdict"]]
    for c in checked:
        kernel, eager = c.findings.get("triton"), c.findings.get("eager")
        figures = ["-", "-"] if kernel is None or kernel.error else ratios(kernel.draws)
        verdict = "FAILED" if not c.passed else "within" if kernel else "eager only"
        rows.append([c.name, dtype_name(c.dtype), *figures, eager.verdict if eager else "-", verdict])
    return rows


def _layer_rows(checked: Sequence[Checked]) -> list[list[str]]:
    """One for all layers of a shape that ran the same, with the worst figures of any."""
    from ..kernels.dtypes import dtype_name
    from .verify_results import ratios

    groups: dict[tuple[str, ...], list[Finding]] = {}
    for c in checked:
        for impl, finding in c.findings.items():
            groups.setdefault((c.shape, dtype_name(c.dtype), impl, finding.verdict), []).append(finding)
    rows = [["layers", "shape", "dtype", "ran", "rms", "max", "verdict"]]
    for (shape, dtype, impl, verdict), findings in groups.items():
        figures = ["-", "-"] if findings[0].error else ratios(draw for finding in findings for draw in finding.draws)
        rows.append([str(len(findings)), shape, dtype, impl, *figures, verdict])
    return rows


def _check_kernel(options: VerifyOptions, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    """Raises UserError where the kernel is asked for, in words or by the interpreter's dtypes, and does not run."""
    from ..kernels.dtypes import dtype_name
    from ..ops.dispatch import layer_reasons

    for dtype in dtypes:
        reasons = "; ".join(layer_reasons(device, dtype, _HEAD_DIM))
        if reasons and options.impl == "triton":
            raise UserError(f"--impl triton: the kernel does not run here: {reasons}")
        if reasons and options.impl is None and _is_interpreted():
            raise UserError(f"--dtype {dtype_name(dtype)}: {reasons}; or --impl eager")


def _dtypes(options: VerifyOptions, device: torch.device) -> list[torch.dtype]:
    import torch

    from ..ops.dispatch import allows_tf32

    if options.dtype is not None:
        return [getattr(torch, name) for name in dict.fromkeys(options.dtype)]
    if options.model is not None:
        return [torch.float32 if device.type == "cpu" else torch.float16]
    if device.type != "cuda":
        return [torch.float32, torch.float16] if _is_interpreted() and options.impl != "eager" else [torch.float32]
    dtypes = [torch.float16]
    if not _is_interpreted() and torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes.append(torch.bfloat16)
    return [*dtypes, torch.float32] if allows_tf32(device) else dtypes


def _is_interpreted() -> bool:
    from ..ops.dispatch import is_interpreted

    return is_interpreted()
