"""Captures without a GPU: the operations of a call, recorded, and run again on the same tensors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import ipa_kernels
from ipa_kernels.graphs import cuda_graphs

from .pipelines import build


class Recorder(TorchDispatchMode):
    """As in a CUDA graph, addresses and numbers are what they were while it was recorded, and no Python runs again.

    runs: how often it was replayed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self._calls: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        # lists of its own: diffusers empties some
        args, kwargs = pytree.tree_map(lambda leaf: leaf, (args, kwargs or {}))
        self._calls.append((func, args, kwargs, pytree.tree_leaves(results)))
        return results

    def replay(self) -> None:
        """Run everything again, into the memory that it was in."""
        self.runs += 1
        with torch.no_grad():
            for func, args, kwargs, results in self._calls:
                for old, new in zip(results, pytree.tree_leaves(func(*args, **kwargs)), strict=True):
                    # views and tensors that were written to are there already
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def record(run: Callable[[], Any]) -> tuple[Recorder, Any]:
    """(recorder, outputs). The outputs hold nothing before the first replay, as those of a capture do."""
    with Recorder() as recorder:
        outputs = run()
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, Tensor):
            leaf.fill_(float("nan"))
    return recorder, outputs


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the CPU for a GPU."""
    monkeypatch.setattr(cuda_graphs.Graphs, "takes", staticmethod(lambda device: True))
    monkeypatch.setattr(cuda_graphs.GraphPool, "on", lambda device: None)


def runs(recorded: list[Recorder]) -> list[int]:
    return [recorder.runs for recorder in recorded]


def pair(kind: str = "sd", names: tuple[str, ...] = ("base", "plus")) -> tuple[Any, Any]:
    """A graphed pipeline and a stock twin."""
    graphed, twin = build(kind, names), build(kind, names)
    ipa_kernels.graphed(graphed)
    return graphed, twin
