"""Pipelines × adapters × controls: what `enable` may not change."""

import copy
from collections.abc import Callable, Iterator
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor

import ipa_kernels
from ipa_kernels import UnsupportedError, reference

from ..helpers.adapters import SETS
from ..helpers.controls import CONTROLS, Control
from ..helpers.generate import Outcome, classes, generate, outcome, refuses, same, takes, target, traces
from ..helpers.pipelines import BUILDERS, QUICK, build

pytestmark = pytest.mark.filterwarnings("ignore:The aspect ratio of the mask:UserWarning")


def set_scales(pipe: Any, names: tuple[str, ...], control: Control) -> Outcome | None:
    """What `set_ip_adapter_scale` raises, or None."""
    try:
        pipe.set_ip_adapter_scale(control.scales(len(names)))
    except Exception as error:
        return type(error), str(error)
    return None


def run(pipe: Any, names: tuple[str, ...], control: Control) -> Outcome:
    """One cell's generation, scales included: callbacks change them."""
    return set_scales(pipe, names, control) or outcome(pipe, names, control)


def pairs() -> Iterator[Any]:
    """Each pipeline with each set of adapters. `make test` runs every set with "sd", and half of them, one adapter and several,
    with each kind that stands for others; every set is among those of four kinds or five. `make test-slow` runs the rest.
    """
    for kind, (j, names) in product(BUILDERS, enumerate(SETS)):
        is_quick = kind == "sd" or (kind in QUICK and (QUICK.index(kind) + j) % 2 == 0)
        yield pytest.param(kind, names, marks=() if is_quick else pytest.mark.slow, id=f"{kind}-{'+'.join(names)}")


@pytest.mark.parametrize(("kind", "names"), list(pairs()))
def test_enabled_is_stock(kind: str, names: tuple[str, ...], record_property: Callable[[str, object], None]) -> None:
    """5,160 cells: 22 pipelines x 8 sets of adapters x 30 controls, less the callbacks that a pipeline does not take.

    In each cell the latents of two steps on the CPU's eager path equal stock's bit for bit; where stock raises (the controls
    say where), enabled raises the same type with the same message. After each cell every layer says what it ran and why, and
    `accelerated` leaves nothing behind.
    """
    pipe = build(kind, names)
    wrong, cells = [], 0
    stock_of_first = None
    for name, control in CONTROLS.items():
        if not takes(pipe, control):
            continue
        cells += 1
        stock = run(pipe, names, control)
        before = classes(pipe.unet)
        with ipa_kernels.accelerated(target(pipe)) as report:
            enabled = run(pipe, names, control)
        if isinstance(stock, Tensor) == refuses(pipe, control, len(names)):
            wrong.append(f"{name}: the control is out of date, stock gave {stock}")
        elif not same(stock, enabled):
            wrong.append(f"{name}: {enabled if isinstance(enabled, tuple) else 'another picture'}")
        elif isinstance(stock, Tensor):
            wrong += [f"{name}: {layer}" for layer in report.layers if not tells(layer, control)]
            if len({layer.calls for layer in report.layers}) != 1:
                wrong.append(f"{name}: layers that ran another number of times")
        if classes(pipe.unet) != before or traces(pipe.unet):
            wrong.append(f"{name}: traces of `enable` are left")
        if stock_of_first is None:
            stock_of_first = stock
        elif name in ("scale 0", "mask", "three images in one softmax") and same(stock, stock_of_first):
            wrong.append(f"{name}: makes no difference, so that this cell would prove nothing")
    record_property("cells of the matrix", cells)
    assert not wrong, "\n".join(wrong)


def tells(layer: ipa_kernels.report.LayerReport, control: Control) -> bool:
    """Whether a layer reports what the control makes it run, how often, and why not the kernel."""
    if layer.calls < 2:
        return False
    if control.stock:
        return layer.impl == "stock" and layer.reason.startswith(control.stock)
    return layer.impl == "eager" and layer.reason.startswith(("device cpu", "Triton's interpreter"))


def test_the_matrix_is_as_large_as_it_says() -> None:
    cells = sum(takes(pipe, control) for pipe in map(build, BUILDERS) for control in CONTROLS.values()) * len(SETS)
    assert f"{cells:,} cells" in test_enabled_is_stock.__doc__
    assert (
        f"{len(BUILDERS)} pipelines x {len(SETS)} sets of adapters x {len(CONTROLS)} controls" in test_enabled_is_stock.__doc__
    )


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        # as many sets as kinds that stand for others: each of both is in `make test` once
        pytest.param(kind, names, marks=() if kind in QUICK else pytest.mark.slow, id=f"{kind}-{'+'.join(names)}")
        for kind, names in zip(sorted(BUILDERS, key=lambda kind: kind not in QUICK), cycle(SETS), strict=False)
    ],
)
def test_the_kernel_in_every_pipeline_and_with_every_adapter(kind: str, names: tuple[str, ...]) -> None:
    through_the_kernel(kind, names, Control(masks=CONTROLS["mask for the last alone"].masks))


@pytest.mark.parametrize("name", CONTROLS)
def test_the_kernel_under_every_control(name: str) -> None:
    control = CONTROLS[name]
    if control.raises(2):
        return refused_as_by_stock(control)
    if control.stock:
        return demanded_where_it_cannot_run(control)
    return through_the_kernel("sd", ("base", "plus"), control)


def refused_as_by_stock(control: Control) -> None:
    names = ("base", "plus")
    pipe = build("sd", names)
    stock = run(pipe, names, control)
    assert not isinstance(stock, Tensor)
    ipa_kernels.enable(pipe)
    assert run(pipe, names, control) == stock


def demanded_where_it_cannot_run(control: Control) -> None:
    pipe = build("sd", ("base",))
    ipa_kernels.enable(pipe, impl="triton")
    with pytest.raises(UnsupportedError, match=control.stock):
        generate(pipe, ("base",), control)


def through_the_kernel(kind: str, names: tuple[str, ...], control: Control) -> None:
    """Every call of every IP-Adapter layer of a generation, against stock and float64 on the very same inputs."""
    pipe = build(kind, names)
    pipe.set_ip_adapter_scale(control.scales(len(names)))
    calls: list[tuple[Any, list[Any], tuple[Any, ...], dict[str, Any], Tensor]] = []

    def record(attention: Any, arguments: Any, options: Any, result: Tensor) -> None:
        calls.append((attention, copy.deepcopy(attention.processor.scale), arguments, dict(options), result))

    with ipa_kernels.accelerated(target(pipe), impl="triton") as report:
        layers = [pipe.unet.get_submodule(layer.name) for layer in report.layers]
        hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
        generate(pipe, names, control, steps=2 if control.callback else 1)
    assert report.triton == len(report.layers) > 0, str(report)
    for hook in hooks:
        hook.remove()

    actual, stock, truth = [], [], []
    for attention, scale, arguments, options, result in calls:
        attention.processor.scale = scale
        actual.append(result.flatten())
        with torch.no_grad():
            stock.append(attention(*arguments, **options).flatten())
            truth.append(copy.deepcopy(attention).double()(*double(arguments), **double(options)).flatten())
    actual, stock, truth = (torch.cat(parts) for parts in (actual, stock, truth))
    assert not torch.equal(actual, stock), "the kernel did not run"
    result = reference.compare(actual, stock, truth)
    assert result.within, str(result)


def double(value: Any) -> Any:
    """Float64 copies of the tensors in a nest of tuples, lists and dicts; masks stay, which stock rounds itself."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(map(double, value))
    if isinstance(value, dict):
        return {name: item if name == "ip_adapter_masks" else double(item) for name, item in value.items()}
    return value
