"""Guards of a whole model: what can run in a step of a UNet (`StructureGuard`), and what a captured step was captured from
(`ModelGuard`): where its weights are, and the settings that Python code has read.
"""

import operator
import weakref
from collections.abc import Callable, Iterable, Iterator
from inspect import ismemberdescriptor
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from .guards import have_hooks, is_hooked
from .provenance import AND_EXTRAS, is_own, runs_own

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_SCORES = ("get_attention_scores", "head_to_batch_dim", "batch_to_head_dim")
_RUN = ("forward", "__call__", *_SCORES)
"""The names of what runs in a call of a module or of an attention processor."""
_SKIPPED = ("_ipa_layer", "_ipa_kernels", "_parameters", "_buffers", "_modules")


class StructureGuard:
    """The module tree of a UNet, its classes and its processors as they were.

    foreign: what can run in a step besides torch's, diffusers', peft's and our own functions, "" where nothing can: then a step
    is closed, and nothing that was checked before it changes while it runs. adapters: the modules that come and go with an
    IP-Adapter; neither they nor the UNet are kept alive, and what is below them is for the guards of layers. ours: the module
    whose functions we put on the UNet.
    """

    def __init__(self, unet: nn.Module, attentions: Iterable[nn.Module], adapters: Iterable[object], ours: str) -> None:
        weak = {id(adapter) for adapter in adapters}
        modules = list(_below(unet, weak))
        attentions = list(attentions)
        self._ours = ours
        self._modules = modules
        self._kinds = list(map(type, modules))
        self._own = list(map(vars, modules))
        self._sizes = [*map(len, self._own), len(vars(unet))]
        mixed = [
            unet,
            *(attention for attention in attentions if any(id(child) in weak for child in attention._modules.values())),
        ]
        skipped = set(map(id, mixed))
        self._trees = [module._modules for module in modules if module._modules and id(module) not in skipped]
        self._children = list(map(dict, self._trees))
        self._mixed = [_Children(module._modules, weak) for module in mixed]
        self._attentions = list(map(vars, attentions))
        self._processors = [type(own.get("processor")) for own in self._attentions]
        called = {*self._kinds, *self._processors, *(type(module) for module in unet.modules() if id(module) in weak)} - {
            type(None)
        }
        bases = {base for kind in {type(unet), *called} for base in kind.__mro__ if _package(base) not in _STANDARD}
        self._classes = [(vars(base), list(vars(base).values())) for base in bases]
        self.foreign, self._is_foreign = self._find(unet, bases, called)

    def matches(self, unet: nn.Module) -> bool:
        """Whether all of that is the same."""
        if self.foreign and not self._is_foreign(unet):
            return False
        # every time: hooks that are put there by hand have no handles to count
        if not self.foreign and (_has_hooks(unet) or have_hooks(self._own)):
            return False
        if [*map(len, self._own), len(vars(unet))] != self._sizes or list(map(type, self._modules)) != self._kinds:
            return False
        if self._trees != self._children or not all(children.match() for children in self._mixed):
            return False
        if [type(own.get("processor")) for own in self._attentions] != self._processors:
            return False
        return all(len(now) == len(known) and all(map(operator.is_, now.values(), known)) for now, known in self._classes)

    def _find(self, unet: nn.Module, bases: set[type], called: set[type]) -> tuple[str, Callable[[nn.Module], bool]]:
        """The first foreign thing, and whether it is still there."""
        if _has_hooks(unet):
            return "a hook on the UNet", _has_hooks
        for name in _overridden(unet):
            if getattr(vars(unet)[name], "__module__", None) != self._ours:
                return f"{type(unet).__name__}.{name} of the UNet", lambda unet, name=name: name in vars(unet)
        for module in self._modules:
            if is_hooked(module):
                return f"a hook on a {type(module).__name__}", lambda unet, module=module: is_hooked(module)
            for name in _overridden(module):
                return (
                    f"{type(module).__name__}.{name} of a module",
                    lambda unet, module=module, name=name: name in vars(module),
                )
        for base in bases:
            for name, function in vars(base).copy().items():
                if type(function) is FunctionType and not is_own(function, _PACKAGES):
                    return f"{base.__name__}.{name}", _always
        for kind in called:
            for name in ("forward", "__call__") if issubclass(kind, nn.Module) else ("__call__",):
                if hasattr(kind, name) and not runs_own(kind, name, _PACKAGES):
                    return f"{kind.__name__}.{name}", _always
        return "", _always


# transformers puts a function on torch.nn.Module when it makes a model; no step runs it
_PACKAGES = (*AND_EXTRAS, "ipa_kernels", "huggingface_hub", "transformers")
_STANDARD = {"builtins", "collections", "typing", "abc", "enum"}


class _Children:
    """The children of a module, of which some are not kept alive."""

    __slots__ = ("_modules", "_names", "_strong", "_weak")

    def __init__(self, modules: dict[str, nn.Module | None], weak: set[int]) -> None:
        self._modules = modules
        self._names = [name for name, child in modules.items() if id(child) not in weak]
        self._strong = [modules[name] for name in self._names]
        self._weak = [(name, weakref.ref(child)) for name, child in modules.items() if child is not None and id(child) in weak]

    def match(self) -> bool:
        modules = self._modules
        if len(modules) != len(self._names) + len(self._weak):
            return False
        if not all(map(operator.is_, map(modules.get, self._names), self._strong)):
            return False
        return all(modules.get(name) is child() for name, child in self._weak)


def _below(module: nn.Module, skipped: set[int]) -> Iterator[nn.Module]:
    """Every module below one, without those that are skipped and what is below these."""
    for child in list(module._modules.values()):
        if child is not None and id(child) not in skipped:
            yield child
            yield from _below(child, skipped)


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _overridden(module: nn.Module) -> Iterator[str]:
    """The names under which a module has something of its own in the place of a function of its class."""
    kind = type(module)
    # copies: another thread may install, or set an attribute
    for name, value in vars(module).copy().items():
        if callable(getattr(kind, name, None)) or (name == "_compiled_call_impl" and value is not None):
            yield name


def _has_hooks(unet: nn.Module) -> bool:
    """Whether a UNet has hooks besides our two."""
    own = vars(unet)
    return len(unet._forward_pre_hooks) > 1 or len(unet._forward_hooks) > 1 or "_hf_hook" in own or "_diffusers_hook" in own


def _always(unet: nn.Module) -> bool:
    return True


class ModelGuard:
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

    def addresses_match(self) -> bool:
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
