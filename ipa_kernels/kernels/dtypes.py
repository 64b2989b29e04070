"""Dtypes by name. torch only."""

import torch

NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
"""Of the dtypes that the kernels read."""


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" of torch.float16."""
    return str(dtype).removeprefix("torch.")
