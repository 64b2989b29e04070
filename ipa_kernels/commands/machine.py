"""The device that a command runs on, and the dtype. torch only."""

import torch

from .errors import UserError, why


def available_device(device: str | None) -> torch.device:
    """The device, after one number has been there and back."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: not available here: {why(error)}") from error


def chosen_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of --dtype; without it float32 on the cpu, else float16."""
    dtype: torch.dtype = getattr(torch, name or ("float32" if device.type == "cpu" else "float16"))
    return dtype
