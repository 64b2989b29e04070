"""What is constant during a generation: values remembered by the tensor that they were computed from, while a UNet runs.

A `Memory` finds a value again by the identity, the version and the address of its source tensor, and by the state of the
modules that computed it. It keeps no source alive: when a pipeline drops its prompt, what was computed from that goes too.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .schedule import Schedule

T = TypeVar("T")

SOURCES = 24
"""The most tensors of which something is remembered: prompt, image embeddings, tokens and masks of three adapters for three
alternating conditions."""


class State(NamedTuple):
    """What a result depends on besides its source: comparable marks, and the objects whose identities are among them."""

    marks: tuple[Hashable, ...] = ()
    held: tuple[object, ...] = ()


class Snapshot:
    """A tensor as it was; it is not kept alive."""

    __slots__ = ("address", "tensor", "version")

    def __init__(self, tensor: Tensor, forget: Callable[[Any], None] | None = None) -> None:
        self.tensor = weakref.ref(tensor, forget)
        self.version = tensor._version
        self.address = tensor.data_ptr()

    def is_still(self, tensor: Any) -> bool:
        """Whether this is the same tensor, and nobody has written to it."""
        same = self.tensor() is tensor
        return same and self.version == tensor._version and self.address == tensor.data_ptr()


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

    def is_still(self, state: State) -> bool:
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
        """Nothing is remembered in this thread, and nothing found: what is computed may be recorded, to be run again."""
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

    def recall(
        self, source: Tensor, key: Hashable, state: State | None, compute: Callable[[], T], doubt: Callable[[], str]
    ) -> T:
        """`compute()`, or what it returned for the same source, key and state. Nothing is kept where state is None, for the
        reason of `doubt()`.
        """
        if state is None or not is_plain(source):
            self.misses += 1
            self._doubt(doubt() if state is None else _doubt_of_tensor(source))
            return compute()
        sources = self._sources
        found = sources.get(_key(source))
        if found is None or not found.is_still(source):
            found = self._source(sources, source)
        device = source.device.type
        key = key, torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        value = found.values.get(key)
        if value is not None and value.is_still(state):
            self.hits += 1
            return value.result  # type: ignore[no-any-return]
        self.misses += 1
        result: Any = compute()
        odd = [tensor for tensor in (result if isinstance(result, tuple) else (result,)) if not is_plain(tensor)]
        if odd:
            self._doubt(_doubt_of_tensor(odd[0]))
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
        return None if found is None or not found.is_still(source) else found.calls.get(key)

    def keep_call(self, text: Tensor, others: tuple[Tensor, ...], key: object, call: Any) -> None:
        """Keep a whole call of a layer for as long as values of its text, and of the images and masks beside it, are kept."""
        found = self._sources.get(_key(text))
        if found is None or not found.is_still(text):
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


def remember(
    source: Tensor,
    key: Hashable,
    state: Callable[[], State | None],
    compute: Callable[[], T],
    doubt: Callable[[], str] = str,
) -> T:
    """`Memory.recall` with the memory of the UNet that runs, or `compute()` where none does."""
    memory = active()
    return compute() if memory is None else memory.recall(source, key, state(), compute, doubt)


def _reason_for_none() -> str:
    """Why nothing may be kept of a step that begins, or found; "" where it may."""
    if torch.is_grad_enabled():
        return "gradients: they are recorded; use torch.no_grad() where none are needed"
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "hooks on every module: they may change any value; remove them"
    if _is_recorded():
        return "recording: torch.jit.trace, torch.func, make_fx or a CUDA graph runs this step again with other data"
    return ""


def _doubt_of_tensor(tensor: Tensor) -> str:
    """Why identity and version of a tensor that is not plain do not tell what is in it."""
    if tensor.is_inference():
        return "torch.inference_mode: a write to a tensor that was made in it leaves no trace; use torch.no_grad() instead"
    if tensor.requires_grad:
        return "requires_grad: of a prompt, an image or a mask; use .detach() where none is needed"
    return f"{type(tensor).__name__} on {tensor.device}: a write to such an input may leave no trace"


def _is_recorded() -> bool:
    """Whether operations are recorded to be run again, where a remembered value would become a constant."""
    traced = torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    if traced or transformed or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's identity and version tell what is in it."""
    return type(tensor) is Tensor and not (tensor.is_meta or tensor.is_inference() or tensor.requires_grad)


def state_of(modules: Iterable[nn.Module], known: Callable[[nn.Module], State | None]) -> State | None:
    """The state of modules whose output depends on nothing but their input, parameters and buffers; None where in doubt.

    known: from a module to the state of its own attributes, or None for a kind of module that is not known.
    """
    found = _examined(modules, known)
    return None if isinstance(found, str) else found


def doubt_of(modules: Iterable[nn.Module], known: Callable[[nn.Module], State | None]) -> str:
    """Why `state_of` is None."""
    found = _examined(modules, known)
    return found if isinstance(found, str) else ""


def _examined(modules: Iterable[nn.Module], known: Callable[[nn.Module], State | None]) -> State | str:
    marks: list[Hashable] = []
    held: list[object] = []
    for root in modules:
        if not isinstance(root, nn.Module):
            return f"{type(root).__name__}: no module, so that it may depend on anything"
        for module in (root,) if type(root) is nn.Linear else root.modules():
            own, kind = known(module), type(module)
            if own is None:
                name = f"{kind.__module__}.{kind.__name__}"
                return f"{name}: may depend on more than its input and weights; torch.nn.Linear does not"
            if is_hooked(module):
                return f"{kind.__name__}: has a hook or a forward of its own (offloading adds such); remove it"
            # a tensor that is a plain attribute is nobody's parameter, and its exchange leaves no trace
            if kind is nn.Linear and "weight" not in module._parameters:
                return "Linear: its weight is no parameter; make it one"
            marks += (id(module), *own.marks)
            held += (module, *own.held)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is None:
                    continue
                if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference() or tensor.is_meta:
                    made = ", made in torch.inference_mode" if tensor.is_inference() else ""
                    return f"{type(tensor).__name__} on {tensor.device}{made}: a write to such a weight may leave no trace"
                marks += (id(tensor), tensor._version, tensor.data_ptr())
                held.append(tensor)
    return State(tuple(marks), tuple(held))


def is_hooked(module: nn.Module) -> bool:
    """Whether something else takes part in a call of a module: hooks of torch, accelerate or diffusers."""
    own = vars(module)
    return bool(
        module._forward_hooks or module._forward_pre_hooks or "forward" in own or "_hf_hook" in own or "_diffusers_hook" in own
    )
