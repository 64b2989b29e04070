"""Random inputs of a kernel as views into memory that is NaN all around, and what a launch was given."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ipa_kernels.testing.layer_cases import Inputs

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def in_turns(cases: Sequence[tuple[Any, ...]], turn: Callable[[int], int] = lambda number: number) -> list[Any]:
    """Each case with each dtype, which becomes its last parameter.

    `make test` runs a case in one of them: float32 where the turn of its number is even, float16 where it is odd. `make
    test-slow` runs it in the other, `make test-gpu` in bfloat16 too.
    """

    def marks(number: int, dtype: torch.dtype) -> Any:
        if dtype == torch.bfloat16:
            return pytest.mark.gpu
        return () if dtype == (torch.float32, torch.float16)[turn(number) % 2] else pytest.mark.slow

    dtypes = torch.float32, torch.float16, torch.bfloat16
    return [pytest.param(*case, dtype, marks=marks(i, dtype)) for i, case in enumerate(cases) for dtype in dtypes]


def fresh_seed() -> int:
    """Another one in every call, the same ones in every run (see `conftest.SEED`)."""
    return int(torch.randint(2**31, ()))


def island(values: Tensor) -> Tensor:
    """The same values as [B, H, N, D], stored [B, N, H, D] as a window into memory that is NaN all around."""
    batch, heads, length, head_dim = values.shape
    sea = torch.full((batch + 1, length + 3, heads + 1, head_dim + 8), float("nan"), dtype=values.dtype, device=values.device)
    view = sea[:batch, 1 : length + 1, :heads, :head_dim]
    view.copy_(values.transpose(1, 2))
    return view.transpose(1, 2)


def random_inputs(
    batch: int, heads: int, queries: int, head_dim: int, lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device,
    *, masked: bool = True,
) -> Inputs:  # fmt: skip
    generator = torch.Generator().manual_seed(fresh_seed())

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def weights(*shape: int) -> Tensor:
        # of either sign, and all of a size: a few rows that outweigh the others would make a small sample of many
        size = torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
        return (size * torch.randn(shape, generator=generator).sign()).bfloat16().to(device)

    keys = [island(normal(batch, heads, n, head_dim)) for n in lengths]
    values = [island(normal(batch, heads, n, head_dim)) for n in lengths]
    scales = weights(batch, len(lengths) - 1).float()
    masks = tuple(weights(batch, queries).to(dtype) if masked and i % 2 == 0 else None for i in range(len(lengths) - 1))
    query = island(normal(batch, heads, queries, head_dim))
    return Inputs(query, keys[0], values[0], tuple(keys[1:]), tuple(values[1:]), scales, masks)


class Recorder:
    """In the place of a compiled kernel: keeps what it is launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
        self.streams: list[int | None] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, stream: int | None = None) -> None:
            self.launches.append((grid, arguments))
            self.streams.append(stream)

        return run


def leaves(types: Any, values: Any, constants: dict[tuple[int, ...], Any], path: tuple[int, ...] = ()) -> Iterator[Any]:
    """(type, value, constant or None) for each argument of a signature, tuples unpacked."""
    for i, (kind, value) in enumerate(zip(types, values, strict=True)):
        here = (*path, i)
        if isinstance(kind, tuple):
            yield from leaves(kind, value, constants, here)
        else:
            yield kind, value, constants.get(here)
