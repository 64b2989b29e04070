"""From tensors to the arguments of a launch, and what is settled once for many of them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ipa_kernels import decoupled_attention
from ipa_kernels.kernels import launch, launch_table
from ipa_kernels.kernels.variant import source

CPU = torch.device("cpu")


class Recorder:
    """In the place of a compiled kernel: keeps what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launches.append((grid, arguments))


def leaves(types: Any, values: Any, constants: dict[tuple[int, ...], Any], path: tuple[int, ...] = ()) -> Iterator[Any]:
    """(type, value, constant or None) for each argument of a signature, tuples unpacked."""
    for i, (kind, value) in enumerate(zip(types, values, strict=True)):
        here = (*path, i)
        if isinstance(kind, tuple):
            yield from leaves(kind, value, constants, here)
        else:
            yield kind, value, constants.get(here)


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
    monkeypatch.setattr(launch, "_compiled", lambda variant, device: recorder)
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

    asked = source(prepared.variant)
    (grid, arguments), (same_grid, same_arguments) = recorder.launches
    assert grid == same_grid == (3 * -(-99 // config.block_m), 2, 1)
    for passed in (arguments, same_arguments):
        for kind, value, constant in leaves(asked.signature.values(), passed, asked.constants):
            if kind == "constexpr":
                assert value == constant
            elif kind.startswith("*"):
                names = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
                assert names[value.dtype] == kind
            elif kind == "i32":
                assert type(value) is int
                assert 0 <= value < 2**31
            else:
                assert kind == "fp32"
                assert type(value) is float
    # what the compiler was told of bases, and what it multiplies back, is true
    assert all(tensor.data_ptr() % 16 == 0 for tensor in (arguments[0], arguments[1], *arguments[2], *arguments[3]))
    vector = 4 if dtype == torch.float32 else 8
    named = dict(zip(asked.signature, arguments, strict=True))
    assert [stride * vector for stride in named["q_strides"]] == [99 * 120, 40, 120]
    assert [stride * vector for stride in named["k_strides"][0]] == [0, 40, 120], "one row of text for all of the batch"
    assert named["q_strides"] == dict(zip(asked.signature, same_arguments, strict=True))["q_strides"]


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
    config = launch_table.INTERPRETED if device.type == "cpu" else None
    if config is None:
        from ipa_kernels.ops.support import launch_config

        config = launch_config(device, torch.float32, 32, 9)
    prepared = launch.Launch(torch.Size([2, 2, 9, 32]), (key,), (key,), None, (), 0.2, False, config)
    query = torch.randn(2, 9, 64, device=device)
    wide = torch.empty(2, 9, 128, device=device)[..., ::2].copy_(query)
    assert torch.equal(prepared.packed(wide), prepared.packed(query))
    assert torch.equal(prepared.packed(shifted(query, 1)), prepared.packed(query))


@pytest.mark.gpu
def test_nothing_is_specialised_on_values(device: torch.device) -> None:
    """One compilation for queries, batches and strides of any size."""
    launch._compiled.cache_clear()
    for batch, queries in ((1, 16), (2, 17), (3, 64)):
        query = torch.randn(batch, 4, queries, 64, device=device, dtype=torch.float16)
        key = torch.randn(1, 4, 77, 64, device=device, dtype=torch.float16)
        decoupled_attention(query, key, key, [key[:, :, :4]], [key[:, :, :4]], impl="triton")
    assert launch._compiled.cache_info().misses == 1
