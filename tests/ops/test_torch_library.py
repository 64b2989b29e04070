"""The op under a compiler, an exporter and fake tensors: one node, any sizes, the same values."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import ipa_kernels
from ipa_kernels import decoupled_attention

OP = torch.ops.ipa_kernels.decoupled_attention
BACKWARD = torch.ops.ipa_kernels.decoupled_attention_backward


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def draw(queries: int = 40, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Text of 7 keys, images of 4 and 3; the second is shared by the batch."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    images = [[randn(2, 2, 4, 16), randn(1, 2, 3, 16)] for _ in range(2)]
    return randn(2, 2, queries, 16), randn(2, 2, 7, 16), randn(2, 2, 7, 16), *images


def attend(query: Tensor, key: Tensor, value: Tensor, keys: Any, values: Any, scales: Any, masks: Any, impl: str) -> Tensor:
    return decoupled_attention(query, key, value, keys, values, image_scales=scales, image_masks=masks, impl=impl)


class Core(nn.Module):
    """With one image branch, for exporters, which take no lists."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.impl = impl

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scale: Tensor, mask: Tensor
    ) -> Any:
        return attend(query, key, value, [keys], [values], scale, [mask], self.impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["triton", "auto"])
def test_opcheck(impl: str, dtype: torch.dtype) -> None:
    query, key, value, keys, values = draw(dtype=dtype)
    some = (
        query,
        [key, *keys],
        [value, *values],
        torch.tensor([[0.5, 0.0]]),
        [torch.rand(1, 40)],
        [False, True],
        0.25,
        True,
        impl,
    )
    none = query, [key], [value], None, [], [], 0.25, True, impl
    for arguments in (some, none):
        torch.library.opcheck(OP, arguments)


@pytest.mark.parametrize("stored", ["[B, H, N, D]", "[B, N, H, D]"])
@pytest.mark.parametrize("impl", ["triton", "auto"])
@pytest.mark.parametrize(("batch", "heads", "queries", "image"), [(2, 2, 5, 4), (1, 2, 3, 1), (2, 1, 1, 2)], ids=str)
def test_what_compilers_are_told_of_memory_is_so(
    batch: int, heads: int, queries: int, image: int, impl: str, stored: str
) -> None:
    """Of the output and of every gradient, with others and without: Inductor reads them by the strides that it was told."""

    def randn(rows: int, of: int = batch) -> Tensor:
        shape = (of, rows, heads, 16) if stored == "[B, N, H, D]" else (of, heads, rows, 16)
        return torch.randn(shape).transpose(1, 2) if stored == "[B, N, H, D]" else torch.randn(shape)

    keys, values = ([randn(7), randn(image), randn(3, of=1)] for _ in range(2))
    scales, masks = torch.rand(batch, 2), [torch.rand(batch, queries)]
    arguments = randn(queries), keys, values, scales, masks, [True, False], 0.25, True, impl
    assert_as_told(OP, arguments)
    odd = [bool(i % 2) for i in range(9)]
    for needed in ([True] * 9, odd, [not need for need in odd]):
        assert_as_told(BACKWARD, (randn(queries), *arguments, needed))
    if impl == "triton":
        # an op that calls autograd, as eager's gradients do, cannot be called below it
        torch.library.opcheck(BACKWARD, (randn(queries), *arguments, odd), test_utils=("test_schema", "test_faketensor"))


def assert_as_told(op: Any, arguments: tuple[Any, ...]) -> None:
    """The shapes, dtypes and strides of what an op returns are those of its fake."""
    with FakeTensorMode() as mode:
        told = op(*pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
    real = op(*arguments)
    for one, other in zip(pytree.tree_leaves(real), pytree.tree_leaves(told), strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        for size, stride, expected in zip(one.shape, one.stride(), other.stride(), strict=True):
            assert size == 1 or stride == expected, f"{one.stride()}, told: {other.stride()}"


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("impl", ["auto", "triton", "eager"])
def test_one_graph_for_any_scale_and_any_number_of_queries(impl: str, dynamic: bool | None) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attend, fullgraph=True, backend=backend, dynamic=dynamic)
    for queries in (40, 56, 33):
        for scales in (torch.tensor([0.5, 0.0]), torch.tensor([-1.0, 1.0])):
            inputs = draw(queries)
            masks = [None, torch.rand(queries)]
            expected = attend(*inputs, scales, masks, "eager")
            torch.testing.assert_close(compiled(*inputs, scales, masks, impl), expected, rtol=1e-5, atol=1e-5)
    assert len(graphs) == (1 if dynamic else 2), "the second number of queries makes it a symbol"
    for scales in (0.5, 0.7, 0.0, 1, [0.3, 0.4], [0.0, 0.9]):
        inputs = draw()
        expected = attend(*inputs, scales, None, "eager")
        torch.testing.assert_close(compiled(*inputs, scales, None, impl), expected, rtol=1e-5, atol=1e-5)


def test_a_branch_of_scale_0_is_left_out_by_selection() -> None:
    """Whatever it holds: in a graph the scale is data."""
    query, key, value, keys, values = draw()
    values[0].fill_(float("nan"))
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for impl in ("eager", "triton"):
        out = compiled(query, key, value, keys, values, torch.tensor([0.0, 0.5]), None, impl)
        expected = attend(query, key, value, keys[1:], values[1:], 0.5, None, "eager")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_gradients_in_a_graph(impl: str) -> None:
    """Of everything that may have one: the backward kernel is an op of its own."""
    query, key, value, keys, values = draw()
    scales, mask = torch.tensor([0.5, 0.8]), torch.rand(40)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value, *keys, *values, scales, mask)]

    def loss(impl: str) -> Tensor:
        return attend(query, key, value, keys, values, scales, [None, mask], impl).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(run(kind), leaves) for run, kind in ((compiled, impl), (loss, "eager")))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_gradients_in_a_graph_of_the_default_backend(
    dynamic: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Inductor generates around the backward kernel reads its results where they are."""
    # its cache on disk does not know what this package tells it of memory
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    query, key, value, keys, values = draw()
    scales, weight = torch.tensor([0.5, 0.8]), torch.randn(16, 16)
    leaves = [tensor.requires_grad_() for tensor in (query, key, *keys, *values, scales, weight)]

    def loss(impl: str) -> Tensor:
        own = [[image * 1.5 for image in images] for images in (keys, values)]
        out = attend(query @ weight, key * 2, value, *own, scales, None, impl)
        return out.transpose(1, 2).flatten(2).square().sum()

    with torch._inductor.config.patch(compile_threads=1):
        found = torch.autograd.grad(torch.compile(loss, fullgraph=True, dynamic=dynamic)("triton"), leaves)
    for one, other in zip(found, torch.autograd.grad(loss("eager"), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("needed", ["query", "keys", "scales", "nothing"])
def test_only_the_gradients_that_are_asked_for(needed: str) -> None:
    query, key, value, keys, values = draw()
    scales = torch.tensor([[0.5, 0.8]])
    for tensor in {"query": [query], "keys": [*keys, *values], "scales": [scales], "nothing": []}[needed]:
        tensor.requires_grad_()
    arguments = query, [key, *keys], [value, *values], scales, [torch.rand(1, 40)], [False, True], 0.25, True, "triton"
    torch.library.opcheck(OP, arguments)
    out = OP(*arguments)
    assert out.requires_grad == (needed != "nothing")


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_export(impl: str, strict: bool) -> None:
    query, key, value, keys, values = draw()
    inputs = query, key, value, keys[0], values[0], torch.tensor([0.7]), torch.rand(40)
    program = torch.export.export(Core(impl), inputs, strict=strict)
    nodes = [node for node in program.graph.nodes if node.target is OP.default]
    assert len(nodes) == (impl == "triton")
    torch.testing.assert_close(program.module()(*inputs), Core("eager")(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_ahead_of_time(impl: str, tmp_path: Path) -> None:
    """AOTInductor: a package that is loaded again."""
    query, key, value, keys, values = draw()
    inputs = query, key, value, keys[0], values[0], torch.tensor([0.7]), torch.rand(40)
    program = torch.export.export(Core(impl), inputs)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "core.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(loaded(*inputs), Core("eager")(*inputs), rtol=1e-5, atol=1e-5)


def test_fake_tensors() -> None:
    """Tools that count memory or shapes run models without data."""
    query, key, value, keys, values = draw()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in (query, key, value)]
        images = [[mode.from_tensor(tensor) for tensor in tensors] for tensors in (keys, values)]
        within = attend(*fake, *images, 0.5, None, "triton")
    for out in (within, attend(*fake, *images, 0.5, None, "triton")):
        assert out.shape == query.shape
        assert out.transpose(1, 2).is_contiguous()


def test_what_the_kernel_cannot_run_is_told_while_tracing() -> None:
    inputs = draw(dtype=torch.float64)
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"the kernel computes in float16, bfloat16 and float32"):
        compiled(*inputs, 0.5, None, "triton")
    assert compiled(*inputs, 0.5, None, "auto").dtype == torch.float64
    assert issubclass(ipa_kernels.UnsupportedError, ValueError)


def test_a_graph_for_a_gpu_that_is_not_there() -> None:
    """Traced with fake CUDA tensors; the kernel of its node is compiled. Inductor's own code needs more than is here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # torch 2.11's pool may wait for ever at exit, on Python 3.12
    command = [sys.executable, "-m", "tests.helpers.compiled_for_cuda"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["output"], result["wgmma"]) == ("cuda:0", True)
    # what the last step needs of the machine: a torch that was built for CUDA, and a driver
    ends = ("not linked with support for cuda", "Found no NVIDIA driver", "compiled")
    assert any(end in result["inductor"] for end in ends), result["inductor"]
