"""The device that a command runs on. torch only."""

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
