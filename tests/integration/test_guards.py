"""Guards by themselves: what tells one tensor, one weight and one mode from another."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ipa_kernels.integration.guards import ModuleGuard, TensorGuard
from ipa_kernels.integration.steps import modes_of


def test_another_tensor_on_the_same_memory_is_another() -> None:
    """Of the same address and version, as memory that is written to without a trace is given again."""
    memory = np.zeros(4, dtype=np.float32)
    tensor, other = torch.from_numpy(memory), torch.from_numpy(memory)
    assert (tensor.data_ptr(), tensor._version) == (other.data_ptr(), other._version)
    guard = TensorGuard(tensor)
    assert guard.matches(tensor)
    assert not guard.matches(other)


def test_a_tensor_that_was_written_to_or_moved_is_no_longer_the_same() -> None:
    tensor = torch.zeros(4)
    guard = TensorGuard(tensor)
    tensor.add_(1)
    assert not guard.matches(tensor)
    guard = TensorGuard(tensor)
    tensor.data = torch.zeros(4)
    assert not guard.matches(tensor)


def test_a_guard_keeps_nothing_alive() -> None:
    tensor, module = torch.zeros(4), nn.Linear(2, 2)
    guards = TensorGuard(tensor), ModuleGuard(module)
    del tensor, module
    assert guards[0].tensor() is None
    assert guards[1].module is None


def test_a_weight_that_was_put_back_does_not_bring_a_guard_back() -> None:
    """What was computed while another was there may be kept under it."""
    module = nn.Linear(2, 2, bias=False)
    weight, guard = module.weight, ModuleGuard(module)
    assert guard.check()
    module.weight = nn.Parameter(torch.zeros(2, 2))
    assert not guard.check()
    module.weight = weight
    assert not guard.check()


MODES: dict[str, tuple[str, Callable[[], AbstractContextManager[object]]]] = {
    "gradients": ("cpu", torch.no_grad),
    "the level of forward AD": ("cpu", torch.autograd.forward_ad.dual_level),
    "autocast": ("cpu", lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast to another dtype": ("cpu", lambda: torch.autocast("cpu", torch.float16)),
}


def test_modes_are_told_apart() -> None:
    found = [modes_of("cpu")]
    for device, mode in MODES.values():
        with mode():
            found.append(modes_of(device))
    assert len(set(found)) == len(found)
    assert modes_of("cpu") == found[0]


def test_tf32_is_a_mode_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=precision))
        found.append((modes_of("cuda"), modes_of("cpu")))
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]
