"""Dtypes by name. torch only."""

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" of torch.float16."""
    return str(dtype).removeprefix("torch.")
