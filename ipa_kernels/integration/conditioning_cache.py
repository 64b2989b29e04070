"""What is constant during a generation: values remembered by the tensor that they were computed from, while a UNet runs.

A `Memory` finds a value again by the identity, the version and the address of its source tensor, and by the state of the
modules that computed it. It keeps no source alive: when a pipeline drops its prompt, what was computed from that goes too.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .guards import Snapshot, State, doubt_of_tensor, is_plain
from .schedule import Schedule

T = TypeVar("T")

SOURCES = 24
"""The most tensors of which something is remembered: prompt, image embeddings, tokens and masks of three adapters for three
alternating conditions."""


class _Source(Snapshot):
    """A tensor as it was, what was computed from it, the calls of layers that it was the text of, and those of other texts that
    it was an image or a mask of.
    """

    __slots__ = ("calls", "others", "values")

    def __init__(self, tensor: Tensor, forget: Callable[[Any], None]) -> None:
        super().__init__(tensor, forget)
        self.values: dict[Hashable, _Value] = {}
        self.calls: dict[object, Any] = {}
        self.others: list[tuple[_Source, object]] = []

    def drop(self) -> None:
        """Let go of everything, at once and not when a cycle is collected."""
        for text, key in self.others:
            text.calls.pop(key, None)
        self.values, self.calls, self.others = {}, {}, []


class _Value:
    """What was computed, and under which state. Whoever got it may have written to it since: then it is not found again."""

    def __init__(self, state: State, result: Any) -> None:
        self.state = state
        self.result = result
        self.versions = [tensor._version for tensor in self.tensors()]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.result if isinstance(self.result, tuple) else (self.result,)

    def matches(self, state: State) -> bool:
        return self.state.marks == state.marks and self.versions == [tensor._version for tensor in self.tensors()]


class _Active(threading.local):
    """The memory of the UNet that runs in this thread, and its CUDA stream: direct calls of its layers remember nothing."""

    memory: "Memory | None" = None
    stream: object = None


_ACTIVE = _Active()

_Key = tuple[int, object]


class _Sources(dict[_Key, _Source]):
    """By `_key` of their tensors. One that can be referred to weakly: what its sources hold of it would be a cycle."""

    __slots__ = ("__weakref__",)


def _key(source: object) -> _Key:
    """The identity of a source, and the stream that this thread's step runs on."""
    return id(source), _ACTIVE.stream


class Memory:
    """Everything that is remembered for one UNet.

    hits: values that were found; misses: values that had to be computed while the UNet ran; unkept: how many of those were not
    kept, because something is in doubt; reason: why not, in the last step, "" where all were.
    """

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.unkept = 0
        self.reason = ""
        self._sources = _Sources()
        self._schedule = Schedule()

    def enter(self, timestep: Any, condition: tuple[int, ...], stream: Any = None) -> bool:
        """A step of the UNet begins, for the tensors with the ids of `condition`; `leave` ends it. Whether it goes on with a
        generation.

        stream: the CUDA stream that it runs on, if any. What was computed on one is found on no other, where it might be read
        before it is there, or after its memory was given away.

        A timestep that does not follow the one before begins a new generation, and everything is forgotten: a weight may have
        been edited in a way that no version shows (`weight.data`).
        """
        _ACTIVE.stream = None if stream is None else stream.cuda_stream
        follows = self._schedule.follows(timestep, condition)
        self.reason = _reason_for_none()
        _ACTIVE.memory = None if self.reason else self
        if not follows:
            # of tensors that are given again: that it is another generation may be a mistake
            if any((one, _ACTIVE.stream) in self._sources for one in condition):
                self.reason = self.reason or self._schedule.reason
            self.forget()
        return follows

    @staticmethod
    def leave() -> None:
        """The step has ended, whether it returned or raised."""
        _ACTIVE.memory = None
        _ACTIVE.stream = None

    @staticmethod
    @contextmanager
    def suspended() -> Iterator[None]:
        """Nothing is remembered in this thread, and nothing found: what is computed may be captured, to be run again."""
        before, _ACTIVE.memory = _ACTIVE.memory, None
        try:
            yield
        finally:
            _ACTIVE.memory = before

    def forget(self) -> None:
        """Drop every value."""
        sources, self._sources = self._sources, _Sources()
        while sources:
            sources.popitem()[1].drop()

    def get_or_compute(
        self, source: Tensor, key: Hashable, state: State | None, compute: Callable[[], T], doubt: Callable[[], str]
    ) -> T:
        """`compute()`, or what it returned for the same source, key and state. Nothing is kept where state is None, for the
        reason of `doubt()`.
        """
        if state is None or not is_plain(source):
            self.misses += 1
            self._doubt(doubt() if state is None else doubt_of_tensor(source))
            return compute()
        sources = self._sources
        found = sources.get(_key(source))
        if found is None or not found.matches(source):
            found = self._source(sources, source)
        device = source.device.type
        key = key, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        value = found.values.get(key)
        if value is not None and value.matches(state):
            self.hits += 1
            return value.result  # type: ignore[no-any-return]
        self.misses += 1
        result: Any = compute()
        odd = [tensor for tensor in (result if isinstance(result, tuple) else (result,)) if not is_plain(tensor)]
        if odd:
            self._doubt(doubt_of_tensor(odd[0]))
        else:
            found.values[key] = _Value(state, result)
        return result  # type: ignore[no-any-return]

    def _doubt(self, reason: str) -> None:
        """A value is not kept."""
        self.unkept += 1
        self.reason = self.reason or reason

    def call(self, source: object, key: object) -> Any:
        """What `keep_call` kept for this tensor as it is now, or None."""
        found = self._sources.get(_key(source))
        return None if found is None or not found.matches(source) else found.calls.get(key)

    def keep_call(self, text: Tensor, others: tuple[Tensor, ...], key: object, call: Any) -> None:
        """Keep a whole call of a layer for as long as values of its text, and of the images and masks beside it, are kept."""
        found = self._sources.get(_key(text))
        if found is None or not found.matches(text):
            return
        for other in others:
            source = self._sources.get(_key(other))
            if source is not None and all(entry[1] != key or entry[0] is not found for entry in source.others):
                source.others.append((found, key))
        found.calls[key] = call

    @property
    def bytes(self) -> int:
        """The size of the values; views of one buffer count once."""
        storages = {}
        for source in list(self._sources.values()):
            for value in list(source.values.values()):
                for tensor in value.tensors():
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    @staticmethod
    def _source(sources: _Sources, tensor: Tensor) -> _Source:
        key, where = _key(tensor), weakref.ref(sources)

        def forget(reference: Any) -> None:
            known = where()
            if known is None:
                return
            source = known.get(key)
            # the id may belong to another tensor by now
            if source is not None and source.tensor is reference:
                known.pop(key, None)
                source.drop()

        stale = [key, *list(sources)[: max(0, len(sources) - SOURCES + 1)]]
        for old in filter(None, (sources.pop(other, None) for other in stale)):
            old.drop()
        sources[key] = source = _Source(tensor, forget)
        return source


def active() -> Memory | None:
    """The memory of the UNet that runs in this thread, if it may be used."""
    return None if torch.compiler.is_compiling() else _ACTIVE.memory


def get_or_compute(
    source: Tensor,
    key: Hashable,
    state: Callable[[], State | None],
    compute: Callable[[], T],
    doubt: Callable[[], str] = str,
) -> T:
    """`Memory.get_or_compute` with the memory of the UNet that runs, or `compute()` where none does."""
    memory = active()
    return compute() if memory is None else memory.get_or_compute(source, key, state(), compute, doubt)


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
    """Whether operations are traced to be run again, where a remembered value would become a constant."""
    traced = torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if traced or transformed or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
