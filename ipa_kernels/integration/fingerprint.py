"""What a captured step of a model was captured from: where its weights are, and the settings that Python code has read."""

import operator
from inspect import ismemberdescriptor
from typing import Any

from torch import Tensor, nn

from .guards import is_hooked
from .provenance import AND_EXTRAS, runs_own

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_SCORES = ("get_attention_scores", "head_to_batch_dim", "batch_to_head_dim")
_RUN = ("forward", "__call__", *_SCORES)
"""The names of what runs in a call of a module or of an attention processor."""
_SKIPPED = ("_ipa_layer", "_ipa_kernels", "_parameters", "_buffers", "_modules")


class Fingerprint:
    """A model as it is now: its modules and processors, their classes, tensors and attributes. It keeps the tensors alive.

    Not seen: what lies within attributes that are neither plain values, containers of such, tensors nor modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(module._modules, dict(module._modules)) for module in model.modules()]
        processors = [vars(module)["processor"] for module in model.modules() if "processor" in vars(module)]
        self._kinds = [(owner, type(owner)) for owner in (*model.modules(), *processors)]
        bases = {base for _, kind in self._kinds for base in kind.__mro__}
        self._classes = [(vars(base), list(vars(base).values())) for base in bases]
        self._tensors: list[tuple[dict[str, Any], str, Tensor | None, int]] = []
        self._sizes: list[tuple[Any, int]] = []
        self._same: list[tuple[dict[str, Any], str, Any]] = []
        self._equal: list[tuple[Any, Any]] = []
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                self._sizes.append((tensors, len(tensors)))
                for name, tensor in tensors.items():
                    self._tensors.append((tensors, name, tensor, 0 if tensor is None else tensor.data_ptr()))
            self._attributes(vars(module))
        self._slots = [
            (processor, name, getattr(processor, name, None)) for processor in processors for name in _slots(processor)
        ]
        for processor in processors:
            self._attributes(getattr(processor, "__dict__", {}))

    def _attributes(self, own: dict[str, Any]) -> None:
        self._sizes.append((own, len(own)))
        for name, value in own.items():
            # the scales of a layer that was installed are data of a graph
            if name in _SKIPPED or (name == "scale" and "_ipa_layer" in own):
                continue
            if isinstance(value, Tensor):
                self._tensors.append((own, name, value, value.data_ptr()))
                continue
            self._same.append((own, name, value))
            if isinstance(value, dict | list | set):
                # most are the empty dicts of hooks
                self._sizes.append((value, len(value)))
                if value:
                    self._equal.append((value, _copy(value)))

    def addresses_are_still(self) -> bool:
        """Whether the modules and the tensors are the same, and where they were."""
        if any(modules != known for modules, known in self._modules):
            return False
        return all(
            tensors.get(name) is tensor and (tensor is None or tensor.data_ptr() == address)
            for tensors, name, tensor, address in self._tensors
        )

    def matches(self) -> bool:
        """Whether classes and what they hold, hooks and attributes are the same."""
        if any(type(owner) is not kind for owner, kind in self._kinds):
            return False
        if any(len(now) != len(known) or not all(map(operator.is_, now.values(), known)) for now, known in self._classes):
            return False
        if any(len(value) != size for value, size in self._sizes):
            return False
        for own, name, value in self._same:
            now = own.get(name)
            if now is not value and not _is_equal(now, value):
                return False
        for processor, name, value in self._slots:
            now = getattr(processor, name, None)
            if now is not value and not _is_equal(now, value):
                return False
        return all(_copy(value) == known for value, known in self._equal)


def hooked(model: nn.Module) -> str | None:
    """The name of a module below a model in whose call something else takes part, which no graph would run again."""
    if nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        return "every module"
    return next((name for name, module in model.named_modules() if name and is_hooked(module)), None)


def replaced(model: nn.Module) -> str | None:
    """The name of a function of torch's or diffusers' classes that is not their own, which no graph would run again."""
    for kind in _classes(model):
        if kind.__module__.partition(".")[0] in AND_EXTRAS:
            for name in _RUN:
                if name in vars(kind) and not runs_own(kind, name, AND_EXTRAS):
                    return f"{kind.__name__}.{name}"
    found = (f"{path}.{name}" for path, module in model.named_modules() for name in _SCORES if name in vars(module))
    return next(found, None)


def _classes(model: nn.Module) -> list[type]:
    """Of modules and attention processors, with those that they are derived from."""
    kinds: dict[type, None] = {}
    for module in model.modules():
        kinds[type(module)] = None
        if "processor" in vars(module):
            kinds[type(vars(module)["processor"])] = None
    return [base for base in dict.fromkeys(base for kind in kinds for base in kind.__mro__) if base is not object]


def _slots(processor: Any) -> list[str]:
    """The names of attributes that are not in `__dict__`."""
    return [name for kind in type(processor).__mro__ for name, held in vars(kind).items() if ismemberdescriptor(held)]


def _is_equal(now: Any, value: Any) -> bool:
    return type(now) is type(value) and type(now) in _PLAIN and now == value


def _copy(value: Any) -> Any:
    """A container of plain values as it is now; of other things, which they are."""
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    if isinstance(value, set):
        return {_copy(item) for item in value}
    return value if type(value) in _PLAIN else id(value)
