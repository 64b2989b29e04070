"""`ipa-kernels verify`: whether what runs on this machine is as close to float64 as promised, in named cases or a pipeline."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..cases import Case
from ..cli import verify_cases as named_cases
from ..cli.defaults import IMAGE_ENCODER, PROMPT, SCALE
from ..cli.device import available_device, check_switch
from ..cli.errors import UserError
from ..cli.imports import quiet_imports
from ..cli.output_files import json_file, written
from ..cli.progress import progress
from ..cli.tables import table, wrapped
from ..cli.verify_results import Checked, ratios
from ..cli.verify_summary import summary
from ..dtypes import dtype_name
from ..measure import machine_facts
from ..ops.support import allows_tf32, kernel_module, layer_reasons

_HEAD_DIM = 64
"""One that the kernel has on every device that it runs on."""

_OF_PIPELINE: dict[str, Any] = {"prompt": PROMPT, "scale": SCALE, "image_encoder": IMAGE_ENCODER}
"""Options that the named cases have no use for, and what a pipeline takes where they are not given."""

_SLOW = ", which is what Triton's interpreter can run"


@dataclass(frozen=True)
class Options:
    """The command line of `ipa-kernels verify`; None stands for what is chosen for the machine, or for all.

    model: None for the named cases, True for the pipeline built in code.
    """

    model: str | bool | None
    ip_adapter: str | None
    ip_adapter_weight: str | None
    image_encoder: str | None
    image: str | None
    prompt: str | None
    scale: float | None
    case: Sequence[str] | None
    quick: bool
    seed: int | None
    impl: str | None
    device: str | None
    dtype: Sequence[str] | None
    json: str | None


def run(options: Options) -> int:
    """Print a table of errors, what was and what was not verified, and the verdict; 0 if all is within the rule, else 1.

    Raises UserError, before anything is computed, where the options do not go together or name something that does not work.
    """
    _check_options(options)
    file = json_file(options.json)
    cases = named_cases.chosen(options.case)
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
    with progress(len(cases) * len(dtypes)) as step:
        checked = []
        for dtype in dtypes:
            for case in cases:
                step(f"{case.name} {dtype_name(dtype)}")
                checked.append(named_cases.check(case, dtype, device, impl, seed))
    return checked


def _pipeline(
    options: Options, dtypes: Sequence[torch.dtype], device: torch.device, seed: int
) -> tuple[list[Checked], list[str]]:
    try:
        with quiet_imports():
            from ..cli.verify_pipeline import check
    except ImportError as error:
        raise UserError(f"--pipeline: {error}; what it needs: pip install 'ipa-kernels[diffusers]'") from error
    impl = options.impl or ("triton" if _is_interpreted() else "auto")
    options = replace(options, **{name: value for name, value in _OF_PIPELINE.items() if getattr(options, name) is None})
    runs = [check(options, dtype, device, impl, seed) for dtype in dtypes]
    return [layer for checked, _ in runs for layer in checked], [report for _, report in runs]


def _case_rows(checked: Sequence[Checked]) -> list[list[str]]:
    rows = [["case", "dtype", "kernel: rms", "max", "eager", "verdict"]]
    for c in checked:
        kernel, eager = c.findings.get("triton"), c.findings.get("eager")
        figures = ["-", "-"] if kernel is None or kernel.error else ratios(kernel.draws)
        verdict = "FAILED" if not c.passed else "within" if kernel else "eager only"
        rows.append([c.name, dtype_name(c.dtype), *figures, eager.verdict if eager else "-", verdict])
    return rows


def _layer_rows(checked: Sequence[Checked]) -> list[list[str]]:
    """One for all layers of a shape that ran the same, with the worst figures of any."""
    groups: dict[tuple[str, ...], list[Any]] = {}
    for c in checked:
        for impl, finding in c.findings.items():
            groups.setdefault((c.shape, dtype_name(c.dtype), impl, finding.verdict), []).append(finding)
    rows = [["layers", "shape", "dtype", "ran", "rms", "max", "verdict"]]
    for (shape, dtype, impl, verdict), findings in groups.items():
        figures = ["-", "-"] if findings[0].error else ratios(draw for finding in findings for draw in finding.draws)
        rows.append([str(len(findings)), shape, dtype, impl, *figures, verdict])
    return rows


def _check_options(options: Options) -> None:
    if isinstance(options.model, str) != (options.ip_adapter is not None):
        raise UserError(
            "--pipeline PATH and --ip-adapter go together: give both, or --pipeline alone for the one built in code"
        )
    if options.model is not None and (options.case or options.quick):
        raise UserError("--case and --quick: they are about the named cases; with --pipeline leave them out")
    for option, given, instead in (
        ("--image", options.image, "random inputs"),
        ("--prompt", options.prompt, "random inputs"),
        ("--scale", options.scale, "random inputs"),
        ("--ip-adapter-weight", options.ip_adapter_weight, "no weights"),
        ("--image-encoder", options.image_encoder, "no weights"),
    ):
        if options.model is None and given is not None:
            raise UserError(f"{option} {given}: it is for --pipeline; the named cases have {instead}")
    if options.model is not None:
        check_switch()


def _check_kernel(options: Options, device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    """Raises UserError where the kernel is asked for, in words or by the interpreter's dtypes, and does not run."""
    for dtype in dtypes:
        reasons = "; ".join(layer_reasons(device, dtype, _HEAD_DIM))
        if reasons and options.impl == "triton":
            raise UserError(f"--impl triton: the kernel does not run here: {reasons}")
        if reasons and options.impl is None and _is_interpreted():
            raise UserError(f"--dtype {dtype_name(dtype)}: {reasons}; or --impl eager")


def _dtypes(options: Options, device: torch.device) -> list[torch.dtype]:
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
    kernel = kernel_module()
    return kernel is not None and kernel.INTERPRETED
