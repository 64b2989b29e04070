"""What is constant during a generation, computed once: values by the tensor that they were computed from, calls by condition.

A *value* (image tokens, keys and values of a branch, a mask vector) belongs to its source tensor, and is found again while the
source and the modules that computed it are unchanged, whatever the timestep. An *entry* is one condition: the text, the images,
the masks and the modes of a step. It holds for each layer the call that ran, ready to run again. Neither keeps a prompt, an
image, a mask or a module alive: when a pipeline drops its prompt, what was computed from that goes too.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .guards import ModuleGuard, TensorGuard, doubt_of_tensor, is_plain
from .prepared_call import PreparedCall

T = TypeVar("T")

ENTRIES = 8
"""The most conditions that are kept."""
UNUSED = 16
"""A condition that so many steps did not have is dropped when a new one comes."""
SOURCES = 10 * ENTRIES
"""The most tensors of which values are kept: of each condition the text, and the embeddings, tokens and masks of three
adapters."""


class _Source(TensorGuard):
    """A tensor as it was, and what was computed from it. last: the number of the last step that had it."""

    __slots__ = ("last", "values")

    def __init__(self, tensor: Tensor, forget: Callable[[Any], None]) -> None:
        super().__init__(tensor, forget)
        self.values: dict[Hashable, _Value] = {}
        self.last = 0


class _Value:
    """What was computed, and by what. Whoever got it may have written to it since: then it is not found again."""

    __slots__ = ("guards", "result", "versions")

    def __init__(self, guards: tuple[ModuleGuard, ...], result: Any) -> None:
        self.guards = guards
        self.result = result
        self.versions = [tensor._version for tensor in self.tensors()]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.result if isinstance(self.result, tuple) else (self.result,)

    def matches(self, guards: tuple[ModuleGuard, ...]) -> bool:
        # a guard that was replaced is another object
        return self.guards == guards and self.versions == [tensor._version for tensor in self.tensors()]


class Entry:
    """A condition. settings: as given to `open`; calls: of each layer that ran under it, by the identity of its `Attention`;
    sources: the identities of the tensors whose values it used; last: the number of the last step that had it; is_new: whether
    this is its first.
    """

    __slots__ = ("calls", "inputs", "is_new", "last", "settings", "sources")

    def __init__(self, settings: Hashable) -> None:
        self.settings = settings
        self.inputs: list[weakref.ref[Tensor]] = []
        self.calls: dict[int, PreparedCall] = {}
        self.sources: set[int] = set()
        self.last = 0
        self.is_new = True


class ConditioningCache:
    """Everything that is kept for one UNet.

    hits: values that were found; misses: values that had to be computed in a step; unkept: how many of those were not kept,
    because something is in doubt; reason: why not, in the last step, "" where all were.
    """

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.unkept = 0
        self.reason = ""
        self._steps = 0
        self._entries: dict[tuple[Any, ...], Entry] = {}
        self._sources: dict[int, _Source] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return ConditioningCache, ()

    def open(self, inputs: Iterable[object], settings: Hashable) -> Entry | None:
        """The entry for a step with these tensors, whatever they hold; None where nothing may be kept.

        settings: everything else that all values and calls of the step depend on, among it the CUDA stream: what was computed
        on one may not be there yet on another.
        """
        self.reason = _reason_for_none()
        if self.reason:
            return None
        self._steps += 1
        tensors = [tensor for tensor in inputs if isinstance(tensor, Tensor)]
        key = (settings, *map(id, tensors))
        entry = self._entries.get(key)
        # an identity may have been given again
        if entry is None or any(known() is not tensor for known, tensor in zip(entry.inputs, tensors, strict=True)):
            entry = self._new_entry(key, tensors, settings)
        else:
            entry.is_new = False
        entry.last = self._steps
        # copies, here and below: threads share a UNet
        for key_of_source in list(entry.sources):
            source = self._sources.get(key_of_source)
            if source is not None:
                source.last = self._steps
        return entry

    def _new_entry(self, key: tuple[Any, ...], tensors: list[Tensor], settings: Hashable) -> Entry:
        self._drop(key)
        by_age = sorted(self._entries.copy().items(), key=lambda item: item[1].last)
        for place, (other, aged) in enumerate(by_age):
            if self._steps - aged.last > UNUSED or len(by_age) - place >= ENTRIES:
                self._drop(other)
        for place_of_source, source in self._sources.copy().items():
            if self._steps - source.last > UNUSED:
                self._drop_source(place_of_source)
        entry, cache = Entry(settings), weakref.ref(self)

        def forget(reference: Any) -> None:
            known = cache()
            found = None if known is None else known._entries.get(key)
            # the key may belong to other tensors by now
            if known is not None and found is not None and any(other is reference for other in found.inputs):
                # what was computed from its other inputs lives on with them
                del known._entries[key]
                found.calls.clear()

        entry.inputs = [weakref.ref(tensor, forget) for tensor in tensors]
        self._entries[key] = entry
        return entry

    def _drop(self, key: tuple[Any, ...]) -> None:
        """Let go of an entry and of the values that no other uses, at once and not when a cycle is collected."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        entry.calls.clear()
        others: set[int] = set().union(*(other.sources for other in list(self._entries.values())))
        for source in entry.sources - others:
            self._drop_source(source)

    def _drop_source(self, key: int) -> None:
        source = self._sources.pop(key, None)
        if source is not None:
            source.values.clear()

    def forget(self) -> None:
        """Drop every value and every call."""
        for key in list(self._entries):
            self._drop(key)
        for source in list(self._sources):
            self._drop_source(source)

    def get_or_compute(
        self,
        entry: Entry,
        source: Tensor,
        key: Hashable,
        guards: tuple[ModuleGuard, ...],
        compute: Callable[[], T],
        place: str,
    ) -> T:
        """`compute()`, or what it returned for the same source and key, by the modules of the same guards."""
        doubt = next((f"{place}: {guard.doubt}" for guard in guards if guard.doubt), "")
        doubt = doubt or ("" if is_plain(source) else doubt_of_tensor(source))
        if doubt:
            return self._unkept(doubt, compute)
        found = self._sources.get(id(source))
        if found is None or not found.matches(source):
            found = self._new_source(source)
        entry.sources.add(id(source))
        found.last = self._steps
        key = key, entry.settings
        value = found.values.get(key)
        if value is not None and value.matches(guards):
            self.hits += 1
            return value.result  # type: ignore[no-any-return]
        self.misses += 1
        result: Any = compute()
        odd = [tensor for tensor in (result if isinstance(result, tuple) else (result,)) if not is_plain(tensor)]
        if odd:
            self.unkept += 1
            self.reason = self.reason or doubt_of_tensor(odd[0])
        # another thread may have edited a weight meanwhile
        elif all(guard.check() for guard in guards):
            found.values[key] = _Value(guards, result)
        return result  # type: ignore[no-any-return]

    def _unkept(self, reason: str, compute: Callable[[], T]) -> T:
        self.misses += 1
        self.unkept += 1
        self.reason = self.reason or reason
        return compute()

    def _new_source(self, tensor: Tensor) -> _Source:
        key, cache = id(tensor), weakref.ref(self)

        def forget(reference: Any) -> None:
            known = cache()
            source = None if known is None else known._sources.get(key)
            # the identity may belong to another tensor by now
            if known is not None and source is not None and source.tensor is reference:
                known._drop_source(key)

        self._drop_source(key)
        for old in list(self._sources)[: max(0, len(self._sources) - SOURCES + 1)]:
            self._drop_source(old)
        self._sources[key] = source = _Source(tensor, forget)
        return source

    @property
    def bytes(self) -> int:
        """The size of what is kept; views of one buffer count once."""
        tensors = [
            tensor
            for source in list(self._sources.values())
            for value in list(source.values.values())
            for tensor in value.tensors()
        ]
        for entry in list(self._entries.values()):
            for call in list(entry.calls.values()):
                tensors += call.computed
        return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


class Keeper(NamedTuple):
    """Keeps what is computed in a step. modes: as `modes_of` where it is computed; is_closed: of the step."""

    cache: ConditioningCache
    entry: Entry
    modes: tuple[Any, ...]
    is_closed: bool

    def get_or_compute(
        self, source: Tensor, key: Hashable, guards: tuple[ModuleGuard, ...], compute: Callable[[], T], place: str = ""
    ) -> T:
        """`compute()`, or what it returned for the same source and key, by the modules of the same guards.

        place: of the model, for the reason why something is not kept.
        """
        if not self.is_closed:
            guards = tuple(guard.verified() for guard in guards)
        return self.cache.get_or_compute(self.entry, source, (key, self.modes), guards, compute, place)


def _reason_for_none() -> str:
    """Why nothing may be kept of a step that begins, or found; "" where it may."""
    if torch.is_grad_enabled():
        return "gradients: they are recorded; use torch.no_grad() where none are needed"
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "hooks on every module: they may change any value; remove them"
    if _is_traced():
        return "recording: torch.jit.trace, torch.func, make_fx or a CUDA graph runs this step again with other data"
    return ""


def _is_traced() -> bool:
    """Whether operations are traced to be run again, where a kept value would become a constant."""
    traced = torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if traced or transformed or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
