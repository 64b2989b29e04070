"""The diagnosis as text, to be read and to be pasted."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..kernels.launch_table import LARGEST_HEAD_DIM, LONG_KEYS
from ..kernels.launch_table_backward import listed
from .doctor_diagnosis import Device, Diagnosis
from .tables import table

if TYPE_CHECKING:
    from .doctor_coverage import Group

_MODELS = "head dims of UNets: 40, 80 and 160 in Stable Diffusion 1.5; 64 in Stable Diffusion 2.1, SDXL and Kolors"
_LONG = f"calls of more than {LONG_KEYS} keys run eager where SDPA is estimated to be faster: explain(pipe) says so"
_MESSAGES = "what libraries said in full, for your own eyes (it may name users and paths): ipa-kernels doctor --messages"


def text(found: Diagnosis) -> str:
    """A section each for what is installed, the environment, each kind of device, notes, and what to do."""
    lines = [f"ipa-kernels {found.ipa_kernels['version']}"]
    lines += [f"  {name}: {value}" for name, value in found.ipa_kernels.items() if name != "version" and value is not None]
    lines += _section("installed", found.installed, "not installed")
    lines += _section("environment", found.environment, "not set")
    alike: dict[tuple[str, ...], list[str]] = {}
    for device in found.devices:
        alike.setdefault(tuple(_device(device)), []).append(device.name)
    for (head, *rest), names in alike.items():
        lines += ["", f"{', '.join(names)}{head}", *rest]
    if any(group.impl == "triton" for device in found.devices for group in device.inference):
        lines += ["", _MODELS, _LONG]
    if found.notes:
        lines += ["", "notes", *(f"  {note}" for note in found.notes)]
    lines += ["", "to do" if found.problems else "nothing to do"]
    for problem in found.problems:
        lines += [f"  {problem.what}", f"    -> {problem.do}"]
    if found.messages:
        lines += ["", _MESSAGES]
    return "\n".join(lines)


def _section(title: str, values: dict[str, str | None], missing: str) -> list[str]:
    rows = [[name, missing if value is None else value] for name, value in values.items()]
    return ["", title, *(f"  {line}" for line in table(rows).splitlines())]


def _device(device: Device) -> Iterator[str]:
    """What follows its name in its line, and the lines below."""
    facts = device.facts
    if facts:
        memory = f"{facts['memory_bytes'] / 2**30:.1f} GiB"
        driver = [f"driver {facts['driver']}"] if facts["driver"] else []
        yield ": " + ", ".join([facts["gpu"], facts["architecture"], memory, *driver])
    else:
        yield ""
    same = device.inference == device.training
    for title, groups in (("inference", device.inference), ("training", [] if same else device.training)):
        if groups:
            yield f"  {title} and training" if same else f"  {title}"
            yield from (f"    {_group(group)}" for group in groups)
    if device.launched is not None:
        yield f"  one launch: {device.launched}"


def _group(group: "Group") -> str:
    dims = "every head dim" if len(group.head_dims) == LARGEST_HEAD_DIM // 8 else f"head dims {listed(list(group.head_dims))}"
    what = f"{', '.join(group.dtypes)}, {dims}"
    if group.impl == "eager":
        return f"eager   {what}: {'; '.join(group.reasons)}"
    if group.longest_image is None:
        return f"kernel  {what}: image branches of any length"
    beyond = "; ".join(group.reasons)
    return f"kernel  {what}: image branches of up to {group.longest_image} tokens; longer ones eager: {beyond}"
