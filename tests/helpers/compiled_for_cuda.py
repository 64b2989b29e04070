"""Without a GPU and without the interpreter: a graph for CUDA tensors, and its kernel compiled for sm_90. Prints JSON.

Run by tests/ops/test_torch_library.py in a process of its own, since the interpreter is chosen when triton is imported.
"""

import json
import warnings
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

from ipa_kernels import decoupled_attention
from ipa_kernels.kernels import launch_table, specialization
from ipa_kernels.kernels.dtypes import dtype_name
from ipa_kernels.ops import dispatch


def core(query: Any, key: Any, value: Any, image_key: Any, image_value: Any, scale: Any, mask: Any) -> Any:
    return decoupled_attention(
        query, key, value, [image_key], [image_value], image_scales=scale, image_masks=[mask], impl="triton"
    )


def draw(*shape: int, dtype: torch.dtype = torch.float16) -> Any:
    return torch.empty(*shape, dtype=dtype, device="cuda:0")


def main() -> None:
    with mock.patch.object(dispatch, "architecture", return_value="sm_90"), torch.no_grad(), FakeTensorMode():
        text, image = [(2, 10, 77, 64)] * 2, [(2, 10, 4, 64)] * 2
        shapes = [(2, 10, 4096, 64), *text, *image]
        inputs = [*(draw(*shape) for shape in shapes), draw(1, dtype=torch.float32), draw(4096)]
        graph = make_fx(core)(*inputs).graph
        (node,) = [node for node in graph.nodes if node.target is torch.ops.ipa_kernels.decoupled_attention.default]
        query, keys = node.args[0].meta["val"], [key.meta["val"] for key in node.args[1]]
        masks = [mask.meta["val"] for mask in node.args[4]]
        try:
            torch.compile(core, fullgraph=True)(*inputs)
            inductor = "compiled"
        except Exception as error:
            inductor = str(error)
    config = launch_table.find("sm_90", 16, query.shape[3], query.shape[2])
    names = [dtype_name(mask.dtype) for mask in masks]
    made = specialization.specialize(
        "float16", query.shape[3], tuple(key.shape[2] for key in keys), tuple(names), False, config
    )
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(specialization.source(made), target=target, options=launch_table.options(config))
    print(json.dumps({"output": str(node.meta["val"].device), "wgmma": "wgmma" in compiled.asm["ptx"], "inductor": inductor}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
