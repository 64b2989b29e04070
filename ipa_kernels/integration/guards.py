"""Is everything that a value was computed from unchanged? Guards of a tensor, of a module, and of an attention layer.

A guard is taken before something is computed, and keeps nothing alive. Once its modules were found to differ it stays invalid:
whoever puts a weight back does not bring back what was computed meanwhile.
"""

import operator
import weakref
from collections.abc import Callable, Hashable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .known_modules import attributes_of, is_known, runs_own_functions, settings_of, stock_kind, tensors_of


class TensorGuard:
    """A tensor as it was. forget: called when the tensor is gone."""

    __slots__ = ("address", "tensor", "version")

    def __init__(self, tensor: Tensor, forget: Callable[[Any], None] | None = None) -> None:
        self.tensor = weakref.ref(tensor, forget)
        self.version = tensor._version
        self.address = tensor.data_ptr()

    def matches(self, tensor: Any) -> bool:
        """Whether this is the same tensor, and nobody has written to it."""
        same = self.tensor() is tensor
        return same and self.version == tensor._version and self.address == tensor.data_ptr()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's identity and version tell what is in it."""
    return type(tensor) is Tensor and not (tensor.is_meta or tensor.is_inference() or tensor.requires_grad)


def doubt_of_tensor(tensor: Tensor) -> str:
    """Why identity and version of a tensor that is not plain do not tell what is in it."""
    if tensor.is_inference():
        return "torch.inference_mode: a write to a tensor that was made in it leaves no trace; use torch.no_grad() instead"
    if tensor.requires_grad:
        return "requires_grad: of a prompt, an image or a mask; use .detach() where none is needed"
    return f"{type(tensor).__name__} on {tensor.device}: a write to such an input may leave no trace"


def is_hooked(module: nn.Module) -> bool:
    """Whether something else takes part in a call of a module: hooks of torch, accelerate or diffusers."""
    own = vars(module)
    return bool(
        module._forward_hooks or module._forward_pre_hooks or "forward" in own or "_hf_hook" in own or "_diffusers_hook" in own
    )


def have_hooks(own: list[dict[str, Any]]) -> bool:
    """Whether one of many modules, of which this is what `vars` returns, has hooks of torch."""
    return any(map(_HOOKS, own)) or any(map(_PRE_HOOKS, own))


_HOOKS, _PRE_HOOKS = operator.itemgetter("_forward_hooks"), operator.itemgetter("_forward_pre_hooks")


def doubt_of(module: Any) -> str:
    """Why what a module computes may depend on more than its guard sees; "" where it does not."""
    kind = stock_kind(type(module))
    if not is_known(module, kind):
        name = f"{kind.__module__}.{kind.__name__}"
        return f"{name}: may depend on more than its input and weights; torch.nn.Linear does not"
    if is_hooked(module):
        return f"{kind.__name__}: has a hook or a forward of its own (offloading adds such); remove it"
    # a tensor that is a plain attribute is nobody's parameter, and its exchange leaves no trace
    if kind is nn.Linear and "weight" not in module._parameters:
        return "Linear: its weight is no parameter; make it one"
    for _, tensor in tensors_of(module):
        if tensor is None:
            continue
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_inference() or tensor.is_meta:
            made = ", made in torch.inference_mode" if tensor.is_inference() else ""
            return f"{type(tensor).__name__} on {tensor.device}{made}: a write to such a weight may leave no trace"
    return ""


class _Part:
    """One module of a `ModuleGuard`: its class, its children, its tensors, and what else its call reads."""

    __slots__ = ("attributes", "children", "is_linear", "kind", "module", "tensors")

    def __init__(self, module: nn.Module, attributes: Hashable) -> None:
        self.module: Any = weakref.ref(module)
        self.kind = type(module)
        self.attributes = attributes
        self.children = [None if child is None else weakref.ref(child) for child in module._modules.values()]
        self.tensors = [(name, None if tensor is None else TensorGuard(tensor)) for name, tensor in tensors_of(module)]
        # as `LayersGuard` looks at it: a weight alone
        self.is_linear = self.kind is nn.Linear and [name for name, guard in self.tensors if guard is not None] == ["weight"]

    def matches(self) -> bool:
        module = self.module()
        if module is None or type(module) is not self.kind or is_hooked(module):
            return False
        parameters = module._parameters
        for name, guard in self.tensors:
            tensor = parameters[name] if name in parameters else module._buffers.get(name, self)
            if tensor is not None if guard is None else not guard.matches(tensor):
                return False
        if self.kind is nn.Linear:
            return True
        children = module._modules.values()
        if len(children) != len(self.children) or len(parameters) + len(module._buffers) != len(self.tensors):
            return False
        for known, child in zip(self.children, children, strict=True):
            if child is not None if known is None else known() is not child:
                return False
        return bool(attributes_of(module) == self.attributes)


class ModuleGuard:
    """A projection as it was, with the modules in it.

    doubt: why what it computes cannot be kept, "" where it can; kinds: the classes whose functions it runs.
    """

    __slots__ = ("doubt", "kinds", "parts", "valid")

    def __init__(self, root: Any) -> None:
        self.parts: list[_Part] = []
        self.kinds: set[type] = set()
        self.doubt = ""
        if not isinstance(root, nn.Module):
            self.doubt = f"{type(root).__name__}: no module, so that it may depend on anything"
        for module in root.modules() if not self.doubt else ():
            self.doubt = doubt_of(module)
            if self.doubt:
                break
            self.kinds.add(type(module))
            if "processor" in vars(module):
                self.kinds.add(type(module.processor))
            self.parts.append(_Part(module, attributes_of(module)))
        self.valid = not self.doubt

    def check(self) -> bool:
        """Whether all is as it was, classes' functions aside."""
        if self.valid:
            for part in self.parts:
                if not part.matches():
                    self.valid = False
                    break
        return self.valid

    def verified(self) -> "ModuleGuard":
        """Itself; one that is in doubt where a class runs a function that is not torch's or diffusers' own."""
        return self if self.doubt or all(map(runs_own_functions, self.kinds)) else ModuleGuard(self.module)

    @property
    def module(self) -> Any:
        """What it guards, or None where that is gone or in doubt."""
        return self.parts[0].module() if self.valid else None


class LayerGuard:
    """A processor in an `Attention` as they were: the projections and the settings that a call reads, inputs and scales aside.

    text: guards of to_k and to_v; images: those of each adapter. A projection in doubt concerns the branches that read it;
    is_pure: whether none is.
    """

    __slots__ = ("attention", "images", "is_pure", "kind", "processor", "settings", "text", "valid")

    def __init__(self, attn: Any, processor: Any, before: "LayerGuard | None" = None) -> None:
        """before: an earlier guard of the same layer, whose valid parts stay."""
        self.attention: Any = weakref.ref(attn)
        self.processor: Any = weakref.ref(processor)
        self.kind = type(processor)
        self.settings = settings_of(attn)
        known = {} if before is None else {id(guard.module): guard for guard in before.projections() if guard.check()}

        def guard(module: Any) -> ModuleGuard:
            return known.get(id(module)) or ModuleGuard(module)

        self.text = guard(attn.to_k), guard(attn.to_v)
        self.images = [(guard(to_k), guard(to_v)) for to_k, to_v in zip(processor.to_k_ip, processor.to_v_ip, strict=False)]
        self.valid = True
        self.is_pure = not any(guard.doubt for guard in self.projections())

    def projections(self) -> Iterator[ModuleGuard]:
        """All of them, text first."""
        for pair in (self.text, *self.images):
            yield from pair

    def check(self) -> bool:
        """Whether all is as it was, classes' functions aside."""
        if self.valid:
            self.valid = self._matches()
        return self.valid

    def _matches(self) -> bool:
        attn, processor = self.attention(), self.processor()
        if attn is None or processor is None or type(processor) is not self.kind:
            return False
        now = settings_of(attn)
        for value, known in zip(now, self.settings, strict=True):
            if value is not known and (type(value) is not type(known) or type(value) not in _COMPARABLE or value != known):
                return False
        modules, own = attn._modules, processor._modules
        to_k_ip, to_v_ip = own.get("to_k_ip"), own.get("to_v_ip")
        if to_k_ip is None or to_v_ip is None or len(to_k_ip) != len(self.images) or len(to_v_ip) != len(self.images):
            return False
        places = [modules.get("to_k"), modules.get("to_v")]
        for pair in zip(to_k_ip._modules.values(), to_v_ip._modules.values(), strict=True):
            places += pair
        for guard, module in zip(self.projections(), places, strict=True):
            # what is in doubt is looked at again by the calls that read it
            if not guard.doubt and (not guard.check() or guard.module is not module):
                return False
        return True


def layer_guard(known: dict[int, LayerGuard], attn: Any, processor: Any) -> LayerGuard:
    """Of a layer as it is now. known: that of each `Attention` by its identity, which gets it."""
    guard = known.get(id(attn))
    if guard is None or not guard.check():
        guard = known[id(attn)] = LayerGuard(attn, processor, guard)
    return guard


_COMPARABLE = {bool, int, float, str}


def number(scale: Any) -> float | None:
    """The value of one scale; None where only diffusers' own code may multiply by it.

    A number is one of Python or NumPy, or a tensor without dimensions that can be read without waiting for a GPU and without
    losing a gradient. Fractions, arrays and integers beyond 64 bits are none: torch refuses to multiply a tensor by them.
    """
    kind = type(scale)
    if kind is int:
        return float(scale) if -(2**63) <= scale < 2**63 else None
    if kind is float or kind is bool:
        return float(scale)
    if isinstance(scale, Tensor):
        return float(scale) if kind in (Tensor, nn.Parameter) and _is_read_freely(scale) else None
    is_of_numpy = kind.__module__ == "numpy" and (isinstance(scale, Real) or kind.__name__ in ("bool", "bool_"))
    return float(scale) if is_of_numpy else None


def _is_read_freely(scale: Tensor) -> bool:
    if scale.ndim != 0 or scale.device.type != "cpu" or scale.requires_grad or scale.is_complex():
        return False
    # what records a step, or differentiates it in another way, would lose sight of the tensor
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    tangents = torch.autograd.forward_ad._current_level >= 0
    return not (traced or tangents or torch._C._functorch.is_functorch_wrapped_tensor(scale))
