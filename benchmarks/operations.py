"""Counting instead of timing: the operations and the live memory of a piece of torch code."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipa_kernels.benchmarking.timing import peak_bytes

# no arithmetic, no copy: what a schema does not say of itself
_VIEWS = {"aten::_unsafe_view", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::_reshape_alias"}
_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class Operations(TorchDispatchMode):
    """Counts the ATen operations that are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
        if not is_view and schema.name not in _VIEWS | _ALLOCATIONS:
            self.counts[schema.name] += 1
        return func(*args, **(kwargs or {}))


class LiveMemory(TorchDispatchMode):
    """The largest sum of the sizes of live tensors after any operation, of those that were made under this mode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()  # type: ignore[no-untyped-call]
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return results


@contextmanager
def kernels_only_counted(counts: Counter[str]) -> Iterator[None]:
    """Count launches of the attention kernel instead of launching it; where triton cannot be imported there are none."""
    try:
        from ipa_kernels.kernels.launch import Launch
    except ImportError:
        yield
        return
    with mock.patch.object(Launch, "_launch", side_effect=lambda *arguments: counts.update(["kernel"])):
        yield


def count(call: Any) -> Counter[str]:
    """The operations of a call, the attention kernel as one."""
    operations = Operations()
    with torch.no_grad(), operations, kernels_only_counted(operations.counts):
        call()
    return operations.counts


def peak_memory(call: Any, device: torch.device) -> int:
    """Bytes: of the allocator on a GPU, of live tensors between operations on a CPU; what lives before the call is left out."""
    allocated = peak_bytes(call, device)
    if allocated is not None:
        return allocated
    memory = LiveMemory()
    with memory:
        call()
    return memory.peak
