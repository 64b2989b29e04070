"""From tensors to the arguments of a launch, and what is settled once for many of them."""

import itertools
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils import _pytree as pytree

from ipa_kernels import UnsupportedError, decoupled_attention
from ipa_kernels.kernels import launch, launch_backward, launch_table, launch_table_backward
from ipa_kernels.kernels.launch_table import INTERPRETED
from ipa_kernels.kernels.specialization import source, specialize
from ipa_kernels.kernels.specialization_backward import Wanted

from ..helpers.kernel_inputs import Recorder, leaves

CPU = torch.device("cpu")
OP = sys.modules["ipa_kernels.ops.api"]
IN_SPARSE_FILES = (
    "on a GPU, rows that are so far apart take 32 GiB of its memory; on the CPU they are in sparse files: "
    "run it with CUDA_VISIBLE_DEVICES=-1, as `make test` does"
)


@pytest.mark.parametrize("images", [(), (4,), (16, 257, 4)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_a_launch_passes_what_was_compiled(
    arch: str, dtype: torch.dtype, masked: bool, images: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(launch, "INTERPRETED", False)
    recorder = Recorder()
    monkeypatch.setattr(launch, "_compiled", lambda specialization, device: recorder)
    monkeypatch.setattr(launch, "current_stream", lambda device: 7)
    config = launch_table.find(arch, 32 if dtype == torch.float32 else 16, 40, 99)
    assert config is not None
    lengths = (77, *images)
    keys = tuple(torch.randn(2 if i else 1, n, 3, 40).to(dtype).transpose(1, 2) for i, n in enumerate(lengths))
    masks = tuple(torch.randn(1, 99) if masked else None for _ in images)
    scales = torch.randn(1, len(images)) if images else None
    query = torch.randn(2, 99, 120).to(dtype)
    prepared = launch.Launch(torch.Size([2, 3, 99, 40]), keys, keys, scales, masks, 0.2, False, config)
    heads = query.view(2, 99, 3, 40).transpose(1, 2)
    assert prepared(heads).shape == heads.shape
    assert prepared.packed(query).shape == query.shape

    asked = source(prepared.specialization)
    # keys, values, scales and masks are passed as addresses
    kept = {tensor.data_ptr(): tensor for tensor in pytree.tree_leaves(prepared.tensors) if tensor is not None}
    assert recorder.streams == [7, 7]
    (grid, arguments), (same_grid, same_arguments) = recorder.launches
    assert grid == same_grid == (3 * -(-99 // config.block_m), 2, 1)
    for passed in (arguments, same_arguments):
        for kind, value, constant in leaves(asked.signature.values(), passed, asked.constants):
            if kind == "constexpr":
                assert value == constant
            elif kind.startswith("*"):
                names = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
                assert names[(kept[value] if isinstance(value, int) else value).dtype] == kind
            elif kind == "i32":
                assert type(value) is int
                assert 0 <= value < 2**31
            else:
                assert kind == "fp32"
                assert type(value) is float
    # what the compiler was told of bases, and what it multiplies back, is true
    addresses = (*(tensor.data_ptr() for tensor in arguments[:2]), *arguments[2], *arguments[3])
    assert not any(address % 16 for address in addresses)
    assert (arguments[2], arguments[3]) == tuple(tuple(key.data_ptr() for key in each) for each in prepared.tensors[:2])
    vector = 4 if dtype == torch.float32 else 8
    named = dict(zip(asked.signature, arguments, strict=True))
    assert [stride * vector for stride in named["q_strides"]] == [99 * 120, 40, 120]
    assert [stride * vector for stride in named["k_strides"][0]] == [0, 40, 120], "one row of text for all of the batch"
    assert named["q_strides"] == dict(zip(asked.signature, same_arguments, strict=True))["q_strides"]


def sparse(path: Path, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros as a file with holes: nothing of it exists but the pages that are written."""
    with path.open("wb") as file:
        file.truncate(size * torch.finfo(dtype).bits // 8)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


def apart(values: Tensor, path: Path, stride: int, step: int = 1) -> Tensor:
    """The same values [B, n], row by row so far apart, and `step` within a row."""
    rows, columns = values.shape
    view = sparse(path, (rows - 1) * stride + (columns - 1) * step + 1, values.dtype).as_strided(values.shape, (stride, step))
    return view.copy_(values)


@pytest.mark.parametrize("stride", [2**31 - 1, 2**31, 2**32 + 100])
@pytest.mark.parametrize("what", ["mask", "scales", "a mask of one query", "scales of one branch", "one row of mask", "both"])
def test_rows_of_weights_that_are_far_apart(what: str, stride: int, tmp_path: Path, device: torch.device) -> None:
    """A launch takes 32 bits: beyond, it would get the lowest of them, and read elsewhere."""
    if device.type != "cpu":
        pytest.skip(IN_SPARSE_FILES)
    batch = 1 if what == "one row of mask" else 2
    queries = 1 if what == "a mask of one query" else 40
    query, key = torch.randn(batch, 2, queries, 16), torch.randn(batch, 2, 5, 16)
    images = [key] if what == "scales of one branch" else [key, key]
    scales, mask = torch.rand(batch, len(images)), torch.rand(batch, queries)
    expected = decoupled_attention(
        query, key, key, images, images, image_scales=scales, image_masks=[mask, None][: len(images)]
    )
    if what != "mask":
        scales = apart(scales, tmp_path / "scales", stride)
    if what != "scales":
        mask = apart(mask, tmp_path / "mask", stride, 3 if what == "both" else 1)
    masks = (mask, None)[: len(images)]
    prepared = launch.Launch(
        query.shape, (key, *[key] * len(images)), (key, *[key] * len(images)), scales, masks, 0.25, False, INTERPRETED
    )
    _, _, scale_stride, mask_strides, *_ = prepared.numbers
    assert all(0 <= number < 2**31 for number in (scale_stride, *mask_strides))
    torch.testing.assert_close(prepared(query), expected)
    _, _, read_scales, read_masks = prepared.tensors
    if stride < 2**31 and what in ("mask", "scales"):
        assert read_scales is scales, "copied without need"
        assert read_masks[0] is mask, "copied without need"


@pytest.mark.parametrize("which", ["batch", "head", "row"])
def test_keys_that_are_far_apart(which: str, tmp_path: Path, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip(IN_SPARSE_FILES)
    query, key = torch.randn(2, 2, 40, 16), torch.randn(2, 2, 3, 16)
    expected = decoupled_attention(query, key, key, [key], [key])
    limit = {"batch": 2**33, "head": 2**33, "row": 2**24}[which]
    for stride in (limit - 4, limit):
        strides = {"batch": (stride, 64, 16), "head": (64, stride, 16), "row": (2**28, 16, stride)}[which]
        need = strides[0] + strides[1] + 2 * strides[2] + 16
        far = sparse(tmp_path / f"{stride}", need).as_strided(key.shape, (*strides, 1)).copy_(key)
        assert (launch.readable(far, 4) is far) == (stride < limit)
        prepared = launch.Launch(query.shape, (far, far), (far, far), torch.ones(1, 1), (None,), 0.25, False, INTERPRETED)
        assert all(0 <= number < 2**31 for strides in prepared.numbers[0] for number in strides)
        torch.testing.assert_close(prepared(query), expected)


def test_a_tile_is_addressed_in_32_bits() -> None:
    """Rows of it are less than 2**24 elements apart: see `readable`, and `call_reasons` for what is stored packed."""
    configs = [row.config for table in (launch_table.TABLE, launch_table_backward.TABLE) for row in table]
    for config in [*configs, INTERPRETED]:
        assert (max(config.block_m, config.block_n) - 1) * (2**24 - 1) + launch_table.LARGEST_HEAD_DIM < 2**31


@pytest.mark.parametrize(
    ("shape", "keys", "reason"),
    [
        ((65536, 1, 1, 8), 1, "batch 65536: a GPU grid ends at 65535"),
        (
            (1, 2**20, 1, 16),
            1,
            "heads 1048576: times the head dim, 16, that is 16777216, and the kernel's rows end below 16777216",
        ),
        ((1, 1, 2**31, 8), 1, r"query \[1, 1, 2147483648, 8\]: a row of the batch has 32 GiB or more"),
        ((1, 1, 1, 8), 2**31, r"value \[1, 1, 2147483648, 8\]: a row of the batch has 32 GiB or more"),
    ],
)
def test_sizes_beyond_32_bits_are_refused(
    shape: tuple[int, ...], keys: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repeated(*shape: int) -> Tensor:
        return torch.zeros(shape[3], dtype=torch.float16).as_strided(shape, (0, 0, 0, 1))

    query, key = repeated(*shape), repeated(*shape[:2], keys, shape[3])
    monkeypatch.setattr(OP, "make_launch", lambda problem: pytest.fail("not refused"))
    with pytest.raises(UnsupportedError, match=reason):
        decoupled_attention(query, key, key, [key], [key], impl="triton")


def shifted(tensor: Tensor, by: int) -> Tensor:
    """The same values, their base `by` elements into an allocation."""
    memory = torch.empty(tensor.numel() + by, dtype=tensor.dtype, device=tensor.device)
    return memory[by:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("how", ["base", "row stride", "head stride"])
@pytest.mark.parametrize("which", ["query", "key", "value", "image key"])
def test_what_is_not_aligned_gives_the_same_bits(which: str, how: str, dtype: torch.dtype, device: torch.device) -> None:
    tensors = {
        "query": torch.randn(2, 3, 65, 40), "key": torch.randn(2, 3, 77, 40), "value": torch.randn(2, 3, 77, 40),
        "image key": torch.randn(2, 3, 4, 40), "image value": torch.randn(2, 3, 4, 40),
    }  # fmt: skip
    tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}

    def attend(query: Tensor, key: Tensor, value: Tensor, image_key: Tensor, image_value: Tensor) -> Tensor:
        return decoupled_attention(query, key, value, [image_key], [image_value], impl="triton")

    expected = attend(*tensors.values())
    tensor = tensors[which]
    if how == "base":
        moved = shifted(tensor, 3)
    elif how == "row stride":
        moved = torch.empty(*tensor.shape[:3], 43, dtype=dtype, device=device)[..., :40].copy_(tensor)
    else:
        moved = torch.empty(2, 3, tensor.shape[2] * 40 + 1, dtype=dtype, device=device)[..., 1:].view(tensor.shape)
        moved = moved.copy_(tensor)
    tensors[which] = moved
    assert torch.equal(attend(*tensors.values()), expected)


def test_a_packed_query_that_is_not_contiguous_gives_the_same_bits(device: torch.device) -> None:
    key = torch.randn(1, 2, 16, 32, device=device)
    config = INTERPRETED if device.type == "cpu" else None
    if config is None:
        from ipa_kernels.ops.dispatch import launch_config

        config = launch_config(device, torch.float32, 32, 9)
    prepared = launch.Launch(torch.Size([2, 2, 9, 32]), (key,), (key,), None, (), 0.2, False, config)
    query = torch.randn(2, 9, 64, device=device)
    wide = torch.empty(2, 9, 128, device=device)[..., ::2].copy_(query)
    assert torch.equal(prepared.packed(wide), prepared.packed(query))
    assert torch.equal(prepared.packed(shifted(query, 1)), prepared.packed(query))


class Compiler:
    """In the place of `triton.compile`: takes its time, fails as often as it is told to, and knows what it made and loaded."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.calls = self.failures = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self.began = threading.Event()
        self.meanwhile: Callable[[], object] = lambda: None

    def __call__(self, source: Any, options: Any) -> Any:
        self.calls += 1
        self.began.set()
        assert self.go_on.wait(20), "deadlock"
        time.sleep(0.05)
        self.meanwhile()
        if self.calls <= self.failures:
            raise RuntimeError("ptxas: killed")
        self.made.append(LoadedLate())
        return self.made[-1]


class LoadedLate:
    """As what `triton.compile` returns: the module is loaded, with no lock, when a launch is first asked for."""

    def __init__(self) -> None:
        self.module: object = None
        self.loads = 0

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        if self.module is None:
            self.loads += 1
            time.sleep(0.05)
            self.module = object()
        return self.module


DEVICES = itertools.count(1000)
"""None of them twice: what is compiled for one stays."""


@pytest.fixture(params=[launch, launch_backward], ids=["forward", "backward"])
def compiled(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """The kernel of a module for a device of this number, on its first use from `triton.compile`."""
    specialization = specialize("float16", 40, (77, 4), (None,), False, launch_table.find("sm_80", 16, 40, 99))
    wanted = [] if request.param is launch else [Wanted((True, True), (True, True), (False,))]
    return lambda number: request.param._compiled(specialization, *wanted, torch.device("cuda", number))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(triton, "compile", found)
    return found


def at_once(count: int, call: Callable[[], object]) -> list[object]:
    """What the call returns, or raises, in each of so many threads that begin together."""
    barrier = threading.Barrier(count)

    def run() -> object:
        barrier.wait()
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return [future.result(timeout=30) for future in [pool.submit(run) for _ in range(count)]]


def test_the_first_calls_of_many_threads_compile_and_load_once(compiled: Callable[..., Any], compiler: Compiler) -> None:
    """Else each keeps a module of its own, and Triton 3.9 unloads those that lose, maybe while a kernel of theirs runs."""
    number = next(DEVICES)
    found = at_once(8, lambda: (compiled(number), compiled(number)[(1, 1, 1)]))
    assert compiler.calls == 1
    assert len({id(kernel) for kernel, _ in found}) == 1
    assert len({id(module) for _, module in found}) == 1
    assert compiler.made[0].loads == 1


def test_a_compilation_that_fails_is_tried_again(compiled: Callable[..., Any], compiler: Compiler) -> None:
    number, compiler.failures = next(DEVICES), 3
    found = at_once(8, lambda: compiled(number))
    assert sum(isinstance(one, RuntimeError) for one in found) == 3, "one thread each"
    assert len({id(one) for one in found if not isinstance(one, RuntimeError)}) == 1
    assert compiled(number) is compiler.made[0]
    assert compiler.calls == 4


def test_what_is_compiled_does_not_wait_for_what_is_being_compiled(compiled: Callable[..., Any], compiler: Compiler) -> None:
    ready, late = next(DEVICES), next(DEVICES)
    kernel = compiled(ready)
    compiler.go_on.clear()
    compiler.began.clear()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(compiled, late)
        assert compiler.began.wait(20)
        try:
            assert pool.submit(compiled, ready).result(timeout=20) is kernel
            assert not waiting.done()
        finally:
            compiler.go_on.set()
        assert waiting.result(timeout=20) is compiler.made[1]


def test_a_compiler_may_compile(compiled: Callable[..., Any], compiler: Compiler) -> None:
    """Its hooks run what they like: another kernel, and this one."""
    number, other = next(DEVICES), next(DEVICES)

    def meanwhile() -> None:
        compiler.meanwhile = lambda: None
        inner.extend([compiled(other), compiled(number)])

    inner: list[Any] = []
    compiler.meanwhile = meanwhile
    assert at_once(1, lambda: compiled(number)) == [inner[1]], "the first that was given out stays"
    assert compiled(other) is inner[0]


@pytest.mark.gpu
def test_nothing_is_specialised_on_values(device: torch.device) -> None:
    """One compilation for queries, batches and strides of any size."""
    launch._compiled.kernels.clear()
    for batch, queries in ((1, 16), (2, 17), (3, 64)):
        query = torch.randn(batch, 4, queries, 64, device=device, dtype=torch.float16)
        key = torch.randn(1, 4, 77, 64, device=device, dtype=torch.float16)
        decoupled_attention(query, key, key, [key[:, :, :4]], [key[:, :, :4]], impl="triton")
    assert len(launch._compiled.kernels) == 1
